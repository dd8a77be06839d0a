"""Partitions: which client each user lives on. Every user lives on exactly one.

A partition is a function of counts and a random generator, registered under the name that the config key ``partition``
starts with: ``random``, ``user``, ``attribute:<field>``, ``dirichlet:<alpha>``, ``quantity:<alpha>``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.errors import InputError, nearest
from recbole_fedkd.registry import Registry, read_settings

Clients = NDArray[np.int64]


@dataclass(frozen=True)
class UserBase:
    """What a partition may look at.

    Attributes:
        label_histograms: training samples per user and label ``[users, T]``; users without padding, from 0.
        attributes: user field to its value's index per user ``[users]``.
        client_num: number of clients asked for; None if the config leaves it open.
    """

    label_histograms: NDArray[np.int64]
    attributes: dict[str, NDArray[np.int64]]
    client_num: int | None

    @property
    def users(self) -> int:
        """Number of users."""
        return len(self.label_histograms)


Partition = Callable[..., Clients]
"""A function of the users' base, the argument behind the colon (or None), a random generator and, where it takes them, its
settings."""

PARTITIONS: Registry[Partition] = Registry("partition", "partitions")
register_partition = PARTITIONS.register


def partition_users(scheme: str, user_base: UserBase, seed: int, config: Any = None) -> Clients:
    """Map every user to a client.

    Args:
        scheme: value of the config key ``partition``.
        user_base: what a partition may look at.
        seed: decides the map, together with the scheme and these.
        config: where the partition's own keys are, if it has any.

    Returns:
        Client number per user ``[users]``; the numbers are ``0..K-1`` and each has at least one user.

    Raises:
        InputError: unknown scheme, bad argument, or more clients than users.
    """
    name, _, argument = check_name_of(scheme).partition(":")
    generator = np.random.default_rng(np.random.SeedSequence([seed, 0x9A27]))
    own: Any = read_settings(PARTITIONS.settings[name], config or {})
    taken = len(signature(PARTITIONS[name]).parameters)
    clients = np.asarray(PARTITIONS[name](*(user_base, argument or None, generator, own)[:taken]))
    if clients.dtype.kind not in "iu" or clients.shape != (user_base.users,) or clients.min() < 0:
        raise InputError(
            f"partition '{name}' gives an array of {clients.dtype} of shape {clients.shape}; it must give the number of a "
            f"client, from 0, for each of the {user_base.users} users"
        )
    return clients.astype(np.int64, copy=False)


def check_name_of(scheme: str) -> str:
    """The scheme; raises :class:`InputError` where no partition is called like what it starts with."""
    name = scheme.partition(":")[0]
    if name not in PARTITIONS:
        raise InputError(
            f"partition '{scheme}' is unknown; allowed are {', '.join(PARTITIONS)}, with an argument after a colon "
            f"where one is needed (attribute:<field>, dirichlet:<alpha>, quantity:<alpha>){nearest(name, PARTITIONS)}"
        )
    return scheme


def held_out_clients(clients: int, share: float, seed: int) -> Clients:
    """Clients that are kept out of training, to come as strangers afterwards.

    Args:
        clients: how many there are.
        share: of them that is kept out, at least one unless it is 0; value of the config key ``holdout_clients``.
        seed: decides which.

    Returns:
        Their numbers, ascending.

    Raises:
        InputError: none would be left to train.
    """
    count = max(1, round(share * clients)) if share else 0
    if count >= clients > 0:
        raise InputError(
            f"holdout_clients is {share}, which keeps {count} of {clients} client(s) out of training and leaves none; it needs "
            "more clients, or a smaller share"
        )
    generator = np.random.default_rng(np.random.SeedSequence([seed, 0x51A9]))
    return np.sort(generator.choice(clients, count, replace=False)).astype(np.int64)


def check_clients_per_round(config: Any, clients: int) -> None:
    """Raise :class:`InputError` if a round is to have more clients than there are, or more answers than clients."""
    asked = config["clients_per_round"]
    if asked is not None and asked > clients:
        raise InputError(
            f"clients_per_round is {asked}, but there are only {clients} clients (partition {config['partition']}); "
            "leave it unset for all of them"
        )
    drawn, needed = asked if asked is not None else clients, config["min_clients"]
    if needed is not None and needed > drawn:
        raise InputError(
            f"min_clients is {needed}, but only {drawn} clients take part in a round; it must be {drawn} at most"
        )


def check_scheme(config: Any) -> None:
    """Refuse what can be known of the clients of a config before there are users.

    Raises:
        InputError: the partition is unknown or has a wrong argument, or there are fewer clients than keys ask for.
    """
    scheme = config["partition"]
    name, _, argument = check_name_of(scheme).partition(":")
    if name in _ARGUMENTS:
        _ARGUMENTS[name](name, argument or None)
    if name in _OF_CLIENT_NUM:
        count = config["client_num"]
        if count is None:
            raise _without_client_num(name)
        check_clients_per_round(config, count - len(held_out_clients(count, config["holdout_clients"], config["seed"])))


@register_partition("random")
def random_partition(user_base: UserBase, argument: str | None, generator: np.random.Generator) -> Clients:
    """Users shuffled and dealt out; client sizes differ by at most one user."""
    _refuse_argument("random", argument)
    clients = np.arange(user_base.users, dtype=np.int64) % _client_num("random", user_base)
    return generator.permutation(clients)


@register_partition("user")
def user_partition(user_base: UserBase, argument: str | None, generator: np.random.Generator) -> Clients:
    """One client per user, the cross-device setting."""
    _refuse_argument("user", argument)
    return np.arange(user_base.users, dtype=np.int64)


@register_partition("attribute")
def attribute_partition(user_base: UserBase, argument: str | None, generator: np.random.Generator) -> Clients:
    """One client per value of a user field, such as ``attribute:occupation``."""
    if argument not in user_base.attributes:
        known = ", ".join(sorted(user_base.attributes)) or "none is loaded"
        raise InputError(
            f"partition 'attribute:{argument or ''}' names no loaded user field; the user fields are: {known}"
        )
    clients: Clients = np.unique(user_base.attributes[argument], return_inverse=True)[1].astype(np.int64)
    return clients


@register_partition("dirichlet")
def dirichlet_partition(user_base: UserBase, argument: str | None, generator: np.random.Generator) -> Clients:
    """Label skew: each client prefers labels by a draw from ``Dirichlet(alpha * global label shares)``.

    A user goes to client ``k`` with a probability proportional to the likelihood ratio of their label shares under the
    client's preference, ``sum_t share_ut pi_kt / prior_t``. Small ``alpha``: strong skew; large: ``random``.
    """
    alpha = _positive_number("dirichlet", argument)
    clients = _client_num("dirichlet", user_base)
    counts = user_base.label_histograms.astype(float)
    prior = np.maximum(counts.sum(0), 1e-9)
    prior /= prior.sum()
    preference = generator.dirichlet(np.maximum(alpha * prior * len(prior), 1e-9), size=clients)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1.0)
    odds = shares @ (preference / prior).T + 1e-12
    cumulative = np.cumsum(odds / odds.sum(1, keepdims=True), 1)
    drawn = generator.random((user_base.users, 1))
    assigned = np.minimum((drawn > cumulative).sum(1), clients - 1).astype(np.int64)
    return _fill_empty(assigned, clients, generator)


@register_partition("quantity")
def quantity_partition(user_base: UserBase, argument: str | None, generator: np.random.Generator) -> Clients:
    """Size skew: the clients' shares of the users are a draw from ``Dirichlet(alpha)``."""
    alpha = _positive_number("quantity", argument)
    clients = _client_num("quantity", user_base)
    shares = generator.dirichlet(np.full(clients, alpha))
    bounds = np.round(np.cumsum(shares) * user_base.users).astype(np.int64)
    assigned = np.minimum(np.searchsorted(bounds, np.arange(user_base.users), side="right"), clients - 1)
    return _fill_empty(generator.permutation(assigned), clients, generator)


