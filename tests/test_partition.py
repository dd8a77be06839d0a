"""Partitions: every user on exactly one client, decided by the seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_fedkd.data.partition import PARTITIONS, UserBase, partition_users
from recbole_fedkd.errors import InputError
from recbole_fedkd.registry import NoSettings

SCHEMES = ["random", "user", "attribute:group", "dirichlet:0.1", "dirichlet:100", "quantity:0.3", "quantity:50"]


def user_base(users: int, clients: int | None, seed: int = 0) -> UserBase:
    generator = np.random.default_rng(seed)
    histograms = generator.poisson(3, size=(users, 5))
    return UserBase(histograms, {"group": generator.integers(1, 4, users)}, clients)


@settings(deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    users=st.integers(1, 60),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_every_user_lives_on_exactly_one_client_and_no_client_is_empty(scheme, users, share, seed):
    clients = 1 + int(share * (users - 1))
    assigned = partition_users(scheme, user_base(users, clients), seed)
    assert assigned.shape == (users,)
    counts = np.bincount(assigned)
    assert counts.sum() == users and (counts > 0).all()
    if not scheme.startswith(("user", "attribute")):
        assert len(counts) == clients


@settings(deadline=None)
@given(scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 2**31))
def test_the_seed_decides(scheme, seed):
    people = user_base(40, 5)
    assert np.array_equal(partition_users(scheme, people, seed), partition_users(scheme, people, seed))


def test_another_seed_gives_another_partition():
    people = user_base(200, 5)
    for scheme in ("random", "dirichlet:1", "quantity:1"):
        assert not np.array_equal(partition_users(scheme, people, 1), partition_users(scheme, people, 2))


def test_random_clients_are_equally_large():
    counts = np.bincount(partition_users("random", user_base(103, 10), 0))
    assert counts.max() - counts.min() <= 1


def test_user_partition_is_one_client_each():
    assert partition_users("user", user_base(7, 3), 0).tolist() == list(range(7))


def test_attribute_partition_follows_the_field():
    people = user_base(50, None)
    assigned = partition_users("attribute:group", people, 0)
    for value in np.unique(people.attributes["group"]):
        assert len(set(assigned[people.attributes["group"] == value])) == 1
    assert len(np.unique(assigned)) == len(np.unique(people.attributes["group"]))


def label_skew(alpha: float) -> float:
    """Mean total variation between the clients' label shares and the population's."""
    generator = np.random.default_rng(0)
    histograms = np.eye(5, dtype=np.int64)[generator.integers(0, 5, 2000)] * 10
    assigned = partition_users(f"dirichlet:{alpha}", UserBase(histograms, {}, 8), 0)
    whole = histograms.sum(0) / histograms.sum()
    shares = [histograms[assigned == client].sum(0) / histograms[assigned == client].sum() for client in range(8)]
    return float(np.mean([np.abs(share - whole).sum() / 2 for share in shares]))


def test_small_alpha_skews_the_labels_and_large_alpha_does_not():
    assert label_skew(0.1) > 0.4
    assert label_skew(1000.0) < 0.1


def test_small_alpha_skews_the_sizes_and_large_alpha_does_not():
    def largest(alpha: float) -> int:
        return int(np.bincount(partition_users(f"quantity:{alpha}", user_base(1000, 10), 0)).max())

    assert largest(0.2) > 250
    assert largest(1000.0) < 130


@pytest.mark.parametrize(
    ("scheme", "clients", "says"),
    [
        ("randm", 3, "did you mean 'random'"),
        ("random:3", 3, "takes none"),
        ("attribute:height", 3, "the user fields are: group"),
        ("dirichlet", 3, "positive number"),
        ("dirichlet:-1", 3, "positive number"),
        ("quantity:nan", 3, "positive number"),
        ("random", 11, "only 10 users"),
        ("random", None, "needs client_num"),
    ],
)
def test_a_bad_scheme_is_told_in_one_line(scheme, clients, says):
    with pytest.raises(InputError, match=says) as caught:
        partition_users(scheme, user_base(10, clients), 0)
    assert "\n" not in str(caught.value)


def test_a_partition_can_be_added_from_outside():
    from recbole_fedkd.data.partition import register_partition

    @register_partition("evenodd")
    def even_odd(people, argument, generator):
        return np.arange(people.users) % 2

    try:
        assert partition_users("evenodd", user_base(4, None), 0).tolist() == [0, 1, 0, 1]
    finally:
        del PARTITIONS["evenodd"]


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda base, argument, generator: np.zeros(base.users), "array of float64"),
        (lambda base, argument, generator, settings: np.zeros(base.users + 1, int), "shape (6,)"),
        (lambda base, argument, generator: np.arange(base.users) - 1, "from 0, for each of the 5 users"),
    ],
)
def test_a_partition_of_ones_own_that_gives_no_clients_is_told(monkeypatch, made, says):
    """With settings or without, whatever it takes."""
    monkeypatch.setitem(PARTITIONS, "own", made)
    monkeypatch.setitem(PARTITIONS.settings, "own", NoSettings)
    with pytest.raises(InputError) as refused:
        partition_users("own", user_base(5, 2), 1)
    assert says in str(refused.value)
