"""Files that are written whole or not at all, and last when they are written."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from recbole_fedkd.errors import InputError, TrainingError, listed, shown

BEST, LAST = "best.pth", "last.pth"
"""Checkpoints in a run's folder: its best, and the one that it goes on from."""

PARTITION = "partition.json"
"""Of a run's folder: which user lives on which client."""

SEAL = b"recbole_fedkd:sha256:"
"""What the seal of a checkpoint begins with, its last bytes; behind it stands the digest of all before."""

SEAL_LENGTH = len(SEAL) + 64

_PROBE = b"\0" * 65536
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Temporary path beside ``file`` that takes its place once it is written, and vanishes if that fails.

    Behind a symbolic link the file that it points to is written. The content is on the disk before the name is.

    Raises:
        InputError: there is a folder, a device or another thing of that name, which is no file to be replaced.
        TrainingError: it cannot be written, because the disk is full or the folder is gone.
    """
    target = regular_file(file)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        _synchronise(temporary)
        temporary.replace(target)
        with suppress(OSError):  # not every file system has it for folders
            _synchronise(target.parent)
    except OSError as error:
        gone = "" if target.parent.is_dir() else ": its folder is no longer there"
        raise TrainingError(f"'{file}' cannot be written{gone or f': {error.strerror or error}'}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _synchronise(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(file: str | Path, subject: str, last: int | None = None) -> bytes:
    """All of a file, or so many of its ``last`` bytes.

    Raises:
        InputError: it cannot be read; ``subject`` says what it is.
    """
    try:
        with Path(file).open("rb") as stream:
            if last is not None:
                stream.seek(max(0, os.fstat(stream.fileno()).st_size - last))
            return stream.read()
    except (OSError, ValueError) as error:
        raise InputError(f"{subject} '{file}' cannot be read: {getattr(error, 'strerror', None) or error}") from error


def write_bytes(content: bytes, file: Path) -> None:
    """Write bytes whole or not at all; raises what :func:`written_whole` does."""
    with written_whole(file) as temporary:
        temporary.write_bytes(content)


def regular_file(file: Path, name: str = "") -> Path:
    """What a path stands for, symbolic links followed, where a file may be written or replaced.

    Args:
        file: the path.
        name: config key to begin the sentence with.

    Raises:
        InputError: a folder, a device node or another special file is there.
    """
    subject = f"{name} '{file}'" if name else f"'{file}'"
    try:
        target = file.resolve()
        occupied = target.exists() and not target.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        # A loop of links, a name that is too long, a character of zeros.
        raise InputError(f"{subject} cannot be used as a file: {error}") from error
    if occupied:
        kind = "a folder" if target.is_dir() else "a device or another special file"
        raise InputError(f"{subject} is {kind}; it must be a regular file, or not be there yet")
    return target


def writable_file(path: str, name: str) -> Path:
    """A file that a key names, known to be writable before anything runs.

    Raises:
        InputError: it is no regular file, or its folder does not exist or cannot be written.
    """
    target = regular_file(Path(path), name)
    if not target.parent.is_dir():
        raise InputError(f"{name} '{path}' cannot be written: there is no folder '{target.parent}'; make it first")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
        if target.exists():
            with target.open("ab"):
                pass
    except OSError as error:
        raise InputError(
            f"{name} '{path}' cannot be written: {error.strerror}; it must be a file in an existing, writable folder"
        ) from error
    return Path(path)


def writable_folder(folder: Path, subject: str) -> Path:
    """Make a folder that is not there, and know that it can be written and that the disk is not full already.

    Args:
        folder: the folder.
        subject: beginning of the sentence if it cannot, such as ``checkpoint_dir 'saved'``.

    Raises:
        InputError: a file is in the way, or the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(_PROBE)
    except (OSError, ValueError) as error:
        in_the_way = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
        reason = (
            f"'{in_the_way}' is a file" if in_the_way is not None else getattr(error, "strerror", None) or str(error)
        )
        raise InputError(
            f"{subject} cannot be used: {reason}; it must be a folder that can be made and written to"
        ) from error
    return folder


