"""RecBole's dataset as the federation needs it: ratings in stars, an exact time order, histories and label sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.data.dataset import Dataset
from recbole.utils import FeatureSource, FeatureType
from torch import Tensor

from recbole_fedkd.data.labels import declared_labels, encode_labels
from recbole_fedkd.data.partition import Population
from recbole_fedkd.errors import InputError, nearest

RECENCY_FIELD = "recency_rank"
"""Generated column: rank of an interaction in time. RecBole turns timestamps into float32, which merges those less than
64 seconds apart; the rank is taken before, on the file's own precision."""


class FedKDDataset(Dataset):
    """A RecBole ``Dataset`` for the attentive models.

    Attributes:
        label_values: the ordered label set: distinct ratings (``label_mode`` rating) or ``[0, 1]``.
    """

    label_values: list[float]

    def _load_data(self, token: str, dataset_path: str) -> None:
        super()._load_data(token, dataset_path)
        rating = self.config["RATING_FIELD"]
        if self.config["label_mode"] != "implicit" and rating not in self.inter_feat:
            raise InputError(
                f"label_mode={self.config['label_mode']} needs ratings, but dataset '{token}' has no column '{rating}' "
                "(RATING_FIELD) among its loaded columns; use label_mode=implicit or load it by load_col"
            )
        if self.config["label_mode"] != "implicit" and self.inter_feat[rating].isna().any():
            missing = int(self.inter_feat[rating].isna().sum())
            raise InputError(
                f"{missing} interaction(s) of dataset '{token}' lack a value in '{rating}'; remove those rows"
            )

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
            order = np.argsort(self.inter_feat[self.time_field].to_numpy(), kind="stable")
            rank = np.empty(len(order), dtype=np.int64)
            rank[order] = np.arange(len(order))
            self.inter_feat[RECENCY_FIELD] = rank
            self.set_field_property(RECENCY_FIELD, FeatureType.FLOAT, FeatureSource.INTERACTION, 1)
        if self.config["label_mode"] == "rating":
            field = self.config["LABEL_FIELD"]
            self.label_values = declared_labels(self.inter_feat[field].to_numpy(), self.config["label_values"], field)
        else:
            self.label_values = [0.0, 1.0]

    def label_indices(self) -> Tensor:
        """Label index of every interaction ``[n]``; in ``implicit`` mode every interaction is a positive."""
        if self.config["label_mode"] == "implicit":
            return torch.ones(len(self.inter_feat), dtype=torch.long)
        values = self.inter_feat[self.config["LABEL_FIELD"]].numpy()
        return torch.from_numpy(encode_labels(values, self.label_values))

    def side_fields(self, source: str) -> dict[str, Tensor]:
        """Token columns of the ``user`` or ``item`` file without the id: ids ``[rows]`` or ``[rows, length]``.

        The config key ``feature_fields`` selects among them.
        """
        features: Any = self.user_feat if source == "user" else self.item_feat
        chosen = self.config["feature_fields"]
        known = self._token_fields(self.user_feat) + self._token_fields(self.item_feat)
        for field in chosen or []:
            if field not in known:
                raise InputError(
                    f"feature_fields names '{field}', but the loaded token fields are {known}{nearest(str(field), known)}"
                )
        return {field: features[field] for field in self._token_fields(features) if chosen is None or field in chosen}

    def _token_fields(self, features: Any) -> list[str]:
        """Token columns of the ``.user`` or ``.item`` file without the id."""
        kinds = (FeatureType.TOKEN, FeatureType.TOKEN_SEQ)
        ids = (self.uid_field, self.iid_field)
        fields = features.interaction if features is not None else []
        return [field for field in fields if field not in ids and self.field2type[field] in kinds]

    def history(self, length: int) -> tuple[Tensor, Tensor]:
        """The latest interactions of every user, most recent first. Call it on the training split only.

        Args:
            length: number of interactions ``L`` that a network attends to; one more is kept, for the row that may not
                see itself.

        Returns:
            Item ids and label indices, both ``[users, L + 1]`` with padding users and slots 0.
        """
        users = self.inter_feat[self.uid_field].numpy()
        items = self.inter_feat[self.iid_field].numpy()
        recency = self.inter_feat[RECENCY_FIELD].numpy() if RECENCY_FIELD in self.inter_feat else np.arange(len(users))
        order = np.lexsort((-recency, users))
        users, items, labels = users[order], items[order], self.label_indices().numpy()[order]
        starts = np.searchsorted(users, np.arange(self.user_num))
        slot = np.arange(len(users)) - starts[users]
        kept = slot <= length
        history_items = torch.zeros(self.user_num, length + 1, dtype=torch.long)
        history_labels = torch.zeros_like(history_items)
        history_items[users[kept], slot[kept]] = torch.from_numpy(items[kept]).long()
        history_labels[users[kept], slot[kept]] = torch.from_numpy(labels[kept])
        return history_items, history_labels

    def population(self) -> Population:
        """What a partition may look at, counted on this split; user 0 (padding) is left out."""
        labels = len(self.label_values)
        users = self.inter_feat[self.uid_field].numpy()
        histograms: NDArray[np.int64] = np.bincount(
            users * labels + self.label_indices().numpy(), minlength=self.user_num * labels
        ).reshape(self.user_num, labels)
        attributes = {}
        if self.user_feat is not None:
            for field in self.user_feat.interaction:
                if field != self.uid_field and self.field2type[field] == FeatureType.TOKEN:
                    attributes[field] = self.user_feat[field].numpy()[1:]
        return Population(histograms[1:], attributes, self.config["client_num"])
