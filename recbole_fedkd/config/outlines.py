"""What a config asks of models, strategies and metrics, answered by those that are loaded, or before torch is by files alone.

Of this package ``properties/described/outlines.yaml`` says it; of RecBole its source does, which is read and not run.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

from recbole_fedkd.config.files import PROPERTIES, RECBOLE_PROPERTIES
from recbole_fedkd.registry import registries, settings_of

_RECBOLE = RECBOLE_PROPERTIES.parent
# What is True of a strategy by an attribute of its class.
_OF_STRATEGIES = (
    "exchanges_knowledge",
    "shares_parameters",
    "trains_teacher",
    "taught_by_received",
    "distils_on_server",
)


@dataclass(frozen=True)
class Outline:
    """A model, as far as a config depends on it.

    Attributes:
        name: of the model.
        kind: name of its RecBole type, such as ``CONTEXT``.
        input_kind: name of what it learns from, such as ``PAIRWISE``; None where that is a key's to say.
        traits: of this package's models: ``population`` (a network a client), ``features`` (embeds them), ``clicks`` (has no
            output per rating), ``ratings`` (has nothing else).
        sums: what kind of sums it is made of; None: it is trained.
        own: whether it is of this package, or derived from one that is.
        stock: whether it is this package's or RecBole's.
        fields: whether attention can be put over its feature fields.
        reads_negatives: whether its loss reads sampled items.
        may_click: whether it may minimise a binary cross-entropy, which its source then names.
        mentioned: keys that its source reads.
    """

    name: str
    kind: str
    input_kind: str | None
    traits: frozenset[str] = frozenset()
    sums: str | None = None
    own: bool = False
    stock: bool = True
    fields: bool = False
    reads_negatives: bool = False
    may_click: bool = True
    mentioned: frozenset[str] = frozenset()


@lru_cache
def described() -> Mapping[str, Mapping[str, Any]]:
    """The content of the file of outlines."""
    content: dict[str, dict[str, Any]] = yaml.safe_load(
        (PROPERTIES / "described" / "outlines.yaml").read_text(encoding="utf-8")
    )
    return content


def outline_of_name(name: str) -> Outline:
    """The outline of a model of this package or of RecBole; nothing of it is loaded."""
    traits: list[str] | None = described()["models"].get(name)
    if traits is None:
        return _outline_of_source(name)
    sums = next((trait.removeprefix("sums of ") for trait in traits if trait.startswith("sums of ")), None)
    own = frozenset(trait for trait in traits if not trait.startswith("sums of "))
    return Outline(name, "CONTEXT", "POINTWISE", own, sums, own=True)


def mentioned_keys(source: str) -> set[str]:
    """Keys that a piece of Python reads from its config."""
    return set(re.findall(r"config\[[\"']([\w-]+)[\"']\]", source))


def _outline_of_source(name: str) -> Outline:
    (file,) = (_RECBOLE / "model").glob(f"*_recommender/{name.lower()}.py")
    source = file.read_text(encoding="utf-8")
    bases = re.findall(r"\w+", re.findall(rf"^class {name}\(([^)]*)\):", source, re.M)[0])
    others = [base for base in bases if (file.parent / f"{base.lower()}.py").is_file()]
    above = _outline_of_source(others[0]) if others else None
    body = re.split(r"^class ", source.partition(f"class {name}(")[2], maxsplit=1, flags=re.M)[0]
    kind, input_kind = (
        next(iter(re.findall(rf"^    {attribute} = \w+\.(\w+)", body, re.M)), None)
        for attribute in ("type", "input_type")
    )
    abstract = (_RECBOLE / "model" / "abstract_recommender.py").read_text(encoding="utf-8")
    if kind is None:
        kind = above.kind if above else _kind_of_base(bases[0], abstract)
    if input_kind is None and above is not None:
        input_kind = above.input_kind
    if input_kind is None and bases[0] == "ContextRecommender":
        input_kind = "POINTWISE"
    mentioned = mentioned_keys(source) | mentioned_keys(abstract) | (above.mentioned if above else set())
    fields = "ContextRecommender" in bases or "ContextSeqEmbLayer" in source
    kind = described()["mended"].get(name, kind)
    loss = above if above is not None and "def calculate_loss" not in body else None
    negatives = loss.reads_negatives if loss else "[self.NEG_ITEM_ID]" in source
    clicks = "BCE" in source or (above is not None and above.may_click)
    keys = frozenset(mentioned)
    return Outline(name, kind, input_kind, fields=fields, reads_negatives=negatives, may_click=clicks, mentioned=keys)


def _kind_of_base(base: str, abstract: str) -> str:
    return str(re.findall(r"type = ModelType\.(\w+)", abstract.partition(f"class {base}(")[2])[0])


def has_dataset(model: str) -> bool:
    """Whether RecBole prepares rows in a way of a model's own, by a dataset class with its name."""
    return f"{model}Dataset" in _classes("data/dataset")


