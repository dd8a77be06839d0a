"""Asked for every item at once, a network says what it says of each item by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import needs_numba
from torch.func import functional_call, vmap

from recbole_fedkd.distillation.exchange import FactorExchange, FactorSettings
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.engine.fleet.group import Caller
from recbole_fedkd.model import catalogue
from recbole_fedkd.model.asked_again import AskedAgain
from recbole_fedkd.model.catalogue import rank_items
from recbole_fedkd.model.compiled import has_compiler
from recbole_fedkd.model.known import KnownPairs
from recbole_fedkd.model.network import Architecture, AttentiveNetwork, FeatureTable, History
from recbole_fedkd.model.pair import TeacherAndStudent
from recbole_fedkd.model.ranking import WIDTH, expected_values

pytestmark = pytest.mark.without_loops

# Items of two blocks, the second of which is not full.
USERS, ITEMS, LABELS, SLOTS = 6, WIDTH + 23, 3, 5


def network_of(
    backbone="cnn", attention=True, history=True, context=False, prior=False, known=False, profiles=True, **different
):
    """A network with numbers, several tokens a field, odd names, padded and full and empty histories."""
    torch.manual_seed(5)
    users = FeatureTable(
        "user", USERS, {"age": torch.randint(0, 4, (USERS,)), "income": torch.randn(USERS)}, {"age": 4}
    )
    users = users if profiles else FeatureTable("user", USERS, {}, {})
    columns = {"genre": torch.randint(0, 7, (ITEMS, 3)), "price": torch.randn(ITEMS)}
    items = FeatureTable("item", ITEMS, columns, {"genre": 7})
    past = torch.stack([torch.randperm(ITEMS - 1)[:SLOTS] + 1 for _ in range(USERS)])
    past[2, 2:], past[3], past[4, 1] = 0, 0, past[4, 0]
    tokens = {"hour": 4, "load": None} if context else {}
    of_past = {"hour": torch.randint(0, 4, (USERS, SLOTS)), "load": torch.randn(USERS, SLOTS)} if context else {}
    kept = History(past, torch.randint(0, LABELS, (USERS, SLOTS)), of_past) if history else None
    values = {
        "embedding_size": 6,
        "hidden_sizes": (5, 7),
        "dropout_prob": 0.3,
        "attention_heads": 3,
        "use_user_id": True,
        "history_length": SLOTS - 1 if history else 0,
    }
    architecture = Architecture(
        labels=LABELS, backbone=backbone, attention=attention, item_prior=prior, **{**values, **different}
    )
    network = AttentiveNetwork(architecture, users, items, kept, tokens, pairs() if known else None)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.5)
    if prior:
        network.item_prior.normal_()
    return network.eval()


def pairs():
    """What rows of the users say of pairs."""
    numbers, items = torch.arange(40) % (USERS - 1) + 1, torch.randint(1, ITEMS, (40,))
    labels, values = torch.randint(0, LABELS, (40,)), torch.arange(1.0, LABELS + 1)
    order = torch.argsort(numbers, stable=True)
    rows = Rows(numbers[order], items[order], values.double()[labels[order]], USERS, ITEMS)
    settings = FactorSettings(factor_size=3, sketch_width=4, sketch_passes=1, em_steps=1)
    return KnownPairs(FactorExchange(settings, rows, labels[order], values))


def context_of(network, users):
    if not network.context_fields:
        return {}
    return {"hour": torch.randint(0, 4, (len(users), 1)), "load": torch.randn(len(users), 1)}


def item_by_item(network, users, context):
    """The slow version: one item at a time, as training sees it."""
    columns = [network(users, torch.full((len(users), 1), item), context) for item in range(ITEMS)]
    return torch.cat(columns, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "backbone, attention, history, context", itertools.product(["cnn", "mlp"], *[[False, True]] * 3)
)
def test_every_architecture_ranks_as_it_scores(backbone, attention, history, context):
    network = network_of(backbone, attention, history, context, prior=history)
    users = torch.tensor([1, 5, 2, 3, 4, 0, 2])
    told = context_of(network, users)
    expected = item_by_item(network, users, told)
    torch.testing.assert_close(rank_items(network, users, told, ITEMS), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "different",
    [{"use_user_id": False}, {"use_user_id": False, "profiles": False}, {"hidden_sizes": (4,)}, {"attention_heads": 1}],
)
def test_sizes_do_not_matter(different):
    network, users = network_of(**different), torch.arange(USERS)
    expected = item_by_item(network, users, {})
    torch.testing.assert_close(rank_items(network, users, {}, ITEMS), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_users_of_several_turns_rank_as_each_does(monkeypatch):
    monkeypatch.setattr(catalogue, "AT_ONCE", 2)
    network, users = network_of(context=True), torch.tensor([1, 5, 2, 3, 4])
    told = context_of(network, users)
    expected = item_by_item(network, users, told)
    torch.testing.assert_close(rank_items(network, users, told, ITEMS), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_that_are_not_finite_are_seen_in_the_scores():
    network = network_of()
    network.backbone.layers[0].weight.data[0] = float("nan")
    assert not rank_items(network, torch.arange(USERS), {}, ITEMS).isfinite().any()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("different", [{}, {"known": True}, {"context": True}], ids=str)
def test_nobody_has_no_ranking(different, gradients):
    network, nobody = network_of(**different), torch.arange(0)
    with torch.set_grad_enabled(gradients):
        assert rank_items(network, nobody, context_of(network, nobody), ITEMS).shape == (0, ITEMS, LABELS)
        chosen = torch.ones(0, 4, dtype=torch.long)
        asked = rank_items(network, nobody, context_of(network, nobody), ITEMS, chosen=chosen)
        assert asked.shape == (0, 4, LABELS)


@torch.no_grad()
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_scores_that_no_exponent_holds_are_taken_apart_as_a_softmax_does(scale):
    network, users = network_of(), torch.arange(USERS)
    network.history_attention.head.mul_(scale)
    network.field_attention.head.mul_(scale)
    expected = item_by_item(network, users, {})
    found = rank_items(network, users, {}, ITEMS)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("serve", ["student", "teacher", "both"])
def test_a_pair_ranks_by_what_serves(serve):
    pair = TeacherAndStudent(network_of(), network_of("mlp", embedding_size=8), serve).eval()
    users = torch.arange(USERS)
    expected = item_by_item(pair, users, {})
    torch.testing.assert_close(rank_items(pair, users, {}, ITEMS), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("history, context", itertools.product([False, True], repeat=2))
def test_what_rows_say_of_a_pair_is_part_of_its_rank(history, context):
    network, users = network_of(history=history, context=context, known=True), torch.arange(1, USERS)
    told = context_of(network, users)
    expected = item_by_item(network, users, told)
    torch.testing.assert_close(rank_items(network, users, told, ITEMS), expected, rtol=1e-4, atol=1e-5)


@needs_numba
@torch.no_grad()
@pytest.mark.parametrize("serve", [None, "teacher", "both"])
def test_what_is_kept_of_the_items_changes_no_bit(serve):
    network = network_of() if serve is None else TeacherAndStudent(network_of(), network_of("mlp"), serve).eval()
    users = torch.arange(USERS)
    of_items = network.catalogue()
    one_by_one = [rank_items(network, users[place : place + 1], {}, ITEMS, of_items) for place in range(USERS)]
    assert torch.equal(torch.cat(one_by_one), rank_items(network, users, {}, ITEMS))


def test_the_latest_are_kept_and_no_more(monkeypatch):
    monkeypatch.setattr(catalogue, "KEPT", 1)
    monkeypatch.setattr(catalogue, "KEPT_ITEMS", 100)
    made, kept = [], catalogue.Kept(100)

    def make(number):
        return kept.of(number, lambda: made.append(number) or number)

    assert [make(number) for number in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2], "1 was asked for again before 2 went"


def test_in_training_and_with_gradients_the_network_itself_is_asked():
    network, users = network_of(), torch.arange(USERS)
    assert rank_items(network, users, {}, ITEMS).requires_grad
    network.train()
    with torch.no_grad():
        torch.manual_seed(1)
        dropped = rank_items(network, users, {}, ITEMS)
        torch.manual_seed(1)
        assert torch.equal(dropped, network(users, torch.arange(ITEMS).expand(USERS, -1)))


@torch.no_grad()
@pytest.mark.parametrize(
    "backbone, history, prior, known",
    [("cnn", True, True, False), ("mlp", False, False, False), ("cnn", True, False, True)],
)
def test_chosen_items_rank_as_they_do_among_all(backbone, history, prior, known):
    network, users = network_of(backbone, history=history, prior=prior, known=known), torch.arange(1, USERS)
    everything = rank_items(network, users, {}, ITEMS)
    chosen = torch.stack([torch.randperm(ITEMS)[: WIDTH + 5] for _ in users])
    own = network.history_items[1, :WIDTH] if history else chosen[0, :SLOTS]
    chosen[0, : len(own)] = own  # what a user has had sees no label of its own
    found = rank_items(network, users, {}, ITEMS, chosen=chosen)
    expected = everything.gather(1, chosen.unsqueeze(2).expand(-1, -1, LABELS))
    # Loops make the same bits, whichever items stand beside one; torch does not.
    assert torch.equal(found, expected) or not has_compiler()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, network(users, chosen), rtol=1e-4, atol=1e-5)


@needs_numba
@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("serve", ["student", "both"])
def test_what_is_asked_again_is_the_same_bits_whichever_items_and_users_it_is_asked_of(scale, serve):
    network = TeacherAndStudent(network_of(prior=True), network_of("mlp"), serve).eval()
    for parameter in network.parameters():
        parameter.mul_(scale)
    users = torch.arange(1, USERS)
    everything, asked = rank_items(network, users, {}, ITEMS), AskedAgain.of_one(network, users)
    places = torch.tensor([3, 0, 3, 1])
    chosen = torch.stack([torch.randperm(ITEMS)[: WIDTH + 5] for _ in places])
    for items in (chosen, chosen[:, :3]):
        expected = everything[places].gather(1, items.unsqueeze(2).expand(-1, -1, LABELS))
        assert torch.equal(asked.logits(places, items), expected)
    values = torch.arange(1.0, LABELS + 1)
    means = expected_values(everything.transpose(1, 2), values)
    torch.testing.assert_close(means, everything.softmax(2) @ values)
    some = expected_values(everything[:, 7:12].transpose(1, 2), values)
    assert torch.equal(some, means[:, 7:12])


@needs_numba
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_gives_no_number(bad):
    logits = torch.randn(2, LABELS, 40)
    logits[1, 2, 5] = bad
    means = expected_values(logits, torch.arange(1.0, LABELS + 1))
    assert means.isfinite().sum() == 79 and not means[1, 5].isfinite()


@needs_numba
@torch.no_grad()
def test_a_pair_and_a_network_that_is_not_compiled_rank_chosen_items(monkeypatch):
    pair, users = TeacherAndStudent(network_of(), network_of("mlp"), "both").eval(), torch.arange(USERS)
    chosen = torch.randint(0, ITEMS, (USERS, 9))
    expected = pair(users, chosen)
    torch.testing.assert_close(rank_items(pair, users, {}, ITEMS, None, chosen), expected, rtol=1e-4, atol=1e-5)
    assert catalogue.ranks_chosen(pair)
    monkeypatch.setattr(AttentiveNetwork, "ranks", False)
    assert torch.equal(rank_items(pair, users, {}, ITEMS, None, chosen), expected) and not catalogue.ranks_chosen(pair)


@needs_numba
def test_items_are_chosen_where_neither_context_nor_pairs_are_known():
    assert catalogue.ranks_chosen(network_of())
    assert not catalogue.ranks_chosen(network_of(context=True))
    assert not catalogue.ranks_chosen(network_of(known=True))


@needs_numba
@torch.no_grad()
@pytest.mark.parametrize(
    "backbone, attention, history, context", itertools.product(["cnn", "mlp"], *[[False, True]] * 3)
)
def test_many_networks_side_by_side_rank_as_each_by_itself(backbone, attention, history, context):
    network = network_of(backbone, attention, history, context, prior=history)
    assert catalogue.ranks_side_by_side(network)
    users = torch.tensor([2, 5, 4])
    told = context_of(network, users)
    own = {name: value + 0.1 * torch.randn(3, *value.shape) for name, value in network.named_parameters()}
    asked = {name: values.unsqueeze(1) for name, values in told.items()}

    caller = Caller(network, lambda network, users, context: rank_items(network, users, context, ITEMS))

    def rank(parameters, users, context):
        named = {f"network.{name}": value for name, value in parameters.items()}
        return functional_call(caller, named, (users, context))

    side_by_side = vmap(rank)(own, users.unsqueeze(1), asked)
    for place in range(len(users)):
        alone = {name: value[place] for name, value in own.items()}
        of_place = {name: values[place] for name, values in asked.items()}
        assert torch.equal(side_by_side[place], rank(alone, users[place : place + 1], of_place))


def test_networks_that_know_something_of_pairs_are_not_asked_side_by_side():
    assert not catalogue.ranks_side_by_side(network_of(known=True))


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["cnn", "mlp"])
@pytest.mark.parametrize("attends", [False, True])
def test_outputs_that_are_computed_once_are_alike_whatever_the_weights(backbone, attends):
    layers = network_of(backbone).backbone
    of_item, of_both = (0, 1, 2), (layers.count - 1,)
    alike = catalogue._alike(layers.first_places, layers.first_shape(), of_item, of_both, attends)
    weight, _ = layers.first()
    read = weight[:, list(of_both)].flatten(1)
    if attends:
        read = torch.cat([read, weight.double().sum(1).float()], 1)
    assert torch.equal(read[alike.different][alike.which], read)
    assert len(alike.different) == len(read.unique(dim=0)), "and nothing is computed twice"
    reads_items = weight[:, list(of_item)].flatten(1).any(1)
    assert torch.equal(torch.from_numpy(alike.row_of) >= 0, reads_items)
    assert torch.equal(alike.known, reads_items.nonzero().flatten())


@torch.no_grad()
@pytest.mark.parametrize("item", [-1, ITEMS])
def test_an_item_that_is_none_is_refused(item):
    network, chosen = network_of(), torch.tensor([[1, item]])
    with pytest.raises(IndexError, match=f"items are 0 to {ITEMS - 1}"):
        rank_items(network, torch.tensor([1]), {}, ITEMS, chosen=chosen)


@torch.no_grad()
def test_a_token_that_a_table_of_items_does_not_have_is_refused():
    network = network_of()
    network.column_genre[3, 1] = 7
    with pytest.raises(IndexError, match="a table has rows 0 to 6"):
        rank_items(network, torch.tensor([1]), {}, ITEMS)
