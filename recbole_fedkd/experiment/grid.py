"""From an experiment's yaml file to its cells, the single runs; nothing is run and no config is built here."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_fedkd.config.given import read_given
from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.config.plugins import plugins_from_anywhere
from recbole_fedkd.config.values import parse_value, read_yaml
from recbole_fedkd.errors import InputError, nearest

DEFAULT_MODEL = "AttnFedKD"
DEFAULT_SEED = 2020

_PUBLISHED_PARTS = ("published", "published_as", "published_for", "published_source")
# All after the rows is the report's: what to compare with, and numbers of a publication to stand beside the measured ones.
_PARTS = ("keys", "grid", "rows", "reference", "scale", *_PUBLISHED_PARTS)
# Rows between whose quality the others stand, and the one whose bytes are the unit.
_SCALE_PARTS = ("floor", "ceiling", "bytes")
_LONGEST_SLUG = 120
_DIGEST_LENGTH = 8


@dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Attributes:
        id: readable name and eight hexadecimal digits of the keys' hash; names the files of the run.
        row: name of the row in the table.
        group: the grid's keys other than ``seed`` with this cell's values, in the order of the yaml file.
        seed: the run's seed.
        keys: every config key of the run that the user gave, the seed among them; paths are absolute.
    """

    id: str
    row: str
    group: dict[str, Any]
    seed: int
    keys: dict[str, Any]

    @property
    def title(self) -> str:
        """How a person calls this run, such as ``AFD+CNN ml-100k random seed 2020``."""
        return " ".join([self.row, *map(_text, self.group.values()), f"seed {self.seed}"])


@dataclass(frozen=True)
class Experiment:
    """What a yaml file describes.

    Attributes:
        name: name of the file without its ending.
        content: the file's content as it was read.
        cells: the runs, grid combination by grid combination, and in each the rows in their order.
        rows: names of the rows in the order of the file.
        reference: row that the others are tested against, if it has a run.
    """

    name: str
    content: dict[str, Any]
    cells: tuple[Cell, ...]
    rows: tuple[str, ...]
    reference: str | None


