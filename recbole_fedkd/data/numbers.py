"""Numbers in files: which texts are some, which stand for none, and why not."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from decimal import Decimal, InvalidOperation

import numpy as np

LARGEST = float(np.finfo(np.float32).max)
"""RecBole computes in 32 bits: a larger number would be infinite."""

EXACT = 2.0**53
"""From here on 64-bit floating point merges neighbouring integers, such as timestamps in nanoseconds."""

MISSING = frozenset({
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "None", "n/a",
    "null",
})  # fmt: skip
"""Texts that stand for no number, as in pandas; so does whatever Python reads as not-a-number. Tokens know none but ''."""

_PLAIN = frozenset("0123456789.-")
"""What most numbers are written with; Python reads such a text as the number that it is, or not at all."""


def number(text: str) -> float | None:
    """The number that a text is; nan for a missing one, None for what is no number."""
    try:
        # Python reads 1_000 as a number; a file hardly means it.
        return None if "_" in text else float(text)
    except ValueError:
        return math.nan if text.strip() in MISSING else None


def numbers_of(texts: Collection[str]) -> dict[str, float | None]:
    """The number of each text, as of :func:`number`."""
    if _PLAIN.issuperset("".join(texts)):
        try:
            return dict(zip(texts, map(float, texts), strict=True))
        except ValueError:
            pass
    return {text: number(text) for text in texts}


def integer(text: str) -> int | None:
    """The integer that a text is, exactly; None for what is none."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        exact = Decimal(text)
        return int(exact) if exact == exact.to_integral_value() else None
    except (InvalidOperation, OverflowError, ValueError):
        return None


def why_no_number(text: str, value: float | None) -> str:
    """The rest of a sentence that says that a text is no number."""
    if value is not None and math.isnan(value):
        return " where every row needs a number"
    if value is not None and math.isinf(value):
        return "; it must be a finite number"
    if value is not None:
        return f"; it must lie between -{LARGEST:.3g} and {LARGEST:.3g}, as RecBole computes in 32 bits"
    if re.fullmatch(r"[\d.,'\s]+", text.strip()) and any(character.isdigit() for character in text):
        return ", which is no number: decimals follow a point, and nothing separates thousands"
    if re.match(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}", text.strip()):
        return ", which is no number: times are numbers, such as seconds since 1970"
    return ", which is no number"
