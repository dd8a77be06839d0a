"""RecBole's dataset as the federation needs it: ratings in stars, an exact time order, histories and label sets."""

from __future__ import annotations

from logging import getLogger
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType
from torch import Tensor

from recbole_fedkd.data.columns import loads_what_is_there
from recbole_fedkd.data.features import Features, choose_features, deciding_columns
from recbole_fedkd.data.labels import declared_labels, encode_labels
from recbole_fedkd.data.loading import AtomicFiles, recbole_dataset_class
from recbole_fedkd.data.order import RECENCY_FIELD, TimeOrder
from recbole_fedkd.data.partition import UserBase
from recbole_fedkd.data.rows import Rows
from recbole_fedkd.data.schema import ClientRows, DataSchema, label_values, latest_rows, of_rows
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

    def history(self, length: int) -> tuple[Tensor, Tensor]:
        """The latest interactions of every user, most recent first. Call it on the training split only.

        Args:
            length: number of interactions ``L`` that a network attends to; one more is kept, for the row that may not
                see itself.

        Returns:
            Item ids and label indices, both ``[users, L + 1]`` with padding users and slots 0.
        """
        columns = self.inter_feat.interaction
        rows = latest_rows(columns[self.uid_field], columns.get(RECENCY_FIELD), self.user_num, length + 1)
        return of_rows(self.inter_feat[self.iid_field], rows), of_rows(self.label_indices(), rows)


def user_base_of(dataset: Any) -> UserBase:
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
    return UserBase(histograms[1:], attributes, dataset.config["client_num"])


def client_dataset(config: Any, schema: DataSchema, rows: ClientRows) -> Any:
    """A training split as one client holds it, of the class that the config's model is trained on.

    Users keep the numbers of the schema; features and histories of those who live elsewhere are padding.
    """
    kind = FedKDDataset if config["label_mode"] is not None else recbole_dataset_class(config)
    own: Any = object.__new__(kind)
    own.__dict__.update(
        schema.more,
        config=config,
        logger=getLogger(),
        dataset_name=schema.name,
        **schema.fields,
        alias={name: np.array([name]) for name in (schema.user_field, schema.item_field)},
        benchmark_filename_list=None,
        field2bucketnum={},
        field2type={name: FeatureType(column.kind) for name, column in schema.columns.items()},
        field2source={name: FeatureSource(column.source) for name, column in schema.columns.items()},
        field2seqlen={name: column.length for name, column in schema.columns.items()},
        field2id_token=dict(schema.vocabularies),
        field2token_id=schema.numbers_of_tokens,
        _preloaded_weight=dict(schema.vectors),
        inter_feat=Rows(dict(rows.interactions)),
        user_feat=_profiles_of_all(schema, rows) if rows.profiles else None,
        item_feat=Rows(dict(schema.items)) if schema.items else None,
    )
    own.feat_name_list = [name for name in ("inter_feat", "user_feat", "item_feat") if getattr(own, name) is not None]
    if isinstance(own, FedKDDataset):
        own.label_values = list(schema.label_values)
        if config.reads_history:
            own.history_columns, _ = own.history(config["MAX_ITEM_LIST_LENGTH"])
    return own


def _profiles_of_all(schema: DataSchema, rows: ClientRows) -> Rows:
    columns = {}
    for name, own in rows.profiles.items():
        columns[name] = own.new_zeros(schema.user_num, *own.shape[1:])
        columns[name][rows.users] = own[1:]
    return Rows({**columns, schema.user_field: torch.arange(schema.user_num)})
