"""Federated averaging over any model: what travels, what it equals, and which rows everybody is trained and judged on."""

import copy
import struct
from functools import partial

import numpy as np
import pytest
import torch
from engines import refused
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recbole_fedkd import load_data_and_model
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.aggregate import Fold, MeanOfChangedRows, WeightedMean
from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.task import click_loss
from recbole_fedkd.model.population import user_rows
from recbole_fedkd.model.shared import SharedState
from recbole_fedkd.optim.server import fedadam, fedavg, fedavgm
from recbole_fedkd.quick_start import build_trainer

THRESHOLD = {"label_mode": "threshold", "metrics": ["AUC", "MAE", "Accuracy"]}
SHORT = {"MAX_ITEM_LIST_LENGTH": 4, "mlp_hidden_size": [8, 4]}
SASREC = {"MAX_ITEM_LIST_LENGTH": 4, "train_neg_sample_args": None, "n_layers": 1, "hidden_size": 8, "inner_size": 8}
# Small widths that no number of users or items equals.
MODELS = {
    "BPR": {},
    "NeuMF": {**THRESHOLD, "mlp_hidden_size": [8, 4]},
    "LightGCN": {},
    "WideDeep": {**THRESHOLD, "mlp_hidden_size": [8, 4]},
    "DeepFM": {**THRESHOLD, "mlp_hidden_size": [8, 4]},
    "AutoInt": {**THRESHOLD, "mlp_hidden_size": [8, 4], "attention_size": 8},
    "DIN": {**THRESHOLD, **SHORT},
    "SASRec": SASREC,
}
EXPECTED_USER_TABLES = {
    "BPR": 1,
    "NeuMF": 2,
    "LightGCN": 1,
    "WideDeep": 2,
    "DeepFM": 2,
    "AutoInt": 2,
    "DIN": 1,
    "SASRec": 0,
}
USERS = 31


@pytest.mark.parametrize("model", MODELS)
def test_one_client_that_holds_everything_trains_as_recbole_does(run, model):
    keys = {"epochs": 3, **MODELS[model]}
    alone, central = run(model, strategy="fedavg", client_num=1, **keys), run(model, **keys)
    assert alone["test_result"] == central["test_result"]
    assert [each["valid"] for each in alone["rounds"]] == [each["valid"] for each in central["rounds"]]
    assert alone["communication"]["total_bytes"] > 0


@pytest.mark.parametrize("label_mode", ["rating", "threshold"])
def test_one_client_with_the_attentive_student_trains_as_the_student_does(run, label_mode):
    keys = {"epochs": 3, "label_mode": label_mode, "dropout_prob": 0.3}
    alone, central = run("AttnFedKD", preset="fedavg", client_num=1, **keys), run("AttnStudent", **keys)
    assert alone["test_result"] == central["test_result"]


@pytest.mark.parametrize("model", [*MODELS, "AttnFedKD"])
def test_user_rows_never_leave_their_client(prepared, model):
    marker = 12345.678
    keys = {"strategy": "fedavg", **MODELS.get(model, {}), "learner": "sgd", "learning_rate": 0.0}
    _, trainer, _, _ = prepared(model, **keys)
    engine = trainer.engine
    found = 0
    for number, network in enumerate(trainer.model.networks):
        private = trainer.model.private_rows(number)
        found += len(private)
        for name, (start, stop) in private.items():
            # A joint table is longer than the slice, and nothing but users stands in it.
            assert stop - start == (USERS if model != "AttnFedKD" else len(network.get_parameter(name)))
            with torch.no_grad():
                network.get_parameter(name)[start:stop] = marker
    assert found == 3 * EXPECTED_USER_TABLES.get(model, 1)
    engine.server.start(engine.clients[0].task.shared)
    payloads = []
    for index in range(2):
        for client in engine.clients:
            payload = engine.server.send(client.number, index)
            client.receive(payload)
            client.train(index)
            payloads += [payload, client.send(index)]
        assert not refused(engine.server, dict(enumerate(payloads[-2 * len(engine.clients) + 1 :: 2])), index)
    assert all(payloads)
    assert all(struct.pack(code, marker) not in payload for payload in payloads for code in ("<f", ">f", "<d"))
    arrays = Message.from_bytes(payloads[1]).arrays
    total = sum(array.size for name, array in arrays.items() if name.startswith("p:"))
    owned = sum(
        trainer.model.networks[0].get_parameter(name)[start:stop].numel()
        for name, (start, stop) in trainer.model.private_rows(0).items()
    )
    assert total == sum(parameter.numel() for parameter in trainer.model.networks[0].parameters()) - owned


