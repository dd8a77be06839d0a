"""Sampled candidates of ``uniN`` and ``popN``: distinct, drawn once per seed, user and phase.

RecBole draws them with replacement, anew for every evaluation, from the process's random stream: rows of one table are
then judged on different candidates. Here every user has a random stream of their own, keyed by seed, phase and the
user's token, over the items that anybody has interacted with, in the order of their tokens. So the candidates are the
same for every model, strategy and engine, for any number of evaluations, any batch size and any order of the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from recbole.data.dataloader import NegSampleEvalDataLoader
from recbole.data.dataloader.abstract_dataloader import NegSampleDataLoader
from recbole.data.interaction import Interaction
from recbole.utils import InputType

from recbole_fedkd.data.rows import PHASES, Ids

# Blocks of a user's stream that are read before the rest is drawn by lots: repetitions and items that do not count
# cost draws, few as a rule, but without end where little of the catalogue is left.
_BLOCKS = 4


@dataclass(frozen=True)
class Candidates:
    """Sampled items of the users of one phase.

    Attributes:
        items: item ids of all users, one user behind the other ``[sum(counts)]``.
        counts: candidates of each user ``[users]``.
        wanted: how many were asked for ``[users]``: N for each of the user's rows.
    """

    items: Ids
    counts: Ids
    wanted: Ids

    @cached_property
    def starts(self) -> Ids:
        """Where each user's items start in ``items`` ``[users]``."""
        starts: Ids = np.cumsum(self.counts) - self.counts
        return starts

    @property
    def short(self) -> int:
        """Users with fewer items left than were asked for; all that are left are their candidates."""
        return int((self.counts < self.wanted).sum())


