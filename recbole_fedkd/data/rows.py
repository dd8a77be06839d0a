"""RecBole's tables of tensors, samplers and loaders, with the same results and without loops over rows.

RecBole takes rows of a table by a Python list, once a column, and keeps the items of every user and phase in sets: of a million
rows that is most of the time between a file and the first round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from logging import getLogger
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader, TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.data.utils import get_dataloader
from recbole.sampler import RepeatableSampler, Sampler
from recbole.utils import ModelType
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler

PHASES = ("train", "valid", "test")

PAIRS = 2**19
"""User-item pairs that a full sort ranks at a time, at least: two megabytes for every number of a pair."""

BLOCK = 2**16
"""Training rows that are brought into an epoch's order at a time."""

Ids = NDArray[np.int64]


class Rows(Interaction):
    """An ``Interaction`` whose rows are taken by a tensor of their numbers, made once for all columns."""

    def __getitem__(self, index: Any) -> Any:
        """A column by its name; else the rows ``index``, anything that a tensor may be indexed by."""
        if isinstance(index, str):
            return self.interaction[index]
        if isinstance(index, Sequence | np.ndarray) and len(index):
            index = torch.as_tensor(np.asarray(index))
        return Rows({name: values[index] for name, values in self.interaction.items()})


class UsedItems:
    """Items of every user, as a set each, made when it is asked for.

    Args:
        pairs: ``user * item_count + item`` of all rows, in any order, repeated or not.
        users: number of users, padding included.
        items: number of items, padding included.
    """

    def __init__(self, pairs: Ids, users: int, items: int) -> None:
        self._unsorted, self._users, self._items = pairs, users, items
        self._sets: list[set[int] | None] = [None] * users

    @cached_property
    def pairs(self) -> Ids:
        """Each pair once, ascending."""
        pairs: Ids = np.sort(pd.unique(self._unsorted))
        return pairs

    @cached_property
    def _starts(self) -> Ids:
        return np.searchsorted(self.pairs, np.arange(self._users + 1) * self._items)

    @property
    def counts(self) -> Ids:
        """Items of every user ``[users]``."""
        return np.diff(self._starts)

    def __len__(self) -> int:
        return self._users

    def __getitem__(self, users: Any) -> Any:
        """The set of a user, or those of an array of users."""
        if isinstance(users, np.ndarray):
            return [self[user] for user in users.tolist()]
        known = self._sets[users]
        if known is None:
            user = int(users) % self._users
            own = self.pairs[self._starts[user] : self._starts[user + 1]] - user * self._items
            known = self._sets[users] = set(own.tolist())
        return known


