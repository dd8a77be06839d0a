"""``load(run)``: a trained model that recommends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.errors import InputError, TrainingError, listed, nearest, shown
from recbole_fedkd.model.catalogue import Kept
from recbole_fedkd.model.student import LabelledRecommender
from recbole_fedkd.quick_start import load_data_and_model
from recbole_fedkd.recommend.folding import FoldIn
from recbole_fedkd.recommend.scoring import Scorer

LARGEST_SAMPLE = 1000
"""Users by whose scores items are compared."""


def load(run: str | Path, config_dict: Mapping[str, Any] | None = None, model: type | None = None) -> Recommender:
    """The trained model of a run, with the data that it knows.

    Args:
        run: a run folder (its best checkpoint counts) or a checkpoint file.
        config_dict: keys to change, such as ``data_path``.
        model: class of a model of your own, where the key ``plugins`` does not name its module.

    Raises:
        InputError: the checkpoint cannot be used, or the data are not those that it was made from.
    """
    # A few users at a time are answered sooner by the processor, and a run of a GPU recommends where there is none.
    config, loaded, dataset, train_data, _, _ = load_data_and_model(run, config_dict, model, torch.device("cpu"))
    return Recommender(config, loaded, dataset, train_data._dataset)


class Recommender:
    """A trained model that answers in the dataset's own tokens, with data frames.

    A user of a federation is served by the network of the user's own client.

    Args:
        config: the run's config.
        model: the trained model, whose parameters change no more: what follows from them alone is computed once.
        dataset: the whole dataset.
        training: its training split.
    """

    def __init__(self, config: Any, model: Any, dataset: Any, training: Any) -> None:
        self.config, self.model, self.dataset = config, model, dataset
        if isinstance(model, LabelledRecommender):
            model.kept = Kept(model.item_num)
        self._scorer = Scorer(config, model, dataset, training)
        self._folding = FoldIn(config, model, dataset, training, self._scorer)
        self.user_field, self.item_field = dataset.uid_field, dataset.iid_field
        # The text that the data have; pandas calls it an object, and RecBole numpy's.
        self._item_tokens = np.array([str(token) for token in dataset.field2id_token[self.item_field]], dtype=object)
        self._user_tokens = np.array([str(token) for token in dataset.field2id_token[self.user_field]], dtype=object)
        self._item_ids = {token: number for number, token in enumerate(self._item_tokens) if number}
        self._user_ids = {token: number for number, token in enumerate(self._user_tokens) if number}

    def __repr__(self) -> str:
        return (
            f"Recommender({self.config['model']} on {self.config['dataset']}: {len(self._user_ids)} users, "
            f"{len(self._item_ids)} items)"
        )

    @property
    def users(self) -> list[str]:
        """The users that the model knows."""
        return list(self._user_ids)

    @property
    def items(self) -> list[str]:
        """The items that it ranks."""
        return list(self._item_ids)

    def recommend(self, users: Any = None, k: int = 10, *, exclude_seen: bool = False) -> pd.DataFrame:
        """The ``k`` best items of every user, best first.

        Args:
            users: one token or several; None: all.
            k: items per user.
            exclude_seen: leave out what the user has an interaction with anywhere in the data.

        Returns:
            Columns user, item (by the names of the dataset), ``score`` and ``rank`` from 1. A user for whom fewer items are
            left has fewer rows.

        Raises:
            InputError: an unknown user, or no number of items.
            TrainingError: the model gives scores that are no numbers.
        """
        k = self._count(k)
        tokens = self.users if users is None else _several(users)
        ids = torch.tensor(self._ids(tokens, self._user_ids, "user"), dtype=torch.long)
        frames = []
        for part in ids.split(max(1, 2**22 // len(self._item_tokens))) if len(ids) else ():
            scores = self._scorer.of_users(part)
            if exclude_seen:
                scores[self._seen_of(part)] = -torch.inf
            frames.append(self._ranked(scores, k, self._user_tokens[part.numpy()]))
        if not frames:
            return pd.DataFrame(columns=[self.user_field, self.item_field, "score", "rank"])
        return pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]

    def score(self, pairs: Any) -> pd.DataFrame:
        """The model's score of pairs, in their order.

        Args:
            pairs: (user, item) tuples, or a data frame with the two columns.

        Returns:
            Columns user, item (by the names of the dataset) and ``score``: an expected label for models that predict
            labels, else what RecBole ranks by.

        Raises:
            InputError: an unknown user or item, or something that is no pairs.
        """
        users, items = self._pairs(pairs)
        user_ids = torch.tensor(self._ids(users, self._user_ids, "user"), dtype=torch.long)
        item_ids = torch.tensor(self._ids(items, self._item_ids, "item"), dtype=torch.long)
        scores = self._finite(self._scorer.of_pairs(user_ids, item_ids))
        return pd.DataFrame({self.user_field: users, self.item_field: items, "score": scores.numpy()})

    def similar_items(self, item: Any, k: int = 10) -> pd.DataFrame:
        """The items that the model scores most like one, whatever kind of model it is.

        Two items are alike as far as the same users prefer them: the correlation of their scores over users (up to 1,000),
        after what every user gives on average.

        Args:
            item: its token.
            k: how many.

        Returns:
            Columns item (by the name of the dataset), ``similarity`` in [-1, 1], and ``rank``.

        Raises:
            InputError: an unknown item, or a model that scores it alike for everybody.
        """
        k = self._count(k)
        (number,) = self._ids([str(item)], self._item_ids, "item")
        vectors = getattr(self.model, "item_vectors", None)
        profiles = self._profiles
        # Of sums of biases the ends of the scale alone would tell users apart.
        if not bool(profiles[number].any()) or (isinstance(vectors, Tensor) and not vectors.shape[1]):
            raise InputError(
                f"model '{self.config['model']}' ranks item '{item}' alike for every user, so that nothing can be said to be "
                "similar to it"
            )
        similarity = profiles @ profiles[number]
        similarity[[0, number]] = -torch.inf
        return self._ranked(similarity.unsqueeze(0), k, None, "similarity")

    def recommend_for(
        self, history: Any, k: int = 10, *, exclude_seen: bool = True, client: int | None = None
    ) -> pd.DataFrame:
        """The ``k`` best items for somebody who was never there, from a history alone.

        What a device would do: the model is folded in on the history, and everything else stays as it is. See
        ``docs/recommend.md`` for what that means for which model.

        Args:
            history: ``(item, rating)`` pairs, items alone where the model learns from clicks, or a data frame with these
                columns; the latest last.
            k: number of items.
            exclude_seen: leave out the items of the history.
            client: the client whose network serves, in a federation whose clients do not share one; None: the mean over 16
                clients at most, spread evenly.

        Returns:
            Columns item (by the name of the dataset), ``score`` and ``rank``.

        Raises:
            InputError: an unknown item, a missing or unknown rating, or a model that cannot be folded in.
        """
        k = self._count(k)
        items, ratings = self._history(history)
        scores = self._folding.scores(items, ratings, client).unsqueeze(0)
        scores[:, 0] = -torch.inf
        if exclude_seen:
            scores[:, items] = -torch.inf
        return self._ranked(scores, k, None)

    @cached_property
    def _profiles(self) -> Tensor:
        """Scores of every item ``[items, users]``, less the user's mean and the item's, of length 1 or 0."""
        known = torch.arange(1, len(self._user_tokens))
        sample = known[torch.linspace(0, len(known) - 1, min(LARGEST_SAMPLE, len(known))).long()]
        scores = self._finite(self._scorer.of_users(sample)[:, 1:]).double()
        left = scores - scores.mean(1, keepdim=True)
        left = left - left.mean(0)
        size = left.norm(dim=0)
        # What is left of an item that all score alike is rounding.
        size = torch.where(size > 1e-6 * scores.abs().max() * math.sqrt(len(sample)), size, torch.inf)
        return torch.cat([left.new_zeros(1, len(sample)), (left / size).T]).float()

    @cached_property
    def _seen(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Items of all interactions, user by user, and where each user's begin ``[users + 1]``."""
        rows = self.dataset.inter_feat
        users, items = rows[self.user_field].numpy(), rows[self.item_field].numpy()
        past = self.item_field + self.config["LIST_SUFFIX"]
        if self._scorer.sequential:  # RecBole has no row of a user's first item
            lists = rows[past].numpy()
            users = np.concatenate([users, np.repeat(users, lists.shape[1])])
            items = np.concatenate([items, lists.flatten()])
        order = np.argsort(users, kind="stable")
        return items[order], np.searchsorted(users[order], np.arange(len(self._user_tokens) + 1))

    def _seen_of(self, users: Tensor) -> tuple[Tensor, Tensor]:
        items, starts = self._seen
        own = [items[starts[user] : starts[user + 1]] for user in users.tolist()]
        rows = torch.arange(len(users)).repeat_interleave(torch.tensor([len(seen) for seen in own], dtype=torch.long))
        return rows, torch.from_numpy(np.concatenate(own)) if own else rows

    def _ranked(self, scores: Tensor, k: int, users: Any, name: str = "score") -> pd.DataFrame:
        """The ``k`` best columns of every row; what has minus infinity is no candidate."""
        self._finite(torch.where(scores == -torch.inf, 0, scores))
        values, items = scores.topk(min(k, scores.shape[1]))
        kept = (values > -torch.inf).numpy()
        rank = np.broadcast_to(np.arange(1, values.shape[1] + 1), kept.shape)
        columns = {
            self.item_field: self._item_tokens[items.numpy()[kept]],
            name: values.numpy()[kept],
            "rank": rank[kept],
        }
        if users is not None:
            columns = {self.user_field: np.repeat(users, kept.sum(1)), **columns}
        return pd.DataFrame(columns)

    def _finite(self, scores: Tensor) -> Tensor:
        if not bool(scores.isfinite().all()):
            raise TrainingError(
                f"model '{self.config['model']}' gives scores that are no finite numbers; train it anew"
            )
        return scores

    def _ids(self, tokens: Sequence[str], known: Mapping[str, int], what: str) -> list[int]:
        ids = []
        for token in tokens:
            number = known.get(token)
            if number is None:
                other = "; somebody new is served by recommend_for (--history)" if what == "user" else ""
                raise InputError(
                    f"{what} '{token[:100]}' is not among the {len(known)} {what}s of dataset '{self.config['dataset']}', "
                    f"named as in its files, such as {listed(list(known)[:3])}{nearest(token, list(known)[:20_000]) or other}"
                )
            ids.append(number)
        return ids

    def _pairs(self, pairs: Any) -> tuple[list[str], list[str]]:
        if isinstance(pairs, pd.DataFrame):
            missing = [name for name in (self.user_field, self.item_field) if name not in pairs]
            if missing:
                raise InputError(f"pairs has the columns {list(pairs.columns)}; it must have {missing[0]}")
            return list(map(str, pairs[self.user_field])), list(map(str, pairs[self.item_field]))
        read = list(pairs) if isinstance(pairs, Iterable) and not isinstance(pairs, str) else [pairs]
        for pair in read:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise InputError(
                    f"{shown(pair)} is no pair; score takes (user, item) tuples or a data frame of the two"
                )
        return [str(user) for user, _ in read], [str(item) for _, item in read]

    def _history(self, history: Any) -> tuple[Tensor, list[float | None]]:
        """Item ids ``[h]`` and ratings of a history, the latest last."""
        rating_field = self.config["RATING_FIELD"]
        if isinstance(history, pd.DataFrame):
            if self.item_field not in history:
                raise InputError(f"history has the columns {list(history.columns)}; it must have {self.item_field}")
            ratings = history[rating_field] if rating_field in history else [None] * len(history)
            history = list(zip(history[self.item_field], ratings, strict=True))
        if isinstance(history, Mapping):
            history = list(history.items())
        read = list(history) if isinstance(history, Iterable) and not isinstance(history, str) else [history]
        if not read:
            raise InputError("history is empty; recommend_for needs at least one item")
        pairs = [pair if isinstance(pair, tuple | list) else (pair, None) for pair in read]
        for pair in pairs:
            if len(pair) != 2:
                raise InputError(f"{shown(pair)} is no (item, rating)")
        items = self._ids([str(item) for item, _ in pairs], self._item_ids, "item")
        return torch.tensor(items, dtype=torch.long), [_rating(item, value) for item, value in pairs]

    @staticmethod
    def _count(k: Any) -> int:
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise InputError(f"k is {shown(k)}; it must be an integer >= 1")
        return int(k)


def _several(users: Any) -> list[str]:
    if isinstance(users, str) or not isinstance(users, Iterable):
        users = [users]
    return list(map(str, users))


def _rating(item: Any, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise InputError(f"the rating of item '{item}' is {shown(value)}; it must be a finite number")
    return float(value)
