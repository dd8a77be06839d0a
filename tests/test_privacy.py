"""Differential privacy: the account, the bound on what one user changes, and noise that no seed knows."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recbole_fedkd import run_recbole_fedkd
from recbole_fedkd.checkpoint.reading import last_and_best
from recbole_fedkd.checkpoint.resumed import check_unspent, mark_spent
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.federated.clipping import ClipSettings, clipped, length
from recbole_fedkd.federated.message import Message, Training
from recbole_fedkd.federated.stage import Clip
from recbole_fedkd.privacy import clipping
from recbole_fedkd.privacy.accountant import epsilon_of, noise_for, rounds_within
from recbole_fedkd.privacy.clipping import next_bound, noise_beside_count, usual_count_noise
from recbole_fedkd.privacy.noise import LocalNoise, LocalSettings, discrete_gaussian, gaussian, uniform
from recbole_fedkd.privacy.release import PrivateRelease
from recbole_fedkd.privacy.settings import PrivacySettings
from recbole_fedkd.trainer import FedKDTrainer

FEDAVG = {
    "strategy": "fedavg",
    "partition": "user",
    "client_weights": "uniform",
    "epochs": 3,
    "privacy": {"clip": 0.05, "noise_multiplier": 1.0},
}
FACTORS = {
    "strategy": "afd",
    "knowledge": "factors",
    "partition": "user",
    "factor_size": 2,
    "sketch_width": 3,
    "sketch_passes": 2,
    "em_steps": 1,
    "epochs": 6,
    "label_mode": "rating",
    "privacy": {"clip": 0.5, "noise_multiplier": 1.0},
}


# The account


@pytest.mark.parametrize(("noise", "releases", "epsilon"), [(4.0, 40, 7.5113), (1.0, 1, 4.3772)])
def test_without_sampling_the_account_is_exact(noise, releases, epsilon):
    assert epsilon_of(noise, releases, 1e-5) == pytest.approx(epsilon, abs=1e-4)


@pytest.mark.parametrize(
    ("noise", "rate", "releases", "prv", "rdp"), [(2.0, 0.25, 100, 6.460, 7.033), (1.0, 0.01, 1000, 1.838, 2.101)]
)
def test_with_sampling_the_accounts_are_those_of_opacus(noise, rate, releases, prv, rdp):
    pytest.importorskip("opacus")
    assert epsilon_of(noise, releases, 1e-5, rate, "prv") == pytest.approx(prv, abs=1e-3)
    assert epsilon_of(noise, releases, 1e-5, rate, "rdp") == pytest.approx(rdp, abs=1e-3)


def test_the_exact_account_agrees_with_integration_over_the_privacy_loss():
    noise, releases, epsilon = 3.0, 5, 2.0
    mean = math.sqrt(releases) / noise
    grid = np.linspace(-20, 20, 400_001)
    with_unit, without = (np.exp(-((grid - centre) ** 2) / 2) / math.sqrt(2 * math.pi) for centre in (mean, 0.0))
    delta = np.maximum(with_unit - math.exp(epsilon) * without, 0).sum() * (grid[1] - grid[0])
    assert epsilon_of(noise, releases, float(delta)) == pytest.approx(epsilon, abs=1e-4)


def test_nothing_let_out_spends_nothing_and_no_noise_hides_nothing():
    assert epsilon_of(1.0, 0, 1e-5) == 0.0
    assert epsilon_of(0.0, 1, 1e-5) == math.inf


@given(st.floats(0.05, 50), st.integers(1, 500), st.floats(1e-9, 0.1))
def test_the_noise_for_a_budget_spends_it_and_hardly_less(epsilon, releases, delta):
    noise = noise_for(epsilon, releases, delta)
    assert epsilon_of(noise, releases, delta) <= epsilon
    assert epsilon_of(noise * 0.999, releases, delta) > epsilon


@given(st.integers(0, 60), st.floats(0, 70))
def test_a_budget_lasts_until_the_next_round_would_spend_more(most, budget):
    lasts = rounds_within(budget, float, most)
    assert lasts == min(int(budget), most)


# Noise


def test_the_noise_has_its_deviation_and_is_normal():
    drawn = gaussian((500, 1000), 3.0)
    assert drawn.std() == pytest.approx(3.0, rel=0.01)
    assert drawn.mean() == pytest.approx(0.0, abs=0.03)
    assert (np.abs(drawn) < 3.0).mean() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.005)


def test_noise_does_not_follow_a_seed():
    drawn = []
    for _ in range(2):
        np.random.seed(1)
        torch.manual_seed(1)
        drawn.append(gaussian((4,), 1.0))
    assert not np.array_equal(*drawn)
    assert (uniform(1000) > 0).all() and (uniform(1000) < 1).all()


@pytest.mark.parametrize("deviation", [0.4, 2.0, 1e9])
def test_whole_numbers_have_their_deviation_and_nobody_is_drawn_but_those(deviation):
    drawn = discrete_gaussian(400_000, deviation)
    assert drawn.dtype == np.int64
    support = np.arange(-60, 61)
    weights = np.exp(-(support**2) / (2 * deviation**2))
    expected = deviation if deviation > 10 else float(np.sqrt((support**2 * weights).sum() / weights.sum()))
    assert drawn.std() == pytest.approx(expected, rel=0.01)
    if deviation < 10:
        shares = np.array([(drawn == number).mean() for number in (-1, 0, 2)])
        np.testing.assert_allclose(shares, weights[[59, 60, 62]] / weights.sum(), atol=0.004)


def test_no_deviation_is_no_noise():
    assert not discrete_gaussian(5, 0.0).any()


def test_a_client_adds_its_noise_to_what_it_has_shortened_and_nobody_shortens_that():
    stage = LocalNoise(LocalSettings(1.0, {}, 5.0))
    message = Message(
        "model", 0, 3, {"w": np.full(40_000, 9, np.float32), "n": np.zeros(1000, np.int32)}, Training(1, 1, 0)
    )
    made = stage.encode(message)
    assert float(made.arrays["w"].std()) == pytest.approx(5.0, rel=0.02)
    assert made.arrays["n"].dtype == np.int32 and made.arrays["n"].min() == 0 and made.arrays["n"].max() > 5
    assert stage.decode(made, None) is made


# The bound


arrays = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8).map(lambda each: np.array(each, np.float32))


@given(arrays, st.lists(st.integers(-1000, 1000), min_size=1, max_size=6), st.floats(1e-3, 1e4))
def test_counts_stay_counts_and_within_the_bound(numbers, counts, bound):
    whole = np.array(counts, np.int32)
    made = clipped({"n": whole, "x": numbers}, ClipSettings(bound))
    length = float(np.linalg.norm(np.concatenate([made["n"], made["x"]]).astype(np.float64)))
    assert made["n"].dtype == np.int32 and length <= bound * (1 + 1e-6)
    if np.linalg.norm(whole) <= bound:
        assert np.array_equal(made["n"], whole)


def test_counts_beside_numbers_that_are_none_stay_counts():
    made = clipped({"n": np.array([3, 4], np.int32), "x": np.array([np.nan], np.float32)}, ClipSettings(2.5))
    assert made["n"].tolist() in ([1, 2], [2, 1]) and np.isnan(made["x"]).all()


def told_of(items, labels, scale):
    """A message of knowledge of a client with these ratings: samples, histogram, and sums of logits."""
    seen = np.bincount(items, minlength=12).astype(np.int32)
    histogram = np.zeros((12, 3), np.int32)
    np.add.at(histogram, (items, labels), 1)
    sums = (seen[:, None] * np.array([scale, 2 * scale, -scale])).astype(np.float32)
    return {"sums": sums, "seen": seen, "histogram": histogram}


ratings = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 2)), min_size=1, max_size=40)


@given(ratings, st.floats(0, 100), st.floats(0.1, 30), st.dictionaries(st.just("seen"), st.floats(0.5, 9)))
def test_of_counts_that_do_not_fit_some_stay_within_the_bound(rated, scale, bound, norms):
    """Both ends say the same, and what fits stays bit for bit."""
    settings = ClipSettings(bound, norms)
    before = told_of(*np.array(rated).T, scale)
    made = clipped(before, settings, (3, 7))
    assert length(made, settings) <= 1 + 1e-6
    assert all((made[name] >= 0).all() and (made[name] <= before[name]).all() for name in ("seen", "histogram"))
    again = clipped(made, settings, (0,))
    for name, array in made.items():
        assert array.dtype == before[name].dtype
        np.testing.assert_allclose(again[name], array, rtol=1e-6)
        if length(before, settings) <= 1:
            assert array is before[name]
    one_item = {name: array[[np.flatnonzero(before["seen"])[0]]] for name, array in before.items()}
    if length({name: np.minimum(one_item[name], 1) for name in ("seen", "histogram")}, settings) <= 1:
        assert made["seen"].any()


def test_items_that_stay_in_a_clipped_message_keep_their_means_and_change_from_round_to_round():
    """Ten items of length 2.96 ** .5 each are shortened to 3, which three of them are."""
    items = np.arange(10)
    before = told_of(items, items % 3, 0.4)
    made = [clipped(before, ClipSettings(3.0), (round_index, 5)) for round_index in range(20)]
    for each in made:
        kept = each["seen"] > 0
        assert kept.sum() == 3
        for name, array in before.items():
            np.testing.assert_array_equal(each[name][kept], array[kept])
            assert not each[name][~kept].any()
    assert sum(each["seen"] for each in made)[:10].all()


def test_label_counts_that_do_not_fit_are_fewer_and_keep_their_means():
    before = {"sums": np.outer([30, 40], [0.1, 0.2]).astype(np.float32), "weights": np.array([30, 40], np.int32)}
    made = clipped(before, ClipSettings(25.0))
    assert made["weights"].min() >= 14 and made["weights"].sum() >= 33
    means = made["sums"] / made["weights"][:, None]
    np.testing.assert_allclose(means, [[0.1, 0.2]] * 2, rtol=0.1)


@given(arrays, arrays, st.floats(1e-3, 1e3))
def test_a_clipped_message_is_no_longer_than_the_bound_and_points_where_it_did(first, second, bound):
    made = clipped({"a": first, "b": second, "n": np.array([True])}, ClipSettings(bound))
    before, after = np.concatenate([first, second]), np.concatenate([made["a"], made["b"]])
    length = np.linalg.norm(before.astype(np.float64))
    assert np.linalg.norm(after.astype(np.float64)) <= bound * (1 + 1e-6)
    np.testing.assert_allclose(after, before * min(1.0, bound / length if length else 1.0), rtol=1e-5, atol=1e-30)
    assert made["n"].all()


def test_arrays_of_bounds_of_their_own_share_one_bound():
    settings = ClipSettings(1.0, {"big*": 10.0, "b*": 5.0})
    made = clipped({"big": np.array([10.0]), "b": np.array([0.0]), "c": np.array([1.0])}, settings)
    assert made["big"].tolist() == pytest.approx([10 / 2**0.5]) and made["c"].tolist() == pytest.approx([1 / 2**0.5])
    assert clipped({"b": np.array([5.0])}, settings)["b"].tolist() == [5.0]


def test_the_server_shortens_what_a_client_did_not():
    long = Message("model", 0, 3, {"w": np.full(4, 10, np.float32)}, Training(1, 1, 0.0))
    np.testing.assert_allclose(Clip(ClipSettings(2.0)).decode(long, None).arrays["w"], 1.0, rtol=1e-6)


def told_by_a_round(prepared, without, engine, keys):
    """What the clients say in a round, as the server has it before noise; ``without`` are not there."""
    _, trainer, _, _ = prepared(**{**keys, "engine": engine})
    running = trainer.engine
    running.server.release.start(len(running.samples), 3)
    running.server.release.noise_multiplier = 0.0
    running.held_out = frozenset(without)
    before = {name: value.double().clone() for name, value in running.server.state.items()}
    running.run_round(0)
    after = {name: value.double() for name, value in running.server.state.items()}
    return {name: after[name] - before.get(name, 0) for name in running.server.link.schema.arrays if name in after}


def distance(one, other):
    return float(sum(((one[name] - other[name]) ** 2).sum() for name in one) ** 0.5)


LABEL = {**FEDAVG, "strategy": "afd", "privacy": {"clip": 2.05, "noise_multiplier": 1.0}}
ITEM = {**LABEL, "knowledge": "item", "privacy": {"clip": 5.4, "noise_multiplier": 1.0}}


@pytest.mark.parametrize("engine", ["local", "fleet"])
@pytest.mark.parametrize(
    ("keys", "bound"),
    [(FEDAVG, 0.05 / 30), (FACTORS, 0.5), (LABEL, 2.05), (ITEM, 5.4)],
    ids=["mean", "factors", "label", "item"],
)
def test_one_user_changes_no_more_than_the_clip(prepared, engine, keys, bound):
    """Of a sum the clip, of a mean the clip over the clients; the messages here are longer than that."""
    whole, less = (told_by_a_round(prepared, without, engine, keys) for without in ((), (4,)))
    assert whole and 0.9 * bound < distance(whole, less) <= bound * (1 + 1e-3)


@pytest.mark.parametrize(("keys", "clip"), [(ITEM, 3.0), (LABEL, 1.5)], ids=["item", "label"])
def test_engines_keep_the_same_of_counts_that_do_not_fit(prepared, keys, clip):
    keys = {**keys, "privacy": {"clip": clip, "noise_multiplier": 1.0}}
    local, fleet = (told_by_a_round(prepared, (), engine, keys) for engine in ("local", "fleet"))
    for name, value in local.items():
        torch.testing.assert_close(fleet[name], value, rtol=1e-3, atol=1e-4)
    counts = local["seen" if "seen" in local else "weights"]
    assert counts.sum() >= 30  # of thirty clients


OWN_CLIPS = {"clip": 7.0, "clips": {"histogram": 2.0, "product_*": 0.02, "squares": 3.0}, "noise_multiplier": 1.0}


def test_engines_agree_over_clipped_factors_and_every_stage_has_its_bound(prepared):
    """The fleet shortens all clients' sums at once, and the local engine message by message."""
    told = []
    for engine in ("local", "fleet"):
        _, trainer, _, _ = prepared(**{**FACTORS, "privacy": OWN_CLIPS, "engine": engine})
        running = trainer.engine
        running.server.release.start(len(running.samples), 5)
        running.server.release.noise_multiplier = 0.0
        for index in range(5):
            running.run_round(index)
        told.append({name: value.double() for name, value in running.server.state.items()})
    for name, value in told[0].items():
        torch.testing.assert_close(told[1][name], value, rtol=1e-4, atol=1e-5)
    assert float(told[0]["histogram"].sum()) < 300  # thirty users of 16 rows, each shortened to length 2


