"""Updates: with codecs a network travels as what changed of it, and what a codec drops is made good later.

Up: a client sends its network minus the one it was given, plus what earlier encodings dropped (error feedback: Seide et al.,
Interspeech 2014; Karimireddy et al., ICML 2019). Down: the server knows what its clients hold, since it knows what it has
sent; it sends its network minus that, so that what was dropped is part of the next difference. Before the first round nothing
travels: every party builds the same network from the run's seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.federated.codec import CodecStack

Arrays = dict[str, NDArray[np.generic]]

UPDATE, NETWORK, VERSION = "update", "network", "version"
"""Kinds of a message, a difference to the version before and a whole one; and the array ``[1]`` that names the version."""


def difference(arrays: Mapping[str, NDArray[np.generic]], reference: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """Arrays minus those of the same name in ``reference``; what has no reference stays as it is."""
    return {name: array - reference[name] if name in reference else array for name, array in arrays.items()}  # type: ignore[operator]


def applied(arrays: Mapping[str, NDArray[np.generic]], reference: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """Arrays plus those of the same name in ``reference``; what has no reference stays as it is."""
    return {name: reference[name] + array if name in reference else array for name, array in arrays.items()}  # type: ignore[operator]


def numbered(arrays: Mapping[str, NDArray[np.generic]], reference: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """Arrays under the number of their name among those of ``reference``, which both sides know: a few bytes each."""
    numbers = {name: str(number) for number, name in enumerate(sorted(reference))}
    return {numbers.get(name, name): array for name, array in arrays.items()}


def named(arrays: Mapping[str, NDArray[np.generic]], reference: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """The way back from :func:`numbered`."""
    names = {str(number): name for number, name in enumerate(sorted(reference))}
    return {names.get(number, number): array for number, array in arrays.items()}


def updated(update: Mapping[str, NDArray[np.generic]], reference: Mapping[str, NDArray[np.generic]]) -> Arrays:
    """``reference`` moved on by a decoded update, whose arrays are numbered."""
    return applied(named(update, reference), reference)


@dataclass
class Broadcast:
    """The server's side: what the clients hold, and how each gets to the latest version.

    Attributes:
        replica: the network as every client holds it that has the latest version.
        version: its number; 0 is the network that everybody builds from the seed.
        update: encoded difference from the version before, arrays by number; empty for version 0.
        told: latest version that each client was sent, 0 where it is not named.
    """

    replica: Arrays
    version: int = 0
    update: Arrays = field(default_factory=dict)
    told: dict[int, int] = field(default_factory=dict)

    def advance(self, arrays: Mapping[str, NDArray[np.generic]], codecs: CodecStack, round_index: int) -> None:
        """Make the next version, as near to ``arrays`` as the codecs allow."""
        self.update = codecs.encode(numbered(difference(arrays, self.replica), self.replica), round_index)
        self.replica = updated(codecs.decode(self.update), self.replica)
        self.version += 1

    def for_client(self, client: int) -> tuple[str, Arrays] | None:
        """Kind and arrays of what a client lacks: the update, the whole network after a longer absence, or None."""
        behind = self.version - self.told.get(client, 0)
        if not behind:
            return None
        arrays = self.update if behind == 1 else self.replica
        return UPDATE if behind == 1 else NETWORK, {**arrays, VERSION: np.array([self.version], dtype=np.int32)}
