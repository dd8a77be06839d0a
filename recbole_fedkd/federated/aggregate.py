"""The fold: what the uploads of a round are in sum, taken in one by one.

A fold starts empty, takes uploads, can be merged with another of the same round, and is finished once. What is additive keeps
sums alone, however many clients there are; :class:`EveryUpload` keeps all, for a strategy that has to see every client's own.
The order of the uploads is that of the sums, so that the same order gives the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.stacked import Stacked
from recbole_fedkd.registry import outdated

Tensors = dict[str, Tensor]


class Fold(ABC):
    """Statistics of a round."""

    def __init_subclass__(cls) -> None:
        # Whoever takes an upload in another way than its base takes them one by one, unless it says how many are taken in.
        if outdated(cls, "add_many", "add"):
            cls.add_many = Fold.add_many  # type: ignore[method-assign]
        if outdated(cls, "add_stacked", "add", "part"):
            cls.add_stacked = Fold.add_stacked  # type: ignore[method-assign]

    @abstractmethod
    def add(self, upload: Message) -> None:
        """Take one client's upload in. Raises :class:`MessageError`, and is as before, for one that is not taken."""

    def add_many(self, senders: Sequence[int], arrays: Mapping[str, NDArray[np.generic]]) -> bool:
        """Take in the uploads of several clients, ``[c, ...]`` by name, to the same bits as one by one.

        Returns:
            Whether it has; else it sees them one by one.
        """
        return False

    def add_stacked(self, stacked: Stacked) -> bool:
        """Take in the uploads of several clients that differ from something common in some rows alone; as :meth:`add_many`."""
        return not stacked.common and self.add_many(list(stacked.training), stacked.arrays())

    def heard_of(self, senders: Sequence[int]) -> None:  # noqa: B027
        """Know that what it holds now are sums of these clients' uploads, which it has not seen."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Take in what another fold of the same round has taken in, from other clients."""

    @abstractmethod
    def finish(self) -> Tensors:
        """What all of them come to, by name."""


class EveryUpload(Fold):
    """All uploads, for a function of them all.

    Args:
        function: of the uploads in the order of their senders, whenever they came: it may take the first of equal ones.
    """

    def __init__(self, function: Callable[[list[Message]], Tensors]) -> None:
        self.function = function
        self.uploads: list[Message] = []

    def add(self, upload: Message) -> None:
        """Keep it."""
        self.uploads.append(upload)

    def merge(self, other: Self) -> None:
        """Keep the other's."""
        self.uploads += other.uploads

    def finish(self) -> Tensors:
        """What the function makes of them."""
        return self.function(sorted(self.uploads, key=lambda upload: upload.sender))


class Sums(Fold):
    """The sum of every array; whole numbers stop at the largest of their type, where honest counts never come.

    Args:
        dtype: in which numbers are added up; None: in their own.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.sums: Tensors = {}
        self.dtype = dtype

    def add(self, upload: Message) -> None:
        """Add its arrays."""
        for name, array in upload.arrays.items():
            self._add(name, array[None])

    def add_many(self, senders: Sequence[int], arrays: Mapping[str, NDArray[np.generic]]) -> bool:
        """Add their arrays, in their order."""
        for name, of_clients in arrays.items():
            self._add(name, of_clients)
        return True

    def _add(self, name: str, of_clients: NDArray[np.generic]) -> None:
        known = name in self.sums
        if not known:
            self.sums[name] = torch.tensor(of_clients[0], dtype=self.dtype)
        total = self.sums[name].numpy()
        for array in of_clients[not known :]:
            if total.dtype.kind == "f":
                np.add(total, array, out=total)
            else:
                total[...] = added(total, array)

    def merge(self, other: Self) -> None:
        """Add the other's sums."""
        for name, part in other.sums.items():
            if name in self.sums:
                self._add(name, part.numpy()[None])
            else:
                self.sums[name] = part.clone()

    def finish(self) -> Tensors:
        """The sums."""
        return self.sums


def add_to(sums: Tensors, more: Mapping[str, Tensor]) -> None:
    """Add tensors to those of the same name, where there are any."""
    for name, part in more.items():
        sums[name] = sums[name] + part if name in sums else part


def added(total: NDArray[Any], more: NDArray[Any]) -> NDArray[Any]:
    """Sum of whole numbers, in the type of the first."""
    return within(total.astype(np.int64) + more, total.dtype)


