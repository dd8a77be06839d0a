"""Accountants: the epsilon that releases of Gaussian noise spend together, and the noise that an epsilon asks for.

Everything is for neighbours that differ in one unit (a user, or a client) that is there or not, and for sums of which a unit
changes at most ``clip`` in L2 norm, with noise of standard deviation ``noise_multiplier * clip``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

from scipy.special import log_ndtr

from recbole_fedkd.errors import InputError

_LARGEST_NOISE = 1e6
PRECISION = 1e-4
"""Of a noise multiplier that is found, as a share of it."""


def gaussian_delta(epsilon: float, mean: float) -> float:
    """Least delta at which a Gaussian mechanism is (epsilon, delta)-private (Balle, Wang, ICML 2018, theorem 8).

    Args:
        epsilon: >= 0.
        mean: what a unit changes, in standard deviations of the noise; of ``n`` releases ``sqrt(n) / noise_multiplier``.
    """
    above = math.exp(log_ndtr(mean / 2 - epsilon / mean))
    return above - math.exp(epsilon + log_ndtr(-mean / 2 - epsilon / mean))


def gaussian_epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Exact epsilon of so many releases in which every unit takes part."""
    mean = math.sqrt(releases) / noise_multiplier
    if gaussian_delta(0.0, mean) <= delta:
        return 0.0
    # The bound of zero-concentrated privacy, and a bit.
    most = mean * mean / 2 + mean * math.sqrt(2 * math.log(1 / delta)) + 1
    from scipy.optimize import brentq  # a quarter of a second for every run, and few ask for it

    return float(brentq(lambda epsilon: gaussian_delta(epsilon, mean) - delta, 0.0, most, xtol=1e-10))


@lru_cache(maxsize=4096)
def epsilon_of(
    noise_multiplier: float, releases: int, delta: float, rate: float = 1.0, accountant: str = "prv"
) -> float:
    """Epsilon that releases have spent together.

    Args:
        noise_multiplier: standard deviation of the noise, in what a unit changes at most.
        releases: how many.
        delta: of the guarantee.
        rate: probability of a unit to take part in a release (Poisson sampling); 1: all do, and the result is exact.
        accountant: for a rate below 1; ``prv`` (Gopi, Lee, Wutschitz, NeurIPS 2021; an upper bound within .02) or ``rdp``
            (Mironov, Talwar, Zhang, 2019; larger).

    Raises:
        InputError: units are sampled and opacus, which counts then, is not installed.
    """
    if releases == 0:
        return 0.0
    if noise_multiplier == 0.0:
        return math.inf
    if rate >= 1.0:
        return gaussian_epsilon(noise_multiplier, releases, delta)
    try:
        from opacus.accountants import PRVAccountant, RDPAccountant
    except ImportError as error:
        raise InputError(
            "privacy with clients_per_round counts what sampling is worth by opacus, which is not installed; install "
            "recbole-fedkd[privacy], or leave clients_per_round unset"
        ) from error
    counter = {"prv": PRVAccountant, "rdp": RDPAccountant}[accountant]()
    counter.history = [(noise_multiplier, rate, releases)]
    return float(counter.get_epsilon(delta))


def noise_for(epsilon: float, releases: int, delta: float, rate: float = 1.0, accountant: str = "prv") -> float:
    """The least noise multiplier, within .01 %, at which releases spend no more than ``epsilon``.

    Args:
        epsilon: the budget, > 0.
        releases: how many it has to last for.
        delta: as of :func:`epsilon_of`, also the next two.
        rate: see there.
        accountant: see there.

    Raises:
        InputError: no noise is enough.
    """

    def too_much(noise: float) -> bool:
        return epsilon_of(noise, releases, delta, rate, accountant) > epsilon

    low, high = 0.0, 1.0
    while too_much(high):
        low, high = high, 2 * high
        if high > _LARGEST_NOISE:
            raise InputError(f"no noise keeps {releases} rounds within privacy.epsilon={epsilon:g}; it must be larger")
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if too_much(middle) else (low, middle)
    return high


def rounds_within(epsilon: float, spent_by: Callable[[int], float], most: int) -> int:
    """How many of at most ``most`` rounds a budget lasts for, given what a number of rounds spends."""
    return bisect_right(range(1, most + 1), epsilon, key=spent_by)
