"""The errors a user is meant to read, each in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A key, value or file that cannot be used; the message names it, what was found and what is allowed."""

    def __init__(self, message: str) -> None:
        # Errors of libraries that are quoted here may run over several lines.
        super().__init__(" ".join(message.split()))


class TrainingError(RuntimeError):
    """Training cannot go on, although the input could be used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Half a sentence with the known name closest to ``name``, or an empty string if none is close."""
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    return f"; did you mean '{lowered[close[0]]}'?" if close else ""
