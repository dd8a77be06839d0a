"""The errors a user is meant to read, each in one sentence of bounded length."""

from __future__ import annotations

import difflib
import reprlib
import sys
import traceback
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

NAMED = 10
"""How many names a sentence lists before it only counts."""

_LONGEST = 2000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxfrozenset = 20
_SHORT.maxdict = 12
_SHORT.maxlevel = 4


class InputError(ValueError):
    """A key, value or file that cannot be used; the message names it, what was found and what is allowed."""

    def __init__(self, message: str) -> None:
        # Errors of libraries that are quoted here may run over several lines, or over pages.
        line = " ".join(message.split())
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ...")


class TrainingError(RuntimeError):
    """Training cannot go on, although the input could be used."""


FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, NotImplementedError, TypeError)
"""Errors of code, whose text alone says little."""

_LIBRARIES = {"numpy", "pandas", "recbole", "scipy", "torch", *sys.stdlib_module_names}


def reason_of(error: BaseException) -> str:
    """What an error says, and where in somebody's own file it was raised; of one of code also its kind, and always where."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)][::-1]
    rooms = [frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in frames]
    own = [at for at, room in zip(frames, rooms, strict=True) if room not in _LIBRARIES | {__package__}]
    try:
        text = str(error)
    except Exception:  # of somebody's own class, whose text cannot be made
        text = ""
    text, here = text or type(error).__name__, own[:1]
    if isinstance(error, FAULTS):
        text = text if text == type(error).__name__ else f"{type(error).__name__}: {text}"
        here = here or [at for at, room in zip(frames, rooms, strict=True) if room == __package__][:1]
    for frame, line in here:
        text += f" ({Path(frame.f_code.co_filename).name}, line {line}, in {frame.f_code.co_name})"
    return text


def nearest(name: str, known: Iterable[str]) -> str:
    """Half a sentence with the known name closest to ``name``, or an empty string if none is close."""
    lowered = {candidate.lower(): candidate for candidate in known}
    # Nobody mistypes a name into one of another length, and the search takes time that grows with it.
    close = difflib.get_close_matches(name.lower()[:100], list(lowered), n=1, cutoff=0.6)
    return f"; did you mean '{lowered[close[0]]}'?" if close else ""


def listed(names: Collection[Any], most: int = NAMED) -> str:
    """Names with commas between: ``a, b, c``; of many the first ones, and how many there are besides."""
    first = [str(name)[:100] for _, name in zip(range(most), names, strict=False)]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")


def printable(text: str) -> str:
    """Somebody else's text as one line that does nothing to a terminal: what is not printable is a question mark."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def shown(value: Any) -> str:
    """A value as Python writes it, shortened where it is long, deep, or contains itself."""
    return _SHORT.repr(value)


def not_distilled(strategy: str, model: str) -> str:
    """What is said of a strategy that exchanges knowledge, over a model that tells no click probability."""
    return (
        f"strategy '{strategy}' distils the click probability of a model with a binary cross-entropy, which model '{model}' "
        "does not minimise; use fedavg or local"
    )
