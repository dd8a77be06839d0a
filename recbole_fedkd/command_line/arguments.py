"""Arguments of the command line as a dictionary of texts."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from recbole_fedkd.errors import InputError

# RecBole's own script has these.
_SHORT = {"-m": "--model", "-d": "--dataset", "-k": "--k"}


def parse_arguments(arguments: Sequence[str], flags: Collection[str] = ()) -> dict[str, str]:
    """``--key=value`` and ``--key value`` to a dictionary of texts; of ``flags``, which have no value, the text ``True``.

    Raises:
        InputError: an argument that is no key, a key without a value, or one given twice with different values.
    """
    parsed: dict[str, str] = {}
    position = 0
    while position < len(arguments):
        short, equals, value = arguments[position].partition("=")
        argument = _SHORT.get(short, short) + equals + value
        position += 1
        if not argument.startswith("--") or argument == "--":
            raise InputError(f"argument '{argument}' is not of the form --key=value")
        key, equals, value = argument[2:].partition("=")
        if not key.strip("-"):
            raise InputError(f"argument '{argument}' is not of the form --key=value")
        if not equals and key in flags:
            value = "True"
        elif not equals:
            if position == len(arguments) or arguments[position].startswith("--"):
                raise InputError(f"--{key} has no value; write --{key}=<value>")
            value = arguments[position]
            position += 1
        if parsed.get(key, value) != value:
            raise InputError(f"--{key} is given twice, as '{parsed[key]}' and as '{value}'")
        parsed[key] = value
    return parsed


def parse_after_first(arguments: Sequence[str], needed: str, flags: Collection[str] = ()) -> dict[str, str]:
    """As :func:`parse_arguments`, of those behind the first.

    Raises:
        InputError: also where the first is none, or a key; it says what is ``needed``.
    """
    if not arguments or arguments[0].startswith("-"):
        raise InputError(needed)
    return parse_arguments(arguments[1:], flags)


def take_run(keys: dict[str, str]) -> tuple[str | None, str | None, list[str]]:
    """Take model, dataset and config files of a run out of the keys."""
    return keys.pop("model", None), keys.pop("dataset", None), keys.pop("config_files", "").split()


def take_count(keys: dict[str, str], name: str, most: int | None = None) -> int | None:
    """Take a number from 1, to ``most`` where there is a bound, out of the keys; None if it is not there."""
    text = keys.pop(name, None)
    if text is None:
        return None
    allowed = ">= 1" if most is None else f"in [1, {most}]"
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not 1 <= int(text) <= (most or 10**10):
        raise InputError(f"{name} is '{text[:40]}'; it must be an integer {allowed}")
    return int(text)
