"""Feature columns: what describes a user, an item and the context of an interaction, and which of it a model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recbole.model.abstract_recommender import ContextRecommender
from recbole.utils import FeatureSource, FeatureType

SIDES = {"user": FeatureSource.USER, "item": FeatureSource.ITEM, "context": FeatureSource.INTERACTION}
"""Names of the sides in a sentence, and the file that a side's columns stand in."""


@dataclass(frozen=True)
class Features:
    """The columns that a model reads beside the ids.

    Attributes:
        user: of the ``.user`` file.
        item: of the ``.item`` file.
        context: of the ``.inter`` file: those of the row itself, such as the hour of an interaction.
        unused: what is loaded and not read, and why.
    """

    user: Sequence[str] = ()
    item: Sequence[str] = ()
    context: Sequence[str] = ()
    unused: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.user or self.item or self.context or self.unused)

    def __str__(self) -> str:
        parts = [f"{side}: {', '.join(getattr(self, side)) or 'none'}" for side in SIDES]
        if self.unused:
            parts.append("not used: " + ", ".join(f"{name} ({reason})" for name, reason in self.unused.items()))
        return "features: " + "; ".join(parts)


def excluded_columns(config: Any) -> set[str]:
    """Columns that are never features: ids, what is to be predicted, the time and what stands for the history."""
    ids = {config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]}
    sequences = {f"{name}{config['LIST_SUFFIX']}" for name in [*ids, config["RATING_FIELD"], config["TIME_FIELD"]]}
    targets = {config["RATING_FIELD"], config["LABEL_FIELD"], "label", *(config["threshold"] or {})}
    return {*ids, *sequences, *targets, config["TIME_FIELD"], config["ITEM_LIST_LENGTH_FIELD"]}


def features_of(config: Any, dataset: Any) -> Features:
    """The columns that the model of a config reads of a dataset, whichever kind both are of."""
    own: Features | None = getattr(dataset, "features", None)
    return own if own is not None else _recbole_features(config, dataset)


def _recbole_features(config: Any, dataset: Any) -> Features:
    """The columns that a model of RecBole reads: those of all files, those of users and items, or none."""
    model = config.model_class
    context_aware = issubclass(model, ContextRecommender)
    reads_sides = context_aware or config.reads_history
    reads_rows = context_aware and not config["double_tower"]
    excluded = excluded_columns(config) | {getattr(dataset, "recency_field", None)}
    read: dict[str, list[str]] = {side: [] for side in SIDES}
    unused: dict[str, str] = {}
    for side, source in SIDES.items():
        for name in dataset.fields(source=[source]):
            numerical = name in config["numerical_features"]
            if (
                name == config["LABEL_FIELD"]
                or (name in excluded and not numerical)
                or name not in _columns(dataset, source)
            ):
                continue
            if not (reads_rows if side == "context" else reads_sides):
                unused[name] = (
                    f"{model.__name__} reads no features" if not reads_sides else f"{model.__name__} reads no context"
                )
            elif dataset.field2type[name] in (FeatureType.TOKEN, FeatureType.TOKEN_SEQ) or numerical:
                read[side].append(name)
            else:
                unused[name] = f"{dataset.field2type[name].value}, not in numerical_features"
    return Features(**read, unused=unused)


def _columns(dataset: Any, source: FeatureSource) -> Any:
    """The columns of a file as it is loaded; fields that a loader or a split makes are none."""
    table = getattr(dataset, f"{source.value}_feat", None)
    return table.columns if table is not None else ()