@dataclass(frozen=True)
class _Row:
    """A row of the file: its keys, the grid values that it is confined to, and keys that hold for single grid values.

    Grid values stand as canonical JSON.
    """

    keys: dict[str, Any]
    only: dict[str, set[str]] = field(default_factory=dict)
    by: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def keys_at(self, values: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
        """The row's keys at the values of a cell; what is fixed wins over the row's own."""
        keys = dict(self.keys)
        for key, cases in self.by.items():
            keys.update(cases.get(canonical({**values, **self.keys, **fixed}[key]), {}))
        return keys


def read_experiment(file: str | Path, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Read an experiment's yaml file.

    Args:
        file: the yaml file.
        overrides: config keys that win in every cell, texts or values.

    Raises:
        InputError: the file cannot be read or used; the sentence names file and part.
    """
    content = _found_beside(read_yaml(file, "experiment"), Path(file).parent)
    return expand(content, overrides, f"experiment '{file}'", Path(file).stem)


def _found_beside(content: Any, folder: Path, names_files: bool = False) -> Any:
    """An experiment whose ``plugins`` and ``config_files`` are named by whole paths, where they lie beside it."""
    if isinstance(content, Mapping):
        return {key: _found_beside(value, folder, key in ("plugins", "config_files")) for key, value in content.items()}
    if isinstance(content, list):
        return [_found_beside(element, folder, names_files) for element in content]
    if not names_files or not isinstance(content, str):
        return content
    parts = [part.strip() for part in content.split(",")]
    near = [str((folder / part).resolve()) if (folder / part).is_file() else part for part in parts]
    return content if near == parts else near[0] if len(near) == 1 else near


def expand(
    content: Any, overrides: Mapping[str, Any] | None = None, origin: str = "experiment", name: str = "experiment"
) -> Experiment:
    """The cells of an experiment: the product of the grid's lists for every row.

    A row that sets a key of the grid has that one value on the axis, and so has everything under an override.

    Args:
        content: ``keys``, ``grid``, ``rows``, ``reference`` and the like, as the yaml file holds them.
        overrides: config keys that win in every cell, texts or values.
        origin: what error messages call the experiment.
        name: the experiment's name.

    Raises:
        InputError: something in it cannot be used.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{origin} holds a {type(content).__name__}; it must hold {', '.join(_PARTS)}")
    for part in content:
        if part not in _PARTS:
            raise InputError(
                f"{origin}: '{part}' is unknown; allowed are {', '.join(_PARTS)}{nearest(str(part), _PARTS)}"
            )
    fixed = _checked_keys(overrides, f"{origin}, command line")
    keys = _checked_keys(content.get("keys"), f"{origin}, keys")
    axes = _axes(content.get("grid"), origin)
    for key in content.get("keys") or {}:
        if key in axes:
            raise InputError(f"{origin}: key '{key}' is in keys and in grid; it may be in one of them only")
    axes.setdefault("seed", [keys.get("seed", DEFAULT_SEED)])
    rows = _rows(content.get("rows"), axes, origin)
    axes = {key: [fixed[key]] if key in fixed else values for key, values in axes.items()}

    cells: dict[str, Cell] = {}
    for values in itertools.product(*axes.values()):
        for row_name, row in (rows or {"": _Row({})}).items():
            point = dict(zip(axes, values, strict=True))
            merged = {**keys, **point, **row.keys_at(point, fixed), **fixed}
            if "preset" not in merged:
                # A preset names its model.
                merged = {"model": DEFAULT_MODEL, **merged}
            if any(canonical(merged[key]) not in allowed for key, allowed in row.only.items()):
                continue
            cell = _cell(row_name, merged, axes, origin)
            digest = _identity(merged)
            earlier = cells.setdefault(digest, cell)
            if earlier.row != cell.row:
                raise InputError(f"{origin}: rows '{earlier.row}' and '{cell.row}' are the same run, {cell.title}")
    if not cells:
        raise InputError(f"{origin} has no cell: no row exists for these values of the grid")

    names = tuple(rows) or tuple(dict.fromkeys(cell.row for cell in cells.values()))
    _conditions(content.get("published_for") or {}, "published_for", "single values", axes, origin)
    _check_scale(content.get("scale"), names, origin)
    reference = content.get("reference")
    if reference is not None:
        _check_row("reference", reference, names, origin)
    if all(cell.row != reference for cell in cells.values()):
        reference = None
    return Experiment(name, dict(content), tuple(cells.values()), names, reference)


def none_starts(first: Cell, why: str) -> InputError:
    """The error of an experiment of which no run can start, with what is wrong with the first."""
    return InputError(f"no run of the experiment can start; {first.title}: {why}")


def _check_row(what: str, row: Any, names: Iterable[str], origin: str) -> None:
    if row not in names:
        raise InputError(f"{origin}: {what} '{row}' is no row{nearest(str(row), names)}")


def _check_scale(scale: Any, names: Iterable[str], origin: str) -> None:
    if scale is None:
        return
    if not isinstance(scale, Mapping):
        raise InputError(f"{origin}: scale is {scale!r}; it must map {', '.join(_SCALE_PARTS)} to rows")
    for part, row in scale.items():
        if part not in _SCALE_PARTS:
            raise InputError(
                f"{origin}: scale names '{part}'; allowed are {', '.join(_SCALE_PARTS)}{nearest(str(part), _SCALE_PARTS)}"
            )
        _check_row(f"scale.{part}", row, names, origin)


def canonical(value: Any) -> str:
    """The one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _identity(keys: Mapping[str, Any]) -> str:
    """Hash of what a run computes."""
    computed = {key: value for key, value in keys.items() if key not in keys_with("aside")}
    return hashlib.sha256(canonical(computed).encode()).hexdigest()


def digest_of(cell_id: str) -> str:
    """The part of a cell's id that depends on its keys alone."""
    return cell_id[-_DIGEST_LENGTH:]


def _cell(row: str, keys: dict[str, Any], axes: Iterable[str], origin: str) -> Cell:
    """The cell of merged keys; without a row's name, model and strategy name it."""
    if "dataset" not in keys:
        raise InputError(f"{origin}: no dataset is named; put dataset into keys or grid")
    seed = keys["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"{origin}: seed is {seed!r}; it must be an integer >= 0")
    group = {key: keys[key] for key in axes if key != "seed"}
    if not row:
        naming = [key for key in keys_with("row") if key in group] or [key for key in keys_with("row") if key in keys]
        row = " ".join(_text(keys[key]) for key in naming)
        group = {key: value for key, value in group.items() if key not in naming}
    data = [] if "dataset" in group else [keys["dataset"]]
    readable = [row, *data, *group.values(), f"seed{seed}"]
    slug = "-".join(re.sub(r"[^A-Za-z0-9.+]+", "-", _text(part)).strip("-.") for part in readable)
    folder = str(Path(str(keys.get("data_path") or "dataset")).resolve())
    return Cell(
        f"{slug[:_LONGEST_SLUG]}-{_identity(keys)[:_DIGEST_LENGTH]}", row, group, seed, {**keys, "data_path": folder}
    )


def _axes(grid: Any, origin: str) -> dict[str, list[Any]]:
    """Config keys to the values that they run through."""
    if grid is not None and not isinstance(grid, Mapping):
        raise InputError(f"{origin}: grid is a {type(grid).__name__}; it must map config keys to lists")
    axes: dict[str, list[Any]] = {}
    for name, values in (grid or {}).items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{origin}: grid key '{name}' is {values!r}; it must be a list of at least one value")
        if name == "config_files":
            raise InputError(f"{origin}: config_files cannot be in grid; put it into keys or into rows")
        axes[name] = [_checked_keys({name: value}, f"{origin}, grid")[name] for value in values]
        texts = [canonical(value) for value in axes[name]]
        for text in texts:
            if texts.count(text) > 1:
                raise InputError(f"{origin}: grid key '{name}' holds {text} twice, which makes cells twice")
    return axes


def _rows(content: Any, axes: Mapping[str, list[Any]], origin: str) -> dict[str, _Row]:
    """The rows by name; none if the file has no rows."""
    if content is None:
        return {}
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{origin}: rows is {content!r}; it must map names to config keys")
    rows = {}
    for name, given in content.items():
        where = f"{origin}, row '{name}'"
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{where}: its name must be a text")
        if given is not None and not isinstance(given, Mapping):
            raise InputError(f"{where} is {given!r}; it must map config keys to values")
        settings = dict(given or {})
        confined, cases = settings.pop("only", None) or {}, settings.pop("by", None) or {}
        keys = _checked_keys(settings, where)
        only: dict[str, set[str]] = {}
        for key, values in _conditions(confined, "only", "lists", axes, where):
            if not isinstance(values, list) or not values:
                raise InputError(f"{where}: only.{key} is {values!r}; it must be a list of at least one value")
            only[key] = set(_grid_values(key, values, keys, axes, f"{where}: only.{key}"))
        by: dict[str, dict[str, dict[str, Any]]] = {}
        for key, of_value in _conditions(cases, "by", "values and their config keys", axes, where):
            if not isinstance(of_value, Mapping) or not of_value:
                raise InputError(f"{where}: by.{key} is {of_value!r}; it must map values of the grid to config keys")
            texts = _grid_values(key, list(of_value), keys, axes, f"{where}: by.{key}")
            parts = [_checked_keys(part, f"{where}, by.{key}") for part in of_value.values()]
            for part in parts:
                if set(part) & set(axes):
                    raise InputError(f"{where}: by.{key} sets '{min(set(part) & set(axes))}', a key of the grid")
            by[key] = dict(zip(texts, parts, strict=True))
        rows[name] = _Row(keys, only, by)
    return rows


def _conditions(
    content: Any, name: str, what: str, axes: Mapping[str, list[Any]], where: str
) -> Iterable[tuple[str, Any]]:
    """The entries of ``only``, ``by`` or ``published_for``, whose keys are the grid's."""
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: {name} is {content!r}; it must map keys of the grid to {what}")
    for key in content:
        if key not in axes:
            raise InputError(f"{where}: {name} names '{key}', which is not in the grid{nearest(str(key), axes)}")
    return content.items()


def _grid_values(
    key: str, values: list[Any], keys: Mapping[str, Any], axes: Mapping[str, list[Any]], where: str
) -> list[str]:
    """Values of a grid key as canonical JSON; each must be one that the grid, or the row itself, has."""
    texts = [canonical(_checked_keys({key: value}, where)[key]) for value in values]
    known = {canonical(value) for value in [*axes[key], *([keys[key]] if key in keys else [])]}
    for text in sorted(set(texts) - known):
        raise InputError(f"{where} holds {text}, which the grid does not: {', '.join(known)}")
    return texts


def _checked_keys(given: Any, where: str) -> dict[str, Any]:
    """Config keys with their texts read as values, their config files read, and their paths absolute."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InputError(f"{where} is {given!r}; it must map config keys to values")
    for name in given:
        if not isinstance(name, str):
            raise InputError(f"{where}: {name!r} is no name of a config key")
        if name == "user_metrics" or name in keys_with("one_run") - keys_with("folder"):
            raise InputError(f"{where}: key '{name}' is that of a single run and cannot be in an experiment")
    keys = dict(given)
    files = keys.pop("config_files", None) or []
    if isinstance(files, str):
        files = files.split()
    if not isinstance(files, list):
        raise InputError(f"{where}: config_files is {files!r}; it must be a list of files, or their names in one text")
    # What the files hold, not where they lie, is part of a cell.
    keys = {**read_given([str(file) for file in files], None, None), **keys}
    for name, value in keys.items():
        keys[name] = parse_value(value) if isinstance(value, str) else value
        if name in keys_with("folder") and value is not None:
            keys[name] = str(Path(str(value)).resolve())
        if name == "plugins":
            keys[name] = plugins_from_anywhere(value)
        try:
            # What a cell's process will read.
            keys[name] = json.loads(canonical(keys[name]))
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: key '{name}' is {value!r}, which JSON cannot hold: {error}") from error
    return keys


def _text(value: Any) -> str:
    return value if isinstance(value, str) else canonical(value)