def test_the_users_slice_of_a_joint_table_is_found_by_its_offset(prepared):
    _, trainer, _, _ = prepared("WideDeep", strategy="fedavg", **MODELS["WideDeep"])
    network = trainer.model.networks[0]
    position = network.token_field_names.index("user_id")
    start = int(np.cumsum([0, *network.token_field_dims])[position])
    rows = user_rows(network, "user_id", USERS, 41)
    assert set(rows.values()) == {(start, start + USERS)}
    assert set(rows) == {
        "token_embedding_table.embedding.weight",
        "first_order_linear.token_embedding_table.embedding.weight",
    }


def test_an_item_table_as_long_as_the_user_table_is_not_taken_for_it():
    model = nn.ModuleDict({"user_embedding": nn.Embedding(9, 2), "item_embedding": nn.Embedding(9, 2)})
    assert user_rows(model, "user_id", 9, 9) == {"user_embedding.weight": (0, 9)}


def test_an_embedding_with_a_row_per_user_is_private_whatever_it_is_called(prepared):
    model = nn.ModuleDict({"item_neigh_embedding": nn.Embedding(9, 2), "item_embedding": nn.Embedding(12, 2)})
    assert user_rows(model, "user_id", 9, 12) == {"item_neigh_embedding.weight": (0, 9)}  # NNCF looks users up in it
    _, trainer, _, _ = prepared("FFM", strategy="fedavg", **THRESHOLD)
    network = trainer.model.networks[0]
    start = int(network.ffm.token_offsets[network.ffm.token_feature_names.index("user_id")])
    tables = {name: rows for name, rows in trainer.model.private_rows(0).items() if name.startswith("ffm.")}
    assert len(tables) > 1 and set(tables.values()) == {(start, start + USERS)}


@pytest.mark.parametrize("model", ["DMF", "GCMC"])
def test_a_model_whose_user_weights_cannot_be_told_apart_is_refused(run, model):
    with pytest.raises(InputError, match="seems to hold something of every user"):
        run(model, strategy="fedavg", epochs=1)
    assert run(model, strategy="local", epochs=1)["test_result"]


def test_a_model_without_weights_to_learn_is_refused(run):
    with pytest.raises(InputError, match="NCEPLRec' learns nothing by gradient"):
        run("NCEPLRec", strategy="fedavg", epochs=1, rank=4)


def test_a_scalar_weight_travels_too():
    model = nn.Linear(2, 1)
    model.scale = nn.Parameter(torch.tensor(1.0))
    SharedState(model, dict).install({"scale": torch.tensor(3.0)})
    assert model.scale == 3.0


@given(st.integers(0, 6), st.integers(0, 6))
def test_what_is_shared_and_what_is_private_make_up_the_whole(first, second):
    start, stop = sorted((first, second))
    table = nn.Embedding(6, 3)
    private = SharedState(table, lambda: {"weight": (start, stop)})
    before = table.weight.detach().clone()
    shared = private.parameters()
    assert shared.get("weight", before[:0]).shape[0] == 6 - (stop - start)
    private.install({name: torch.full_like(value, 7.0) for name, value in shared.items()})
    torch.testing.assert_close(table.weight[start:stop], before[start:stop])
    rest = torch.cat([table.weight[:start], table.weight[stop:]])
    assert (rest == 7.0).all()


