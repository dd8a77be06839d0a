"""What the keys that name something of this package take: what is registered, or before torch is loaded what ships."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache

import yaml

from recbole_fedkd.config.files import PROPERTIES

# `<name>` in a rule of a properties file: the module that holds the registry, and the registry's name.
_REGISTRIES = {
    "models": ("recbole_fedkd.model", "MODELS"),
    "strategies": ("recbole_fedkd.federated.strategy", "STRATEGIES"),
    "engines": ("recbole_fedkd.engine", "ENGINES"),
    "backbones": ("recbole_fedkd.model.backbone", "BACKBONES"),
    "aggregations": ("recbole_fedkd.distillation.knowledge", "AGGREGATIONS"),
    "codecs": ("recbole_fedkd.federated.codec", "CODECS"),
    "knowledge": ("recbole_fedkd.federated.knowledge", "KNOWLEDGE"),
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


def choices(registry: str) -> list[str]:
    """Names of a registry: all that are registered, also from outside the package, where its module is loaded."""
    module, attribute = _REGISTRIES.get(registry, ("", ""))
    names: Iterable[str] = getattr(sys.modules.get(module), attribute, shipped()[registry])
    return list(names)


def spelled_out(text: str) -> str:
    """A rule in which every ``<registry>`` is its names, ``a|b|c``."""
    if "<" in text:
        for registry in (*_REGISTRIES, "presets"):
            text = text.replace(f"<{registry}>", "|".join(choices(registry)))
    return text


def _sentence(text: str) -> str:
    """The first sentence of the comment that a file begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(lines))[0]
