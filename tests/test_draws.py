"""What clients draw is a function of seed, client, round, epoch, purpose and place."""

import random
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.stats import chisquare

from recbole_fedkd.engine.fleet.draws import drawn_factors
from recbole_fedkd.federated import draws
from recbole_fedkd.federated.client import own_streams
from recbole_fedkd.federated.draws import DROPOUT, NEGATIVES, ORDER, KeyedDraws
from recbole_fedkd.model.dropout import HandedAttention, dropping_by

pytestmark = pytest.mark.without_loops

MASK = 2**64 - 1


def mixed(state: int) -> int:
    """SplitMix64's output function in Python's whole numbers."""
    state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ state >> 27) * 0x94D049BB133111EB) & MASK
    return state ^ state >> 31


def keyed(*numbers: int) -> int:
    state = 0
    for number in numbers:
        state = mixed(((state ^ (number & MASK)) + 0x9E3779B97F4A7C15) & MASK)
    return state


def word(key: int, place: int) -> int:
    return mixed((key + place * 0x9E3779B97F4A7C15) & MASK)


def slow_order(seed: int, client: int, round_index: int, epoch: int, size: int) -> list[int]:
    key = keyed(seed, client + 1, round_index, epoch, ORDER)
    return sorted(range(size), key=lambda place: (word(key, place) >> 28, place))


def slow_negatives(
    seed: int, client: int, round_index: int, epoch: int, taken: list[set[int]], item_count: int
) -> list[int]:
    found = []
    for place, own in enumerate(taken):
        attempt = 0
        while True:
            drawn = word(keyed(seed, client + 1, round_index, epoch, NEGATIVES, attempt), place)
            item = 1 + ((drawn >> 32) * (item_count - 1) >> 32)
            if item not in own:
                break
            attempt += 1
        found.append(item)
    return found


@settings(max_examples=40, deadline=None)
@given(
    some.integers(-5, 2**64 - 1),
    some.dictionaries(some.integers(0, 10**6), some.integers(0, 40), min_size=1, max_size=4),
    some.integers(0, 10**4),
)
def test_draws_of_many_are_those_of_each_in_plain_python(seed, sizes, round_index):
    clients, counts, item_count = list(sizes), list(sizes.values()), 5
    keyed_draws = KeyedDraws(seed, clients, round_index)
    owners = np.repeat(np.arange(len(clients)), counts)
    held = [{1 + client % 4, 1 + client % 3} for client in clients]
    table = torch.tensor([[item in own for item in range(item_count)] for own in held])
    for epoch in (1, 2):
        drawn = keyed_draws.epoch()
        orders = drawn.orders(counts)
        negatives = drawn.negatives(counts, item_count, lambda places, items: table[owners[places.numpy()], items])
        for slot, own in enumerate(negatives.split(counts)):
            who = seed, clients[slot], round_index, epoch
            assert orders[slot, : counts[slot]].tolist() == slow_order(*who, counts[slot])
            assert own.tolist() == slow_negatives(*who, [held[slot]] * counts[slot], item_count)


def test_every_order_and_every_item_is_as_likely_as_any_other():
    clients = range(6000)
    drawn = KeyedDraws(7, clients, 3).epoch()
    counts = dict.fromkeys(permutations(range(3)), 0)
    for order in drawn.orders([3] * len(clients)).tolist():
        counts[tuple(order)] += 1
    assert chisquare(list(counts.values())).pvalue > 1e-3
    items = drawn.negatives([2] * len(clients), 8, lambda places, items: items == 4)
    found = torch.bincount(items, minlength=8).tolist()
    assert found[0] == found[4] == 0
    assert chisquare([count for item, count in enumerate(found) if item not in (0, 4)]).pvalue > 1e-3


def test_neither_places_nor_clients_nor_rounds_nor_epochs_draw_alike():
    places = 200
    rows = []
    for seed in (0, 1):
        for round_index in (0, 1):
            of_round = KeyedDraws(seed, range(20), round_index)
            for _ in range(2):
                rows += [row.float() for row in of_round.epoch().orders([places] * 20)]
    correlated = torch.corrcoef(torch.stack(rows)).fill_diagonal_(0.0)
    assert correlated.abs().max() < 6 / places**0.5