def test_the_noise_of_an_array_is_in_units_of_its_own_bound(prepared):
    _, trainer, _, _ = prepared(**{**FACTORS, "privacy": {**OWN_CLIPS, "noise_multiplier": 50.0}})
    trainer.engine.server.release.start(30, 5)
    for index in range(3):
        trainer.engine.run_round(index)
    state = trainer.engine.server.state
    assert float(state["product_0"].double().std()) == pytest.approx(50 * 0.02, rel=0.3)
    assert float(state["residuals"].double().std()) == pytest.approx(50 * 7, rel=0.4)


def test_the_noise_of_a_round_has_the_deviation_that_is_accounted(prepared):
    _, trainer, _, _ = prepared(**{**FEDAVG, "learning_rate": 0.0, "privacy": {"clip": 2.0, "noise_multiplier": 3.0}})
    engine = trainer.engine
    engine.server.release.start(30, 3)
    before = {name: value.clone() for name, value in engine.server.state.items()}
    changes = []
    for index in range(2):
        engine.run_round(index)
        changes += [(value - before[name]).flatten() for name, value in engine.server.state.items()]
        before = {name: value.clone() for name, value in engine.server.state.items()}
    changed = torch.cat(changes).double()
    assert float(changed.std()) == pytest.approx(3.0 * 2.0 / 30, rel=6 / len(changed) ** 0.5)


