"""RecBole's dataset as the federation needs it: ratings in stars, an exact time order, histories and label sets."""

from __future__ import annotations

from collections.abc import Sequence
from logging import getLogger
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType
from torch import Tensor

from recbole_fedkd.data.columns import loads_what_is_there
from recbole_fedkd.data.features import FeatureField, Features, choose_features, deciding_columns
from recbole_fedkd.data.labels import declared_labels, encode_labels
from recbole_fedkd.data.loading import AtomicFiles
from recbole_fedkd.data.order import RECENCY_FIELD, TimeOrder
from recbole_fedkd.data.partition import Population
from recbole_fedkd.data.rows import Rows
from recbole_fedkd.data.threshold import ThresholdLabels


class FedKDDataset(TimeOrder, ThresholdLabels, AtomicFiles):
    """A RecBole ``Dataset`` of labelled rows, the same rows for every model.

    RecBole gives a sequential model rows of its own making: one per prefix of every history. Here such a model gets the
    user's training history as two more columns of the rows that everybody has.

    Attributes:
        label_values: the ordered label set: distinct ratings (``label_mode`` rating) or ``[0, 1]``.
        history_columns: item ids ``[users, L + 1]`` as of :meth:`history`, joined to every row for models that read
            ``item_id_list``; None for all other models.
        features: the columns that the package's networks read; None for all other models.
    """

    keeps_recency = True
    recency_field = RECENCY_FIELD
    label_values: list[float]
    history_columns: Tensor | None = None
    features: Features | None = None
    item_feat: Any

    def _remap_ID_all(self) -> None:  # noqa: N802 (RecBole's name)
        """As RecBole's; an ``.item`` file that nobody asked for brings features, and no item into the catalogue."""
        if self.item_feat is not None and loads_what_is_there(self.config):
            known = self.item_feat[self.iid_field].isin(self.inter_feat[self.iid_field])
            if known.any():
                self.item_feat = self.item_feat[known].reset_index(drop=True)
        super()._remap_ID_all()

    def _normalize(self) -> None:
        """Normalise as RecBole does, but never the ratings: ``ml-100k.yaml`` would scale stars to 0..1 silently."""
        rating = self.config["RATING_FIELD"]
        stars = self.inter_feat[rating].copy() if rating in self.inter_feat else None
        super()._normalize()
        if stars is not None:
            self.inter_feat[rating] = stars

    def _data_processing(self) -> None:
        super()._data_processing()
        if self.time_field in self.inter_feat:
            self.set_field_property(RECENCY_FIELD, FeatureType.FLOAT, FeatureSource.INTERACTION, 1)
        if self.config["label_mode"] == "rating":
            field = self.config["LABEL_FIELD"]
            self.label_values = declared_labels(self.inter_feat[field].to_numpy(), self.config["label_values"], field)
        else:
            self.label_values = [0.0, 1.0]
        if self.config.reads_features:
            self._choose_features()

    def _choose_features(self) -> None:
        """Say which columns networks read, and forget those of rows that they do not: every batch would carry them."""
        self.features = choose_features(self.config, self)
        for name in self.features.unused:
            if name in self.inter_feat:
                self._del_col(self.inter_feat, name)
        if self.config["label_mode"] == "implicit":
            return
        for name in deciding_columns(self, self.config["LABEL_FIELD"], self.features.context):
            getLogger().warning(
                f"column '{name}' alone tells high labels from low ones in every row; if that is only known afterwards, "
                f"leave it out by unload_col={{'inter': ['{name}']}}"
            )

    def build(self) -> list[Any]:
        """Split as RecBole does; the splits' history columns hold training interactions only."""
        splits: list[Any] = super().build()
        if self.config.reads_history:
            items, _ = splits[0].history(self.config["MAX_ITEM_LIST_LENGTH"])
            for split in splits:
                split.history_columns = items
        return splits

    def join(self, df: Any) -> Any:
        """Join user and item features, and the history columns where a model reads them.

        The history of a row never holds the row's own item; where it would not, the oldest of the ``L + 1`` is left out
        instead, so that training and evaluation see equally long histories. Oldest first, as in RecBole.
        """
        joined = super().join(df)
        if self.history_columns is None or self.uid_field not in joined:
            return joined
        past = self.history_columns[joined[self.uid_field]]
        if self.iid_field in joined:
            own = past == joined[self.iid_field].unsqueeze(1)
            past = past.masked_fill(own, 0).gather(1, own.long().argsort(dim=1, stable=True))
        past = past[:, :-1]
        length = (past != 0).sum(1)
        slots = torch.arange(past.shape[1]).expand_as(past)
        oldest_first = past.gather(1, (length.unsqueeze(1) - 1 - slots).clamp(min=0))
        sequence = torch.where(slots < length.unsqueeze(1), oldest_first, 0)
        suffix = self.config["LIST_SUFFIX"]
        # A user without any history attends to one padding item; RecBole's layers divide by the length.
        columns = {self.iid_field + suffix: sequence, self.config["ITEM_LIST_LENGTH_FIELD"]: length.clamp(min=1)}
        joined.update(Interaction(columns))
        return joined

    def label_indices(self) -> Tensor:
        """Label index of every interaction ``[n]``; in ``implicit`` mode every interaction is a positive."""
        if self.config["label_mode"] == "implicit":
            return torch.ones(len(self.inter_feat), dtype=torch.long)
        values = self.inter_feat[self.config["LABEL_FIELD"]].numpy()
        return torch.from_numpy(encode_labels(values, self.label_values))

    def side_fields(self, source: str) -> tuple[list[FeatureField], dict[str, Tensor]]:
        """Feature columns of the ``user`` or ``item`` file: the fields, and their values ``[rows]`` or ``[rows, length]``."""
        assert self.features is not None
        names = self.features.user if source == "user" else self.features.item
        return self._read(names, self.user_feat if source == "user" else self.item_feat)

    def context_fields(self) -> list[FeatureField]:
        """Feature columns of rows. Call it on the training split, whose numbers have mean 0 and deviation 1."""
        return self._read(self.features.context if self.features is not None else (), self.inter_feat)[0]

    def _read(self, names: Sequence[str], table: Any) -> tuple[list[FeatureField], dict[str, Tensor]]:
        fields = [FeatureField.of(self, name, table[name]) for name in names]
        return fields, {field.name: field.read(table[field.name]) for field in fields}

    def history(self, length: int) -> tuple[Tensor, Tensor]:
        """The latest interactions of every user, most recent first. Call it on the training split only.

        Args:
            length: number of interactions ``L`` that a network attends to; one more is kept, for the row that may not
                see itself.

        Returns:
            Item ids and label indices, both ``[users, L + 1]`` with padding users and slots 0.
        """
        rows = self.history_rows(length)
        return _of_rows(self.inter_feat[self.iid_field], rows), _of_rows(self.label_indices(), rows)

    def history_context(self, length: int) -> dict[str, Tensor]:
        """Context of the interactions of :meth:`history`, ``[users, L + 1, ...]`` for each context column."""
        fields = self.context_fields()
        rows = self.history_rows(length) if fields else torch.empty(0)
        return {field.name: _of_rows(field.read(self.inter_feat[field.name]), rows) for field in fields}

    def history_rows(self, length: int) -> Tensor:
        """Row numbers of the interactions of :meth:`history`, ``[users, L + 1]``; -1 where there is none."""
        users = self.inter_feat[self.uid_field].numpy()
        recency = self.inter_feat[RECENCY_FIELD].numpy() if RECENCY_FIELD in self.inter_feat else np.arange(len(users))
        order = np.lexsort((-recency, users))
        users = users[order]
        starts = np.searchsorted(users, np.arange(self.user_num))
        slot = np.arange(len(users)) - starts[users]
        kept = slot <= length
        rows = torch.full((self.user_num, length + 1), -1)
        rows[users[kept], slot[kept]] = torch.from_numpy(order[kept])
        return rows


