"""Plugins: modules of the user's own, with models or with whatever they register, imported before any key is looked at."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from types import ModuleType
from typing import Any

from recbole_fedkd.config.files import PROPERTIES
from recbole_fedkd.config.keys import declared_keys, keys_of_model, read_keys
from recbole_fedkd.errors import InputError, TrainingError, reason_of
from recbole_fedkd.registry import all_or_nothing


def plugin_names(value: Any) -> list[str]:
    """The modules and files that the key ``plugins`` names; raises :class:`InputError` if it is no list of texts."""
    return read_keys(PROPERTIES / "overall.yaml")["plugins"].read(value) or []


def plugins_from_anywhere(value: Any) -> list[str]:
    """As :func:`plugin_names`, files by their whole path."""
    return [str(Path(name).resolve()) if name.endswith(".py") else name for name in plugin_names(value)]


def check_plugins_there(value: Any) -> None:
    """Raise :class:`InputError` as :func:`import_plugins` does, for a file or a module that is not there."""
    for name in plugin_names(value):
        try:
            if name.endswith(".py"):
                with Path(name).resolve().open("rb"):
                    pass
            elif importlib.util.find_spec(name.partition(".")[0]) is None:
                raise ModuleNotFoundError(f"No module named {name.partition('.')[0]!r}")
        except (OSError, ImportError, ValueError) as error:
            raise _not_imported(name, error) from error


def import_plugins(value: Any) -> list[ModuleType]:
    """Import what the key ``plugins`` names: modules, or files that end in ``.py``; each once in a process.

    Raises:
        InputError: one is not there, or fails while it is imported.
    """
    modules = []
    for name in plugin_names(value):
        try:
            with all_or_nothing():
                modules.append(_from_file(Path(name)) if name.endswith(".py") else importlib.import_module(name))
        except InputError as error:
            raise InputError(f"plugins names '{name}': {error}") from error
        except Exception as error:  # a module of anybody's raises whatever comes
            raise _not_imported(name, error) from error
    return modules


def _not_imported(name: str, error: Exception) -> InputError:
    return InputError(
        f"plugins names '{name}', which cannot be imported ({type(error).__name__}: {error}); name a module that "
        "Python finds, or a file that ends in .py"
    )


@contextmanager
def faults_told(plugins: Sequence[str]) -> Iterator[None]:
    """With plugins an error of code is theirs, or of what they gave: one sentence, and a traceback in the run's log.

    Raises:
        TrainingError: in place of an error that is not meant for whoever runs a model.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        if not plugins:
            raise
        getLogger().info("With plugins:", exc_info=error)
        if isinstance(error, TrainingError):
            raise
        failure = TrainingError(f"with plugins={list(plugins)}: {reason_of(error)}")
        for note in getattr(error, "__notes__", ()):
            failure.add_note(note)
        raise failure from error


def _from_file(file: Path) -> ModuleType:
    # Under a name of its own in sys.modules, where pickle and inspect look for the module of a class.
    name = f"{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"'{file}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        declared_keys()
    except BaseException:
        del sys.modules[name]
        raise
    return module


def models_with_keys(modules: Sequence[ModuleType]) -> list[type]:
    """The models of some modules that declare keys of their own."""
    classes = (member for module in modules for member in vars(module).values() if isinstance(member, type))
    return [model for model in classes if hasattr(model, "calculate_loss") and keys_of_model(model)]


def model_of(modules: Sequence[ModuleType], name: str) -> type | None:
    """The class of a model that one of some modules has under a name; None if none has."""
    attributes = (getattr(module, name, None) for module in modules)
    return next((attribute for attribute in attributes if isinstance(attribute, type)), None)