def test_a_round_is_the_mean_weighted_by_samples(prepared):
    """Equality with a slow version: train copies of the network by hand, then average."""
    keys = {"strategy": "fedavg", "learner": "sgd", "learning_rate": 0.1, "partition": "quantity:0.5", "seed": 3}
    _, trainer, _, _ = prepared(**keys)
    _, twin, _, _ = prepared(**keys)
    engine = trainer.engine
    sizes = [len(client.task) for client in twin.engine.clients]
    assert len(set(sizes)) == 3
    for index in range(2):
        report = engine.run_round(index)
        trained = []
        for client in twin.engine.clients:
            client.train(index)
            trained.append(dict(client.task.shared.parameters()))
        mean = {
            name: sum(part[name].detach() * size for part, size in zip(trained, sizes, strict=True)) / sum(sizes)
            for name in trained[0]
        }
        for client in twin.engine.clients:
            client.task.shared.install(mean)
        for client, other in zip(engine.clients, twin.engine.clients, strict=True):
            for name, value in client.task.network.named_parameters():
                torch.testing.assert_close(value, other.task.network.get_parameter(name), atol=1e-6, rtol=1e-5)
        assert set(report.bytes_up) == set(report.bytes_down) == {0, 1, 2}
    assert len({float(c.task.network.embeddings["field_user_id"].weight[1, 0]) for c in engine.clients}) == 3


def test_server_optimisers_by_hand():
    current, mean = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
    assert fedavg(current, mean, {}, 1.0, 0.9, 0.99, 1e-3)[0]["w"] == 3.0
    assert fedavg(current, mean, {}, 0.5, 0.9, 0.99, 1e-3)[0]["w"] == 2.0
    moved, memory = fedavgm(current, mean, {}, 0.5, 0.9, 0.99, 1e-3)
    assert moved["w"] == 2.0 and memory["momentum:w"] == 2.0
    moved, memory = fedavgm(moved, mean, memory, 0.5, 0.9, 0.99, 1e-3)  # v = .9 * 2 + 1
    torch.testing.assert_close(memory["momentum:w"], torch.tensor([2.8]))
    torch.testing.assert_close(moved["w"], torch.tensor([3.4]))
    moved, memory = fedadam(current, mean, {}, 0.1, 0.9, 0.99, 0.1)
    first, second = 0.1 * 2.0, 0.99 * 0.01 + 0.01 * 4.0
    torch.testing.assert_close(moved["w"], torch.tensor([1.0 + 0.1 * first / (second**0.5 + 0.1)]))
    moved, again = fedadam(moved, mean, memory, 0.1, 0.9, 0.99, 0.1)
    step = mean["w"] - (1.0 + 0.1 * first / (second**0.5 + 0.1))
    torch.testing.assert_close(again["momentum:w"], 0.9 * first + 0.1 * step)
    torch.testing.assert_close(again["second:w"], 0.99 * second + 0.01 * step**2)


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
def test_a_server_optimiser_keeps_its_memory_over_resume_and_sends_none_of_it(run, optimizer):
    keys = {"strategy": "fedavg", "server_optimizer": optimizer, "server_learning_rate": 0.5}
    whole = run(epochs=3, **keys)
    part = run(epochs=1, **keys)
    resumed = run(epochs=3, resume=part["run_folder"], **keys)
    assert resumed["test_result"] == whole["test_result"]
    plain = run(epochs=3, strategy="fedavg")
    assert plain["test_result"] != whole["test_result"]
    assert plain["communication"]["bytes_down"] == whole["communication"]["bytes_down"]