def test_a_clients_streams_begin_at_the_upper_half_of_its_word():
    assert KeyedDraws(2020, [17], 3).seeds == [keyed(2020, 18, 3) >> 32]


@pytest.mark.parametrize(("model", "negatives"), [("BPR", 1), ("NeuMF", 2), ("FM", 0)])
def test_a_clients_loader_of_recboles_draws_orders_and_negatives_as_the_packages_own_networks_do(
    prepared, model, negatives
):
    sampling = {"distribution": "uniform", "sample_num": negatives, "alpha": 1.0, "dynamic": False, "candidate_num": 0}
    keys = {"train_neg_sample_args": sampling} if negatives else {"threshold": {"rating": 3}}
    _, _, (loader, *_), _ = prepared(model, train_batch_size=16, **keys)
    users, items = (loader.dataset.inter_feat[field].tolist() for field in ("user_id", "item_id"))
    taken = {user: {item for other, item in zip(users, items, strict=True) if other == user} for user in users}
    size, item_count = loader.batch_sampler.batch_size, loader.dataset.item_num
    loader.draws = KeyedDraws(7, [3], 5)
    for epoch in (1, 2):
        order = slow_order(7, 3, 5, epoch, len(users))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        owners = [taken[users[row]] for rows in batches for row in rows * negatives]
        drawn = slow_negatives(7, 3, 5, epoch, owners, item_count)
        for rows, batch in zip(batches, loader, strict=True):
            own, drawn = drawn[: len(rows) * negatives], drawn[len(rows) * negatives :]
            found = (batch["user_id"].tolist(), batch["item_id"].tolist())
            if model == "BPR":
                assert found == ([users[row] for row in rows], [items[row] for row in rows])
                assert batch["neg_item_id"].tolist() == own
            else:
                assert found == ([users[row] for row in rows * (1 + negatives)], [items[row] for row in rows] + own)


def slow_factors(
    seed: int, client: int, round_index: int, call: int, shape: tuple[int, ...], kept: float
) -> np.ndarray:
    key, factor = keyed(seed, client + 1, round_index, 0, DROPOUT, call), np.float32(1) / np.float32(kept)
    stays = [word(key, place) < kept * 2**64 for place in range(int(np.prod(shape)))]
    return np.where(stays, factor, np.float32(0)).reshape(shape)


@pytest.fixture(params=["compiled", "by torch"])
def way(request, monkeypatch):
    if request.param == "compiled" and not draws.has_compiler():
        pytest.skip("numba is not installed")
    monkeypatch.setattr(draws, "has_compiler", lambda: request.param == "compiled")


@pytest.mark.parametrize("layers", [[(0.3, (7,)), (0.5, (2, 3))], [(1e-17, (1,))], [(0.999, (67,)), (0.1, ())]])
def test_what_packed_clients_drop_is_what_each_drops_in_plain_python(way, layers):
    """Two layers and two steps, in the second of which the last client has no samples left; what fills up stays."""
    clients, steps = [17, 4, 10**6], [[4, 2, 3], [4, 1]]
    dropout, cpu = KeyedDraws(2020, clients, 3).dropout, torch.device("cpu")
    alone = [KeyedDraws(2020, [client], 3).dropout.of_one for client in clients]
    for step, counts in enumerate(steps):
        of_layers = drawn_factors(dropout, counts, 4, layers, cpu)
        for layer, (factors, (share, shape)) in enumerate(zip(of_layers, layers, strict=True)):
            assert factors.shape == (len(counts), 4, *shape) and factors.dtype == torch.float32
            for slot, count in enumerate(counts):
                call = step * len(layers) + layer
                expected = slow_factors(2020, clients[slot], 3, call, (count, *shape), 1.0 - share)
                np.testing.assert_array_equal(factors[slot, :count].numpy(), expected)
                np.testing.assert_array_equal(alone[slot]((count, *shape), 1.0 - share, cpu).numpy(), expected)
                assert bool((factors[slot, count:] > 0).all())


