"""Models: the names of this package's and of RecBole's, and their classes."""

from __future__ import annotations

import pkgutil

from recbole.utils import get_model

from recbole_fedkd import compat
from recbole_fedkd.config.keys import RECBOLE_PROPERTIES
from recbole_fedkd.errors import InputError, nearest
from recbole_fedkd.model import MODELS


def recbole_models() -> dict[str, str]:
    """Names of RecBole's models, lower case to their own spelling, without importing any of them."""
    names = {path.stem.lower(): path.stem for path in (RECBOLE_PROPERTIES / "model").glob("*.yaml")}
    folders = [str(folder) for folder in (RECBOLE_PROPERTIES.parent / "model").glob("*_recommender")]
    files = {module.name for module in pkgutil.iter_modules(folders)}
    return {lowered: name for lowered, name in names.items() if lowered in files}


def find_model(name: str) -> type:
    """Model class of this package or of RecBole; raises :class:`InputError` with the nearest name for any other."""
    if name in MODELS:
        return MODELS[name]
    known = recbole_models()
    if known.get(name.lower()) != name:
        raise InputError(f"model '{name}' is unknown{nearest(name, [*MODELS, *known.values()])}")
    try:
        with compat.anomaly_detection_kept():
            model: type = get_model(name)
    except ImportError as error:
        raise InputError(f"model '{name}' needs a package that is not installed: {error}") from error
    return model
