"""Secrets in shares: any ``threshold`` of them give a secret back, fewer say nothing of it (Shamir, CACM 22(11), 1979)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**257 - 93
"""The field is that of the integers modulo a prime above every secret of 32 bytes."""
SHARE_BYTES = 33


def shares_of(secret: bytes, holders: Sequence[int], threshold: int) -> dict[int, bytes]:
    """One share for each holder.

    Args:
        secret: 32 bytes.
        holders: distinct numbers from 0; a share is the value of a polynomial at the number plus 1.
        threshold: shares that are needed, 1 to the number of holders.
    """
    polynomial = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    dealt = {}
    for holder in holders:
        value = 0
        for coefficient in reversed(polynomial):
            value = (value * (holder + 1) + coefficient) % PRIME
        dealt[holder] = value.to_bytes(SHARE_BYTES, "big")
    return dealt


def secret_of(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of enough shares, by their holders; None where they are none of one secret of 32 bytes."""
    weights = _weights(tuple(sorted(shares)))
    value = sum(weights[holder] * int.from_bytes(share, "big") for holder, share in shares.items()) % PRIME
    return value.to_bytes(32, "big") if value < 2**256 else None


@lru_cache(maxsize=4096)
def _weights(holders: tuple[int, ...]) -> dict[int, int]:
    """Lagrange's coefficients at 0."""
    weights = {}
    for holder in holders:
        above = below = 1
        for other in holders:
            if other != holder:
                above = above * (other + 1) % PRIME
                below = below * (other - holder) % PRIME
        weights[holder] = above * pow(below, -1, PRIME) % PRIME
    return weights
