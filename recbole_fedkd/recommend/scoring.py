"""Scores of every item for users, of whichever kind the model is."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from torch import Tensor

from recbole_fedkd.data.features import features_of
from recbole_fedkd.data.partition import held_out_clients
from recbole_fedkd.data.rows import rows_in_time
from recbole_fedkd.model.student import LabelledRecommender

BATCH = 2**21
"""Pairs of user and item that are ranked at a time."""

SLOTS = 2**14
"""Entries of the longest column that a model reads of pairs at a time: what it makes of them stays in the processor's cache."""


class Scorer:
    """Scores of users whom the model knows.

    A user is scored as of now: a sequential model reads all interactions of the user that the data hold, a model that
    reads the context of a row that of the user's latest one.

    Args:
        config: the run's config.
        model: the trained model.
        dataset: the whole dataset.
        training: the training split, whose columns a user's rows are joined to.
    """

    def __init__(self, config: Any, model: Any, dataset: Any, training: Any) -> None:
        self.config, self.model, self.dataset, self.training = config, model, dataset, training
        self.user_field, self.item_field = dataset.uid_field, dataset.iid_field
        self.item_count, self.device = dataset.item_num, config["device"]
        self.sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self.latest = latest_rows(dataset)
        self.context = () if self.sequential else features_of(config, dataset).context
        self._full = True

    @cached_property
    def trained_clients(self) -> list[int]:
        """Clients of a federation that have taken part in training: the networks of others are the initial ones."""
        homes, config = self.model.client_of_user.cpu(), self.config
        strangers = held_out_clients(int(homes.max()) + 1, config["holdout_clients"], config["seed"])
        holds = homes[self.training.inter_feat[self.user_field]].unique()
        return [number for number in holds.tolist() if number not in strangers]

    @torch.no_grad()
    def of_users(self, users: Tensor) -> Tensor:
        """Scores ``[users, items]`` of user ids ``[users]``; the padding item has minus infinity."""
        parts = [self._of_rows(self.rows(part)) for part in users.split(max(1, BATCH // self.item_count))]
        scores = torch.cat(parts) if parts else torch.zeros(0, self.item_count)
        scores[:, 0] = -torch.inf
        return scores

    @torch.no_grad()
    def of_pairs(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores ``[n]`` of pairs of ids ``[n]``."""
        if not len(users):
            return torch.zeros(0)
        if not isinstance(self.model, LabelledRecommender):  # RecBole's may rank by something else than they predict
            scores = self._ranked_pairs(users, items)
            if scores is not None:
                return scores
        parts = []
        for some, those in zip(users.split(BATCH // 64), items.split(BATCH // 64), strict=True):
            rows = self.rows(some)
            rows.update(Interaction({self.item_field: those}))
            parts.append(self._predict(self._joined(rows)))
        return torch.cat(parts)

    def _ranked_pairs(self, users: Tensor, items: Tensor) -> Tensor | None:
        """Scores ``[n]`` of pairs in the rankings of their users; None where a model ranks nothing by itself."""
        asked, places = users.unique(return_inverse=True)
        scores, first = torch.empty(len(users)), 0
        for part in asked.split(max(1, BATCH // self.item_count)):
            ranked = self.full_sort(self.rows(part))
            if ranked is None:
                return None
            own = (places >= first) & (places < first + len(part))
            scores[own] = ranked.view(len(part), self.item_count)[places[own] - first, items[own]]
            first += len(part)
        return scores

    def rows(self, users: Tensor) -> Interaction:
        """The columns that a model reads of users, but those of items."""
        latest = self.latest[users]
        if not self.sequential:
            columns = Interaction({self.user_field: users})
            joined = self.training.join(columns)
            context = {name: self.dataset.inter_feat[name][latest] for name in self.context}
            joined.update(Interaction(context))
            return joined
        return self._sequences(users, self.dataset.inter_feat[latest])

    def _sequences(self, users: Tensor, rows: Interaction) -> Interaction:
        """Sequences that end with the latest interaction, where RecBole's rows end before their target."""
        length_field, suffix = self.config["ITEM_LIST_LENGTH_FIELD"], self.config["LIST_SUFFIX"]
        # Some read a target where they rank, for a loss that nobody asks for.
        columns = {self.user_field: users, self.item_field: rows[self.item_field]}
        lengths = rows[length_field]
        for name in rows.interaction:
            if name.endswith(suffix):
                of_row = name.removesuffix(suffix)  # DIEN's sampled items are of no row
                columns[name] = appended(rows[name], lengths, rows[of_row]) if of_row in rows else rows[name]
        columns[length_field] = (lengths + 1).clamp(max=self.config["MAX_ITEM_LIST_LENGTH"])
        return self.dataset.join(Interaction(columns))

    def _of_rows(self, rows: Interaction) -> Tensor:
        scores = self.full_sort(rows)
        if scores is None:
            items = torch.arange(self.item_count)
            pairs = Interaction(
                {name: values.repeat_interleave(len(items), 0) for name, values in rows.interaction.items()}
            )
            pairs.update(Interaction({self.item_field: items.repeat(len(rows))}))
            scores = self._predict(self._joined(pairs))
        return scores.view(len(rows), self.item_count)

    def full_sort(self, rows: Interaction) -> Tensor | None:
        """Scores ``[users * items]``; None for a model that scores pairs alone."""
        if self._full:
            try:
                scores: Tensor = self.model.full_sort_predict(rows.to(self.device))
                return flat(scores)
            except NotImplementedError:
                self._full = False
        return None

    def _joined(self, pairs: Interaction) -> Interaction:
        """Pairs with the features of their items."""
        features = self.dataset.item_feat
        if features is not None:
            pairs.update(features[pairs[self.item_field]])
        return pairs

    def _predict(self, pairs: Interaction) -> Tensor:
        return torch.cat([flat(self.model.predict(part.to(self.device))) for part in in_parts(pairs)])


def in_parts(pairs: Interaction) -> list[Interaction]:
    """Rows, :data:`SLOTS` entries of their longest column at a time."""
    longest = max(values[:1].numel() for values in pairs.interaction.values())
    size = max(1, SLOTS // max(1, longest))
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def flat(scores: Tensor) -> Tensor:
    """Scores of any shape and device, ``[n]``."""
    return scores.detach().cpu().float().flatten()


def appended(past: Tensor, lengths: Tensor, latest: Tensor) -> Tensor:
    """Sequences ``[n, L]`` of given lengths ``[n]`` with one more entry ``[n]``; a full one loses its first."""
    size = past.shape[1]
    full = lengths >= size
    moved = past.clone()
    moved[full] = past[full].roll(-1, 1)
    moved[torch.arange(len(past)), lengths.clamp(max=size - 1)] = latest.to(moved.dtype)
    return moved


def latest_rows(dataset: Any) -> Tensor:
    """The number of every user's latest row ``[users]``, of equally late ones the last; 0 of a user without rows."""
    users = dataset.inter_feat[dataset.uid_field]
    order = rows_in_time(dataset)
    latest = torch.zeros(dataset.user_num, dtype=torch.long)
    latest.numpy()[users[order].numpy()] = order.numpy()  # of several numpy keeps the last
    return latest