class UserSampler(Sampler):
    """RecBole's sampler, with :class:`UsedItems`; draws are the same.

    Args:
        phases, datasets, distribution, alpha: as of RecBole's.
        draws: whether negatives are drawn; if not, a user may have met all items.
    """

    def __init__(
        self,
        phases: list[str],
        datasets: list[Any],
        distribution: str = "uniform",
        alpha: float = 1.0,
        draws: bool = True,
    ) -> None:
        self.draws = draws
        super().__init__(phases, datasets, distribution, alpha)

    def get_used_ids(self) -> dict[str, UsedItems]:
        """Phase to what every user has met until its end; raises ValueError as RecBole's where negatives are drawn."""
        used = {}
        pairs: Ids = np.empty(0, dtype=np.int64)
        for phase, dataset in zip(self.phases, self.datasets, strict=True):
            pairs = np.concatenate([pairs, pairs_of(dataset)])
            used[phase] = UsedItems(pairs, self.user_num, self.item_num)
        # A pair that is repeated counts once; the bound on all rows saves the sort where nobody is near it.
        asked = (self.draws or self.item_num == 2) and len(pairs)  # of one item nothing can be judged either
        near = asked and np.bincount(pairs // self.item_num).max() + 1 >= self.item_num
        if near and used[self.phases[-1]].counts.max() + 1 == self.item_num:
            raise ValueError(
                "Some users have interacted with all items, so that there is none to sample; leave them out by "
                f"user_inter_num_interval=[1,{self.item_num - 1})"
            )
        return used


class RepeatSampler(RepeatableSampler):
    """RecBole's sampler of models that may recommend an item again, which nobody has met: without a set for every user."""

    def get_used_ids(self) -> UsedItems:
        """Nothing of anybody."""
        return UsedItems(np.empty(0, dtype=np.int64), self.user_num, self.item_num)


def rows_in_time(dataset: Any) -> Tensor:
    """Numbers of a dataset's rows, the earliest first, of equally early ones in the order of the rows ``[n]``."""
    # The package's own datasets hold an exact rank; the time itself has gone through 32 bits.
    times = (getattr(dataset, "recency_field", None), dataset.time_field)
    time = next((name for name in times if name in dataset.inter_feat), None)
    if time is None:
        return torch.arange(len(dataset.inter_feat))
    return torch.argsort(dataset.inter_feat[time], stable=True)


def pairs_of(dataset: Any) -> Ids:
    """``user * item_count + item`` of every row of a dataset."""
    users, items = dataset.inter_feat[dataset.uid_field].numpy(), dataset.inter_feat[dataset.iid_field].numpy()
    pairs: Ids = users.astype(np.int64) * dataset.item_num + items
    return pairs


def create_samplers(config: Any, dataset: Any, splits: Sequence[Any]) -> list[Any]:
    """Samplers of the three phases, None for one that samples nothing; as RecBole's function of this name.

    Args:
        config: the run's, or a protocol's.
        dataset: the whole dataset.
        splits: train, valid and test datasets.
    """
    sampler = None
    samplers: list[Any] = []
    for phase in PHASES:
        sampling = config[f"{phase}_neg_sample_args"]
        if sampling["distribution"] == "none":
            samplers.append(None)
            continue
        if sampler is None:
            # Judging draws nothing from it: a full sort has no negatives, and uniN and popN have candidates of their own.
            trains, distribution = phase == "train", sampling["distribution"]
            sampler = sampler_of(
                config, PHASES, dataset, splits, distribution, sampling["alpha"] if trains else 1.0, trains
            )
        else:
            sampler.set_distribution(sampling["distribution"])
        samplers.append(sampler.set_phase(phase))
    return samplers


def sampler_of(
    config: Any,
    phases: Sequence[str],
    dataset: Any,
    splits: Sequence[Any],
    distribution: str,
    alpha: float,
    draws: bool = True,
) -> Any:
    """The sampler of some phases; arguments as of :func:`create_samplers` and of :class:`UserSampler`."""
    if config["repeatable"]:
        return RepeatSampler(list(phases), dataset, distribution, alpha)
    return UserSampler(list(phases), list(splits), distribution, alpha, draws)


class FullSortLoader(FullSortEvalDataLoader):
    """RecBole's full-sort loader; what users hold and know is found for all of them at once."""

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False) -> None:
        if config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            super().__init__(config, dataset, sampler, shuffle)
            return
        self.logger, self.is_sequential = getLogger(), False
        self.uid_field, self.iid_field = dataset.uid_field, dataset.iid_field
        dataset.sort(by=self.uid_field, ascending=True)
        positive = np.unique(pairs_of(dataset))
        users = np.unique(positive // dataset.item_num)
        used: Ids = sampler.used_ids.pairs
        entry = np.searchsorted(positive, used)
        history = used[np.append(positive, -1)[entry] != used]
        self.uid2positive_item = _items_of(positive, users, dataset)
        self.uid2history_item = _items_of(history, users, dataset)
        self.uid2items_num = np.bincount(positive // dataset.item_num, minlength=dataset.user_num)
        self.uid_list = torch.from_numpy(users)
        self.user_df = dataset.join(Interaction({self.uid_field: self.uid_list}))
        self.sample_size = len(self.user_df)
        # Past FullSortEvalDataLoader's own, which goes through the rows.
        super(FullSortEvalDataLoader, self).__init__(config, dataset, sampler, shuffle=shuffle)

    @property
    def ranked_users(self) -> Ids:
        """User of every list that is ranked: each once, of sequential models one for every row."""
        users: Ids = (self._dataset.inter_feat[self.uid_field] if self.is_sequential else self.uid_list).numpy()
        return users

    def _init_batch_size_and_step(self) -> None:
        """As RecBole's, but in batches of :data:`PAIRS` where ``eval_batch_size`` makes smaller ones of a user or two."""
        super()._init_batch_size_and_step()
        if not self.is_sequential:
            items = self._dataset.item_num
            self.step: int = max(self.step, PAIRS // items)
            self.set_batch_size(self.step * items)


def bring_together(loader: Any, client_of_user: Tensor) -> None:
    """Judge the users of a client one after the other, so that few networks are asked for a batch.

    Args:
        loader: one that ranks every item, or judges rows as they are; its users or rows change places. Others stay as they are.
        client_of_user: ``[users]``; what is of equal ones stays in its order.
    """
    rows = loader._dataset
    if isinstance(loader, FullSortLoader) and not loader.is_sequential:
        order = _order_of(client_of_user, loader.uid_list)
        loader.uid_list, loader.user_df = loader.uid_list[order], loader.user_df[order]
    elif type(loader) is NegSampleEvalDataLoader and loader.neg_sample_args["distribution"] == "none":
        rows.inter_feat = rows.inter_feat[_order_of(client_of_user, rows.inter_feat[rows.uid_field])]


def _order_of(client_of_user: Tensor, users: Tensor) -> Tensor:
    """Places of users ``[n]``, those of a client side by side."""
    return torch.argsort(client_of_user.cpu()[users], stable=True)


class TrainingLoader(TrainDataLoader):
    """RecBole's training loader, draw by draw and row by row; rows are brought into an epoch's order a block at a time.

    The columns of users and items are left out where ``joins_features`` of the model says that its loss reads none of a batch.

    Attributes:
        draws: of a client of several: its ``epoch()`` gives ``orders`` and ``negatives``; None: RecBole draws.
    """

    draws: Any = None

    def __iter__(self) -> Iterator[Any]:
        """Batches of an epoch; RecBole's own where other processes make them, or several share them."""
        if self.draws is not None:
            return self._drawn_batches(self.draws.epoch())
        if self.num_workers or not isinstance(self.sampler, RandomSampler | SequentialSampler):
            return super().__iter__()  # type: ignore[no-any-return]
        return (self._neg_sampling(rows) for rows in self._batches(self._order()))

    def _drawn_batches(self, epoch: Any) -> Iterator[Any]:
        """Batches of an epoch whose order and negatives are drawn for it; those of a batch stand as RecBole has them."""
        count, size = self.sample_size, self.batch_sampler.batch_size
        in_order = isinstance(self.sampler, SequentialSampler)
        order = torch.arange(count) if in_order else epoch.orders([count])[0]
        sampled = self.neg_sample_args["distribution"] != "none"
        if not sampled:
            yield from self._batches(order)
            return
        users = self._dataset.inter_feat[self.uid_field][order]
        owners = torch.cat([part.repeat(self.neg_sample_num) for part in users.split(size)])
        pairs, items = torch.from_numpy(self._sampler.used_ids.pairs), self._dataset.item_num

        def taken(places: Tensor, drawn: Tensor) -> Tensor:
            return torch.isin(owners[places] * items + drawn, pairs)

        negatives = epoch.negatives([len(owners)], items, taken).split(size * self.neg_sample_num)
        for rows, own in zip(self._batches(order), negatives, strict=True):
            yield self.sampling_func(rows, own)

    def _order(self) -> Tensor:
        """Numbers of all rows in the order of torch's loader, whose sampler draws an order of which it takes no row last."""
        count = self.sample_size
        # Torch's loader draws a seed of its workers first, though there are none.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        if isinstance(self.sampler, SequentialSampler):
            return torch.arange(count)
        order = torch.randperm(count, generator=self.sampler.generator)
        torch.randperm(count, generator=self.sampler.generator)
        return order

    def _batches(self, order: Tensor) -> Iterator[Any]:
        """Rows in an order, without negatives."""
        dataset, joins = self._dataset, getattr(self.config.model_class, "joins_features", True)
        size = self.batch_sampler.batch_size
        for numbers in order.split(max(1, BLOCK // size) * size):
            block = dataset.inter_feat[numbers]
            for start in range(0, len(numbers), size):
                rows = block[start : start + size]
                yield self.transform(dataset, dataset.join(rows) if joins else rows)


def training_loader(config: Any) -> Any:
    """Class of RecBole's loader of training rows."""
    kind = get_dataloader(config, "train")
    return TrainingLoader if kind is TrainDataLoader else kind


def _items_of(pairs: Ids, users: Ids, dataset: Any) -> NDArray[np.object_]:
    """Item ids of the given users, from ascending pairs, ``[all users]``; None for users that are not given."""
    items_of = np.full(dataset.user_num, None, dtype=object)
    items = torch.from_numpy(pairs % dataset.item_num)
    bounds = np.searchsorted(pairs, np.stack([users, users + 1]) * dataset.item_num)
    for user, start, end in zip(users.tolist(), *bounds.tolist(), strict=True):
        items_of[user] = items[start:end]
    return items_of


def evaluation_loader(config: Any, phase: str) -> Any:
    """Class of RecBole's loader of a phase to judge by."""
    kind = get_dataloader(config, phase)
    return FullSortLoader if kind is FullSortEvalDataLoader else kind
