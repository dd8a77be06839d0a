"""Numbers that are not finite: found where they arise, told with client and round, and nothing is judged by them."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from engines import refused
from hypothesis import given
from hypothesis import strategies as st
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType

from recbole_fedkd import finite
from recbole_fedkd.command_line import main
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.federated.message import Message

NAN, INF = float("nan"), float("inf")


class TestTensors:
    @given(
        st.lists(
            st.lists(st.sampled_from([0.0, 1.0, -3.4e38, 3.4e38, NAN, INF, -INF]), min_size=1, max_size=4),
            min_size=1,
            max_size=4,
        )
    )
    def test_the_quick_look_sees_what_a_look_at_every_number_sees(self, rows):
        tensors = [torch.tensor(row) for row in rows]
        expected = all(math.isfinite(number) for row in rows for number in row)
        assert finite.all_finite(tensors) == expected
        named = {str(place): tensor for place, tensor in enumerate(tensors)}
        bad = [str(place) for place, row in enumerate(rows) if not all(map(math.isfinite, row))]
        assert finite.not_finite(named) == bad
        assert finite.not_finite_arrays({name: tensor.numpy() for name, tensor in named.items()}) == bad

    def test_large_numbers_whose_sum_overflows_are_finite(self):
        assert finite.all_finite([torch.full((4,), 3e38)])
        assert finite.finite_clients([torch.full((2, 4), 3e38)]).tolist() == [True, True]

    def test_whole_numbers_and_complex_ones_are_looked_at_as_what_they_are(self):
        assert finite.all_finite([torch.tensor([2**62]), torch.tensor([True])])
        assert not finite.all_finite([torch.tensor([complex(0, NAN)])])
        assert not finite.not_finite_arrays({"counts": np.array([2**31 - 1], dtype=np.int32)})

    def test_clients_are_told_apart(self):
        weights = torch.ones(3, 2, 2)
        weights[1, 0, 1] = INF
        rows = torch.ones(3, 4)
        rows[2, 0] = NAN
        assert finite.finite_clients([weights, rows]).tolist() == [True, False, False]


def spoil(engine, number, place="gradient"):
    """One client of the local engine whose gradient is not a number."""
    parameter = next(engine.clients[number].task.network.parameters())
    parameter.register_hook(lambda gradient: gradient * NAN)


STRATEGIES = [
    {"strategy": "afd"},
    {"strategy": "afd", "knowledge": "item"},
    {"strategy": "afd", "knowledge_pass": "last_epoch"},
    {"strategy": "fd", "learner": "adam_to_sgd"},
    {"strategy": "fedavg"},
    {"strategy": "fedavg", "server_optimizer": "fedadam"},
    {"strategy": "fedavg", "codecs": ["int8"]},
    {"strategy": "fedkd"},
    {"strategy": "local", "clip_grad_norm": {"max_norm": 1.0}},
]


class TestOneClient:
    @pytest.mark.parametrize("keys", STRATEGIES)
    def test_whose_gradient_is_nan_ends_the_round_by_its_number(self, prepared, keys):
        _, trainer, _, _ = prepared(**keys)
        engine = trainer.engine
        engine.run_round(0)
        state = {name: value.clone() for name, value in engine.server.state.items() if name != "held"}
        spoil(engine, 1)
        with pytest.raises(TrainingError, match=r"client 1, round \d, training: .*not finite after training"):
            engine.run_round(1)
        assert all(torch.equal(value, engine.server.state[name]) for name, value in state.items())

    @pytest.mark.parametrize("keys", [{}, {"learner": "sgd"}, {"learner": "adam_to_sgd"}, {"fleet_threads": 2}])
    @pytest.mark.parametrize("strategy", ["afd", "fedavg", "local"])
    def test_of_a_fleet_is_told_by_its_own_number(self, prepared, monkeypatch, keys, strategy):
        _, trainer, _, _ = prepared(engine="fleet", partition="user", strategy=strategy, fleet_memory=0.2, **keys)
        engine = trainer.engine
        assert len(engine._packs(0, list(engine.samples))) > 1
        engine.run_round(0)
        whole = engine.training._trained_on

        def spoiled(training, batch, counts, streams):
            found = whole(training, batch, counts, streams)
            numbers = training.group.numbers[training.pack.clients].tolist()
            if 17 in numbers:
                training.weights.dense[numbers.index(17), 0] = NAN
            return found

        monkeypatch.setattr(engine.training, "_trained_on", spoiled)
        with pytest.raises(TrainingError, match=r"^client 17, round \d, training: not finite after training"):
            engine.run_round(1)

    def test_that_sends_a_nan_is_told_by_its_sender(self, prepared):
        _, trainer, _, _ = prepared(strategy="fedavg")
        engine = trainer.engine
        engine.run_round(0)
        for bad in (NAN, INF, -INF):
            payloads = []
            for client in engine.clients:
                client.train(1)
                payloads.append(client.send(1))
            message = Message.from_bytes(payloads[2])
            name = next(name for name in message.arrays if name.startswith("p:"))
            spoiled = message.arrays[name].copy()
            spoiled.flat[0] = bad
            payloads[2] = dataclasses.replace(message, arrays={**message.arrays, name: spoiled}).to_bytes()
            faults = refused(engine.server, dict(enumerate(payloads)), 1)
            assert {client: error.fault for client, error in faults.items()} == {2: "not finite"}
            assert f"'{name}'" in str(faults[2])
            assert finite.all_finite(engine.server.state.values())

    def test_is_not_told_what_is_no_number(self, prepared):
        _, trainer, _, _ = prepared(strategy="afd")
        engine = trainer.engine
        engine.run_round(0)
        engine.server.state["sums"][0, 0] = INF
        with pytest.raises(TrainingError, match=r"client 0, round \d, receiving: not finite: 'sums' holds inf"):
            engine.run_round(1)


class TestServer:
    @pytest.mark.parametrize("engine", ["local", "fleet"])
    def test_whose_step_overflows_says_so_and_keeps_its_state(self, prepared, engine):
        keys = {"server_optimizer": "fedavgm", "server_learning_rate": 1e38, "server_momentum": 0.9}
        _, trainer, _, _ = prepared(strategy="fedavg", engine=engine, learner="sgd", learning_rate=1e3, **keys)
        with pytest.raises(TrainingError, match=r"round \d"):
            for index in range(5):
                trainer.engine.run_round(index)
        assert finite.all_finite(trainer.engine.server.state.values())


def command(data_path, model, **keys):
    merged = {**SMALL, "epochs": 2, "data_path": data_path, **keys}
    return [f"--model={model}", "--dataset=tiny", *[f"--{key}={value}" for key, value in merged.items()]]


RUNS = [
    ("MF", {"strategy": "fedavg", "partition": "user", "learner": "sgd", "learning_rate": 1e20}),
    ("MF", {"strategy": "fedavg", "partition": "user", "learner": "sgd", "learning_rate": 1e20, "engine": "fleet"}),
    ("MF", {"strategy": "central", "learner": "sgd", "learning_rate": 1e20, "label_mode": "threshold"}),
    ("MF", {"strategy": "fedavg", "learner": "sgd", "learning_rate": 1e20, "label_mode": "implicit"}),
    ("AttnFedKD", {"learner": "sgd", "learning_rate": 1e20}),
    ("AttnFedKD", {"learner": "sgd", "learning_rate": 1e20, "knowledge": "item"}),
    ("AttnFedKD", {"learner": "sgd", "learning_rate": 1e20, "engine": "fleet", "partition": "user"}),
    ("AttnFedKD", {"learner": "sgd", "learning_rate": 1e20, "strategy": "fedavg", "codecs": "['fp16']"}),
    ("AttnFedKD", {"learner": "adam_to_sgd", "learning_rate": 1e30, "switch_threshold": 10.0, "switch_reach": 1e9}),
    ("AttnStudent", {"learner": "sgd", "learning_rate": 1e20}),
    ("AttnStudent", {"learner": "sgd", "learning_rate": 1e38, "metrics": "['NDCG','Hit']", "valid_metric": "NDCG@10"}),
    ("WideDeep", {"learner": "sgd", "learning_rate": 1e20, "label_mode": "threshold"}),
    ("WideDeep", {"learner": "sgd", "learning_rate": 1e20, "label_mode": "threshold", "strategy": "fedavg"}),
    ("BPR", {"learner": "sgd", "learning_rate": 1e38, "epochs": 20}),
    ("BPR", {"learner": "sgd", "learning_rate": 1e38, "epochs": 20, "eval_args": "{'mode': 'uni5'}"}),
    ("NeuMF", {"learner": "sgd", "learning_rate": 1e30, "label_mode": "implicit", "strategy": "local"}),
    ("SASRec", {"learner": "sgd", "learning_rate": 1e30, "train_neg_sample_args": "~"}),
    ("BPR", {"learner": "adam", "learning_rate": 3e38}),
    ("LightGCN", {"learner": "sgd", "learning_rate": 1e38, "epochs": 20}),
]


def ended(capsys, arguments):
    """The sentence that a run ends in."""
    assert main(arguments) == 1
    said = capsys.readouterr().err.strip()
    assert "Input contains" not in said and "Traceback" not in said
    lines = said.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


@pytest.mark.parametrize(("model", "keys"), RUNS)
def test_a_run_that_diverges_ends_in_one_sentence_and_no_metric(model, keys, data_path, capsys):
    line = ended(capsys, command(data_path, model, result_file="result.json", **keys))
    assert re.search(r"clients? \d+.*, round \d|^error: (validation after (epoch|round)|epoch) \d", line), line
    assert not Path("result.json").exists()


@pytest.mark.parametrize("strategy", ["afd", "central"])
def test_the_last_whole_round_stays_on_disk_and_is_named(prepared, run, strategy):
    keys = {"strategy": "afd"} if strategy == "afd" else {}
    model = "AttnFedKD" if strategy == "afd" else "AttnStudent"
    _, trainer, loaders, evaluations = prepared(model, epochs=3, **keys)

    def spoil_the_third(epoch, epochs, record):
        if epoch == 1:
            network = trainer.engine.clients[1].task.network if trainer.engine else trainer.model
            next(network.parameters()).register_hook(lambda gradient: gradient * NAN)

    if strategy == "central":
        trainer.engine = None
    trainer.observers.append(spoil_the_third)
    with pytest.raises(TrainingError) as raised:
        trainer.fit(loaders[0], evaluations[0])
    assert f"kept in '{trainer.run_folder}'" in str(raised.value)
    assert run(model, resume=str(trainer.run_folder), **keys, epochs=3)["rounds"][2]["loss"] > 0


def test_a_model_without_gradients_is_told_by_its_own_keys(run, monkeypatch):
    with pytest.raises(InputError, match=r"'EASE' cannot be computed as configured: reg_weight 0.0: Singular matrix"):
        run("EASE", reg_weight=0.0)
    monkeypatch.setattr(np.linalg, "inv", lambda matrix: matrix * NAN)
    with pytest.raises(TrainingError, match=r"scores of model 'EASE' are not finite, as configured: reg_weight 1.5"):
        run("EASE", reg_weight=1.5)


class Broken(GeneralRecommender):
    """Scores 1, but for one item."""

    input_type = InputType.POINTWISE
    value = NAN

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def calculate_loss(self, interaction):
        return self.weight.sum()

    def predict(self, interaction):
        return torch.where(interaction["item_id"] == 3, self.value, 1.0)


class BrokenRanking(Broken):
    """The same, of the whole catalogue."""

    value = -INF

    def full_sort_predict(self, interaction):
        scores = torch.ones(len(interaction), self.n_items)
        scores[:, 0] = NAN  # nobody is recommended the padding item
        scores[:, 3] = self.value
        return scores


@pytest.mark.parametrize("model", [Broken, BrokenRanking])
@pytest.mark.parametrize(
    "keys",
    [
        {"eval_args": {"mode": "full"}},
        {"eval_args": {"mode": "uni20"}},
        {"label_mode": "threshold", "metrics": ["MAE"], "valid_metric": "MAE"},
        {"label_mode": "implicit"},
    ],
)
def test_scores_that_are_not_finite_are_counted_before_anything_is_made_of_them(run, model, keys):
    with pytest.raises(TrainingError, match=r"validation after epoch \d: \d+ of \d+ scores of model 'Broken"):
        run(model, epochs=1, **keys)


def test_only_what_is_masked_on_purpose_may_be_infinite(run):
    class Whole(BrokenRanking):
        value = 0.0

    assert 0 < run(Whole, epochs=1)["test_result"]["recall@10"] < 1


@pytest.mark.parametrize(
    ("model", "keys"),
    [("LightGCN", {}), ("GRU4RecCPR", {"train_neg_sample_args": "~"}), ("LightGCN", {"strategy": "fedavg"})],
)
def test_mixed_precision_that_a_model_cannot_take_is_refused_by_its_key(data_path, capsys, model, keys):
    more = {"reranker_CAN_NUM": 10} if model == "GRU4RecCPR" else {}
    line = ended(capsys, command(data_path, model, enable_amp=True, **keys, **more))
    assert (
        line.startswith(f"error: enable_amp=True does not go with model '{model}'") and "set enable_amp=False" in line
    )


@pytest.mark.parametrize(("strategy", "told"), [("local", "round"), ("central", "epoch")])
def test_scores_that_are_not_finite_are_told_by_what_the_run_counts(run, strategy, told):
    with pytest.raises(TrainingError, match=rf"validation after {told} 1: \d+ of \d+ scores of model 'Broken'"):
        run(Broken, epochs=1, strategy=strategy, label_mode="threshold", metrics=["MAE"], valid_metric="MAE")


@pytest.mark.parametrize("mode", ["full", "uni5", "labeled"])
def test_scores_that_are_no_numbers_name_the_clients_that_gave_them(prepared, mode):
    metrics = ["MAE"] if mode == "labeled" else ["Hit"]
    keys = {"label_mode": "threshold", "metrics": metrics, "valid_metric": "MAE" if mode == "labeled" else "Hit@10"}
    _, trainer, _, evaluations = prepared("AttnFedKD", strategy="local", eval_args={"mode": mode}, **keys)
    with torch.no_grad():
        for parameter in trainer.model.networks[1].parameters():
            parameter.fill_(NAN)
    with pytest.raises(TrainingError, match=r"scores of model 'AttnFedKD' are not finite \(client\(s\) 1\)"):
        trainer.evaluate(evaluations[1], load_best_model=False)
