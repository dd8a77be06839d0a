"""Parameters that stay on their client by pattern, the small models that need it, and the means that go with them."""

import copy
import struct

import numpy as np
import pytest
import torch
from engines import refused
from hypothesis import given
from hypothesis import strategies as st
from test_fleet import assert_same_round, engines_of
from torch import nn
from torch.nn import functional

from recbole_fedkd.config.files import PROPERTIES
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.aggregate import MeanOfChangedRows, WeightedMean
from recbole_fedkd.federated.message import Message
from recbole_fedkd.model.factorization import FactorizationNetwork, ScoreFunctionNetwork
from recbole_fedkd.model.shared import SharedState, matching, private_slices

USERS, ITEMS = 31, 41
MARKER = 0.12345678
STILL = {"learner": "sgd", "learning_rate": 0.0}
TEACHER = {"embedding_size": 6, "hidden_sizes": [6, 12], "history_length": 7, "attention_heads": 3}
# Model, keys, patterns, and how many parameters and buffers a pattern keeps.
CASES = [
    ("AttnFedKD", {"strategy": "fedavg"}, ["backbone.*", "*field_item_id*"], 11),
    ("AttnFedKD", {"strategy": "fedkd", "teacher": TEACHER}, ["student.backbone.*"], 10),
    ("MF", {"strategy": "fedavg", "partition": "user"}, ["item_bias.*"], 1),
    ("PFedRec", {"strategy": "fedavg", "partition": "user"}, ["score.*"], 2),
    ("BPR", {"strategy": "fedavg"}, ["item_embedding.*"], 1),
    ("WideDeep", {"strategy": "fedavg", "label_mode": "threshold"}, ["mlp_layers.*", "deep_predict_layer.?ias"], None),
]


def private_names(trainer, number, patterns):
    return matching(trainer.model.networks[number].state_dict(), patterns)


@pytest.mark.parametrize(("model", "keys", "patterns", "count"), CASES, ids=str)
def test_what_a_pattern_keeps_never_leaves_its_client(prepared, model, keys, patterns, count):
    if model == "BPR":
        with pytest.raises(InputError, match="leaves nothing that could be averaged"):
            prepared(model, private_parameters=patterns, **keys)
        return
    if model == "WideDeep":
        keys = {**keys, "mlp_hidden_size": [8, 4], "metrics": ["AUC"]}
    _, trainer, _, _ = prepared(model, private_parameters=patterns, **keys, **STILL)
    engine = trainer.engine
    with torch.no_grad():
        for number, network in enumerate(trainer.model.networks):
            names = private_names(trainer, number, patterns)
            assert names and (count is None or len(names) == count)
            for name, tensor in network.state_dict(keep_vars=True).items():
                if name in names:
                    tensor.fill_(MARKER)
            for name, (start, stop) in trainer.model.private_rows(number).items():
                network.get_parameter(name)[start:stop] = MARKER
    engine.server.start(engine.clients[0].task.shared)
    payloads = []
    for index in range(2):
        for client in engine.clients:
            payloads.append(engine.server.send(client.number, index))
            client.receive(payloads[-1])
            client.train(index)
            payloads.append(client.send(index))
        assert not refused(engine.server, dict(enumerate(payloads[-2 * len(engine.clients) + 1 :: 2])), index)
    assert all(payloads[1::2])
    marks = [struct.pack(code, MARKER) for code in ("<f", ">f", "<d")]
    assert not any(mark in payload for payload in payloads for mark in marks)
    for payload in payloads:
        if payload:
            sent = {name.partition(":")[2] for name in Message.from_bytes(payload).arrays}
            assert not sent & set(private_names(trainer, 0, patterns))


def test_private_parameters_differ_between_clients_and_the_shared_ones_do_not(prepared):
    _, trainer, _, _ = prepared("AttnFedKD", strategy="fedavg", private_parameters=["backbone.*"])
    trainer.engine.run_round(0)
    first, second = trainer.model.networks[:2]
    for name, value in first.named_parameters():
        if name not in first.user_rows:
            assert torch.equal(value, second.get_parameter(name)) != name.startswith("backbone."), name


