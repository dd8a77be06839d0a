"""Where the properties files lie, this package's and RecBole's; none of RecBole is imported for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
PROPERTIES = _PACKAGE / "properties" if (_PACKAGE / "properties").is_dir() else _PACKAGE.parent / "properties"
"""In a wheel the properties lie inside the package, in a checkout or an editable install beside it."""

_RECBOLE = importlib.util.find_spec("recbole")
if _RECBOLE is None or _RECBOLE.origin is None:
    raise ModuleNotFoundError("recbole is not installed", name="recbole")
RECBOLE_PROPERTIES = Path(_RECBOLE.origin).resolve().parent / "properties"
FILES_OF_EVERY_RUN = (
    PROPERTIES / "overall.yaml",
    RECBOLE_PROPERTIES / "overall.yaml",
    RECBOLE_PROPERTIES / "dataset" / "sample.yaml",
)
"""Files whose keys every run knows, whatever its model and dataset."""

OWN_DEFAULTS = {"filter_inter_by_user_or_item": False, "show_progress": False}
"""Defaults that are not RecBole's, which drops interactions of users and items that side files lack, and draws bars unasked."""

DESCRIBED = PROPERTIES / "described" / "recbole.yaml"
"""What RecBole's files do not say of its keys."""

# Models of this package whose networks have the keys of AttnStudent.yaml.
_STUDENTS = ("AttnFedKD", "AttnStudent", "AttnTeacher")


def files_of_model(model: str, student: bool | None = None) -> list[Path]:
    """Files of this package for a model, later ones win.

    Args:
        model: its name.
        student: whether its network is an attentive student's; not given: whether it is one of this package's.
    """
    files = [PROPERTIES / "model" / "AttnStudent.yaml"] if (model in _STUDENTS if student is None else student) else []
    own = PROPERTIES / "model" / f"{model}.yaml"
    return [*files, own] if own.is_file() and own not in files else files


def preset_file(preset: str) -> Path:
    """The file of a preset."""
    return PROPERTIES / "preset" / f"{preset}.yaml"