MANY = {**FACTORS, "partition": "random", "client_num": 4, "privacy": {"clip": 0.5, "noise_multiplier": 1.0}}


@pytest.mark.parametrize("kind", [{}, {"knowledge": "fold_in"}, {"model": "Bias", "strategy": "sums"}], ids=str)
def test_of_a_client_of_many_users_each_is_bounded_by_itself(prepared, kind):
    """One user's rows go; the totals of every stage change by the clip at most, though the client's sum is longer."""
    told = []
    for gone in (False, True):
        _, trainer, _, _ = prepared(**{**MANY, **kind})
        engine = trainer.engine
        engine.server.release.start(4, 5)
        engine.server.release.noise_multiplier = 0.0
        rows = engine.clients[0].task.teacher.exchange.rows
        user = int(rows.users[0])
        if gone:
            head, kept = engine.clients[0].task.teacher, rows.users != user
            left = replace(rows, users=rows.users[kept], items=rows.items[kept], values=rows.values[kept])
            head.exchange = replace(head.exchange, rows=left, labels=head.exchange.labels[kept])
        intake = engine.server.intake(0, engine.samples)
        fold = intake.fold
        for client in engine.clients:
            statistics = client.strategy.statistics(client.task, {})
            fold.add(Message("knowledge", 0, client.number, client.strategy.knowledge.upload(statistics, True)))
        told.append(fold.finish())
    changed = distance(*({name: value.double() for name, value in each.items()} for each in told))
    assert 0.4 < changed <= 0.5 * (1 + 1e-3)
    assert float(told[0]["histogram"].double().norm()) > 0.5


