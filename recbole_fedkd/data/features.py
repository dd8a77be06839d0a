"""Feature columns: what describes a user, an item and the context of an interaction, and which of it a model reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from recbole.model.abstract_recommender import ContextRecommender
from recbole.model.layers import ContextSeqEmbLayer, FeatureSeqEmbLayer
from recbole.utils import FeatureSource, FeatureType
from torch import Tensor

from recbole_fedkd.errors import InputError, nearest

SIDES = {"user": FeatureSource.USER, "item": FeatureSource.ITEM, "context": FeatureSource.INTERACTION}
"""Names of the sides in a sentence, and the file that a side's columns stand in."""

TOKENS = (FeatureType.TOKEN, FeatureType.TOKEN_SEQ)

ALWAYS_FEW, LARGEST_SHARE = 50, 0.5
"""A column with more distinct tokens than both this many and this share of what is filled in names rows, not kinds of rows."""


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
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.unused.items():
            by_reason.setdefault(reason, []).append(name)
        if by_reason:
            parts.append(
                "not used: " + ", ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
            )
        return "features: " + "; ".join(parts)


@dataclass(frozen=True)
class FeatureField:
    """A feature column as the package's networks read it.

    Attributes:
        name: of the column.
        tokens: number of its tokens, padding included; None: a number.
        mean: of a number in the training rows, or in the file of its side.
        deviation: its standard deviation there.
    """

    name: str
    tokens: int | None
    mean: float = 0.0
    deviation: float = 1.0

    @staticmethod
    def of(dataset: Any, name: str, column: Tensor) -> FeatureField:
        """The field of a column of RecBole's."""
        kind, numerical = dataset.field2type[name], name in dataset.config["numerical_features"]
        if kind in TOKENS or (numerical and name in (dataset.config["discretization"] or {})):
            return FeatureField(name, dataset.num(name))
        values = _numbers(column)
        deviation = float(values.std(correction=0)) if len(values) else 0.0
        return FeatureField(name, None, float(values.mean()) if len(values) else 0.0, deviation or 1.0)

    def read(self, column: Tensor) -> Tensor:
        """Tokens as they are, ``[rows]`` or ``[rows, length]``; numbers ``[rows]`` with mean 0 and deviation 1.

        RecBole gives a column of ``numerical_features`` as pairs: value and 1, or 1 and the number of a bucket.
        """
        if self.tokens is None:
            return ((_numbers(column) - self.mean) / self.deviation).float()
        return column[..., 1].long() if column.is_floating_point() else column


def _numbers(column: Tensor) -> Tensor:
    return (column[:, 0] if column.dim() > 1 else column).double()


def excluded_columns(config: Any) -> set[str]:
    """Columns of rows that are never features: ids, what is to be predicted, the time and what stands for the history."""
    ids = {config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]}
    sequences = {f"{name}{config['LIST_SUFFIX']}" for name in [*ids, config["RATING_FIELD"], config["TIME_FIELD"]]}
    targets = {config["RATING_FIELD"], config["LABEL_FIELD"], "label", *(config["threshold"] or {})}
    return {*ids, *sequences, *targets, config["TIME_FIELD"], config["ITEM_LIST_LENGTH_FIELD"]}


def features_of(config: Any, dataset: Any) -> Features:
    """The columns that the model of a config reads of a dataset, whichever kind both are of."""
    own: Features | None = getattr(dataset, "features", None)
    return own if own is not None else _recbole_features(config, dataset)


def choose_features(config: Any, dataset: Any) -> Features:
    """The columns that the package's networks read of a dataset that is loaded and not yet split.

    All that are loaded, unless ``feature_fields`` says which. Where neither that nor ``load_col`` names a column, it is left
    out if nearly every row has a token of its own: such a token says who or which row it is, and nothing of any other.

    Raises:
        InputError: ``feature_fields`` names no column that could be one.
    """
    chosen = config["feature_fields"]
    loaded = {side: _loaded(config, dataset, side) for side in SIDES}
    known = [name for names in loaded.values() for name in names]
    for name in chosen or []:
        if name not in known:
            raise InputError(
                f"feature_fields names '{name}', but the loaded feature columns are {known}{nearest(str(name), known)}"
            )

    def why_not(side: str, name: str) -> str | None:
        if chosen is not None and name not in chosen:
            return "not in feature_fields"
        if dataset.field2type[name] == FeatureType.FLOAT_SEQ:
            return "several numbers"
        asked_for = name in (chosen or ()) or name in _named_by_load_col(config, SIDES[side].value)
        return _emptiness(dataset, name, _table(dataset, SIDES[side])[name], asked_for)

    return _parted(loaded, why_not)


