"""Adaptive clipping: a bound that follows a quantile of how long clients' updates are (Andrew et al., NeurIPS 2021).

A client adds to a round its update, shortened to the bound, and whether it was within it. Both are let out with noise, and
together they spend what the update alone would under less noise, so that the account is that of a bound that stays.
"""

from __future__ import annotations

import math

from recbole_fedkd.federated.clipping import length
from recbole_fedkd.federated.message import Message, Schema, check_arrays
from recbole_fedkd.federated.stage import Clip


class FollowedClip(Clip):
    """A bound that only the server knows, and changes: its end shortens, the clients' ends do not.

    Attributes:
        within: client to whether its update was within the bound, since somebody has last cleared it.
    """

    name = "followed_clip"

    def __init__(self, settings: object = None) -> None:
        super().__init__(settings)
        self.within: dict[int, bool] = {}

    def encode(self, message: Message) -> Message:
        """As it is."""
        return message

    def decode(self, message: Message, schema: Schema | None) -> Message:
        """No longer than the bound."""
        check_arrays(message.arrays, schema)
        self.within[message.sender] = length(message.arrays, self.settings) <= 1
        return super().encode(message)


def usual_count_noise(clients: float, noise_multiplier: float) -> float:
    """Deviation of the noise on the count: a twentieth of the clients, as in the paper, and at least so much that the noise on
    updates grows by a sixth at most.
    """
    return max(clients / 20, noise_multiplier)


def noise_beside_count(noise_multiplier: float, count_noise: float) -> float:
    """Noise multiplier of the updates, with which they and the count spend what ``noise_multiplier`` would (theorem 1).

    A client changes the count by a half at most, since a half is taken off what each says: ``(z^-2 - (2 s)^-2)^(-1/2)``.

    Args:
        noise_multiplier: ``z`` that is accounted.
        count_noise: deviation ``s`` of the noise on the count, above ``z / 2``.
    """
    return noise_multiplier / math.sqrt(1 - (noise_multiplier / (2 * count_noise)) ** 2)


def next_bound(bound: float, within: float, quantile: float, rate: float) -> float:
    """``C exp(-rate (b - quantile))`` of a share ``b`` of updates that were within ``C``."""
    return bound * math.exp(-rate * (within - quantile))
