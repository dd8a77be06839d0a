"""Which columns of an atomic file are loaded: what the config names, against what the file has."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from recbole.utils import ModelType

from recbole_fedkd.data.atomic import Column
from recbole_fedkd.errors import InputError, listed, nearest

_IDS = {
    "inter": ("USER_ID_FIELD", "ITEM_ID_FIELD"),
    "user": ("USER_ID_FIELD",),
    "item": ("ITEM_ID_FIELD",),
    "kg": ("HEAD_ENTITY_ID_FIELD", "RELATION_ID_FIELD", "TAIL_ENTITY_ID_FIELD"),
    "link": ("ITEM_ID_FIELD", "ENTITY_ID_FIELD"),
}


def id_fields(config: Any, suffix: str) -> dict[str, str]:
    """Columns that a file cannot do without: config key to name."""
    return {key: config[key] for key in _IDS.get(suffix, ()) if config[key] is not None}


def number_fields(config: Any) -> set[str]:
    """Columns of the interactions that are numbers whatever their type says: ratings, labels, timestamps."""
    fields = {config["RATING_FIELD"], config["LABEL_FIELD"], config["TIME_FIELD"], *(config["threshold"] or {})}
    return {field for field in fields if field is not None}


def order_counts(config: Any) -> bool:
    """Whether anything depends on the time order of the rows, so that every row needs a timestamp."""
    return bool(
        _splits_by_time(config)
        or config["benchmark_filename"]
        or config["rm_dup_inter"]
        or config.reads_history
        or config["history_length"]
        or config["student_pool"]
        or config.trains_teacher
    )


def _splits_by_time(config: Any) -> str | None:
    """The setting, if any, that cannot do without a timestamp column."""
    if config["benchmark_filename"]:
        return None
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
        return f"model '{config['model']}'"
    if "TS" in (config["eval_args"]["split"] or {}):
        return "eval_args.split of kind TS"
    return "eval_args.order=TO" if config["eval_args"]["order"] == "TO" else None


def loaded_columns(config: Any, path: Path, suffix: str, columns: list[Column]) -> list[Column]:
    """The columns of a file to load, in its order: its ids, and what ``load_col`` and ``unload_col`` leave.

    Raises:
        InputError: a key names a column that the file does not have, or leaves out one that is needed.
    """
    names = [column.name for column in columns]
    columns_there = f"the columns of '{path}' are {listed(names, 30)}"
    ids = id_fields(config, suffix)
    absent = {key: field for key, field in ids.items() if field not in names}
    if absent:
        missing = " and ".join(f"'{field}' ({key})" for key, field in absent.items())
        raise InputError(f"'{path}' has no column {missing}; {columns_there}: name yours by {' and '.join(absent)}")
    load, unload = _named(config, "load_col", suffix), _named(config, "unload_col", suffix) or []
    if config.gives("unload_col") and not config.gives("load_col"):
        load = None
    for key, names_of_key in (("load_col", load), ("unload_col", unload)):
        for field in names_of_key or [] if config.gives(key) else []:
            if field not in names:
                raise InputError(f"{key} names '{field}', but {columns_there}{nearest(str(field), names)}")
    for field in unload:
        if field in ids.values():
            raise InputError(f"unload_col names '{field}', which '{path}' cannot do without")
    if load and unload:
        raise InputError(f"load_col and unload_col both name columns of '{path}'; set one of them to None")
    wanted = [
        column
        for column in columns
        if column.name in ids.values() or ((load is None or column.name in load) and column.name not in unload)
    ]
    if suffix == "inter":
        _check_what_is_read(config, path, names, [column.name for column in wanted])
    return wanted


def loads_what_is_there(config: Any) -> bool:
    """Whether a model reads features and nobody has said which columns to load: then every file gives what it has."""
    return bool(config.reads_features) and config["load_col"] is None


def is_loaded(config: Any, suffix: str) -> bool:
    """Whether a file is loaded at all: without ``load_col`` every one is, with it those that it names."""
    named = _named(config, "load_col", suffix)
    return named is None or len(named) > 0 or (config.gives("unload_col") and not config.gives("load_col"))


def lacks_its_id(config: Any, suffix: str, columns: list[Column]) -> bool:
    """Whether a ``.user`` or ``.item`` file that nobody named cannot be joined: it is no file of this dataset's features."""
    if suffix not in ("user", "item") or not loads_what_is_there(config):
        return False
    named = config.gives("load_col") or any((config[key] or {}).get(suffix) for key in ("unload_col", "unused_col"))
    return not named and not {column.name for column in columns}.issuperset(id_fields(config, suffix).values())