def trainer_name(model: str, kind: str) -> str:
    """The name of RecBole's trainer of a model of a type."""
    if f"{model}Trainer" in _classes("trainer"):
        return f"{model}Trainer"
    return {"KNOWLEDGE": "KGTrainer", "TRADITIONAL": "TraditionalTrainer"}.get(kind, "Trainer")


def has_loader(model: str, kind: str) -> bool:
    """Whether RecBole hands training rows of a model of a type out by a loader that is not the usual one."""
    return kind == "KNOWLEDGE" or model in _models_with_loaders()


@lru_cache
def _classes(folder: str) -> frozenset[str]:
    sources = (file.read_text(encoding="utf-8") for file in (_RECBOLE / folder).glob("*.py"))
    return frozenset(name for source in sources for name in re.findall(r"^class (\w+)\(", source, re.M))


@lru_cache
def _models_with_loaders() -> frozenset[str]:
    source = (_RECBOLE / "data" / "utils.py").read_text(encoding="utf-8")
    return frozenset(re.findall(r'^\s+"(\w+)": _get_\w+_dataloader', source, re.M))


def traits_of_strategy(name: str) -> frozenset[str]:
    """What a strategy does, as the attributes of its class say; ``learns_mutually``: its two networks teach each other."""
    strategies = registries().get("strategies")
    if strategies is None:
        return frozenset(described()["strategies"][name])
    from recbole_fedkd.distillation.losses import MutualWeights

    traits = {trait for trait in _OF_STRATEGIES if getattr(strategies[name], trait)}
    mutual = issubclass(strategies.settings[name], MutualWeights)
    return frozenset(traits | ({"learns_mutually"} if mutual else set()))


def traits_of_stage(name: str) -> frozenset[str]:
    """What a stage does, as its class says: ``reads_numbers``, or nothing."""
    stages = registries().get("stages")
    if stages is None:
        return frozenset(described()["stages"][name])
    return frozenset({"reads_numbers"} if getattr(stages[name], "reads_numbers", False) else set())


def keys_of(kind: str, name: str) -> frozenset[str]:
    """The keys that one of a registry's things declares, such as of the ``strategies`` ``fedavg``."""
    registry = registries().get(kind)
    if registry is None:
        return frozenset(described()["keys"][kind][name])
    return frozenset(settings_of(registry.settings[name]))


def keys_of_all(kind: str) -> frozenset[str]:
    """The keys that all things of a registry declare."""
    names = registries().get(kind, described()["keys"][kind])
    return frozenset(key for name in names for key in keys_of(kind, name))


@dataclass(frozen=True)
class Metric:
    """A metric, as far as a config depends on it.

    Attributes:
        kind: ``RANKING`` or ``VALUE``, what RecBole calls its type.
        takes_k: whether it is one of the first k.
        smaller: whether less of it is better.
    """

    kind: str
    takes_k: bool
    smaller: bool


def metric_names() -> Collection[str]:
    """Names of all metrics in lower case: those that are registered, or before torch is loaded those that ship."""
    registered = _registered_metrics()
    return described()["metrics"].keys() if registered is None else registered.metric_types.keys()


def metric_of(name: str) -> Metric:
    """The metric of a name in lower case."""
    registered = _registered_metrics()
    if registered is None:
        words = described()["metrics"][name]
        return Metric("VALUE" if "value" in words else "RANKING", "k" in words, "smaller" in words)
    # Keys of a metric of its own, such as tail_ratio, are unset, as RecBole's config gives them.
    probe: Any = defaultdict(lambda: None, {"topk": [1], "metric_decimal_place": 4})
    takes_k = hasattr(registered.metrics_dict[name](probe), "topk")
    return Metric(registered.metric_types[name].name, takes_k, name in registered.smaller_metrics)


def _registered_metrics() -> Any:
    """RecBole's registry of metrics, once this package's are in it."""
    return sys.modules.get("recbole.evaluator.register") if "recbole_fedkd.evaluation.metrics" in sys.modules else None