def test_users_of_many_on_a_client_are_private_on_engine_local_alone(run):
    result = run(**MANY, engine="fleet")
    assert result["engine"] == "local" and "shortens user by user" in result["engine_fallback"]
    assert result["epsilon"] == pytest.approx(epsilon_of(1.0, 5, 1e-5))


DISTRIBUTED = {
    **FEDAVG,
    "secure_aggregation": True,
    "privacy": {"clip": 2.0, "noise_multiplier": 3.0, "noise": "distributed"},
}


@pytest.mark.parametrize(
    "keys", [DISTRIBUTED, {**FEDAVG, "privacy": {"clip": 2.0, "noise_multiplier": 3.0, "noise": "local"}}]
)
def test_noise_that_clients_add_comes_to_what_is_accounted_or_more(prepared, keys):
    """Distributed: as much as the server's would be. Local: of every client as much, of 30 sqrt(30) times that."""
    if "secure_aggregation" in keys:
        pytest.importorskip("cryptography")
    _, trainer, _, _ = prepared(**{**keys, "learning_rate": 0.0})
    engine = trainer.engine
    engine.server.release.start(30, 3)
    before = {name: value.clone() for name, value in engine.server.state.items()}
    engine.run_round(0)
    changed = torch.cat([(value - before[name]).flatten() for name, value in engine.server.state.items()]).double()
    expected = 3.0 * 2.0 / 30 * (30**0.5 if keys["privacy"]["noise"] == "local" else 1)
    assert float(changed.std()) == pytest.approx(expected, rel=6 / len(changed) ** 0.5)


