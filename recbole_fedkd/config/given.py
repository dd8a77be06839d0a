"""What the user gave: config files, dictionary and command line, merged and as Python values, before any default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_fedkd.config.files import PROPERTIES, preset_file
from recbole_fedkd.config.keys import merged_layers, read_keys, text_keys
from recbole_fedkd.config.values import excess, native, parse_value, read_yaml
from recbole_fedkd.errors import InputError, shown


def read_given(
    config_file_list: Any, config_dict: Mapping[Any, Any] | None, command_line: Mapping[Any, Any] | None
) -> dict[str, Any]:
    """The user's own keys merged, the command line over the dictionary over the files; unchecked."""
    layers = (read_files(config_file_list), convert_given(config_dict or {}), convert_given(command_line or {}))
    return merged_layers(*layers)


def convert_given(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Texts as literals, never executed, and numpy's scalars as Python's.

    A key that takes nothing but texts keeps what was written: a folder may be called ``1_000``.
    """
    texts = text_keys()
    read = {}
    for key, value in values.items():
        if not isinstance(value, str):
            problem = excess(value)
            if problem:
                raise InputError(f"{shown(key)} is {shown(value)}, which {problem}")
            read[key] = native(value)
            continue
        parsed = parse_value(value)
        keeps = key in texts and not (parsed is None or isinstance(parsed, str))
        read[key] = value.strip() if keeps else parsed
    return read


def read_files(file_list: Any) -> dict[str, Any]:
    """The keys of config files, later ones win.

    Raises:
        InputError: one cannot be read, or holds no ``key: value`` lines.
    """
    files = [file_list] if isinstance(file_list, str | Path) else file_list or []
    contents = []
    for file in files:
        content = read_yaml(file, "config file")
        if content is not None and not isinstance(content, dict):
            raise InputError(f"config file '{file}' holds a {type(content).__name__}; it must hold `key: value` lines")
        contents.append(content or {})
    return merged_layers(*contents)


def named(given: Mapping[str, Any], model: str | type | None, dataset: str | None) -> tuple[str | type, str]:
    """Model and dataset of a run: the arguments, else the user's keys, else of the model the preset's.

    Raises:
        InputError: one of them is not named, or by something that is no name.
    """
    chosen = model or given.get("model") or values_of_preset(given).get("model")
    if dataset is not None and not isinstance(dataset, str | int | float):
        raise InputError(
            f"dataset is a {type(dataset).__name__}; it must be the name of a folder in data_path, or a data frame"
        )
    name = dataset or given.get("dataset")
    if not chosen:
        raise InputError("no model is named; give --model=<name>, such as AttnFedKD")
    if not name:
        raise InputError("no dataset is named; give --dataset=<name>, such as ml-100k")
    if isinstance(name, int | float) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or name != Path(name).name or name in (".", "..") or not name.isprintable():
        raise InputError(f"dataset is {shown(name)}; it must be the name of a folder in data_path")
    if not isinstance(chosen, str | type):
        raise InputError(f"model is {shown(chosen)}; it must be the name of a model, or its class")
    return chosen, name


def values_of_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the preset that the user names; its model and label mode decide what else is read."""
    preset = given.get("preset")
    if preset is None:
        return {}
    read_keys(PROPERTIES / "overall.yaml")["preset"].check(preset)
    values: dict[str, Any] = read_yaml(preset_file(preset), "preset")
    return values