def within(numbers: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Numbers as those of a type; whole ones stop at its largest and least, and do not wrap around."""
    if np.dtype(dtype).kind in "iu":
        numbers = numbers.clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    return numbers.astype(dtype)


def type_of_mean(array: NDArray[np.generic]) -> torch.dtype:
    """In which a mean of arrays like this one is told: theirs, single precision for whole numbers."""
    # By an empty one: numbers out of a message are read-only, which torch warns of.
    return torch.result_type(torch.from_numpy(np.empty(0, array.dtype)), 1.0)


class WeightedMean(Fold):
    """The weighted mean of every array.

    Args:
        weight_of: weight of an upload.
        expected: what the weights will come to if everybody answers. Uploads are added up as shares of it, and only where
            somebody is missing the sum is divided by what has come.
    """

    def __init__(self, weight_of: Callable[[Message], float], expected: float) -> None:
        self.weight_of, self.expected = weight_of, expected
        self.weight = 0.0
        self.sums: Tensors = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def add(self, upload: Message) -> None:
        """Add its arrays times its share."""
        weight = self.weight_of(upload)
        for name, array in upload.arrays.items():
            self.dtypes.setdefault(name, type_of_mean(array))
        add_to(
            self.sums, {name: self.part(name, array, weight / self.expected) for name, array in upload.arrays.items()}
        )
        self.weight += weight

    def add_stacked(self, stacked: Stacked) -> bool:
        """Add what is common as often as they count, and the rows in which they differ."""
        if stacked.others:
            return False
        weights = [
            self.weight_of(Message(stacked.kind, stacked.round, client, {}, training))
            for client, training in stacked.training.items()
        ]
        shares = np.array(weights, dtype=np.float64) / self.expected
        for name, block in stacked.blocks.items():
            self.dtypes.setdefault(name, torch.float32)
            values, common = torch.from_numpy(block.values), stacked.common.get(name)
            if block.row is None:
                part = torch.from_numpy(shares) @ values.view(len(shares), -1).double()
            else:
                moved, row = values.double(), torch.from_numpy(block.row)
                part = moved.new_zeros(block.shape[0], moved.shape[1])
                if common is not None:
                    table = torch.tensor(common, dtype=torch.float64).view_as(part)
                    moved -= table[row]
                    part += table * shares.sum()
                part.index_add_(0, row, moved.mul_(torch.from_numpy(shares[block.owner]).unsqueeze(1)))
            add_to(self.sums, {name: part.view(block.shape)})
        self.weight += sum(weights)
        return True

    def part(self, name: str, array: NDArray[np.generic], share: float) -> Tensor:
        """What an array adds to its sum; in double precision, or the sum of many clients would be off as their number grows."""
        return torch.tensor(array, dtype=torch.float64) * share

    def merge(self, other: Self) -> None:
        """Add the other's sums."""
        add_to(self.sums, other.sums)
        self.dtypes |= other.dtypes
        self.weight += other.weight

    def finish(self) -> Tensors:
        """The means, in the type of the arrays."""
        missing = self.expected / self.weight if self.weight != self.expected else 1.0
        single = torch.get_default_dtype()  # of sums that somebody else has added up
        return {name: (total * missing).to(self.dtypes.get(name, single)) for name, total in self.sums.items()}


class MeanOfChangedRows(WeightedMean):
    """Weighted mean of every row (along the first axis) over the clients that changed it; a row nobody changed stays.

    Cold rows move as far as hot ones: the mean over all clients divides what the few did by the number of all. FedSubAvg: Ding
    et al., Federated submodel optimization for hot and cold data features, NeurIPS 2022.

    Args:
        weight_of: weight of an upload.
        expected: as of :class:`WeightedMean`.
        reference: what the clients started from.
    """

    def __init__(self, weight_of: Callable[[Message], float], expected: float, reference: Mapping[str, Tensor]) -> None:
        super().__init__(weight_of, expected)
        self.reference = reference
        self.row_weights: Tensors = {}

    def part(self, name: str, array: NDArray[np.generic], share: float) -> Tensor:
        """Its difference to the reference, row by row; who has changed a row counts there."""
        moved = (torch.tensor(array, dtype=torch.float64) - self.reference[name]).view(
            len(array) if array.ndim else 1, -1
        )
        weights = (moved != 0).any(1).double() * share
        add_to(self.row_weights, {name: weights})
        return moved * share

    def merge(self, other: Self) -> None:
        """Add the other's sums and weights."""
        super().merge(other)
        add_to(self.row_weights, other.row_weights)

    def finish(self) -> Tensors:
        """The means; shares cancel out, whoever is missing."""
        return {
            name: (
                self.reference[name]
                + (total / torch.where(part > 0, part, 1.0).unsqueeze(1)).view(self.reference[name].shape)
            ).to(self.dtypes[name])
            for (name, total), part in zip(self.sums.items(), self.row_weights.values(), strict=True)
        }


class LatestOfEach(Fold):
    """The latest arrays of every client, ``[clients, ...]`` each: who is silent is remembered.

    Args:
        before: as of the round before.
    """

    def __init__(self, before: Mapping[str, Tensor]) -> None:
        self.latest = {name: value.clone() for name, value in before.items()}
        self.heard: set[int] = set()

    def add(self, upload: Message) -> None:
        """Replace the client's."""
        self.add_many([upload.sender], {name: array[None] for name, array in upload.arrays.items()})

    def add_many(self, senders: Sequence[int], arrays: Mapping[str, NDArray[np.generic]]) -> bool:
        """Replace the clients'."""
        self.heard.update(senders)
        for name, of_clients in arrays.items():
            self.latest[name][list(senders)] = torch.tensor(of_clients)
        return True

    def merge(self, other: Self) -> None:
        """Replace those that the other has heard."""
        places: Any = sorted(other.heard)
        self.heard |= other.heard
        for name, value in other.latest.items():
            self.latest[name][places] = value[places]

    def finish(self) -> Tensors:
        """All of them."""
        return self.latest
