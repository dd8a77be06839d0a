"""Item factors over clients: the exchange, what is taken off, the head, and a run of all of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recbole_fedkd import load_data_and_model
from recbole_fedkd.distillation import factors
from recbole_fedkd.distillation.exchange import FactorExchange, FactorSettings, item_tables, stepped
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.codec import CodecStack
from recbole_fedkd.federated.knowledge import FactorKnowledge, Sizes
from recbole_fedkd.model import received
from recbole_fedkd.model.factor_head import FactorHead
from recbole_fedkd.quick_start import build_trainer

SETTINGS = FactorSettings(3, 4, 2, 1, 4.0, 2.0, 3.0, 1.0, 7)
VALUES = torch.tensor([1.0, 2.0, 3.0])
USERS, ITEMS, CLIENTS = 12, 9, 3
FACTORS = {
    "strategy": "afd",
    "knowledge": "factors",
    "factor_size": 3,
    "sketch_width": 4,
    "sketch_passes": 2,
    "em_steps": 1,
    "head_size": 4,
    "metrics": ["Accuracy", "MAE"],
    "valid_metric": "MAE",
}


def random_rows(users: torch.Tensor, seed: int = 0) -> tuple[Rows, torch.Tensor]:
    """Rows of some users of a population that is the same for all calls, users numbered anew."""
    generator = torch.Generator().manual_seed(seed)
    rated = torch.rand(USERS, ITEMS, generator=generator) < 0.6
    labels = torch.randint(0, 3, (USERS, ITEMS), generator=generator)
    local, items = torch.nonzero(rated[users], as_tuple=True)
    own = labels[users][local, items]
    return Rows(local, items, VALUES.double()[own], len(users), ITEMS), own


def exchanged(parts: list[FactorExchange]) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """The totals of an exchange, and what each has said of them."""
    totals: dict[str, torch.Tensor] = {}
    said: list[dict[str, torch.Tensor]] = [{} for _ in parts]
    for stage in SETTINGS.stages:
        answers = [part.answer(stage, totals) for part in parts]
        for own, answer in zip(said, answers, strict=True):
            own.update(answer)
        totals.update({name: sum(answer[name] for answer in answers) for name in answers[0]})
    return totals, said


def clients() -> list[FactorExchange]:
    members = torch.arange(USERS).chunk(CLIENTS)
    return [FactorExchange(SETTINGS, *random_rows(part), VALUES) for part in members]


def test_clients_come_to_what_one_place_with_all_rows_comes_to():
    alone, _ = exchanged([FactorExchange(SETTINGS, *random_rows(torch.arange(USERS)), VALUES)])
    together, _ = exchanged(clients())
    for name, total in alone.items():
        torch.testing.assert_close(together[name], total, atol=1e-8, rtol=0)
        assert total.dim() == 2


def test_a_clients_own_part_is_taken_off_every_table():
    parts = clients()
    totals, said = exchanged(parts)
    others = item_tables(SETTINGS, totals, said[0], VALUES)
    histogram = sum(part["histogram"] for part in said[1:])
    torch.testing.assert_close(others.histogram, histogram)
    earlier = {name: total for name, total in totals.items() if not name.startswith(("gradient", "curvature"))}
    before = item_tables(SETTINGS, earlier, None, VALUES)
    precision = torch.tensor([3.0] * SETTINGS.factor_size + [4.0]).double()
    mean = totals["curvature_0"] / totals["histogram"].sum()
    gradient = sum(part["gradient_0"] for part in said[1:])
    for item, count in enumerate(histogram.sum(1)):
        inverse = torch.linalg.inv(count * mean + torch.diag(precision))
        expected = before.entries[item] + inverse @ (gradient[item] - precision * before.entries[item])
        torch.testing.assert_close(others.entries[item], expected, atol=1e-8, rtol=0)


def test_steps_end_where_the_rows_pull_as_much_as_the_prior():
    exchange = FactorExchange(replace(SETTINGS, em_steps=0), *random_rows(torch.arange(USERS)), VALUES)
    totals: dict[str, torch.Tensor] = {}
    for stage in exchange.settings.stages:
        totals.update(exchange.answer(stage, totals))
    tables = item_tables(exchange.settings, totals, None, VALUES)
    for _ in range(300):
        before, (gradient, curvature) = tables, factors.em_statistics(exchange.known_users(tables).fold)
        tables = stepped(exchange.settings, tables, gradient, curvature)
    torch.testing.assert_close(tables.entries, before.entries, atol=1e-6, rtol=0)
    # The biases' prior is as if so many more rows of residual zero were there.
    torch.testing.assert_close(gradient[:, -1], 4.0 * tables.bias, atol=1e-4, rtol=0)


def test_features_of_a_row_are_those_of_the_pair_once_the_row_is_gone():
    rows, labels = random_rows(torch.arange(USERS))
    exchange = FactorExchange(SETTINGS, rows, labels, VALUES)
    totals, _ = exchanged([exchange])
    tables = item_tables(SETTINGS, totals, None, VALUES)
    mean, features = exchange.known_users(tables).of_rows()
    for row in (0, 17, len(labels) - 1):
        left = torch.arange(len(labels)) != row
        fewer = Rows(rows.users[left], rows.items[left], rows.values[left], USERS, ITEMS)
        known = FactorExchange(SETTINGS, fewer, labels[left], VALUES).known_users(tables)
        predicted, expected = known.of_pairs(rows.users[row : row + 1], rows.items[row : row + 1])
        torch.testing.assert_close(features[row], expected[0], atol=1e-8, rtol=0)
        torch.testing.assert_close(mean[row], predicted[0], atol=1e-8, rtol=0)


def test_a_head_starts_as_a_distribution_with_what_the_fold_in_predicts_for_a_mean():
    rows, labels = random_rows(torch.arange(USERS))
    exchange = FactorExchange(SETTINGS, rows, labels, VALUES)
    head = FactorHead(exchange, 4)
    assert torch.equal(head.rows(torch.tensor([0, 1]))[0], head.rows(torch.tensor([0, 1]))[1])
    totals, said = exchanged([exchange])
    head.know(totals, {name: torch.zeros_like(value) for name, value in said[0].items()})
    tables = item_tables(SETTINGS, totals, None, VALUES)
    everything = torch.arange(ITEMS)
    mean, _ = exchange.known_users(tables).of_pairs(torch.full((ITEMS,), 3), everything)
    expected = factors.distribution_of_mean(mean, float(tables.noise.sqrt()), VALUES)
    found = head(torch.tensor([3]), everything.unsqueeze(0)).softmax(-1).squeeze(0).double()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    low, high = float(VALUES[0]), float(VALUES[-1])
    inside = factors.MARGIN * (high - low)
    torch.testing.assert_close(found @ VALUES.double(), mean.clamp(low + inside, high - inside), atol=1e-4, rtol=0)


def test_where_a_codec_dropped_every_count_nobody_is_alone(monkeypatch):
    exchange, *_ = parts = clients()
    totals, said = exchanged(parts)
    monkeypatch.setattr(received, "described_in_groups", lambda *of_one: pytest.fail("told to be alone"))
    dropped = torch.zeros_like(totals["histogram"])
    FactorHead(exchange, 4).know({**totals, "histogram": dropped}, {**said[0], "histogram": dropped})


def test_a_loaded_head_predicts_as_before(run, tmp_path):
    result = run(epochs=8, checkpoint_dir=str(tmp_path), **FACTORS)
    rounds = result["rounds"]
    stages = len(SETTINGS.stages)
    assert [bool(each["bytes_up"]) for each in rounds] == [True] * stages + [False] * (len(rounds) - stages)
    assert result["test_result"]["mae"] < 1.6
    config, model, _, _, _, test = load_data_and_model(result["run_folder"])
    judged = build_trainer(config, model).evaluate(test, load_best_model=False)
    assert judged is not None and judged["mae"] == pytest.approx(result["test_result"]["mae"])


def test_a_run_stopped_in_or_after_the_exchange_goes_on_to_the_same_numbers(run, tmp_path):
    whole = run(epochs=7, checkpoint_dir=str(tmp_path / "whole"), **FACTORS)
    for stop in (3, 6):
        part = run(epochs=stop, checkpoint_dir=str(tmp_path / str(stop)), **FACTORS)
        again = run(epochs=7, checkpoint_dir=str(tmp_path / str(stop)), resume=part["run_folder"], **FACTORS)
        assert again["test_result"] == whole["test_result"]
        assert [each["loss"] for each in again["rounds"]] == [each["loss"] for each in whole["rounds"]]


@pytest.mark.parametrize("keys", [
    {"codecs": ["row_sparse", "int4", "int8", "fp16"], "codec_arrays": {"int4": "product_*", "int8": "[hpg]*"}},
    {"label_mode": "threshold", "metrics": ["AUC"], "valid_metric": "AUC"},
    {"partition": "user"},
    {"em_steps": 0},
    {"em_steps": 2, "min_clients": 2},
    {"factor_size": 40, "sketch_width": 60},
])  # fmt: skip
def test_factors_run_with_other_keys_too(run, keys):
    result = run(**{**FACTORS, "epochs": 8, "saved": False, **keys})
    assert np.isfinite([each for each in result["test_result"].values() if each is not None]).all()


def test_many_rows_have_the_residuals_of_all_of_them_whatever_the_codec():
    """Half precision ends at 65504, which a sum of squares over a million rows passes."""
    knowledge = FactorKnowledge(SETTINGS, Sizes(1, 3, ITEMS))
    arrays = knowledge.upload(
        {"product_0": torch.ones(ITEMS, 4).double(), "squares": torch.tensor([[7e5]]).double()}, False
    )
    stack = CodecStack.of(["int8", "fp16"], {})
    assert stack.decode(stack.encode(arrays, 0))["squares"] == 7e5
    specs = knowledge.upload_arrays()
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
        name: (specs[name].shape, specs[name].dtype) for name in arrays
    }


@pytest.mark.parametrize(("codec", "takes_most"), [("sign", True), ("int8", False)])
def test_a_codec_that_leaves_little_of_the_sums_is_told_and_counts_stay_counts(prepared, caplog, codec, takes_most):
    _, trainer, loaders, _ = prepared("AttnFedKD", **FACTORS, codecs=[codec], partition="user", engine="fleet")
    trainer._train_once(loaders[0], 0, None, False)
    assert ("codecs took" in caplog.text) == takes_most
    assert (trainer.engine.server.state["histogram"] >= 0).all()


def test_codecs_take_the_arrays_that_they_are_given(prepared):
    stack = CodecStack.of(["int4", "fp16"], {"codec_arrays": {"int4": "product_*"}})
    array = np.random.default_rng(0).normal(size=(40, 20)).astype(np.float32)
    encoded = stack.encode({"product_0": array, "histogram": array}, 0)
    assert {name.partition(".")[0] for name in encoded} == {"product_0|0", "histogram|1"}
    decoded = stack.decode(encoded)
    assert np.abs(decoded["histogram"] - array).max() < 2e-3 < np.abs(decoded["product_0"] - array).max()


@pytest.mark.parametrize(("keys", "sentence"), [
    ({"label_mode": "implicit", "metrics": ["AUC"], "valid_metric": "AUC"}, "is made of labels"),
    ({"clients_per_round": 2}, "unset clients_per_round"),
    ({"student_pool": [{}]}, "unset student_pool"),
])  # fmt: skip
def test_what_cannot_go_with_factors_is_refused(run, keys, sentence):
    with pytest.raises(InputError, match=sentence):
        run(**{**FACTORS, "saved": False, **keys})
