"""Models by name: this package's, and RecBole's without importing any of them."""

from __future__ import annotations

import re
from functools import lru_cache

from recbole_fedkd.config.choices import choices
from recbole_fedkd.config.files import RECBOLE_PROPERTIES
from recbole_fedkd.config.needs import missing_package
from recbole_fedkd.errors import InputError, nearest

# RecBole trains these by libraries of trees, whose models are files of their own and no parameters of torch.
_NOT_RUN = {"LightGBM": "lightgbm", "XGBoost": "xgboost"}


@lru_cache
def recbole_models() -> dict[str, str]:
    """Names of RecBole's models, lower case to their own spelling, without importing any of them.

    A model is a class in a file of its name, whether RecBole has a properties file for it or not (``Random`` has none).
    """
    names: dict[str, str] = {}
    for file in sorted((RECBOLE_PROPERTIES.parent / "model").glob("*_recommender/*.py")):
        classes = re.findall(r"^class (\w+)\(", file.read_text(encoding="utf-8"), re.M)
        names.update((file.stem, name) for name in classes if name.lower() == file.stem)
    return names


def check_model_name(name: str) -> None:
    """Raise :class:`InputError`, with the nearest name, for what is no model of this package or of RecBole."""
    own, known = choices("models"), recbole_models()
    if name not in own and known.get(name.lower()) != name:
        raise InputError(
            f"model '{name}' is unknown; a model of your own is given as its class, or found in the modules that plugins names"
            f"{nearest(name, [*own, *known.values()])}"
        )
    if name in _NOT_RUN:
        raise InputError(
            f"model '{name}' is not run here: RecBole has the library {_NOT_RUN[name]} train its trees, and this package "
            "trains, saves and judges models of torch; choose another click model, such as DeepFM"
        )


def check_model(name: str) -> None:
    """As :func:`check_model_name`, and that the package is there that a model of RecBole needs."""
    check_model_name(name)
    if (package := missing_package(name)) is not None:
        raise InputError(f"model '{name}' needs the package {package}, which is not installed")


def find_model(name: str) -> type:
    """Model class of this package or of RecBole; raises :class:`InputError` with the nearest name for any other."""
    from recbole.utils import get_model

    from recbole_fedkd import compat
    from recbole_fedkd.model import MODELS, corrected

    check_model(name)
    if name in MODELS:
        return MODELS[name]
    try:
        with compat.anomaly_detection_kept():
            model: type = get_model(name)
    except ImportError as error:
        raise InputError(f"model '{name}' needs a package that is not installed: {error}") from error
    return corrected(model)