def test_private_parameters_survive_a_resume(run):
    keys = {
        "preset": "pfedrec",
        "learning_rates": {"item_embedding.*": 5.0},
        "clients_per_round": 7,
        "metrics": ["NDCG"],
    }
    keys |= {"valid_metric": "NDCG@10"}
    whole, part = run("PFedRec", epochs=3, **keys), run("PFedRec", epochs=1, **keys)
    resumed = run("PFedRec", epochs=3, resume=part["run_folder"], **keys)
    assert resumed["test_result"] == whole["test_result"]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"private_parameters": ["scores.*"]},
            r"private_parameters: no parameter .* matches 'scores.\*'; did you mean 'score.bias'",
        ),
        ({"private_parameters": ["zzz"]}, "matches 'zzz'; there are item_embedding.weight, score.weight, score.bias"),
        ({"private_parameters": ""}, "private_parameters is ''; it must be a list of texts"),
        ({"private_parameters": [3]}, r"private_parameters is \[3\]; it must be a list of texts"),
        ({"private_parameters": ["*"]}, "leaves nothing that could be averaged; use strategy=local"),
        ({"learning_rates": {"item.*": 1.0}}, r"learning_rates: no parameter of the network matches 'item.\*'"),
        ({"learning_rates": {"score.*": -1.0}}, r"learning_rates.score.\* is -1.0; it must be a number >= 0"),
        ({"row_mean": "changed", "codecs": ["int8"]}, "which codecs and stages blur; unset one of them"),
        ({"row_mean": "some"}, "row_mean is 'some'; it must be one of all, changed"),
    ],
)
def test_a_wrong_key_is_told(prepared, keys, sentence):
    with pytest.raises(InputError, match=sentence):
        prepared("PFedRec", strategy="fedavg", **keys)


def test_a_text_is_a_list_of_what_stands_between_its_commas(prepared):
    config = prepared("PFedRec", strategy="fedavg", private_parameters="score.*")[0]
    assert config["private_parameters"] == ["score.*"]


def test_patterns_know_upper_and_lower_case_and_the_first_one_counts():
    assert matching(["a.Weight", "a.bias", "b.bias"], ["A.*", "*.bias", "a.*"]) == {
        "a.Weight": "a.*",
        "a.bias": "*.bias",
        "b.bias": "*.bias",
    }


def test_a_private_scalar_and_a_private_buffer_stay():
    network = nn.BatchNorm1d(3)
    network.scale = nn.Parameter(torch.tensor(1.0))
    rows = private_slices(network, {"weight": (0, 1)}, ["scale", "running_*"])
    assert rows == {"weight": (0, 1), "scale": (0, 1), "running_mean": (0, 3), "running_var": (0, 3)}
    shared = SharedState(network, lambda: rows)
    assert {name: len(value) for name, value in shared.parameters().items()} == {"weight": 2, "bias": 3}
    assert not shared.buffers()


def test_what_stays_on_a_client_may_still_be_told_by_the_server(prepared):
    _, trainer, _, _ = prepared("AttnFedKD", strategy="afd", knowledge="item", private_parameters=["item_prior"])
    for index in range(2):
        trainer.engine.run_round(index)
    assert trainer.model.networks[0].item_prior.abs().sum() > 0


# Learning rates by pattern


def test_each_pattern_has_its_own_rate(prepared):
    rates = {"item_embedding.*": 0.5, "score.b*": 0.0}
    _, trainer, _, _ = prepared("PFedRec", strategy="local", learner="sgd", learning_rate=0.1, learning_rates=rates)
    client = trainer.engine.clients[0]
    network = client.task.network
    before = copy.deepcopy(network)
    batch = next(client.task.batches())
    functional.cross_entropy(before(batch.users, batch.items[:, None])[:, 0], batch.labels).backward()
    client.optimizer.zero_grad()
    client.task.step(batch, False).loss.backward()
    client.optimizer.step()
    for name, rate in (("item_embedding.weight", 0.5), ("score.weight", 0.1), ("score.bias", 0.0)):
        old = before.get_parameter(name)
        torch.testing.assert_close(network.get_parameter(name), old - rate * old.grad, msg=name)


def test_rates_by_pattern_reach_central_training_too(run):
    keys = {"epochs": 1, "learner": "sgd", "learning_rate": 0.0}
    still, moved = run("MF", **keys), run("MF", learning_rates={"*item_bias.*": 10.0}, **keys)
    assert still["test_result"]["logloss"] == pytest.approx(np.log(2), abs=5e-3)
    assert moved["test_result"]["logloss"] != still["test_result"]["logloss"]


# Means of the server


def folded(fold, arrays):
    for number, array in enumerate(arrays):
        fold.add(Message("model", 0, number, {"p:w": np.asarray(array, np.float32)}))
    return fold.finish()["p:w"]


def mean_of_changed_rows(state, arrays, weights):
    return folded(MeanOfChangedRows(lambda upload: weights[upload.sender], sum(weights), state), arrays)


def test_the_mean_of_changed_rows_by_hand():
    state = {"p:w": torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])}
    sent = [
        [[4.0, 1.0], [2.0, 2.0], [3.0, 3.0]],
        [[1.0, 1.0], [4.0, 2.0], [3.0, 3.0]],
        [[7.0, 1.0], [2.0, 2.0], [3.0, 3.0]],
    ]
    mean = mean_of_changed_rows(state, sent, [0.25, 0.25, 0.5])
    torch.testing.assert_close(mean, torch.tensor([[6.0, 1.0], [4.0, 2.0], [3.0, 3.0]]))