def test_fedprox_holds_clients_near_the_servers_network(prepared):
    def distance(weight: float) -> float:
        _, trainer, _, _ = prepared(strategy="fedavg", proximal_weight=weight, learner="sgd", learning_rate=0.05)
        engine = trainer.engine
        client = engine.clients[0]
        client.receive(engine.server.send(0, 0))
        start = {name: value.detach().clone() for name, value in client.task.shared.parameters().items()}
        client.train(0)
        moved = [(value - start[name]).pow(2).sum() for name, value in client.task.shared.parameters().items()]
        return float(torch.stack(moved).sum())

    assert distance(10.0) < 0.5 * distance(0.0)


def test_fedprox_adds_half_mu_times_the_squared_distance(prepared):
    _, trainer, _, _ = prepared(strategy="fedavg", proximal_weight=3.0)
    client = trainer.engine.clients[0]
    client.receive(trainer.engine.server.send(0, 0))
    step = client.task.step(next(client.task.batches()), False)
    received = {name: value + (0.1 if name.startswith("p:") else 0.0) for name, value in client.received.items()}
    count = sum(value.numel() for value in client.task.shared.parameters().values())
    loss = client.strategy.loss(step, received, client.task.shared)
    assert float(loss - step.loss) == pytest.approx(1.5 * 0.01 * count, rel=1e-4)


@pytest.mark.parametrize("keys", [{}, {"codecs": ["int8"]}, {"serve_average": 0.5}], ids=str)
def test_what_serves_after_a_round_is_read_once_and_the_next_begins_with_it(prepared, monkeypatch, keys):
    _, trainer, _, _ = prepared("MF", strategy="fedavg", label_mode="threshold", **keys)
    _, other, _, _ = prepared("MF", strategy="fedavg", label_mode="threshold", **keys)
    read, counts = Message.from_bytes, []
    monkeypatch.setattr(Message, "from_bytes", lambda payload: counts.append(1) or read(payload))
    clients = len(trainer.engine.clients)
    for index in range(3):
        counts.clear()
        trainer.engine.run_round(index)
        assert len(counts) == 2 * clients + (0 if index or keys.get("codecs") else clients)  # its own, and the network
        for client in other.engine.clients:
            client._taken_in = None
        other.engine.run_round(index)
        for one, two in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(one, two)


def test_chosen_clients_take_part_and_all_are_served(prepared):
    _, trainer, _, _ = prepared(strategy="fedavg", client_num=10, clients_per_round=3)
    engine = trainer.engine
    chosen = []
    for index in range(4):
        report = engine.run_round(index)
        assert len(report.bytes_up) == 3
        chosen.append(tuple(report.bytes_up))
        networks = [client.task.shared.parameters() for client in engine.clients]
        assert all(torch.equal(networks[0][name], each[name]) for each in networks for name in networks[0])
    assert len(set(chosen)) > 1
    _, again, _, _ = prepared(strategy="fedavg", client_num=10, clients_per_round=3)
    assert [tuple(again.engine.server.choose(range(10), index)) for index in range(4)] == chosen


def test_a_client_that_is_not_chosen_keeps_its_last_word_in_afd(prepared):
    _, trainer, _, _ = prepared(strategy="afd", client_num=4, clients_per_round=2)
    for index in range(3):
        before = copy.deepcopy(trainer.engine.server.state.get("latest_sums"))
        report = trainer.engine.run_round(index)
        for client in set(range(4)) - set(report.bytes_up):
            if before is not None:
                assert torch.equal(trainer.engine.server.state["latest_sums"][client], before[client])


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("BPR", {"client_num": 3}),
        ("NeuMF", {**MODELS["NeuMF"], "client_num": 1, "dropout_prob": 0.5}),
        ("LightGCN", {"client_num": 3}),
        ("WideDeep", {**MODELS["WideDeep"], "clients_per_round": 2, "reset_optimizer": True}),
        ("DIN", MODELS["DIN"]),
        ("AttnFedKD", {"preset": "fedavg", "proximal_weight": 0.1, "client_num": 1}),
    ],
)
def test_federated_averaging_resumes_exactly(run, model, keys):
    keys = {"strategy": "fedavg", **keys}
    whole = run(model, epochs=3, **keys)
    part = run(model, epochs=1, **keys)
    resumed = run(model, epochs=3, resume=part["run_folder"], **keys)
    assert resumed["test_result"] == whole["test_result"]
    assert resumed["communication"] == whole["communication"]