def check_folders(config: Any) -> None:
    """Know, before anything runs, that the folders can be written that every run writes into.

    Raises:
        InputError: one of them cannot; the sentence says which.
    """
    try:
        here = Path.cwd()
    except OSError as error:
        raise InputError(
            f"the working folder cannot be used: {error.strerror}; start the run in one that is there"
        ) from error
    for name in (f"log/{config['model']}", "log_tensorboard"):
        writable_folder(
            here / name, f"working folder '{here}', in which RecBole keeps log/ and log_tensorboard/ of every run,"
        )
    folder = config["checkpoint_dir"]
    writable_folder(Path(folder), f"checkpoint_dir '{folder}'")


@contextmanager
def held_alone(file: Path, refused: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a file's lock, which the operating system lets go when the process ends, however it ends.

    Args:
        file: of the lock.
        refused: sentence for whoever comes second.
        patience: seconds that another has to let it go.

    Raises:
        InputError: another process holds it.
    """
    from filelock import FileLock, Timeout  # asyncio comes with it, which no help text needs

    try:
        held = FileLock(file).acquire(timeout=patience)
    except Timeout as error:
        raise InputError(refused) from error
    with held:
        yield


def check_one_run(folder: Path, *names: str) -> None:
    """Raise :class:`InputError` where a folder is that of several runs, each with a file of one of the names."""
    runs = {file.parent for name in names for file in folder.glob(f"*/{name}")}
    if runs:
        youngest = sorted(map(str, runs), key=lambda run: -Path(run).stat().st_mtime)
        raise InputError(f"folder '{folder}' is none of one run, but holds {listed(youngest, 5)}; name one")


def state_of_folder(folder: Path) -> Path:
    """The file that a run of this folder goes on from; raises :class:`InputError` where it has none."""
    if (folder / LAST).is_file():
        return folder / LAST
    if (folder / BEST).is_file():
        raise InputError(f"run folder '{folder}' has a {BEST} but no {LAST}, which a run is resumed from")
    check_one_run(folder, LAST, BEST)
    raise InputError(
        f"run folder '{folder}' holds no checkpoint: no epoch (round) of a run was finished there; start the run again"
    )


def run_path(path: str | Path) -> Path:
    """The path of a run's folder or checkpoint; raises :class:`InputError` for what is none."""
    if not isinstance(path, str | Path) or not str(path):
        raise InputError(f"run is {shown(path)}; it must be the folder of a run, or a checkpoint file")
    return Path(path)


def check_checkpoint(path: str | Path, best: bool = False) -> None:
    """Raise :class:`InputError` where a run's folder or a checkpoint's file is not there or none, or a folder has none.

    Args:
        path: of either.
        best: whether a folder with the best checkpoint alone will do.
    """
    source = run_path(path)
    if source.is_dir():
        source = source / BEST if best and (source / BEST).is_file() else state_of_folder(source)
    elif not source.is_file():
        raise InputError(f"checkpoint '{source}' does not exist")
    check_seal(read_bytes(source, "checkpoint", SEAL_LENGTH), source)


def check_seal(end: bytes, file: Path, kind: str = "checkpoint") -> None:
    """Raise :class:`InputError` for a file whose last bytes are no seal; ``kind`` is what the sentence calls it."""
    if not end.startswith(SEAL):
        raise InputError(
            f"{kind} '{file}' cannot be read: it is truncated, damaged, not a checkpoint, or one of recbole_fedkd 0.2.0"
        )


def remove_temporaries(folder: Path) -> None:
    """Remove what processes that were killed while they wrote left in a folder."""
    with suppress(OSError):
        for file in folder.iterdir():
            if _TEMPORARY.fullmatch(file.name):
                file.unlink(missing_ok=True)


def json_ready(value: Any) -> Any:
    """JSON has no word for nan and infinity: null."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def config_text(about: str, keys: Mapping[str, Any]) -> str:
    """A config file of keys, texts or values, that begins with a sentence on it and says how it is used."""
    usage = "recbole-fedkd --config_files=FILE, and --data_path=FOLDER for data that do not lie in dataset/"
    lines = [f"# {' '.join(text.split())}\n" for text in (about, usage)]
    return "".join(lines) + yaml.safe_dump(
        json.loads(json.dumps(keys, default=str)), sort_keys=False, allow_unicode=True
    )


def write_json(content: Mapping[str, Any], file: Path) -> None:
    """Write a JSON file whole or not at all; raises what :func:`written_whole` does."""
    write_bytes((json.dumps(json_ready(content), indent=2, allow_nan=False) + "\n").encode(), file)