def test_as_much_stays_as_should_and_nothing_stays_together():
    """By client, round, call and place: shares, and correlations between any two, within what chance allows."""
    cpu, width, kept = torch.device("cpu"), 4000, 0.8
    rows = []
    for seed, round_index in ((0, 0), (0, 1), (1, 0)):
        dropout = KeyedDraws(seed, range(10), round_index).dropout
        for _ in range(3):
            rows += list(dropout.factors([1] * 10, 1, (width,), kept, cpu).view(10, width) > 0)
    stays = torch.stack(rows).double()
    deviation = (kept * (1 - kept)) ** 0.5
    assert (stays.mean(1) - kept).abs().max() < 5 * deviation / width**0.5
    assert abs(stays.mean() - kept) < 4 * deviation / stays.numel() ** 0.5
    assert torch.corrcoef(stays).fill_diagonal_(0.0).abs().max() < 6 / width**0.5
    for shift in (1, 2, 16, 64):
        beside = ((stays[:, shift:] - kept) * (stays[:, :-shift] - kept)).mean() / deviation**2
        assert abs(beside) < 4 / stays.numel() ** 0.5


class Own(torch.nn.Module):
    """A model with torch's own layers, one of which drops in two places."""

    def __init__(self):
        super().__init__()
        self.dropout, self.attention = torch.nn.Dropout(0.4), torch.nn.MultiheadAttention(8, 2, dropout=0.3)

    def forward(self, values):
        return self.dropout(self.attention(self.dropout(values), values, values)[0])


def test_what_is_dropped_shares_no_word_with_an_order_or_a_negative():
    epochs = {(7, 3, 5, epoch, purpose) for epoch in range(1, 9) for purpose in (ORDER, NEGATIVES)}
    attempts = {(*key, attempt) for key in epochs for attempt in range(9)}
    calls = {(7, 3, 5, 0, DROPOUT, call) for call in range(99)}
    words = {keyed(*numbers) for numbers in epochs | attempts | calls}
    assert len(words) == len(epochs) + len(attempts) + len(calls)
    dropout = KeyedDraws(7, [2], 5).dropout
    drawn = [dropout.factors([1], 1, (64,), 0.5, torch.device("cpu")).flatten() for _ in range(3)]
    for factors, call in zip(drawn, range(3), strict=True):
        key = keyed(7, 3, 5, 0, DROPOUT, call)
        assert (factors > 0).tolist() == [word(key, place) < 2**63 for place in range(64)]


def test_layers_of_torch_drop_by_a_clients_draws_in_training_alone_and_are_theirs_again_afterwards():
    model, values = Own(), torch.randn(5, 3, 8)
    before, evaluated = dict(vars(model.dropout)), model.eval()(values)
    model.train()

    def trained(client):
        with dropping_by(model, KeyedDraws(2020, [client], 3).dropout.of_one):
            return model(values)

    torch.manual_seed(1)
    one = trained(17)
    torch.manual_seed(2)
    assert torch.equal(trained(17), one) and not torch.equal(trained(18), one)
    factors = KeyedDraws(2020, [17], 3).dropout.of_one
    first, weights = (factors(shape, kept, values.device) for shape, kept in (((5, 3, 8), 0.6), ((3, 2, 5, 5), 0.7)))
    attention = HandedAttention(model.attention)
    attention.dropout.handed = [weights]
    expected = attention(values * first, values, values)[0] * factors((5, 3, 8), 0.6, values.device)
    torch.testing.assert_close(one, expected)
    with dropping_by(model.eval(), factors):
        torch.testing.assert_close(model(values), evaluated)
    assert dict(vars(model.dropout)) == {**before, "training": False} and "forward" not in vars(model.attention)


def test_clients_leave_the_random_streams_of_the_process_as_they_were():
    def drawn():
        return random.random(), np.random.random(), torch.rand(1).item()

    def after(clients):
        random.seed(5), np.random.seed(5), torch.manual_seed(5)
        for seed in clients:
            with own_streams(seed, torch.device("cpu")):
                inside.append(drawn())
        return drawn()

    inside = []
    assert after([3, 4, 3]) == after([])
    assert inside[0] == inside[2] != inside[1]
