"""What can be refused, and told, before torch is loaded: names and values of keys, as their declarations say."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from recbole_fedkd.config.files import RECBOLE_PROPERTIES, files_of_model
from recbole_fedkd.config.given import named, read_given
from recbole_fedkd.config.known import KnownKeys, mentioned_keys
from recbole_fedkd.config.models import check_model_name


def check_early(
    model: str | None, dataset: str | None, config_file_list: list[str], command_line: Mapping[str, Any]
) -> None:
    """Refuse what ``FedKDConfig`` would refuse in the same words, of all that needs no model to be loaded.

    What plugins bring, and a checkpoint says, is only known later: with those nothing is checked here.

    Raises:
        InputError: a name or a value that cannot be used.
    """
    given = read_given(config_file_list, None, command_line)
    if given.get("plugins") or given.get("resume"):
        return
    chosen, data = named(given, model, dataset)
    assert isinstance(chosen, str)
    check_model_name(chosen)
    known = KnownKeys(recbole_arguments(), chosen, data, files_of_model(chosen))
    if any(isinstance(name, str) and not known.knows(name) for name in given):
        # A model's source may read keys that no file defines. Which model's is asked later.
        read = {
            name
            for file in RECBOLE_PROPERTIES.parent.rglob("model/**/*.py")
            for name in mentioned_keys(file.read_text())
        }
        given = {name: value for name, value in given.items() if name not in read or known.knows(name)}
    known.check(given)


@lru_cache
def recbole_arguments() -> list[str]:
    """Names that RecBole lists as its own arguments, read without loading RecBole."""
    lists = runpy.run_path(str(RECBOLE_PROPERTIES.parent / "utils" / "argument_list.py"))
    return [name for kind in ("general", "training", "evaluation", "dataset") for name in lists[f"{kind}_arguments"]]
