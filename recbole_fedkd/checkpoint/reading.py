"""Which file of a run folder is what, and the form that a checkpoint must have.

``last.pth`` is written after every epoch and is the run's state. Where its epoch is the best so far it is its own best
checkpoint, and ``best.pth`` becomes a copy of it afterwards; else it names ``best.pth`` by digest. Whenever a run is killed,
the folder therefore holds one whole state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from recbole_fedkd.checkpoint.large import large_file, put_back
from recbole_fedkd.checkpoint.sealed import digest, read_sealed, write_sealed
from recbole_fedkd.errors import InputError
from recbole_fedkd.files import BEST, LAST, PARTITION, check_checkpoint, run_path, state_of_folder

CHECKPOINT_VERSION = 8
ROWS = "rows.pth"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read.

    Attributes:
        file: where it lies.
        state: its fields, all there and of the right form.
        content: all of the file.
        beside: the file that holds its large tensors; None: it does itself.
    """

    file: Path
    state: dict[str, Any]
    content: bytes
    beside: Path | None

    @property
    def digest(self) -> str:
        """The digest of the whole file."""
        return digest(self.content)


def _whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _plain(value: Any, depth: int = 0) -> bool:
    """None, numbers, texts, and lists and dictionaries by text of such."""
    if isinstance(value, list):
        return depth < 20 and all(_plain(element, depth + 1) for element in value)
    if isinstance(value, dict):
        return depth < 20 and all(isinstance(key, str) and _plain(inner, depth + 1) for key, inner in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _of_a_file(value: Any) -> bool:
    kinds = {name: type(part) for name, part in value.items()} if isinstance(value, dict) else {}
    return kinds == {"bytes": int, "digest": str} and value["bytes"] >= 0


def _by_text(*kinds: type) -> Callable[[Any], bool]:
    """Whether a value is a dictionary by text of what is of some kinds."""
    return lambda value: (
        isinstance(value, dict)
        and all(isinstance(key, str) and isinstance(inner, kinds) for key, inner in value.items())
    )


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "config": (lambda value: isinstance(value, dict) and len(value) > 0 and _plain(value), "the keys of a config"),
    "epoch": (_whole_number, "a whole number"),
    "cur_step": (_whole_number, "a whole number"),
    "best_valid_score": (_is(float), "a number"),
    "best_epoch": (lambda value: value is None or _whole_number(value), "a whole number or None"),
    "best_digest": (_is(str, NoneType), "a text or None"),
    "best_valid_result": (lambda value: value is None or _by_text(float)(value), "metrics or None"),
    "train_loss": (lambda value: isinstance(value, dict) and all(map(_whole_number, value)), "a dict by epoch"),
    "records": (lambda value: isinstance(value, list) and all(map(_is(dict), value)), "a list of dicts"),
    "clients": (_of_a_file, "the length and digest of a file"),
    "state_dict": (_by_text(Tensor), "tensors by name"),
    "other_parameter": (_by_text(Tensor, NoneType), "tensors by name"),
    "training": (_is(dict), "a dict"),
    "random": (_is(dict), "a dict"),
    "data": (_is(dict, NoneType), "a dict or None"),
}


def _check_form(state: Mapping[str, Any], file: Path) -> None:
    """Raise :class:`InputError` for the first field that is missing, unknown or of another form."""
    version = state.get("format_version")
    if not _whole_number(version):
        raise InputError(f"'{file}' is not a checkpoint of recbole_fedkd: it has no format version")
    if version != CHECKPOINT_VERSION:
        raise InputError(
            f"checkpoint '{file}' has format version {version}; this version of recbole_fedkd reads {CHECKPOINT_VERSION}"
        )
    for name in state:
        if name not in _FIELDS and name != "format_version":
            raise InputError(
                f"checkpoint '{file}' cannot be used: it has a field '{str(name)[:40]}' that no run writes"
            )
    for name, (has_form, form) in _FIELDS.items():
        if name not in state:
            raise InputError(f"checkpoint '{file}' cannot be used: its field '{name}' is missing")
        if not has_form(state[name]):
            raise InputError(f"checkpoint '{file}' cannot be used: its field '{name}' must be {form}")


def open_checkpoint(file: Path) -> Checkpoint:
    """Read one checkpoint file.

    Raises:
        InputError: it is not there, damaged, not a checkpoint, or one of another version or form.
    """
    check_checkpoint(file)
    sealed, content = read_sealed(file)
    state = put_back(sealed, file)
    _check_form(state, file)
    return Checkpoint(file, state, content, large_file(sealed, file))


def last_and_best(path: str | Path) -> tuple[Checkpoint, Checkpoint | None]:
    """The state to go on from and the run's best checkpoint, of a run folder or of one file in it.

    Returns:
        The checkpoint, and the best one that it speaks of: itself, the file beside it, or None if no epoch was judged.

    Raises:
        InputError: no checkpoint is there, one cannot be read, or the best one is not the one that the last speaks of.
    """
    source = run_path(path)
    last = open_checkpoint(state_of_folder(source) if source.is_dir() else source)
    best_epoch = last.state["best_epoch"]
    if best_epoch is None or best_epoch == last.state["epoch"]:
        return last, last if best_epoch is not None else None
    file = last.file.with_name(BEST)
    if not file.is_file():
        raise InputError(
            f"'{file}' is not there, the best checkpoint of the run whose last is '{last.file}'; resume from the run's folder"
        )
    best = open_checkpoint(file)
    if best.digest != last.state["best_digest"]:
        raise InputError(
            f"'{file}' is not the best checkpoint that '{last.file}' speaks of (that of epoch {best_epoch + 1}); "
            "resume from the folder of the run"
        )
    return last, best


def best_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint to load a model from: the file itself, or the best one of a run folder; its last, if none was judged.

    Raises:
        InputError: as :func:`last_and_best`.
    """
    source = run_path(path)
    if not source.is_dir():
        return open_checkpoint(source)
    if not (source / LAST).is_file() and (source / BEST).is_file():
        return open_checkpoint(source / BEST)  # a copy of the best alone
    last, best = last_and_best(source)
    return best or last


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The fields of a checkpoint file; of a run folder's ``last.pth``. Raises what :func:`open_checkpoint` does."""
    source = run_path(path)
    return open_checkpoint(state_of_folder(source) if source.is_dir() else source).state


def write_places(places: Mapping[str, Tensor], file: Path) -> None:
    """Write where a run's rows stand, once for all of its checkpoints; see ``data.fingerprint``."""
    write_sealed({"format_version": CHECKPOINT_VERSION, "places": dict(places)}, file)


def places_beside(checkpoint: Path) -> dict[str, Any]:
    """What :func:`write_places` wrote for the run of a checkpoint file; empty if it is not there.

    Raises:
        InputError: it is damaged.
    """
    file = checkpoint.with_name(ROWS)
    if not file.is_file():
        return {}
    places = read_sealed(file, "the rows' order")[0].get("places")
    return places if isinstance(places, dict) else {}


def take_away_unsaved(folder: Path) -> None:
    """What a run has written that ends before its first checkpoint, since nothing goes on from it."""
    if any((folder / name).exists() for name in (LAST, BEST)):
        return
    for name in (ROWS, PARTITION, "schema.json", "schema.npz"):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not there, or with files of somebody else
        folder.rmdir()