def test_distributed_noise_is_in_the_sum_that_the_server_gets(prepared, monkeypatch):
    pytest.importorskip("cryptography")
    _, trainer, _, _ = prepared(**{**DISTRIBUTED, "learning_rate": 0.0})
    engine, sums = trainer.engine, []
    engine.server.release.start(30, 3)
    release = engine.server.release
    monkeypatch.setattr(release, "of_round", lambda fold, *rest: sums.append(fold.finish()))
    before = {name: value.clone() for name, value in engine.server.state.items()}
    engine.run_round(0)
    noise = torch.cat([(value - before[name]).flatten() for name, value in sums[0].items()])
    assert float(noise.std()) == pytest.approx(0.2, rel=6 / len(noise) ** 0.5)


@pytest.mark.parametrize("engine", ["local", "fleet"])
@pytest.mark.parametrize("keys", [FEDAVG, FACTORS, LABEL, ITEM], ids=["mean", "factors", "label", "item"])
def test_runs_go_on_under_local_noise(run, keys, engine):
    result = run(**{**keys, "privacy": {**keys["privacy"], "noise": "local"}}, engine=engine, saved=False)
    assert result["engine"] == engine and all(math.isfinite(value) for value in result["test_result"].values())


# Runs


def test_every_round_and_the_result_tell_what_is_spent(run):
    result = run(**FEDAVG)
    spent = [each["epsilon"] for each in result["rounds"]]
    assert spent == pytest.approx([epsilon_of(1.0, count, 1e-5) for count in (1, 2, 3)])
    assert result["epsilon"] == spent[-1]


def test_without_privacy_nothing_is_said_of_epsilon(run):
    result = run(strategy="fedavg", epochs=1)
    assert result["epsilon"] is None and "epsilon" not in result["rounds"][0]


def test_two_runs_of_one_seed_differ_by_their_noise_alone(run):
    quiet = {**FEDAVG, "privacy": {"clip": 0.05, "noise_multiplier": 1e-9}, "epochs": 1}
    first, second = run(**FEDAVG, saved=False), run(**FEDAVG, saved=False)
    assert first["rounds"][1]["loss"] != second["rounds"][1]["loss"]
    assert run(**quiet, saved=False)["test_result"] == run(**quiet, saved=False)["test_result"]


def test_a_budget_finds_the_noise_and_is_spent_at_the_last_round(run):
    result = run(**{**FEDAVG, "privacy": {"clip": 0.05, "epsilon": 8.0}})
    assert len(result["rounds"]) == 3
    assert 7.99 < result["epsilon"] <= 8.0


def test_a_run_ends_before_the_round_that_would_spend_too_much(run):
    result = run(**{**FEDAVG, "epochs": 9, "privacy": {"clip": 0.05, "noise_multiplier": 1.0, "epsilon": 7.0}})
    assert len(result["rounds"]) == rounds_within(7.0, lambda count: epsilon_of(1.0, count, 1e-5), 9) == 2
    assert result["test_result"]


def test_a_resumed_run_goes_on_counting(run):
    keys = {**FEDAVG, "epochs": 4, "privacy": {"clip": 0.05, "noise_multiplier": 1.0, "epsilon": 9.0}}
    first = run(**{**keys, "epochs": 2})
    second = run_recbole_fedkd(config_dict={"resume": first["run_folder"], "epochs": 9})
    spent = [each["epsilon"] for each in second["rounds"]]
    assert spent == pytest.approx([epsilon_of(1.0, count, 1e-5) for count in range(1, len(spent) + 1)])
    assert spent[:2] == [each["epsilon"] for each in first["rounds"]]
    assert 2 < len(spent) == rounds_within(9.0, lambda count: epsilon_of(1.0, count, 1e-5), 9)
    with pytest.raises(InputError, match=rf"gone on with in '{second['run_folder']}'.*; resume from there"):
        run_recbole_fedkd(config_dict={"resume": first["run_folder"], "epochs": 9})
    # Where nothing is left, nothing is spent.
    again = run_recbole_fedkd(config_dict={"resume": second["run_folder"], "epochs": 9}, saved=False)
    assert again["epsilon"] == second["epsilon"] and not list(Path(second["run_folder"]).glob("spent-*.json"))


def test_a_resumed_run_keeps_the_noise_that_its_budget_was_dealt_out_by(run):
    """More rounds do not buy less noise afterwards: what is spent is spent."""
    first = run(**{**FEDAVG, "epochs": 2, "privacy": {"clip": 0.05, "epsilon": 8.0}})
    second = run_recbole_fedkd(config_dict={"resume": first["run_folder"], "epochs": 5})
    assert len(second["rounds"]) == 2
    assert second["epsilon"] == first["epsilon"] <= 8.0


def test_a_best_checkpoint_does_not_take_back_what_its_run_spent_later(run, monkeypatch):
    scores = iter([0.4, 0.5])
    monkeypatch.setattr(
        FedKDTrainer, "_valid_epoch", lambda *_args, **_keys: ((score := next(scores)), {"rmse": score})
    )
    result = run(**{**FEDAVG, "epochs": 2, "metrics": ["RMSE"], "valid_metric": "RMSE"})
    last, best = last_and_best(result["run_folder"])
    assert (last.state["epoch"], best.state["epoch"]) == (1, 0)
    with pytest.raises(
        InputError, match=r"is that of round 1, and its run has spent of privacy until round 2.*last\.pth'"
    ):
        run_recbole_fedkd(config_dict={"resume": str(best.file), "epochs": 6})
    # Of two that go on with one checkpoint at once, the second does not spend.
    check_unspent(last, "here")
    mark_spent(last, None)
    for again in (lambda: mark_spent(last, Path("other")), lambda: check_unspent(last, "here")):
        with pytest.raises(InputError, match=r"gone on with, which spends of privacy.*; start a new run"):
            again()


