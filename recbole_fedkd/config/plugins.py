"""Models of the user's own: modules that the key ``plugins`` names, imported before a model is looked for by its name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from recbole_fedkd.errors import InputError


def import_plugins(names: str | Sequence[str] | None) -> list[ModuleType]:
    """Import modules by name, or by a file that ends in ``.py``; each once in a process.

    Raises:
        InputError: one is not there, or fails while it is imported.
    """
    modules = []
    for name in [names] if isinstance(names, str) else names or []:
        try:
            modules.append(_from_file(Path(name)) if str(name).endswith(".py") else importlib.import_module(str(name)))
        except Exception as error:  # a module of anybody's raises whatever comes
            raise InputError(
                f"plugins names '{name}', which cannot be imported ({type(error).__name__}: {error}); name a module that "
                "Python finds, or a file that ends in .py"
            ) from error
    return modules


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
    except BaseException:
        del sys.modules[name]
        raise
    return module


def model_of(modules: Sequence[ModuleType], name: str) -> type | None:
    """The class of a model that one of some modules has under a name; None if none has."""
    found = (getattr(module, name, None) for module in modules)
    return next((each for each in found if isinstance(each, type)), None)
