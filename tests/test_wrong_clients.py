"""Wrong clients: what they send, and what robust means make of it."""

import numpy as np
import pytest
import torch

from recbole_fedkd.distillation.knowledge import AGGREGATIONS, TrimSettings, krum_scores
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.message import Message, Training
from recbole_fedkd.federated.robust import ROBUST_MEANS, squared_distances
from recbole_fedkd.privacy.attack import Attack, AttackOfClients, poisoned
from recbole_fedkd.privacy.settings import AttackSettings

FEDAVG = {"strategy": "fedavg", "client_num": 5, "epochs": 1, "saved": False}


def upload(values, sender=0):
    return Message("model", 0, sender, {"p:w": np.array(values, np.float32)}, Training(1, 1, 0.0))


def mean_of(name, vectors, weights=None, trim_ratio=0.2):
    uploads = [upload(each, number) for number, each in enumerate(vectors)]
    start = {"p:w": torch.zeros(len(vectors[0]))}
    return ROBUST_MEANS[name](trim_ratio).of(uploads, start, weights or [1.0] * len(uploads))["p:w"].tolist()


# Robust means

FIVE = [[1.0, 0.0], [2.0, 0.1], [3.0, 0.2], [4.0, 0.3], [100.0, -50.0]]


def test_a_median_is_that_of_every_number_by_itself():
    assert mean_of("median", FIVE) == pytest.approx([3.0, 0.1])
    assert mean_of("median", FIVE[:4]) == pytest.approx([2.5, 0.15])


def test_a_trimmed_mean_leaves_a_share_out_at_each_end():
    assert mean_of("trimmed_mean", FIVE) == pytest.approx([3.0, 0.1])
    assert mean_of("trimmed_mean", FIVE, trim_ratio=0.0) == pytest.approx([22.0, -9.88])


def test_krum_takes_the_client_with_the_nearest_neighbours():
    # With one of five wrong the two nearest count: scores about 5, 2, 2, 5 and a lot; of equals the first is taken.
    assert mean_of("krum", FIVE) == pytest.approx([2.0, 0.1])


def test_multi_krum_leaves_the_farthest_out_and_weights_the_others():
    assert mean_of("multi_krum", FIVE) == pytest.approx([2.5, 0.15])
    assert mean_of("multi_krum", FIVE, [1.0, 1.0, 1.0, 5.0, 9.0]) == pytest.approx([26 / 8, 1.8 / 8])


def test_directions_leave_out_who_turns_another_way_and_shorten_who_goes_farther_than_the_median():
    """By hand: the fifth is left out; lengths 1, 2.0025, 3.0067, 4.0112 and 111.8, so that the fourth is cut by .7496."""
    assert mean_of("directions", FIVE) == pytest.approx([2.2496, 0.1312], abs=1e-4)
    # The last turns back, and is near to the others all the same: Krum keeps it, and drops the third.
    turned = [[10.0, 0.0], [0.5, 6.0], [0.5, -6.0], [8.0, 3.0], [-1.0, 0.0]]
    assert mean_of("directions", turned) == pytest.approx([3.1646, 0.5285], abs=1e-4)
    assert mean_of("multi_krum", turned) == pytest.approx([4.375, 2.25])
    assert mean_of("directions", [[3.0, 4.0], [6.0, 8.0], [-3.0, -4.0]], [1.0, 3.0, 9.0], 0.4) == pytest.approx(
        [3.0, 4.0]
    )


def test_scores_of_krum_are_sums_of_the_nearest_squared_distances():
    uploads = [upload([value]) for value in (0.0, 1.0, 3.0, 7.0)]
    distances = squared_distances(uploads, {"p:w": torch.tensor([5.0])})
    assert distances[0].tolist() == pytest.approx([0, 1, 9, 49])
    assert krum_scores(distances, 0).tolist() == pytest.approx([10, 5, 13, 52])
    assert krum_scores(distances[:1, :1], 0).tolist() == [0.0]


def test_rounding_does_not_say_which_of_two_that_are_nearest_to_each_other_comes_first():
    distances = torch.tensor([[0, 1.0, 5, 8], [1, 0, 6, 7], [5, 6, 0, 9], [8, 7, 9, 0]], dtype=torch.float64)
    for row, column in ((0, 1), (1, 0)):
        rounded = distances.clone()
        rounded[row, column] -= 1e-16
        assert rounded[row, column] < rounded[column, row]
        assert krum_scores(rounded, 1).argsort(stable=True).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ROBUST_MEANS)