def _parted(columns: Mapping[str, Iterable[str]], why_not: Callable[[str, str], str | None]) -> Features:
    """Columns of every side, read but where there is a reason why not."""
    read: dict[str, list[str]] = {side: [] for side in SIDES}
    unused: dict[str, str] = {}
    for side, names in columns.items():
        for name in names:
            reason = why_not(side, name)
            if reason is None:
                read[side].append(name)
            else:
                unused[name] = reason
    return Features(**read, unused=unused)


def deciding_columns(dataset: Any, label: str, columns: Sequence[str]) -> list[str]:
    """Context columns whose values part the labels into ranges that do not overlap: perhaps the label under another name.

    Args:
        dataset: loaded and not yet split.
        label: the label's column.
        columns: context columns.
    """
    rows = dataset.inter_feat
    if label not in rows or rows[label].nunique() < 2:
        return []
    chosen_fields = []
    for name in columns:
        if dataset.field2type[name] in (FeatureType.TOKEN, FeatureType.FLOAT) and np.ndim(rows[name].iloc[0]) == 0:
            ranges = rows.groupby(name)[label].agg(["min", "max"]).sort_values(["min", "max"]).to_numpy()
            few = len(ranges) <= LARGEST_SHARE * len(rows)
            if few and (ranges[:-1, 1] <= ranges[1:, 0]).all() and len(np.unique(ranges, axis=0)) > 1:
                chosen_fields.append(name)
    return chosen_fields


def _loaded(config: Any, dataset: Any, side: str) -> list[str]:
    """Columns of a side that could be features."""
    source = SIDES[side]
    table = _table(dataset, source)
    excluded = {dataset.uid_field, dataset.iid_field}
    if side == "context":
        excluded = excluded_columns(config) | {getattr(dataset, "recency_field", None)}
    excluded |= set((config["unused_col"] or {}).get(source.value, ()))
    return [name for name in (table.columns if table is not None else ()) if name not in excluded]


def _table(dataset: Any, source: FeatureSource) -> Any:
    return getattr(dataset, f"{source.value}_feat", None)


def _named_by_load_col(config: Any, source: str) -> Sequence[str]:
    named = (config["load_col"] or {}).get(source, ())
    return () if isinstance(named, str) else named


def _emptiness(dataset: Any, name: str, column: Any, asked_for: bool) -> str | None:
    """Why a column says nothing of a row; None if it says something."""
    if dataset.field2type[name] not in TOKENS:
        values = np.stack(column.to_list()).astype(float).reshape(len(column), -1)
        if np.isnan(values).any():
            return "no value"
        return "one value" if (values == values[0]).all() else None
    several = dataset.field2type[name] == FeatureType.TOKEN_SEQ
    tokens = np.concatenate(column.to_list()) if several else column.to_numpy()
    tokens = tokens[tokens != 0]
    distinct = len(np.unique(tokens))
    if not distinct:
        return "no value"
    if asked_for or distinct <= max(ALWAYS_FEW, LARGEST_SHARE * len(tokens)):
        return None
    return f"{distinct} different values in {len(tokens)}; feature_fields names it to use it"


def _recbole_features(config: Any, dataset: Any) -> Features:
    """The columns that a model of RecBole reads: of all files, of users and items, chosen ones of items, or none."""
    model = config.model_class
    context_aware = issubclass(model, ContextRecommender)
    layers = vars(sys.modules[model.__module__])
    reads_sides = context_aware or ContextSeqEmbLayer.__name__ in layers
    selected = (config["selected_features"] or []) if FeatureSeqEmbLayer.__name__ in layers else []
    reads_rows = context_aware and not config["double_tower"]
    numbers = config["numerical_features"] if reads_sides else []

    def columns(side: str) -> Iterable[str]:
        table = _table(dataset, SIDES[side])
        there = () if table is None else table.columns
        extra = [name for name in numbers if name in there and name != config["LABEL_FIELD"]]
        return dict.fromkeys([*_loaded(config, dataset, side), *extra])

    def why_not(side: str, name: str) -> str | None:
        if side == "item" and name in selected:
            return None
        if not (reads_rows if side == "context" else reads_sides):
            return f"{model.__name__} reads no {'context' if reads_sides else 'such features'}"
        if dataset.field2type[name] in TOKENS or name in numbers:
            return None
        return f"{dataset.field2type[name].value}, not in numerical_features"

    return _parted({side: columns(side) for side in SIDES}, why_not)
