"""Intervals: RecBole's ``[2,inf)``, as a text or as what yaml and the command line make of ``[2,3]`` and ``(2,3)``."""

from __future__ import annotations

import math
from typing import Any

from recbole_fedkd.errors import InputError


def interval_text(name: str, value: Any) -> str | None:
    """The text of one or more intervals, which is what RecBole reads; None stays None.

    Args:
        name: the key, for the message.
        value: a text such as ``[2,inf)`` or ``(0,1];[3,4]``, or two numbers: a list is closed, a tuple open.

    Raises:
        InputError: no interval, or one without a number in it. RecBole warns and takes what is left of it.
    """
    if value is None or (isinstance(value, str) and value.lower() in ("none", "~")):
        return None
    text = value
    if isinstance(value, list | tuple) and len(value) == 2:
        left, right = "[]" if isinstance(value, list) else "()"
        text = f"{left}{value[0]},{value[1]}{right}"
    parts = "".join(text.split()).split(";") if isinstance(text, str) else [""]
    if not all(_is_interval(part) for part in parts):
        raise InputError(
            f"{name} is {value!r}; it must be an interval such as [2,inf), (0,5] or [2,3], or several with ; between them"
        )
    return ";".join(parts)


def _is_interval(text: str) -> bool:
    if len(text) < 2 or text[0] not in "[(" or text[-1] not in ")]":
        return False
    try:
        low, high = (float(end) for end in text[1:-1].split(","))
    except ValueError:
        return False
    if math.isnan(low) or math.isnan(high):
        return False
    return low < high or (low == high and text[0] + text[-1] == "[]")


def column_intervals(value: Any) -> Any:
    """``val_interval`` with every interval a text; a column of tokens has a list of those that stay.

    Two numbers in a list are taken as RecBole takes them: as an interval where the column holds numbers, as two tokens
    where it holds tokens.

    Raises:
        InputError: no dictionary, or a text that is no interval.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InputError(
            f"val_interval is {value!r}; it must be a dict of columns and intervals, such as {{'rating': '[3,inf)'}}"
        )
    return {
        column: interval if isinstance(interval, list) else interval_text(f"val_interval.{column}", interval)
        for column, interval in value.items()
    }