def user_stream(seed: int, phase: str, token: str) -> np.random.Generator:
    """The random stream of one user in one phase, whatever else the process draws."""
    key = hashlib.blake2b(f"{seed}\0{phase}\0{token}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def draw(stream: np.random.Generator, wanted: int, free: NDArray[np.bool_], weights: NDArray[np.float64] | None) -> Ids:
    """Distinct positions, drawn one after the other with probability proportional to weight among those still left.

    Args:
        stream: read from its start.
        wanted: how many; where fewer are free, all of them.
        free: positions that may be drawn ``[n]``; with a positive weight, if there are weights.
        weights: ``[n]``, or None for equal ones.

    Returns:
        Positions in the order of their draws ``[min(wanted, free)]``.
    """
    left = np.flatnonzero(free)
    if len(left) <= wanted:
        return left
    total = None if weights is None else np.cumsum(weights)
    chosen = np.empty(0, dtype=np.int64)
    for _ in range(_BLOCKS):
        lots = stream.random(wanted + wanted // 4 + 16)
        drawn = _positions(lots, len(free), total)
        chosen = np.concatenate([chosen, drawn[free[drawn]]])
        chosen = chosen[np.sort(np.unique(chosen, return_index=True)[1])]
        if len(chosen) >= wanted:
            return chosen[:wanted]
    # What is still missing, by lots: of exponential times with the weights as rates, the earliest are such a draw too.
    times = -np.log1p(-stream.random(len(free)))[left] / (1.0 if weights is None else weights[left])
    times[np.isin(left, chosen)] = np.inf
    missing = np.argsort(times, kind="stable")[: wanted - len(chosen)]
    return np.concatenate([chosen, left[missing]])


def _positions(lots: NDArray[np.float64], size: int, total: NDArray[np.float64] | None) -> Ids:
    """Where numbers in [0, 1) fall among ``size`` equal parts, or among parts whose bounds are ``total``."""
    positions: Ids = (lots * size).astype(np.int64)
    if total is not None:
        positions = np.searchsorted(total, lots * total[-1], side="right")
    return positions


def draw_candidates(
    seed: int,
    phase: str,
    user_tokens: Sequence[str],
    item_tokens: Sequence[str],
    met: Sequence[Ids],
    wanted: Ids,
    interactions: Ids,
    popular: bool = False,
) -> Candidates:
    """Candidates of users.

    Args:
        seed: the run's.
        phase: ``valid`` or ``test``.
        user_tokens: of the users that are judged ``[users]``.
        item_tokens: of all items, indexed by item id; item 0 is padding and never drawn.
        met: item ids that are no candidates of each user ``[users]``.
        wanted: candidates of each user ``[users]``.
        interactions: of each item in all splits ``[items]``. Items without any are never drawn: an ``.item`` file may list
            some, and one model reads it where another does not.
        popular: draw in proportion to ``interactions``; else all items have the same chance.
    """
    order = 1 + np.argsort(np.asarray(item_tokens, dtype=str)[1:], kind="stable")
    order = order[interactions[order] > 0]
    position = np.zeros(len(item_tokens), dtype=np.int64)
    position[order] = np.arange(len(order))
    weights = interactions[order].astype(np.float64) if popular else None
    drawn = []
    free = np.ones(len(order), dtype=bool)
    for token, items, count in zip(user_tokens, met, wanted.tolist(), strict=True):
        taken = position[items[items > 0]]
        free[taken] = False
        drawn.append(order[draw(user_stream(seed, phase, token), count, free, weights)])
        free[taken] = True
    counts = np.array([len(items_of_user) for items_of_user in drawn], dtype=np.int64)
    return Candidates(np.concatenate([*drawn, np.empty(0, dtype=np.int64)]), counts, wanted)


def met_items(splits: Sequence[Any], phase: str) -> tuple[Ids, Ids]:
    """Users and items of what is no candidate in a phase: every pair of its own rows and of those before.

    RecBole makes rows of histories for sequential models; what stands in those counts as well.

    Args:
        splits: train, valid and test datasets.
        phase: ``valid`` or ``test``.

    Returns:
        User ids, ascending, and item ids, each pair once.
    """
    first = splits[0]
    pairs = np.empty(0, dtype=np.int64)
    for split in splits[: PHASES.index(phase) + 1]:
        rows = split.inter_feat
        if not len(rows):
            continue
        users = rows[first.uid_field].numpy().astype(np.int64) * first.item_num
        columns = [rows[first.iid_field].numpy()]
        history = first.iid_field + first.config["LIST_SUFFIX"]
        if history in rows:
            columns += list(rows[history].numpy().T)
        for column in columns:
            pairs = pd.unique(np.concatenate([pairs, users + column]))
    pairs.sort()
    return pairs // first.item_num, pairs % first.item_num


def candidates_of(
    config: Any, dataset: Any, splits: Sequence[Any], phase: str, users: Ids, counts: Ids
) -> Candidates | None:
    """The candidates that ``eval_args.mode`` asks for in a phase; None where it samples none.

    Candidates are items that the user has not met: those of the rows before the phase and of its own are left out, also
    for models that may recommend an item again. Weights are RecBole's, interactions of an item in all splits to the power
    of one; RecBole would take the ``alpha`` of the training negatives, which belong to the model and not to its judge.

    Args:
        config: the config of the protocol.
        dataset: the whole dataset, which knows the interactions of its items.
        splits: train, valid and test datasets.
        phase: ``valid`` or ``test``.
        users: ids of the users that are judged ``[users]``.
        counts: rows of each of them ``[users]``.
    """
    sampling = config[f"{phase}_neg_sample_args"]
    if not samples_candidates(sampling):
        return None
    met_users, met = met_items(splits, phase)
    bounds = np.searchsorted(met_users, np.stack([users, users + 1]))
    tokens = dataset.field2id_token
    return draw_candidates(
        config["seed"],
        phase,
        [str(token) for token in np.asarray(tokens[dataset.uid_field])[users]],
        [str(token) for token in tokens[dataset.iid_field]],
        [met[start:end] for start, end in bounds.T],
        counts * int(sampling["sample_num"]),
        dataset.item_interactions,
        bool(sampling["distribution"] == "popularity"),
    )


def samples_candidates(sampling: Any) -> bool:
    """Whether RecBole's sampling arguments of a phase are those of ``uniN`` or ``popN``."""
    return bool(sampling["distribution"] != "none" and sampling["sample_num"] != "none")


class CandidateLoader(NegSampleEvalDataLoader):
    """RecBole's loader of ``uniN`` and ``popN`` with candidates that stay.

    A batch holds whole users: first the user's rows, then the candidates, each with the other columns of one of the rows.

    Args:
        config: the config of the protocol.
        dataset: the whole dataset.
        splits: train, valid and test datasets; those of the phase are sorted by user, as RecBole does.
        phase: ``valid`` or ``test``.

    Attributes:
        candidates: of the users in ``uid_list``.
    """

    candidates: Candidates

    @property
    def ranked_users(self) -> Ids:
        """User of every list that is ranked ``[users]``."""
        return self.uid_list

    def __init__(self, config: Any, dataset: Any, splits: Sequence[Any], phase: str) -> None:
        split = splits[PHASES.index(phase)]
        self._set_neg_sample_args(config, split, InputType.POINTWISE, config[f"{phase}_neg_sample_args"])
        split.sort(by=split.uid_field, ascending=True)
        users = split.inter_feat[split.uid_field].numpy()
        self.uid_list, self._first, self._rows = np.unique(users, return_index=True, return_counts=True)
        drawn = candidates_of(config, dataset, splits, phase, self.uid_list, self._rows)
        assert drawn is not None, "there is nothing to sample in this phase"
        self.candidates = drawn
        self.sample_size = len(self.uid_list)
        # Past NegSampleEvalDataLoader's own: it asks the sampler, of which there is none here.
        NegSampleDataLoader.__init__(self, config, split, None, shuffle=False)

    def _init_batch_size_and_step(self) -> None:
        """As many users as fit into ``eval_batch_size``, if they were those with the most rows and candidates."""
        sizes = np.sort(self._rows + self.candidates.counts)[::-1].cumsum()
        self.step = max(int(np.searchsorted(sizes, self.config["eval_batch_size"], side="right")), 1)
        self.set_batch_size(int(sizes[min(self.step, len(sizes)) - 1]))

    def update_config(self, config: Any) -> None:
        """Take another batch size; the candidates stay."""
        super(NegSampleEvalDataLoader, self).update_config(config)

    def collate_fn(self, index: Any) -> tuple[Interaction, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows and candidates of users, the place of each one's user in the batch, and place and item of the rows alone."""
        chosen = np.asarray(index)
        rows, extra = self._rows[chosen], self.candidates.counts[chosen]
        data = self.transform(self._dataset, self._dataset[torch.from_numpy(_ranges(self._first[chosen], rows))])
        positive_items = data[self.iid_field].clone()
        user = np.repeat(np.arange(len(chosen)), rows + extra)
        slot = _ranges(np.zeros_like(rows), rows + extra)
        is_row = slot < rows[user]
        origin = (np.cumsum(rows) - rows)[user] + slot % rows[user]
        batch = data[torch.from_numpy(origin)]
        candidates = self.candidates.items[_ranges(self.candidates.starts[chosen], extra)]
        batch[self.iid_field][torch.from_numpy(~is_row)] = torch.from_numpy(candidates)
        batch = self._dataset.join(batch)
        batch.update(Interaction({self.label_field: torch.from_numpy(is_row.astype(np.float32))}))
        places = torch.from_numpy(np.repeat(np.arange(len(chosen)), rows))
        return batch, torch.from_numpy(user), places, positive_items


def _ranges(starts: Ids, counts: Ids) -> Ids:
    """The numbers ``starts[i] .. starts[i] + counts[i] - 1`` of every i, one after the other."""
    offsets = np.repeat(starts - np.cumsum(counts) + counts, counts)
    ranges: Ids = offsets + np.arange(counts.sum())
    return ranges
