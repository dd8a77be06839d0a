"""Completion in a shell, by argcomplete: commands, keys, and the values of keys that name something."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterable

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


def complete(commands: Iterable[str]) -> None:
    """Answer a shell that asks for completions, and end; nothing happens in a process that none has asked."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser(commands), always_complete_options="long")


def parser(commands: Iterable[str]) -> argparse.ArgumentParser:
    """Commands, keys and choices as argparse knows them; nothing is parsed by it."""
    built = argparse.ArgumentParser("recbole-fedkd", add_help=False, allow_abbrev=False)
    built.add_argument("command", nargs="?", choices=list(commands))
    keys = [
        key
        for file in (PROPERTIES / "model" / "AttnStudent.yaml", *FILES_OF_EVERY_RUN)
        for key in read_keys(file).values()
    ]
    named = {key.name: _choices(key) for key in reversed(keys)}
    named |= {name: None for name in recbole_arguments() if name not in named}
    named |= {"model": [*choices("models"), *recbole_models().values()], "dataset": None, "config_files": None}
    for name, allowed in sorted(named.items()):
        built.add_argument(f"--{name}", choices=allowed)
    return built


def _choices(key: Key) -> Collection[str] | None:
    if key.name == "learner":
        return choices("learners")
    if key.types == (bool,):
        return ["True", "False"]
    return key.rule.removeprefix("one of ").split("|") if key.rule.startswith("one of ") else None