def _fill_empty(assigned: Clients, clients: int, generator: np.random.Generator) -> Clients:
    """Give every client without a user one user of the largest client."""
    assigned = assigned.copy()
    sizes = np.bincount(assigned, minlength=clients)
    for client in np.flatnonzero(sizes == 0):
        largest = int(sizes.argmax())
        assigned[generator.choice(np.flatnonzero(assigned == largest))] = client
        sizes[largest] -= 1
        sizes[client] += 1
    return assigned


def _client_num(name: str, user_base: UserBase) -> int:
    if user_base.client_num is None:
        raise _without_client_num(name)
    if user_base.client_num > user_base.users:
        raise InputError(f"client_num is {user_base.client_num}, but the dataset has only {user_base.users} users")
    return user_base.client_num


def _without_client_num(name: str) -> InputError:
    return InputError(f"partition '{name}' needs client_num, the number of clients")


def _refuse_argument(name: str, argument: str | None) -> None:
    if argument is not None:
        raise InputError(f"partition '{name}:{argument}' has an argument; '{name}' takes none")


def _positive_number(name: str, argument: str | None) -> float:
    try:
        number = float(argument or "")
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise InputError(
            f"partition '{name}:{argument or ''}' needs a positive number after the colon, such as '{name}:0.5'"
        )
    return number


_OF_CLIENT_NUM = ("random", "dirichlet", "quantity")
"""Partitions into as many clients as the key says."""

_ARGUMENTS: dict[str, Callable[[str, str | None], Any]] = {
    **dict.fromkeys(("random", "user"), _refuse_argument),
    **dict.fromkeys(("dirichlet", "quantity"), _positive_number),
}
"""Checks of what stands behind the colon."""
