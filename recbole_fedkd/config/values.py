"""Values: from the text of the command line to Python, and from anything to what JSON can hold."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml


def parse_value(text: str) -> Any:
    """A value from the command line: a Python literal, true/false in any case, a yaml list, or the text itself.

    Nothing is executed.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        lowered = text.lower()
        if re.fullmatch(r"\[[\w., -]*\]", text):
            return yaml.safe_load(text)  # [row_sparse, sign]: a shell eats the quotes that Python wants
        return {"true": True, "false": False, "none": None, "~": None}.get(lowered, text)


def native(value: Any) -> Any:
    """Numpy's scalars, also inside lists and dictionaries, as Python's."""
    if isinstance(value, Mapping):
        return {key: native(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(native(inner) for inner in value)
    return value.item() if isinstance(value, np.generic) else value


def plain(value: Any) -> Any:
    """As what JSON can hold; what it cannot is a text."""
    value = native(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
