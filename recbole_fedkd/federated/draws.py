"""What clients draw by themselves: the order of their samples, their negatives, and what they drop."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.model.compiled import Table, compiled, has_compiler
from recbole_fedkd.splitmix import GOLDEN, LAST_SHIFT, MIXING, Words, keyed, mixed

PLACES = np.uint64(2**28 - 1)
"""The bits of a word that hold a sample's place while samples are ordered; the others are drawn."""

DRAWS_VERSION = 4
"""Of what clients draw; in version 1 they drew from streams of torch's, in version 2 masks by torch on each machine, in version
3 masks from a stream of torch's a client."""

ORDER, NEGATIVES, DROPOUT = 1, 2, 3
"""What draws are for."""
WHOLE_ROUND = 0
"""In place of an epoch, which are counted from 1."""


def client_keys(seed: int, numbers: Sequence[int], round_index: int) -> Words:
    """A word of every client in a round ``[c]``: the order in which clients run changes nothing."""
    clients = np.asarray(numbers, dtype=np.uint64) + np.uint64(1)
    return keyed(np.zeros(len(clients), dtype=np.uint64), seed, clients, round_index)


class EpochDraws(ABC):
    """What clients draw in an epoch."""

    @abstractmethod
    def orders(self, sizes: Sequence[int]) -> Tensor:
        """A random order of each client's samples ``[c, largest]``; what is behind a client's own means nothing."""

    @abstractmethod
    def _items(self, places: NDArray[np.int64], counts: Sequence[int], attempt: int, item_count: int) -> Tensor:
        """Items from 1, drawn for some places among what all clients draw, ``counts`` each."""

    def negatives(self, counts: Sequence[int], item_count: int, taken: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Items that are not taken, uniformly, in bulk: what is taken is drawn again.

        Args:
            counts: items of each client ``[c]``.
            item_count: number of items, padding (id 0, never drawn) included.
            taken: of places among all that is drawn ``[n]`` and items ``[n]``, which are taken; not all may be.

        Returns:
            Items, client by client ``[sum of counts]``.
        """
        items = torch.empty(sum(counts), dtype=torch.long)
        pending, attempt = torch.arange(len(items)), 0
        while len(pending):
            drawn = self._items(pending.numpy(), counts, attempt, item_count)
            items[pending] = drawn
            pending = pending[taken(pending, drawn)]
            attempt += 1
        return items


class Draws(ABC):
    """What clients draw: epoch by epoch."""

    @abstractmethod
    def epoch(self) -> EpochDraws:
        """What they draw in the next one."""


class KeyedDraws(Draws):
    """A function of the run's seed, the client, the round, the epoch, what is drawn for, and the place.

    A client draws the same whoever draws beside it, on both engines and in every process. Words are those of SplitMix64, whose
    state is a counter: word ``i`` follows from a client's key without those before it.

    Args:
        seed: the run's.
        numbers: the clients ``[c]``.
        round_index: from 0.

    Attributes:
        seeds: of 32 bits, of each client's streams ``[c]``: those of RecBole's loaders, and of what else a model draws.
        dropout: what they drop.
    """

    def __init__(self, seed: int, numbers: Sequence[int], round_index: int) -> None:
        self._keys, self._epochs = client_keys(seed, numbers, round_index), 0
        self.seeds: list[int] = (self._keys >> np.uint64(32)).tolist()
        self.dropout = KeyedDropout(keyed(self._keys, WHOLE_ROUND, DROPOUT))

    def epoch(self) -> KeyedEpoch:
        """See the base class."""
        self._epochs += 1
        return KeyedEpoch(keyed(self._keys, self._epochs))


class KeyedEpoch(EpochDraws):
    """What clients draw in an epoch as a function.

    Args:
        keys: a word of each client ``[c]``.
    """

    def __init__(self, keys: Words) -> None:
        self.keys = keys

    @cached_property
    def negative_keys(self) -> Words:
        """A word of each client ``[c]`` that the words of an attempt at its negatives follow from."""
        return keyed(self.keys, NEGATIVES)

    def orders(self, sizes: Sequence[int]) -> Tensor:
        """By the size of a word per sample; of two words of the same 36 bits the sample in front is first."""
        own, largest = np.asarray(sizes)[:, None], max(sizes)
        if largest > PLACES:
            raise ValueError(f"a client has {largest} samples; {PLACES} can be ordered")
        places = np.arange(largest, dtype=np.uint64)
        words = mixed(keyed(self.keys, ORDER)[:, None] + places * np.uint64(GOLDEN))
        words &= ~PLACES
        words |= places
        words[places >= own] = np.uint64(2**64 - 1)
        words.sort(1)
        words &= PLACES
        return torch.from_numpy(words.view(np.int64))

    def _items(self, places: NDArray[np.int64], counts: Sequence[int], attempt: int, item_count: int) -> Tensor:
        """By the upper half of a word; an item is more likely than another by less than ``item_count / 2 ** 32``."""
        starts = np.cumsum(counts) - counts
        keys = keyed(self.negative_keys, attempt) - starts.astype(np.uint64) * np.uint64(GOLDEN)
        of_place = np.repeat(keys, counts)
        if attempt:
            of_place = of_place[places]
        words = mixed(of_place + places.view(np.uint64) * np.uint64(GOLDEN))
        words >>= np.uint64(32)
        words *= np.uint64(item_count - 1)
        words >>= np.uint64(32)
        words += np.uint64(1)
        return torch.from_numpy(words.view(np.int64))


class KeyedDropout:
    """What clients drop in a round: a function of a client's word, of how often it has dropped something before, and the place.

    Args:
        keys: a word of each client ``[c]``.
    """

    def __init__(self, keys: Words) -> None:
        self._keys, self._calls = keys, np.zeros(len(keys), dtype=np.uint64)

    def factors(
        self, counts: Sequence[int], rows: int, shape: Sequence[int], kept: float, device: torch.device
    ) -> Tensor:
        """What a batch of the first clients is multiplied by in the next call of a layer, 0 or ``1 / kept``.

        By the size of a word an entry: the share that stays is as exact as its double.

        Args:
            counts: samples of each of them ``[c]``; what fills a batch up stays.
            rows: of the batch.
            shape: of a sample.
            kept: share of the entries that stay, in (0, 1).
            device: where they are needed.

        Returns:
            Single precision, ``[c, rows, *shape]``.
        """
        first, width = slice(len(counts)), math.prod(shape)
        keys = keyed(self._keys[first], self._calls[first])
        self._calls[first] += np.uint64(1)
        bound, factor = min(int(kept * 2.0**64), 2**64 - 1), np.float32(1.0) / np.float32(kept)
        factors = torch.empty(len(counts), rows * width, device=device)
        entries = np.asarray(counts, dtype=np.int64) * width
        if device.type == "cpu" and has_compiler():
            compiled(_fill)(keys, entries, np.uint64(bound), factor, factors.numpy())
        else:
            signed = torch.from_numpy(keys.view(np.int64)).to(device)
            own = torch.from_numpy(entries).to(device).unsqueeze(1)
            places = torch.arange(factors.shape[1], device=device)
            factors.copy_(_stay(signed, places, bound) | (places >= own)).mul_(float(factor))
        return factors.view(len(counts), rows, *shape)

    def of_one(self, shape: Sequence[int], kept: float, device: torch.device) -> Tensor:
        """The same of the only client's batch of a shape ``[rows, ...]``."""
        return self.factors([shape[0]], shape[0], shape[1:], kept, device).squeeze(0)


def _fill(keys: Words, entries: NDArray[np.int64], bound: np.uint64, factor: np.float32, factors: Table) -> None:
    """See :meth:`KeyedDropout.factors`; words as of :func:`mixed`."""
    golden, one, two = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
    first, second, third, nothing = np.uint64(30), np.uint64(27), np.uint64(31), np.float32(0)
    for client in range(len(keys)):
        key, own = keys[client], factors[client]
        for entry in range(entries[client]):
            word = key + np.uint64(entry) * golden
            word = (word ^ (word >> first)) * one
            word = (word ^ (word >> second)) * two
            own[entry] = factor if word ^ (word >> third) < bound else nothing
        own[entries[client] :] = factor


def _stay(keys: Tensor, places: Tensor, bound: int) -> Tensor:
    """Whether entries stay ``[c, places]``, by torch's whole numbers, which have a sign, on any device."""
    words = keys.unsqueeze(1) + places * _signed(GOLDEN)
    for shift, factor in MIXING:
        words ^= (words >> shift) & (2 ** (64 - shift) - 1)
        words *= _signed(factor)
    words ^= (words >> LAST_SHIFT) & (2 ** (64 - LAST_SHIFT) - 1)
    return (words ^ -(2**63)) < _signed(bound ^ 2**63)


def _signed(number: int) -> int:
    """The whole number in ``[-2^63, 2^63)`` that has the bits of one in ``[0, 2^64)``."""
    return number - 2**64 if number >= 2**63 else number


class StreamDraws(Draws, EpochDraws):
    """What a client alone in its federation draws: as RecBole's loader does, from one stream after the other.

    Args:
        generator: the stream.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def epoch(self) -> EpochDraws:
        """The stream goes on."""
        return self

    def orders(self, sizes: Sequence[int]) -> Tensor:
        """RecBole's loader is torch's; of one client alone."""
        (size,) = sizes
        return shuffled_order(size, self.generator).unsqueeze(0)

    def _items(self, places: NDArray[np.int64], counts: Sequence[int], attempt: int, item_count: int) -> Tensor:
        return torch.randint(1, item_count, (len(places),), generator=self.generator)


def shuffled_order(count: int, generator: torch.Generator) -> Tensor:
    """Row numbers ``[count]`` in the random order of torch's loader; the generator is left as the loader leaves it.

    The loader draws a seed for its workers first, and its sampler an order of which it takes no row last.
    """
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    order = torch.randperm(count, generator=generator)
    torch.randperm(count, generator=generator)
    return order