@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_a_robust_mean_of_equal_networks_is_that_network(name, count):
    assert mean_of(name, [[1.5, -2.0]] * count) == pytest.approx([1.5, -2.0])


@pytest.mark.parametrize("name", ["trimmed_mean", "multi_krum"])
def test_a_robust_mean_says_that_it_leaves_nobody_out_where_its_share_is_less_than_a_client(name):
    robust = ROBUST_MEANS[name](0.2)
    assert robust.without_effect(5) is None
    assert robust.without_effect(4) == (
        f"trim_ratio=0.2 of 4 client(s) is less than one: robust_mean={name} leaves nobody out"
    )


@pytest.mark.parametrize("name", ["krum", "multi_krum", "median", "trimmed_mean"])
def test_a_wrong_client_moves_robust_label_knowledge_little(name):
    generator = torch.Generator().manual_seed(0)
    means = torch.ones(10, 3, 3) + 0.01 * torch.randn(10, 3, 3, generator=generator)
    means[4] = -50
    teachers = AGGREGATIONS[name](TrimSettings(0.2) if name != "median" else None).teachers(means, torch.ones(10, 3))
    assert (teachers - 1).abs().max() < 0.05


def test_krum_of_label_knowledge_falls_back_to_the_next_who_has_the_label():
    means = torch.tensor([[[0.0], [5.0]], [[1.0], [0.0]], [[1.1], [7.0]], [[9.0], [9.0]]])
    counts = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])
    teachers = AGGREGATIONS["krum"](TrimSettings(0.0)).teachers(means, counts)
    assert teachers[0, :, 0].tolist() == pytest.approx(
        [1.0, 7.0]
    )  # client 1 is nearest to the others, and lacks label 1


# Attacks


def attacked(kind, array, strength=3.0, sender=2):
    stage = Attack(AttackOfClients(kind, strength, frozenset([2]), 7))
    message = Message("model", 4, sender, {"w": np.asarray(array), "n": np.array([1, 2], np.int32)})
    return stage.encode(message).arrays


def test_messages_of_wrong_clients_are_flipped_scaled_and_noised_and_counts_stay():
    array = np.array([1.0, -2.0], np.float32)
    assert attacked("sign_flip", array)["w"].tolist() == [-1.0, 2.0]
    assert attacked("scale", array)["w"].tolist() == [3.0, -6.0]
    assert attacked("scale", array)["n"].tolist() == [1, 2]
    long = np.ones(20_000, np.float32)
    noise = attacked("noise", long)["w"] - long
    assert noise.std() == pytest.approx(3.0, rel=0.03)
    assert np.array_equal(attacked("noise", long)["w"], attacked("noise", long)["w"])
    assert attacked("scale", array, sender=1)["w"].tolist() == [1.0, -2.0]


ROWS = {
    "user": torch.tensor([1, 2, 1, 2, 3, 1]),
    "item": torch.tensor([1, 1, 2, 2, 3, 4]),
    "label": torch.tensor([1.0, 2.0, 5.0, 4.0, 3.0, 2.0]),
}
WRONG = ROWS["user"] == 1


def made(kind, with_labels=True, **parts):
    rows = ROWS if with_labels else {name: column for name, column in ROWS.items() if name != "label"}
    return poisoned(AttackSettings(kind=kind, **parts), rows, WRONG, [1.0, 2.0, 3.0, 4.0, 5.0], 7)


def test_flipped_labels_stand_at_the_other_end_of_the_scale():
    assert made("label_flip")["label"].tolist() == [5, 2, 1, 4, 3, 4]


def test_flipped_positives_are_items_that_the_user_has_not():
    items = made("label_flip", with_labels=False)["item"]
    assert torch.equal(items[~WRONG], ROWS["item"][~WRONG])
    assert items[0] == 3  # of four items the only other one; there are no more


def test_promotion_puts_the_rarest_items_into_the_rows_of_wrong_clients():
    changed = made("item_promotion", items=2)
    assert changed["item"].tolist() == [3, 1, 4, 2, 3, 4]
    assert changed["label"].tolist() == [5, 2, 5, 4, 3, 2]
    assert made("none") == {}