def test_a_loaded_population_can_be_trained_on(run):
    result = run("WideDeep", strategy="fedavg", epochs=1, **MODELS["WideDeep"])
    config, model, _, train, valid, _ = load_data_and_model(result["run_folder"])
    score, _ = build_trainer(config, model).fit(train, valid, saved=False)
    assert np.isfinite(score)


def test_a_graph_model_is_not_judged_with_embeddings_of_an_earlier_network(prepared):
    _, trainer, _, evaluations = prepared("LightGCN", strategy="fedavg", client_num=3)
    before = trainer.evaluate(evaluations[1], load_best_model=False)
    shared = trainer.model.networks[0].item_embedding.weight.detach().clone()
    for client in trainer.engine.clients:
        client.task.shared.install({"item_embedding.weight": shared.flip(0)})
    assert trainer.evaluate(evaluations[1], load_best_model=False) != before


def test_a_client_of_a_graph_model_sees_its_own_graph_only(prepared):
    _, trainer, loaders, _ = prepared("LightGCN", strategy="fedavg", client_num=3)
    edges = [network.interaction_matrix for network in trainer.model.networks]
    assert sum(each.nnz for each in edges) == len(loaders[0]._dataset.inter_feat)
    for number, each in enumerate(edges):
        owners = trainer.model.client_of_user[torch.from_numpy(each.row).long()]
        assert (owners == number).all()


def test_a_clients_model_knows_no_other_clients_features_and_histories(prepared):
    _, trainer, _, _ = prepared("DIN", strategy="fedavg", **MODELS["DIN"])
    for number, network in enumerate(trainer.model.networks):
        others = trainer.model.client_of_user != number
        assert (network.user_feat["group"][others] == 0).all()
        assert (network.user_feat["group"][~others] != 0).all()
        assert (network.embedding_layer.dataset.history_columns[others] == 0).all()


# Distillation over click models


@pytest.mark.parametrize("model", ["NeuMF", "WideDeep", "DeepFM", "AutoInt", "DIN"])
def test_afd_distils_the_click_probability_of_a_recbole_model(prepared, model):
    _, trainer, _, _ = prepared(model, strategy="afd", **{**MODELS[model], "train_batch_size": 4096})
    engine = trainer.engine
    engine.run_round(0)
    client = engine.clients[1]
    arrays = Message.from_bytes(client.send(0)).arrays
    assert arrays["sums"].shape == (2, 2)
    (batch,) = client.task.clean_batches()
    network = client.task.network.eval()
    probability = network.predict(batch)
    logits = torch.stack([torch.zeros_like(probability), torch.logit(probability)], -1)
    for label in (0, 1):
        rows = batch["label"] == label
        np.testing.assert_allclose(arrays["sums"][label], logits[rows].mean(0).detach(), atol=1e-4)
        assert arrays["weights"][label] == int(rows.any())
    client.receive(engine.server.send(1, 1))
    assert client.received["teacher"].shape == (2, 2) and client.received["known"].all()


def test_the_teacher_changes_what_a_click_model_learns(run):
    results = {
        gamma: run("WideDeep", strategy="fd", gamma=gamma, epochs=3, **MODELS["WideDeep"])["test_result"]
        for gamma in (0.0, 2.0)
    }
    local = run("WideDeep", strategy="local", epochs=3, **MODELS["WideDeep"])["test_result"]
    assert results[0.0] == local != results[2.0]


def test_a_model_without_a_click_probability_is_refused_for_distillation(run):
    with pytest.raises(InputError, match="BPR' does not minimise; use fedavg or local"):
        run("BPR", strategy="afd")


