"""The keys that a config knows: which names there are for a model and a dataset, and the check of the user's values."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recbole_fedkd.config.files import FILES_OF_EVERY_RUN, PROPERTIES, RECBOLE_PROPERTIES
from recbole_fedkd.config.intervals import column_intervals, interval_text
from recbole_fedkd.config.keys import (
    Key,
    check_size,
    declared_keys,
    described_keys,
    read_keys,
    read_sections,
    sizes_of_models,
)
from recbole_fedkd.config.outlines import mentioned_keys
from recbole_fedkd.config.shapes import check_shape
from recbole_fedkd.config.synonyms import called_here
from recbole_fedkd.errors import InputError, nearest, shown
from recbole_fedkd.privacy import settings as _settings  # noqa: F401  (declares a dictionary)
from recbole_fedkd.registry import DICTIONARIES, settings_of


@lru_cache
def _keys_of_all_models() -> frozenset[str]:
    """Every key that some model knows: a config file may serve several models."""
    files = [*(RECBOLE_PROPERTIES / "model").glob("*.yaml"), *(PROPERTIES / "model").glob("*.yaml")]
    return frozenset(name for file in files for name in read_keys(file))


def keys_in_source(model_class: type) -> set[str]:
    """Keys that a model reads, as its source and its parents' say: files define some of them nowhere."""
    names: set[str] = set()
    for parent in inspect.getmro(model_class):
        if parent.__module__.startswith(("torch", "builtins")):
            continue
        try:
            names |= mentioned_keys(inspect.getsource(importlib.import_module(parent.__module__)))
        except (OSError, TypeError):
            continue
    return names


class KnownKeys:
    """Every key that a model on a dataset may be given.

    Args:
        recbole_names: names that RecBole lists as its own arguments.
        model: the model's name.
        dataset: the dataset's name.
        files: properties files of this package for the model, later ones win.
        mentioned: keys that the model's source reads, see :func:`keys_in_source`.
        stock: whether the model is RecBole's or this package's.
        declared: keys that the model declares itself, see :func:`keys_of_model`.
        elsewhere: names that other models of the user's own declare.

    Attributes:
        keys: name to key.
        of_model: names that the model's own file or source mentions.
        sizes: names of RecBole's models, which bounds nothing; a model of the user's own may mean something else by them.
    """

    def __init__(
        self,
        recbole_names: Iterable[str],
        model: str,
        dataset: str,
        files: list[Path],
        mentioned: Iterable[str] = (),
        stock: bool = True,
        declared: Mapping[str, Key] = MappingProxyType({}),
        elsewhere: Iterable[str] = (),
    ) -> None:
        keys = {name: Key(name, "~", (), "", "") for name in recbole_names} | described_keys() | declared_keys()
        of_dataset = RECBOLE_PROPERTIES / "dataset" / f"{dataset}.yaml"
        own = RECBOLE_PROPERTIES / "model" / f"{model}.yaml"
        for file in filter(Path.is_file, (*FILES_OF_EVERY_RUN, of_dataset, own, *files)):
            for name, key in read_keys(file).items():
                if key.types or name not in keys or "fallback" in keys[name].roles:
                    keys[name] = key
        self.of_model = set(read_keys(own)) if own.is_file() else set()
        for name in mentioned:
            keys.setdefault(name, Key(name, "~", (), "", ""))
            self.of_model.add(name)
        self.keys = {**keys, **declared}
        self.of_model |= declared.keys()
        self.elsewhere = _keys_of_all_models().union(elsewhere)
        own_keys = declared.keys() | {name for file in files for name in read_keys(file)}
        self.sizes = sizes_of_models() - own_keys if stock else frozenset()

    def knows(self, name: str) -> bool:
        """Whether a name is that of a key, of this model or of another one."""
        return name in self.keys or name in self.elsewhere

    def check_names(self, names: Iterable[Any]) -> None:
        """Check that each is the name of a key.

        Raises:
            InputError: one of them is not; the sentence tells what it is called here, or the nearest name.
        """
        for name in names:
            if not isinstance(name, str):
                raise InputError(f"key {shown(name)} is not a text; keys are names such as learning_rate")
            if name in self.keys and "computed" in self.keys[name].roles:
                raise InputError(f"key '{name}' cannot be set; {self.keys[name].sentence}")
            if not self.knows(name):
                hint = called_here(name, self.keys) or nearest(name, {*self.keys, *self.elsewhere})
                raise InputError(f"key '{name[:100]}' is unknown{hint}")

    def check(self, values: dict[str, Any]) -> list[str]:
        """Check names and values, and put in place of each value what its key makes of it, such as a number of a text.

        Returns:
            Names that only other models read.

        Raises:
            InputError: an unknown name, or a value of the wrong type or out of range.
        """
        self.check_names(values)
        unread = []
        named = values.get("additional_feat_suffix")
        several = named if isinstance(named, list | tuple) else [named]
        suffixes = [suffix for suffix in several if isinstance(suffix, str)]  # others are refused by their own key
        for name, given in list(values.items()):
            if name not in self.keys and name in self.elsewhere:
                unread.append(name)
                continue
            roles = self.keys[name].roles
            if "first" in roles:
                continue  # read already, and of a model perhaps its class
            if "pickle" in roles and given:
                raise InputError(
                    f"{name} is {shown(given)}: RecBole keeps datasets and loaders as pickles, which run code when they are "
                    "opened, so none is written or opened here; leave it unset"
                )
            if "interval" in roles:
                values[name] = interval_text(name, given)
                continue
            if "column_intervals" in roles:
                values[name] = column_intervals(given)
                continue
            named = name in DICTIONARIES and isinstance(given, Mapping)
            parts = _read_parts(self.keys[name], given, DICTIONARIES[name]) if named else given
            value = values[name] = self.keys[name].read(parts)
            self.keys[name].check_parts(value, suffixes if "files" in roles else ())
            check_shape(name, value)
            if name in self.sizes:
                check_size(name, value)
            if "network" in roles:
                for part, inner in _numbered(name, value):
                    self._check_architecture(part, inner)
        return unread

    def _check_architecture(self, name: str, values: Any) -> None:
        """Keys in which a network differs from the config's own."""
        allowed = list(read_sections(PROPERTIES / "model" / "AttnStudent.yaml")["Network"])
        if not isinstance(values, dict):
            raise InputError(f"{name} is {shown(values)}; it must be a dict of {', '.join(allowed)}")
        for key, value in values.items():
            if key not in allowed:
                raise InputError(f"key '{name}.{key}' is unknown{nearest(str(key), allowed)}")
            if key in self.keys:
                replace(self.keys[key], name=f"{name}.{key}").check(value)


def _numbered(name: str, value: Any) -> list[tuple[str, Any]]:
    """The elements of a list by their names, such as ``student_pool[0]``; anything else by its own."""
    if isinstance(value, list | tuple):
        return [(f"{name}[{number}]", element) for number, element in enumerate(value)]
    return [] if value is None else [(name, value)]


def _read_parts(key: Key, value: Mapping[Any, Any], settings_type: type) -> dict[str, Any]:
    """A dictionary whose keys a settings dataclass declares, as they take it.

    Raises:
        InputError: an unknown part, or one whose value is not allowed.
    """
    parts = {part: replace(Key.of(own), name=f"{key.name}.{part}") for part, own in settings_of(settings_type).items()}
    replace(key, parts=tuple(parts)).check_parts(value)
    return {part: parts[part].read(content) for part, content in value.items()}