def test_as_many_are_wrong_as_the_share_says_and_at_least_one():
    assert len(AttackSettings(share=0.1).wrong(40, 1)) == 4
    assert len(AttackSettings(share=0.1).wrong(3, 1)) == 1
    assert AttackSettings().wrong(40, 1) == AttackSettings().wrong(40, 1) != AttackSettings().wrong(40, 2)


# Runs


@pytest.mark.parametrize("kind", ["none", "label_flip", "item_promotion", "sign_flip", "scale", "noise"])
def test_engines_agree_over_wrong_clients_and_robust_means(run, kind):
    keys = {**FEDAVG, "attack": {"kind": kind, "share": 0.2}, "robust_mean": "multi_krum", "trim_ratio": 0.2}
    one, other = (run(**keys, engine=engine) for engine in ("local", "fleet"))
    assert other["engine"] == "fleet"
    for metric in ("mae", "rmse", "logloss"):
        assert one["test_result"][metric] == pytest.approx(other["test_result"][metric], abs=1e-4)


@pytest.mark.parametrize("name", ROBUST_MEANS)
def test_engines_agree_over_every_robust_mean(run, name):
    one, other = (run(**FEDAVG, robust_mean=name, trim_ratio=0.2, engine=engine) for engine in ("local", "fleet"))
    for metric in ("mae", "rmse", "logloss"):
        assert one["test_result"][metric] == pytest.approx(other["test_result"][metric], abs=1e-4)


@pytest.mark.parametrize("kind", ["none", "label_flip"])
def test_users_of_wrong_clients_are_not_judged_whatever_their_clients_do(run, kind):
    result = run(**FEDAVG, attack={"kind": kind, "share": 0.2}, user_metrics=True)
    judged = set(result["user_metrics"]["client"])
    assert judged == set(range(5)) - AttackSettings(share=0.2).wrong(5, 2020)


def moved_in_a_round(prepared, strength, **keys):
    """How far a round moves the server's network where one of five clipped clients scales its own."""
    of_clients = {"client_num": 5, "client_weights": "uniform", "stages": ["clip", "codecs"], "clip_norm": 0.1}
    attack = {"kind": "scale", "strength": strength, "share": 0.2}
    _, trainer, _, _ = prepared(strategy="fedavg", **of_clients, attack=attack, **keys)
    before = {name: value.clone() for name, value in trainer.engine.server.state.items()}
    trainer.engine.run_round(0)
    after = trainer.engine.server.state
    return sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5


def test_a_wrong_client_is_bounded_by_the_servers_end_and_not_by_its_own(prepared):
    moved = []
    for strength in (1.0, 1e6):
        moved.append(moved_in_a_round(prepared, strength))
    assert moved[1] <= 0.1 * (1 + 1e-4) and moved[1] == pytest.approx(moved[0], rel=0.01)


def test_under_masks_nobody_sees_that_a_message_is_too_long(prepared):
    pytest.importorskip("cryptography")
    assert moved_in_a_round(prepared, 100.0, secure_aggregation=True) > 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attack": {"kind": "lie"}}, r"attack\.kind is 'lie'; it must be one of none, label_flip"),
        ({"attack": {"share": 1.5}}, r"attack\.share is 1\.5"),
        ({"attack": {"knid": "noise"}}, r"key 'attack\.knid' is unknown; did you mean 'kind'"),
        ({"attack": {"share": 0.99}}, "of 5 client.s. leaves none that is right"),
        ({"attack": {"share": 0.3}, "client_num": 1}, "of 1 client.s. leaves none"),
        ({"attack": "label_flip"}, "attack is 'label_flip'; it must be a dict"),
        ({"attack": {"kind": "noise"}, "strategy": "local"}, "strategy=local they send nothing"),
        ({"robust_mean": "mode"}, "robust_mean is 'mode'"),
        ({"robust_mean": "krum", "row_mean": "changed"}, "unset one of them"),
        ({"robust_mean": "krum", "secure_aggregation": True}, "robust_mean=krum needs every client's own"),
        ({"robust_mean": "median", "privacy": {"clip": 1.0, "epsilon": 1.0}, "partition": "user"}, "robust_mean=median"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_a_sentence(run, changes, said):
    with pytest.raises(InputError, match=said):
        run(**{**FEDAVG, **changes})


def test_no_client_is_wrong_where_there_is_none(run):
    with pytest.raises(InputError, match="strategy=central there are none"):
        run("AttnStudent", attack={"kind": "label_flip"})