@given(st.integers(1, 5), st.integers(0, 100))
def test_where_everybody_changes_everything_both_means_are_one(clients, seed):
    generator = np.random.default_rng(seed)
    state = {"p:w": torch.zeros(4, 3)}
    sent = generator.normal(size=(clients, 4, 3))
    weights = generator.dirichlet(np.ones(clients)).tolist()
    mean = folded(WeightedMean(lambda upload: weights[upload.sender], sum(weights)), sent)
    torch.testing.assert_close(mean_of_changed_rows(state, sent, weights), mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (5,), (5, 1, 2)])
def test_the_mean_of_changed_rows_keeps_every_shape(shape):
    state = {"p:w": torch.ones(shape)}
    mean = mean_of_changed_rows(state, [np.full(shape, 3.0), np.ones(shape)], [0.5, 0.5])
    torch.testing.assert_close(mean, torch.full(shape, 3.0))


def test_clients_that_count_alike_are_averaged_alike(prepared):
    keys = {"strategy": "fedavg", "partition": "quantity:0.5", "seed": 3, "client_weights": "uniform"}
    _, trainer, _, _ = prepared("MF", **keys)
    engine = trainer.engine
    trained = []
    for client in engine.clients:
        client.receive(engine.server.send(client.number, 0))
        client.train(0)
        trained.append(client.task.network.item_bias.weight.detach().clone())
    assert len({len(client.task) for client in engine.clients}) == 3
    assert not refused(engine.server, {client.number: client.send(0) for client in engine.clients}, 0)
    torch.testing.assert_close(engine.server.state["p:item_bias.weight"], torch.stack(trained).mean(0))


def test_users_may_be_served_by_what_training_left(prepared):
    _, trainer, _, _ = prepared("MF", strategy="fedavg", serve_after="training")
    engine = trainer.engine
    engine.run_round(0)
    served = [client.task.network.item_bias.weight.detach().clone() for client in engine.clients]
    assert not torch.equal(served[0], served[1])
    engine.clients[0].receive(engine.server.send(0, 1))
    assert torch.equal(engine.clients[0].task.network.item_bias.weight, engine.server.state["p:item_bias.weight"])


# The small models


@pytest.mark.parametrize("biases", [True, False])
def test_matrix_factorisation_by_hand(biases):
    network = FactorizationNetwork(3, 5, 4, biases)
    with torch.no_grad():
        if biases:
            network.user_bias.weight.copy_(torch.arange(3.0)[:, None])
            network.item_bias.weight.copy_(torch.arange(5.0)[:, None] * 10)
    users, items = torch.tensor([1, 2]), torch.tensor([[4, 0], [3, 3]])
    logits = network(users, items)
    for row, user in enumerate(users):
        for column, item in enumerate(items[row]):
            expected = network.user_embedding.weight[user] @ network.item_embedding.weight[item]
            expected = expected + biases * (float(user) + 10 * float(item))
            torch.testing.assert_close(logits[row, column], torch.stack([torch.zeros(()), expected]))
    assert {len(network.get_parameter(name)) for name in network.user_rows} == {3}
    assert {len(network.get_parameter(name)) for name in network.item_rows} == {5}
    assert {*network.user_rows, *network.item_rows} == {name for name, _ in network.named_parameters()}
    norm = network.touched_squared_norm(users[:1], items[:1])
    parts = [network.user_embedding.weight[1], network.item_embedding.weight[[4, 0]]]
    parts += [network.user_bias.weight[1:2], network.item_bias.weight[[4, 0]]] if biases else []
    torch.testing.assert_close(norm, sum(part.pow(2).sum() for part in parts))


def test_the_score_function_by_hand():
    network = ScoreFunctionNetwork(5, 4)
    items = torch.tensor([[4, 0], [3, 3]])
    expected = network.score(network.item_embedding.weight[items]).squeeze(-1)
    logits = network(torch.tensor([1, 2]), items)
    torch.testing.assert_close(logits, torch.stack([torch.zeros(2, 2), expected], -1))
    norm = network.item_embedding.weight[[3]].pow(2).sum() + sum(
        each.pow(2).sum() for each in network.score.parameters()
    )
    torch.testing.assert_close(network.touched_squared_norm(torch.tensor([2]), items[1:]), norm)


