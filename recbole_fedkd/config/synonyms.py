"""What others call the keys of this package, see ``properties/described/synonyms.yaml``."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import lru_cache

from recbole_fedkd.config.files import PROPERTIES
from recbole_fedkd.config.values import read_yaml


@lru_cache
def synonyms() -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Lower-case name to the key that means it here, and key to a note on its values."""
    content = read_yaml(PROPERTIES / "described" / "synonyms.yaml", "file of synonyms")
    return {other: key for key, others in content["called"].items() for other in others}, content["notes"]


def called_here(name: str, known: Container[str]) -> str | None:
    """Half a sentence with what a key of another framework is called here; None if it is none of the known keys."""
    keys, notes = synonyms()
    key = keys.get(name.lower().replace("-", "_").strip("_"))
    if key is None or key not in known or key == name:
        return None
    note = f" ({notes[key]})" if key in notes else ""
    return f"; here it is called {key}{note}"