def test_the_one_cross_entropy_is_found():
    assert click_loss(nn.ModuleList([nn.Linear(2, 1), nn.BCEWithLogitsLoss()])) is not None
    assert click_loss(nn.Linear(2, 1)) is None
    assert click_loss(nn.ModuleList([nn.BCELoss(), nn.BCEWithLogitsLoss()])) is None


def test_afd_without_its_three_ideas_is_fd_cnn(run):
    none, fd = run(preset="afd_none", epochs=3), run(preset="fd", epochs=3)
    assert none["test_result"] == fd["test_result"]
    assert [each["loss"] for each in none["rounds"]] == [each["loss"] for each in fd["rounds"]]
    for ablation in ("afd_no_attention", "afd_no_kl", "afd_no_switch"):
        assert run(preset=ablation, epochs=2, switch_threshold=0.05, switch_reach=1e9)["config"]["strategy"] == "afd"


# The same rows for everybody


@pytest.mark.parametrize("model", ["AttnStudent", "AttnFedKD", "WideDeep", "NeuMF", "DIN", "BPR"])
def test_every_model_is_trained_and_judged_on_the_same_rows(prepared, model):
    def rows(loader):
        features = loader._dataset.inter_feat
        return sorted(zip(features["user_id"].tolist(), features["item_id"].tolist(), strict=True))

    keys = {"label_mode": "threshold"}
    _, _, expected, _ = prepared("WideDeep", **keys)
    _, _, found, _ = prepared(model, **keys, **(SHORT if model == "DIN" else {}))
    for one, other in zip(found, expected, strict=True):
        assert rows(one) == rows(other)


def test_the_history_columns_hold_training_rows_and_never_the_row_itself(prepared):
    _, _, loaders, _ = prepared("DIN", strategy="fedavg", **MODELS["DIN"])
    train = loaders[0]._dataset
    latest = {}
    order = torch.argsort(train.inter_feat["recency_rank"])
    for row in order.tolist():
        latest.setdefault(int(train.inter_feat["user_id"][row]), []).append(int(train.inter_feat["item_id"][row]))
    for loader in loaders:
        joined = loader._dataset[np.arange(len(loader._dataset))]
        for user, item, sequence, length in zip(
            joined["user_id"].tolist(),
            joined["item_id"].tolist(),
            joined["item_id_list"].tolist(),
            joined["item_length"].tolist(),
            strict=True,
        ):
            past = latest[user][-5:]
            expected = [each for each in past if each != item][-4:]
            assert sequence == expected + [0] * (4 - len(expected))
            assert length == max(1, len(expected))


def test_an_item_that_a_user_has_met_twice_is_hidden_from_its_own_row_altogether(prepared):
    _, _, loaders, _ = prepared("DIN", **MODELS["DIN"])
    train = loaders[0]._dataset
    user, item = int(train.inter_feat["user_id"][0]), int(train.inter_feat["item_id"][0])
    train.history_columns[user] = torch.tensor([item, 7, item, 8, 9])
    joined = train[np.array([0])]
    assert joined["item_id_list"][0].tolist() == [9, 8, 7, 0]
    assert joined["item_length"][0] == 3


# Attention encoding in front of RecBole's models


@pytest.mark.parametrize("model", ["WideDeep", "DeepFM", "DIN"])
def test_the_attention_encoding_stands_between_embeddings_and_network(prepared, model):
    _, plain, loaders, _ = prepared(model, **MODELS[model])
    _, encoded, _, _ = prepared(model, attention=True, **MODELS[model])
    assert type(encoded.model).__name__ == model
    extra = {name for name, _ in encoded.model.named_parameters()} - {
        name for name, _ in plain.model.named_parameters()
    }
    assert extra and all(name.startswith("field_attention.") for name in extra)
    batch = next(iter(loaders[0]))
    encoded.model.load_state_dict({**encoded.model.state_dict(), **plain.model.state_dict()})
    plain.model.eval(), encoded.model.eval()
    before = encoded.model.predict(batch)
    assert not torch.allclose(before, plain.model.predict(batch))
    with torch.no_grad():
        encoded.model.field_attention.attention.value.weight.zero_()
    torch.testing.assert_close(encoded.model.predict(batch), plain.model.predict(batch))