@pytest.mark.parametrize("model", ["MF", "PFedRec"])
def test_one_client_that_holds_everything_trains_a_small_model_as_central_training_does(run, model):
    """Not bit for bit: RecBole's loader draws the negatives of a batch, a client those of an epoch."""
    keys = {"epochs": 20, "learning_rate": 0.03, "metrics": ["AUC"], "train_neg_sample_args": NEGATIVES}
    keys["eval_args"] = {"mode": "uni15"}  # one candidate a row would leave more to chance than training does
    alone, central = run(model, strategy="fedavg", client_num=1, **keys), run(model, **keys)
    assert alone["test_result"]["auc"] == pytest.approx(central["test_result"]["auc"], abs=0.05)


NEGATIVES = {"distribution": "uniform", "sample_num": 4, "alpha": 1.0, "dynamic": False, "candidate_num": 0}


@pytest.mark.parametrize("strategy", ["afd", "fd", "local", "fedavg"])
def test_every_strategy_runs_over_a_small_model(run, strategy):
    result = run("MF", strategy=strategy, epochs=2, knowledge="label")
    assert np.isfinite(list(result["test_result"].values())).all()
    assert (result["communication"]["total_bytes"] > 0) == (strategy != "local")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"label_mode": "rating"}, "label_mode=rating needs a model with one output per rating, which MF is not"),
        ({"strategy": "fedkd"}, "use --model=AttnFedKD for it"),
        ({"strategy": "afd", "knowledge": "item"}, "only AttnFedKD adds a log-prior"),
    ],
)
def test_what_a_small_model_cannot_do_is_told(run, keys, sentence):
    with pytest.raises(InputError, match=sentence):
        run("MF", **keys)


FLEET = {
    "fedmf": {"preset": "fedmf"},
    "fedmf by clients": {"preset": "fedmf", "client_weights": "uniform", "clients_per_round": 11},
    "fedrec": {"preset": "fedrec", "clients_per_round": 9},
    "pfedrec": {"preset": "pfedrec"},
    "pfedrec, aggregate": {"preset": "pfedrec", "serve_after": "aggregation", "clients_per_round": 9},
    "private backbone": {"preset": "fedavg", "private_parameters": ["backbone.*"]},
    "private items": {"preset": "fedavg", "private_parameters": ["embeddings.field_item_id.*"]},
    "own networks": {"preset": "fedavg", "serve_after": "training", "label_mode": "implicit"},
    "rates": {"preset": "fedavg", "learner": "sgd", "learning_rates": {"*item_id*": 2.0, "backbone.*": 0.3}},
}


@pytest.mark.parametrize("case", FLEET)
def test_small_models_and_private_parameters_train_on_the_fleet_as_one_by_one(prepared, case):
    keys = {"partition": "user", "train_batch_size": 16, **FLEET[case]}
    if "learning_rates" not in keys and keys["preset"] != "fedavg":
        keys |= {"learner": "sgd", "learning_rate": 0.5, "learning_rates": {"item_*": 20.0}}
    model = None if keys["preset"] != "fedavg" else "AttnFedKD"
    local, fleet = engines_of(prepared, model=model, **keys)
    for index in range(3):
        assert_same_round(local, fleet, index)
    users = torch.arange(1, USERS)
    items = torch.arange(1, ITEMS).expand(len(users), -1)
    expected = local.model.eval().logits(users, items)
    torch.testing.assert_close(fleet.model.eval().logits(users, items), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"learner": "adam_to_sgd", "learning_rates": {"item_*": 0.1}}, "which learning_rates contradict"),
        ({"learner": "adagrad"}, "learner 'adagrad' is not batched"),
    ],
)
def test_what_the_fleet_cannot_do_runs_one_by_one_and_is_told(run, caplog, keys, sentence):
    run("MF", strategy="fedavg", partition="user", engine="fleet", epochs=1, **keys)
    assert sentence in caplog.text


@pytest.mark.parametrize("preset", ["fedmf", "fedncf", "pfedrec", "fedrec"])
def test_a_cross_device_preset_runs_one_client_per_user(run, preset):
    keys = {"clients_per_round": 9} if preset == "fedrec" else {}
    keys |= {"embedding_size": 4} if preset != "fedncf" else {"mlp_hidden_size": [8, 4], "mf_embedding_size": 4}
    result = run(None, preset=preset, epochs=2, **keys, **LEAVE_ONE_OUT)
    assert result["partition"]["client_num"] == USERS - 1
    assert len(result["rounds"]) == 2 and result["config"]["train_neg_sample_args"]["sample_num"] == 4
    assert set(result["test_result"]) == {"hit@10", "ndcg@10"}
    assert (PROPERTIES / "preset" / f"{preset}.yaml").read_text().startswith("# ")


LEAVE_ONE_OUT = {
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": {"valid": "uni9", "test": "uni9"}},
    "metrics": ["Hit", "NDCG"],
    "valid_metric": "NDCG@10",
}