@pytest.mark.parametrize("keys", [LABEL, ITEM], ids=["label", "item"])
@pytest.mark.parametrize("engine", ["local", "fleet"])
def test_knowledge_of_labels_and_items_goes_on_under_noise(run, keys, engine):
    result = run(**keys, engine=engine, saved=False)
    assert result["engine"] == engine
    assert result["epsilon"] == pytest.approx(epsilon_of(1.0, 3, 1e-5))
    assert all(math.isfinite(value) for value in result["test_result"].values())


def test_factors_spend_in_their_exchange_alone(run):
    result = run(**FACTORS)
    spent = [each["epsilon"] for each in result["rounds"]]
    assert spent == pytest.approx([epsilon_of(1.0, min(count, 5), 1e-5) for count in range(1, 7)])
    assert all(math.isfinite(value) for value in result["test_result"].values())


def test_a_budget_that_ends_within_an_exchange_is_spent_and_one_that_outlasts_it_is_not(prepared):
    for budget, spent in ((5.0, True), (80.0, False)):
        privacy = {**FACTORS["privacy"], "noise_multiplier": 1.0, "epsilon": budget}
        _, trainer, _, _ = prepared(**{**FACTORS, "privacy": privacy})
        trainer.begin()
        release = trainer.engine.server.release
        release.releases = min(trainer.epochs, trainer.engine.server.strategy.exchange_rounds)
        assert trainer.budget_is_spent == spent


def test_a_release_beyond_the_budget_is_refused_wherever_it_is_asked_for(prepared):
    _, trainer, _, _ = prepared(**{**FEDAVG, "privacy": {"clip": 0.05, "noise_multiplier": 1.0, "epsilon": 5.0}})
    trainer.engine.server.release.start(30, 3)
    trainer.engine.run_round(0)
    with pytest.raises(TrainingError, match=r"privacy\.epsilon=5 is spent"):
        trainer.engine.run_round(1)


# Sampling


def test_clients_are_drawn_by_coins_that_no_seed_knows(prepared):
    pytest.importorskip("opacus")
    servers = [prepared(**FEDAVG, clients_per_round=10)[1].engine.server for _ in range(2)]
    everybody = list(range(30))
    draws = [[server.choose(everybody, index) for index in range(40)] for server in servers]
    assert servers[0].choose(everybody, 39) == draws[0][-1]
    assert draws[0] != draws[1]
    counts = [len(each) for part in draws for each in part]
    assert np.mean(counts) == pytest.approx(10, abs=1.5) and len(set(counts)) > 3


def test_a_run_with_sampling_accounts_for_it_and_does_not_tell_who_took_part(run):
    pytest.importorskip("opacus")
    result = run(**FEDAVG, clients_per_round=3)
    assert result["epsilon"] == pytest.approx(epsilon_of(1.0, 3, 1e-5, 0.1))
    assert result["epsilon"] < epsilon_of(1.0, 3, 1e-5)
    assert result["communication"]["clients_per_round"] == [{}, {}, {}]


def test_a_draw_that_the_server_makes_hides_nobody_from_the_server():
    release = PrivateRelease(PrivacySettings(clip=0.5, noise_multiplier=1.0, noise="local"), 3)
    release.clients = 30
    assert release.samples and release.spent_by(3) == pytest.approx(epsilon_of(1.0, 3, 1e-5))