def test_a_model_without_feature_fields_cannot_be_encoded(run):
    with pytest.raises(InputError, match="attention is True, but model 'BPR' embeds no feature fields"):
        run("BPR", attention=True)


@pytest.mark.parametrize(("model", "encoded"), [("BPR", False), ("DeepFM", True), ("DIN", True)])
def test_a_preset_encodes_what_can_be_encoded_and_refuses_nobody(model, encoded, data_path):
    config = FedKDConfig(model, "tiny", config_dict={"preset": "fedavg", "data_path": str(data_path)})
    assert config["attention"] == encoded


def test_a_recbole_population_takes_any_partition_and_reports_it(run):
    result = run("WideDeep", strategy="fedavg", partition="attribute:group", epochs=1, **MODELS["WideDeep"])
    assert [client["users"] for client in result["partition"]["clients"]] == [15, 15]
    assert result["partition"]["label_values"] == [0.0, 1.0]
    clicks = run("BPR", strategy="fedavg", epochs=1)["partition"]
    assert clicks["label_values"] == [1.0]
    assert sum(client["samples"] for client in clicks["clients"]) == sum(sum(c["labels"]) for c in clicks["clients"])


def test_metrics_of_single_users_average_to_the_runs_own(run):
    for model, keys in (("AttnFedKD", {}), ("WideDeep", {"label_mode": "threshold"})):
        result = run(model, epochs=1, user_metrics=True, **keys)
        users = result["user_metrics"]
        for name in ("ndcg@10", "recall@10", "hit@10", "mrr@10", "labelledndcg@10"):
            assert np.nanmean(users[name]) == pytest.approx(result["test_result"][name], abs=1e-4), name
        assert users["user"] == sorted(users["user"])
        assert {"accuracy", "mae"} <= users.keys()


def test_means_in_parts_are_the_mean_of_all_who_have_come():
    def message(sender, *numbers):
        return Message("model", 0, sender, {"a": np.array(numbers, dtype=np.float32)})

    def of(*messages):
        fold = WeightedMean(lambda upload: 1.0 + upload.sender, 10.0)  # four were asked, one is missing
        for upload in messages:
            fold.add(upload)
        return fold

    first, second, third = message(0, 1, 0), message(1, 0, 3), message(2, 2, 2)
    parts = of(first, second)
    parts.merge(of(third))
    torch.testing.assert_close(parts.finish()["a"], torch.tensor([7 / 6, 2.0]))


def test_a_mean_that_makes_another_part_of_an_upload_takes_uploads_one_by_one():
    class Doubled(WeightedMean):
        def part(self, name, array, share):
            return 2 * super().part(name, array, share)

    assert Doubled.add_stacked is Fold.add_stacked is not WeightedMean.add_stacked


@pytest.mark.parametrize("fold_of", [WeightedMean, partial(MeanOfChangedRows, reference={"a": torch.zeros(3)})])
def test_a_mean_of_many_equal_networks_is_that_network(fold_of):
    """Sums in single precision are off by 10^-4 of ten thousand clients, and by ten times that of ten times as many."""
    fold = fold_of(lambda message: 1.0, 10_000.0)
    array = np.array([0.1, 1.7, -3.3], dtype=np.float32)
    for client in range(10_000):
        fold.add(Message("network", 0, client, {"a": array}))
    mean = fold.finish()["a"]
    assert mean.dtype == torch.float32
    np.testing.assert_allclose(mean.numpy(), array, rtol=2e-7)
