"""What the keys that name something of this package take: what is registered, or before torch is loaded what ships."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache

import yaml

from recbole_fedkd.config.files import PROPERTIES
from recbole_fedkd.registry import registries

# `<name>` in a rule that stands for no registry: the module that holds the choices, and what they are called there.
_CHOICES = {
    "models": ("recbole_fedkd.model", "MODELS"),
    "engines": ("recbole_fedkd.engine", "ENGINES"),
    "backbones": ("recbole_fedkd.model.backbone", "BACKBONES"),
    "knowledge uses": ("recbole_fedkd.federated.knowledge", "KNOWLEDGE_USES"),
    "server optimizers": ("recbole_fedkd.optim.server", "SERVER_OPTIMIZERS"),
    "switch tests": ("recbole_fedkd.optim.adam_to_sgd", "SWITCH_TESTS"),
    "learners": ("recbole_fedkd.optim", "LEARNERS"),
}


@lru_cache
def shipped() -> Mapping[str, Mapping[str, str]]:
    """Registry to the names that this package brings, each with a sentence; see ``properties/described/choices.yaml``."""
    content: dict[str, dict[str, str]] = yaml.safe_load(
        (PROPERTIES / "described" / "choices.yaml").read_text(encoding="utf-8")
    )
    presets = sorted((PROPERTIES / "preset").glob("*.yaml"))
    content["presets"] = {file.stem: _sentence(file.read_text(encoding="utf-8")) for file in presets}
    return content


def choices(kind: str) -> list[str]:
    """What there is of a kind: all that are registered, also from outside the package, where its module is loaded."""
    module, attribute = _CHOICES.get(kind, ("", ""))
    known = shipped()[kind]
    names: Iterable[str] = registries().get(kind, getattr(sys.modules.get(module), attribute, known))
    return sorted(names, key=[*known, *names].index)


def spelled_out(rule: str) -> str:
    """A rule in which every ``<kind>`` is its names, ``a|b|c``."""
    return re.sub(r"<([\w ]+)>", lambda kind: "|".join(choices(str(kind[1]))), rule)


def _sentence(text: str) -> str:
    """The first sentence of the comment that a file begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(lines))[0]
