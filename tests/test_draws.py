"""What clients draw is a function of seed, client, round, epoch, purpose and place."""

import random
from itertools import permutations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.stats import chisquare

from recbole_fedkd.engine.fleet.draws import Streams
from recbole_fedkd.federated.client import own_streams
from recbole_fedkd.federated.draws import NEGATIVES, ORDER, KeyedDraws
from recbole_fedkd.model.backbone import drawn_mask

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
    draws = KeyedDraws(seed, clients, round_index)
    owners = np.repeat(np.arange(len(clients)), counts)
    held = [{1 + client % 4, 1 + client % 3} for client in clients]
    table = torch.tensor([[item in own for item in range(item_count)] for own in held])
    for epoch in (1, 2):
        drawn = draws.epoch()
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
            draws = KeyedDraws(seed, range(20), round_index)
            for _ in range(2):
                rows += [row.float() for row in draws.epoch().orders([places] * 20)]
    correlated = torch.corrcoef(torch.stack(rows)).fill_diagonal_(0.0)
    assert correlated.abs().max() < 6 / places**0.5


def test_a_clients_streams_begin_at_the_upper_half_of_its_word():
    assert KeyedDraws(2020, [17], 3).seeds == [keyed(2020, 18, 3) >> 32]


def test_masks_of_packed_clients_are_those_that_each_draws_by_itself():
    """Two layers, and a client whose batch is filled up: nothing of what fills up is dropped."""
    layers, counts = [(0.3, (7,)), (0.5, (2, 3))], [4, 2]
    streams = Streams(2020, [17, 4], 3)
    masks = streams.masks(counts, 4, layers)
    for slot, count in enumerate(counts):
        torch.manual_seed(streams.own.seeds[slot])
        for mask, (share, shape) in zip(masks, layers, strict=True):
            alone = drawn_mask(torch.zeros(count, *shape), 1.0 - share)
            assert torch.equal(mask[slot, :count].float(), alone) and bool(mask[slot, count:].all())


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