@pytest.mark.parametrize("engine", ["local", "fleet"])
def test_a_round_without_anybody_lets_noise_out_all_the_same(prepared, engine, monkeypatch):
    _, trainer, _, _ = prepared(**FEDAVG, clients_per_round=3, engine=engine, min_clients=2)
    release = trainer.engine.server.release
    release.start(30, 3)
    monkeypatch.setattr(release, "choose", lambda clients, index: [])
    before = {name: value.clone() for name, value in trainer.engine.server.state.items()}
    report = trainer.engine.run_round(0)
    assert report.loss == 0.0 and release.releases == 1
    assert any((value != before[name]).any() for name, value in trainer.engine.server.state.items())


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": {"noise_multiplier": 1.0}}, r"privacy\.clip is not set"),
        ({"privacy": {"clip": 1.0}}, "neither noise_multiplier nor epsilon"),
        ({"privacy": {"clip": 0, "epsilon": 1.0}}, r"privacy\.clip is 0; it must be a number > 0"),
        ({"privacy": {"clip": 1.0, "epsilon": -1}}, r"privacy\.epsilon is -1"),
        ({"privacy": {"clip": 1.0, "epsilon": "much"}}, r"privacy\.epsilon is 'much'"),
        ({"privacy": {"clip": 1.0, "delta": 1.0, "epsilon": 1.0}}, r"privacy\.delta is 1"),
        ({"privacy": {"clip": 1.0, "epsilon": 1.0, "unit": "row"}}, r"privacy\.unit is 'row'; it must be one of user, client"),
        ({"privacy": {"clip": 1.0, "epsilom": 1.0}}, r"key 'privacy\.epsilom' is unknown.*epsilon"),
        ({"privacy": [1.0]}, "privacy is"),
        ({"privacy": {"clip": 1.0, "epsilon": 1.0, "clips": {"histogram": 0}}}, r"privacy\.clips\.histogram is 0"),
        ({"privacy": {"clip": 1.0, "epsilon": 1.0, "clips": {"p:*": 1.0}}}, "sends networks"),
        (
            {"strategy": "afd", "knowledge": "item", "privacy": {"clip": 9.0, "epsilon": 1.0, "clips": {"nosuch*": 2}}},
            r"privacy\.clips\.nosuch\* matches no array .* there are sums, seen, histogram$",
        ),
        ({"privacy": {"clip": 1.0, "epsilon": 1.0, "noise": "distributed"}}, "set secure_aggregation=True"),
        ({"privacy": {"clip": 1.0, "epsilon": 1.0, "noise": "local"}}, r"set privacy\.noise_multiplier"),
        ({"privacy": {"clip": 1.0, "epsilon": 1.0, "clip_quantile": 1}}, r"privacy\.clip_quantile is 1"),
        ({"privacy": {"clip": 1.0, "noise_multiplier": 9.0, "clip_quantile": 0.5, "clip_count_noise": 4.5}}, "above half of"),
        (
            {"privacy": {"clip": 1.0, "noise_multiplier": 1.0, "noise": "local", "clip_quantile": 0.5}},
            "sees no message as it was",
        ),
        ({"strategy": "afd", "privacy": {"clip": 1.0, "epsilon": 1.0, "clip_quantile": 0.5}}, "'afd' sends knowledge"),
        ({"privacy": {"clip": 1.0, "epsilon": 1.0, "clip_rate": 0.5}}, "clip_quantile is not set"),
        ({"partition": "random"}, "set partition=user, or privacy.unit=client"),
        (
            {"partition": "random", "strategy": "afd", "knowledge": "fold_in", "label_knowledge": True},
            "whose part in its message is not bounded",
        ),
        ({"partition": "random", "strategy": "sums", "model": "GramEASE"}, "whose part in its message is not bounded"),
        ({"strategy": "local"}, "strategy=local they send nothing"),
        ({"strategy": "afd", "aggregation": "median"}, "aggregation=median needs every client's own"),
        ({"strategy": "afd", "clients_per_round": 5}, "knowledge=label, which remembers who is silent"),
        ({"strategy": "afd", "knowledge": "item", "clients_per_round": 5}, "unset clients_per_round"),
        ({"row_mean": "changed"}, "codecs and stages blur"),
        ({"client_weights": "samples"}, "set client_weights=uniform"),
        ({"privacy": {"clip": 1.0, "noise_multiplier": 0.1, "epsilon": 1.0}}, "a single round spends"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_in_a_sentence(run, changes, said):
    with pytest.raises(InputError, match=said):
        run(**{**FEDAVG, **changes})


def test_a_central_run_is_not_private(run):
    with pytest.raises(InputError, match="strategy=central they send nothing"):
        run("AttnStudent", privacy={"clip": 1.0, "epsilon": 1.0})


def test_clients_may_be_the_unit(run):
    result = run(**{**FEDAVG, "partition": "random", "privacy": {**FEDAVG["privacy"], "unit": "client"}})
    assert result["epsilon"] > 0


@pytest.mark.parametrize(
    ("bound", "told"),
    [
        ({"privacy": {"clip": 1.4, "noise_multiplier": 1.0}}, True),
        ({"privacy": {"clip": 1.5, "noise_multiplier": 1.0}}, False),
        ({"privacy": {"clip": 1.0, "clips": {"seen": 2, "histogram": 2}, "noise_multiplier": 1.0}}, False),
        ({"privacy": None, "stages": ["clip", "codecs"], "clip_norm": 1.4}, True),
    ],
)
def test_a_bound_that_holds_not_one_sample_is_told(prepared, caplog, bound, told):
    prepared(**{**ITEM, "client_num": 4, **bound})
    assert sum("Clients send zeros" in each.message for each in caplog.records) == told


def test_patterns_of_bounds_in_shipped_experiments_match_arrays(prepared):
    names = ("factor_size", "sketch_width", "sketch_passes", "em_steps", "privacy")
    rows = [
        {name: keys[name] for name in names}
        for file in sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
        for keys in yaml.safe_load(file.read_text(encoding="utf-8")).get("rows", {}).values()
        if (keys.get("privacy") or {}).get("clips")
    ]
    differing = [
        keys
        for number, keys in enumerate(rows)
        if keys["privacy"]["clips"] not in [each["privacy"]["clips"] for each in rows[:number]]
    ]
    assert len(rows) == 8 and len(differing) == 2
    for keys in differing:
        prepared(**{**FACTORS, **keys})


@pytest.mark.parametrize(
    ("unit", "delta", "said"), [("user", 1 / 30, "30 users"), ("client", 0.5, "4 clients"), ("user", 1 / 31, None)]
)
def test_a_delta_that_protects_nobody_is_told(prepared, caplog, unit, delta, said):
    keys = {"partition": "user"} if unit == "user" else {"client_num": 4}
    privacy = {**FEDAVG["privacy"], "unit": unit, "delta": delta}
    prepared(strategy="fedavg", client_weights="uniform", privacy=privacy, **keys)
    assert (f"there are {said}: who tells everything" in caplog.text) if said else "privacy.delta" not in caplog.text


# A bound that moves


def test_the_bound_moves_and_its_count_costs_what_the_paper_says():
    """By hand: all within, aim .5, rate .2: C e^-.1; z 1 beside a count's noise of 1: (1 - 1/4)^-1/2 = 1.1547."""
    assert next_bound(2.0, 1.0, 0.5, 0.2) == pytest.approx(2.0 * 0.904837, rel=1e-5)
    assert next_bound(2.0, 0.5, 0.5, 0.2) == 2.0
    assert noise_beside_count(1.0, 1.0) == pytest.approx(1.154701, rel=1e-6)
    assert usual_count_noise(100, 1.0) == 5.0 and usual_count_noise(10, 1.0) == 1.0
    # An update of length C under z C and half a count under its own noise are one Gaussian of the length that z stands for.
    update, half = 1 / noise_beside_count(2.0, 3.0), 0.5 / 3.0
    assert math.hypot(update, half) == pytest.approx(1 / 2.0)


MOVING = {**FEDAVG, "privacy": {"clip": 0.001, "clip_quantile": 0.5, "clip_rate": 3.0, "noise_multiplier": 1e-6}}


@pytest.mark.parametrize("engine", ["local", "fleet"])
def test_the_bound_goes_to_the_quantile_of_the_lengths_and_that_of_a_round_is_recorded(run, engine, monkeypatch):
    lengths = []
    monkeypatch.setattr(clipping, "length", lambda *given: lengths.append(length(*given)) or lengths[-1])
    result = run(**{**MOVING, "privacy": {**MOVING["privacy"], "clip_count_noise": 1e-5}}, engine=engine, saved=False)
    # Nobody is within .001, so that it grows by e^(3 / 2); no noise worth the name.
    clips = [each["clip"] for each in result["rounds"]]
    assert clips[:2] == pytest.approx([0.001, 0.001 * math.exp(1.5)], rel=1e-4)
    assert result["engine"] == engine and len(lengths) == 90
    within = np.mean(np.array(lengths[30:60]) <= 1)
    assert clips[2] == pytest.approx(clips[1] * math.exp(-3.0 * (within - 0.5)), rel=1e-4)
    assert result["epsilon"] == epsilon_of(1e-6, 3, 1e-5)


def test_updates_are_shortened_to_the_bound_of_their_round_and_the_noise_follows_it(prepared):
    _, trainer, _, _ = prepared(**{**MOVING, "learning_rate": 0.0})
    release, engine = trainer.engine.server.release, trainer.engine
    release.noise_multiplier = 2.0
    release.start(30, 3)
    assert release.count_noise == 2.0
    before = {name: value.clone() for name, value in engine.server.state.items()}
    engine.run_round(0)
    noise = torch.cat([(value - before[name]).flatten() for name, value in engine.server.state.items()]).double()
    assert float(noise.std()) == pytest.approx(1.1547 * 2 * 0.001 / 30, rel=6 / len(noise) ** 0.5)
    assert release.deviation_of("p:any") == pytest.approx(1.154701 * 2 * release.clip.clip_norm)
    message = Message("model", 0, 3, {"w": np.full(4, 10, np.float32)}, Training(1, 1, 0.0))
    assert release.follows.encode(message) is message  # a client cannot know the bound
    shortened = release.follows.decode(message, None).arrays["w"]
    assert float(np.linalg.norm(shortened)) == pytest.approx(release.clip.clip_norm)


def test_a_resumed_run_goes_on_with_the_bound_that_it_had(run):
    keys = {**MOVING, "privacy": {**MOVING["privacy"], "clip_count_noise": 1e-5}}
    whole, first = run(**keys), run(**{**keys, "epochs": 2})
    second = run_recbole_fedkd(config_dict={"resume": first["run_folder"], "epochs": 3})
    assert [each["clip"] for each in second["rounds"]] == pytest.approx(
        [each["clip"] for each in whole["rounds"]], rel=1e-3
    )