def check_named_files(config: Any) -> None:
    """The ``.user`` and ``.item`` files whose columns the user names are there; raises :class:`InputError`."""
    for key in ("load_col", "unload_col", "unused_col"):
        for suffix, fields in (config[key] or {}).items() if config.gives(key) else ():
            file = Path(config["data_path"]) / f"{config['dataset']}.{suffix}"
            if suffix in ("user", "item") and fields and not file.is_file():
                raise InputError(f"{key} names columns of '{file}', which does not exist")


def check_unused_columns(config: Any, suffix: str, loaded: Collection[str]) -> None:
    """``unused_col`` names columns that are loaded, and none that everything stands on; raises :class:`InputError`."""
    needed = {*id_fields(config, suffix).values(), config["LABEL_FIELD"]}
    for field in _named(config, "unused_col", suffix) or []:
        if field in needed:
            raise InputError(f"unused_col names '{field}', which is needed")
        if field not in loaded and config.gives("unused_col"):
            raise InputError(
                f"unused_col names '{field}', but the loaded columns of '{config['dataset']}.{suffix}' are "
                f"{listed(loaded, 30)}{nearest(str(field), loaded)}"
            )


def _named(config: Any, key: str, suffix: str) -> list[str] | None:
    """The columns of a file that a key names; None stands for all, which ``load_col`` may say as '*'."""
    value = config[key]
    if value is None:
        return None
    named = value.get(suffix, [])
    if key == "load_col" and named == "*":
        return None
    return list(named)


def _check_what_is_read(config: Any, path: Path, names: list[str], loaded: list[str]) -> None:
    """Ratings and timestamps are there where the config reads them."""
    columns_there = f"the columns of '{path}' are {listed(names, 30)}"
    for key in ("RATING_FIELD", "TIME_FIELD"):
        if config.gives(key) and config[key] not in names:
            raise InputError(
                f"'{path}' has no column '{config[key]}' ({key}); {columns_there}{nearest(str(config[key]), names)}"
            )
    rating, mode = config["RATING_FIELD"], config["label_mode"]
    if mode in ("rating", "threshold") and rating not in loaded:
        mend = "load it by load_col" if rating in names else "name yours by RATING_FIELD"
        raise InputError(
            f"label_mode={mode} needs ratings, but dataset '{config['dataset']}' has no column '{rating}' among its loaded "
            f"columns; {columns_there}: {mend}, or use label_mode=implicit"
        )
    history = config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]
    written = config["benchmark_filename"] and config["MODEL_TYPE"] == ModelType.SEQUENTIAL and mode is None
    if written and history not in loaded:
        mend = (
            "load it by load_col"
            if history in names
            else f"add a column {history}:token_seq, or leave benchmark_filename out"
        )
        raise InputError(
            f"model '{config['model']}' takes the histories of a benchmark file as they are, but no column '{history}' is "
            f"loaded; {columns_there}: {mend}"
        )
    who, time = _splits_by_time(config), config["TIME_FIELD"]
    if who and time not in loaded:
        mend = "load it by load_col" if time in names else "name yours by TIME_FIELD"
        raise InputError(f"{who} needs timestamps, but no column '{time}' is loaded; {columns_there}: {mend}")
