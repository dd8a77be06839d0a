"""Completion in a shell, by argcomplete: commands, keys, and the values of keys that name something."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Iterable

from recbole_fedkd.command_line.help import usage_of
from recbole_fedkd.config.choices import choices
from recbole_fedkd.config.early import recbole_arguments
from recbole_fedkd.config.files import FILES_OF_EVERY_RUN, PROPERTIES
from recbole_fedkd.config.keys import Key, read_keys
from recbole_fedkd.config.models import recbole_models

SHELLS = ("bash", "zsh", "fish")


def completion_script(shell: str) -> str:
    """What a shell has to run to complete ``recbole-fedkd``."""
    import argcomplete.shell_integration

    script: str = argcomplete.shell_integration.shellcode(["recbole-fedkd"], shell=shell)
    return script


def complete(commands: Collection[str]) -> None:
    """Answer a shell that asks for completions, and end; nothing happens in a process that none has asked."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        word = next(iter(os.environ.get("COMP_LINE", "").split()[1:]), "")
        usage = usage_of(word) if word in commands else ""
        argcomplete.autocomplete(parser(commands, usage), always_complete_options="long")


def parser(commands: Iterable[str], usage: str = "") -> argparse.ArgumentParser:
    """Commands, keys and choices as argparse knows them; nothing is parsed by it.

    ``usage``: of the command whose arguments are asked for, which says which it has, and whether config keys are among them.
    """
    built = argparse.ArgumentParser("recbole-fedkd", add_help=False, allow_abbrev=False)
    built.add_argument("command", nargs="?", choices=list(commands))
    built.add_argument("rest", nargs="*")
    own = {*re.findall(r"--([a-z][a-z_-]+)", usage), "help"} - {"key"}
    named = {} if usage and "--key=value" not in usage and "config keys" not in usage else _config_keys()
    for name, allowed in sorted({**dict.fromkeys(own), **named}.items()):
        built.add_argument(f"--{name}", choices=allowed)
    return built


def _config_keys() -> dict[str, Collection[str] | None]:
    """Every key of a run, to what it takes; None: anything."""
    files = (PROPERTIES / "model" / "AttnStudent.yaml", *FILES_OF_EVERY_RUN)
    keys = [key for file in files for key in read_keys(file).values()]
    named = {**dict.fromkeys(recbole_arguments()), **{key.name: _choices(key) for key in reversed(keys)}}
    return named | {"model": [*choices("models"), *recbole_models().values()], "dataset": None, "config_files": None}


def _choices(key: Key) -> Collection[str] | None:
    if key.name == "learner":
        return choices("learners")
    if key.types == (bool,):
        return ["True", "False"]
    return key.rule.removeprefix("one of ").split("|") if key.rule.startswith("one of ") else None