def _of_rows(column: Tensor, rows: Tensor) -> Tensor:
    """The values of the rows ``[users, slots]`` in a column ``[n, ...]``, 0 where there is no row."""
    return torch.cat([column, column.new_zeros(1, *column.shape[1:])])[rows]


def label_values(dataset: Any) -> list[float]:
    """The ordered label set of any RecBole dataset; without labels, one: that there was an interaction."""
    if isinstance(dataset, FedKDDataset):
        return dataset.label_values
    field = dataset.label_field
    return [0.0, 1.0] if field in dataset.inter_feat else [1.0]


def population(dataset: Any) -> Population:
    """What a partition may look at, counted on a training split of any kind; user 0 (padding) is left out."""
    if isinstance(dataset, FedKDDataset):
        indices = dataset.label_indices().numpy()
    elif dataset.label_field in dataset.inter_feat:
        indices = dataset.inter_feat[dataset.label_field].numpy().astype(np.int64)
    else:
        indices = np.zeros(len(dataset.inter_feat), dtype=np.int64)
    labels = len(label_values(dataset))
    users = dataset.inter_feat[dataset.uid_field].numpy()
    histograms: NDArray[np.int64] = np.bincount(users * labels + indices, minlength=dataset.user_num * labels).reshape(
        dataset.user_num, labels
    )
    attributes = {}
    if dataset.user_feat is not None:
        for field in dataset.user_feat.interaction:
            if field != dataset.uid_field and dataset.field2type[field] == FeatureType.TOKEN:
                attributes[field] = dataset.user_feat[field].numpy()[1:]
    return Population(histograms[1:], attributes, dataset.config["client_num"])


def of_users(dataset: Any, members: Tensor) -> Any:
    """A training split as one client holds it: the rows, features and histories of its own users alone.

    Args:
        dataset: the training split, of any RecBole kind.
        members: bool ``[users]``.

    Returns:
        A dataset with the same vocabulary; other users' features and histories are padding.
    """
    # RecBole makes a list of what it is given: of the client's few rows, not of a truth value for every row there is.
    rows = torch.nonzero(members[dataset.inter_feat[dataset.uid_field]]).flatten()
    own = dataset.copy(dataset.inter_feat[rows])
    # RecBole's loaders register the label that they sample, in these.
    for name in ("field2type", "field2source", "field2seqlen", "field2id_token"):
        setattr(own, name, dict(getattr(dataset, name)))
    if dataset.user_feat is not None:
        hidden = {}
        for field, column in dataset.user_feat.interaction.items():
            mask = members.view(-1, *[1] * (column.dim() - 1))
            hidden[field] = column if field == dataset.uid_field else torch.where(mask, column, 0)
        own.user_feat = Rows(hidden)
    if getattr(dataset, "history_columns", None) is not None:
        own.history_columns = torch.where(members.unsqueeze(1), dataset.history_columns, 0)
    return own
