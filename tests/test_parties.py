"""Server and clients that are built apart, each from what is public and its own rows, are those of one process."""

import io
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from conftest import SMALL
from engines import refused
from hypothesis import given
from hypothesis import strategies as st

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.data.dataset import client_dataset
from recbole_fedkd.data.schema import ClientRows, DataSchema, all_rows, latest_rows, read_schema, rows_of_clients
from recbole_fedkd.errors import InputError
from recbole_fedkd.federation.parties import build_client, build_server

ROUNDS = 3
THRESHOLD = {"label_mode": "threshold", "metrics": ["AUC"]}
TEACHER = {"embedding_size": 6, "hidden_sizes": [6, 12], "history_length": 7, "attention_heads": 3}
CASES = {
    "afd": ("AttnFedKD", {"strategy": "afd"}),
    "afd, features": ("AttnFedKD", {"strategy": "afd", "use_user_id": True, "dropout_prob": 0.2}),
    "afd, items": ("AttnFedKD", {"strategy": "afd", "knowledge": "item"}),
    "afd, factors": ("AttnFedKD", {"strategy": "afd", "knowledge": "factors", "epochs": 8}),
    "afd, fold_in": ("AttnFedKD", {"strategy": "afd", "knowledge": "fold_in", "label_knowledge": True, "epochs": 8}),
    "fd, pool": ("AttnFedKD", {"strategy": "fd", "student_pool": [{"embedding_size": 2}, {"embedding_size": 8}]}),
    "fedavg": ("AttnFedKD", {"strategy": "fedavg"}),
    "fedavg, int8": ("AttnFedKD", {"strategy": "fedavg", "codecs": ["int8"], "clients_per_round": 2}),
    "fedgkd": ("AttnFedKD", {"strategy": "fedgkd"}),
    "fedkd": ("AttnFedKD", {"strategy": "fedkd", "teacher": TEACHER}),
    "implicit": ("AttnFedKD", {"strategy": "fedavg", "label_mode": "implicit", "metrics": ["NDCG"]}),
    "MF": ("MF", {"strategy": "fedavg", "client_num": 5}),
    "PFedRec": ("PFedRec", {"preset": "pfedrec", "engine": "local"}),
    "BPR": ("BPR", {"strategy": "fedavg"}),
    "LightGCN": ("LightGCN", {"strategy": "fedavg"}),
    "WideDeep": ("WideDeep", {"strategy": "afd", **THRESHOLD, "mlp_hidden_size": [8, 4]}),
    "DIN": ("DIN", {"strategy": "fedavg", **THRESHOLD, "MAX_ITEM_LIST_LENGTH": 4, "mlp_hidden_size": [8, 4]}),
    "SASRec": (
        "SASRec",
        {
            "strategy": "fedavg",
            "MAX_ITEM_LIST_LENGTH": 4,
            "train_neg_sample_args": None,
            "n_layers": 1,
            "hidden_size": 8,
            "inner_size": 8,
        },
    ),
}


def parties(schema_folder, files, config):
    """Server and clients, each from the files that it may see."""
    server = build_server(config, DataSchema.load(schema_folder))
    clients = [
        build_client(config, DataSchema.load(schema_folder), ClientRows.load(file), number)
        for number, file in enumerate(files)
    ]
    return server, clients


def played(server, clients):
    """Parameters of all clients after three rounds in which nothing but bytes goes from one to the other."""
    held = {client.number: len(client.task) for client in clients if len(client.task)}
    for index in range(ROUNDS):
        chosen = server.choose(list(held), index)
        answers = {}
        for number in chosen:
            clients[number].receive(server.send(number, index))
            clients[number].train(index)
            answers[number] = clients[number].send(index)
        assert not refused(server, answers, index)
        if server.strategy.serves_aggregate:
            told = server.serve(index + 1)
            for client in clients:
                client.receive(told)
    return [{name: value.clone() for name, value in client.task.network.state_dict().items()} for client in clients]


@pytest.mark.parametrize("case", CASES)
def test_parties_of_their_own_files_train_to_the_same_bit_as_one_process(prepared, tmp_path, data_path, case):
    model, keys = CASES[case]
    _, trainer, loaders, _ = prepared(model, **keys)
    dataset, client_of_user = loaders[0]._dataset, trainer.model.client_of_user
    read_schema(dataset, int(client_of_user.max()) + 1).save(tmp_path)
    files = []
    for number, rows in enumerate(rows_of_clients(dataset, client_of_user)):
        files.append(tmp_path / f"{number}.npz")
        rows.save(files[-1])
    for index in range(ROUNDS):
        trainer.engine.run_round(index)
    fresh = FedKDConfig(model, "tiny", config_dict={"data_path": str(data_path), **SMALL, **keys})
    torch.manual_seed(99)  # nothing depends on where the process's streams are
    before = torch.get_rng_state()
    server, clients = parties(tmp_path, files, fresh)
    assert torch.equal(torch.get_rng_state(), before)
    assert [len(client.task) for client in clients] == [len(client.task) for client in trainer.engine.clients]
    for client, found in zip(trainer.engine.clients, played(server, clients), strict=True):
        for name, value in client.task.network.state_dict().items():
            assert torch.equal(found[name], value), (client.number, name)
    for name, value in trainer.engine.server.state.items():
        assert torch.equal(server.state[name], value), name


class Whole(pickle.Pickler):
    """Pickles everything but classes, some of which are made while a program runs."""

    def persistent_id(self, reached):
        return "class" if isinstance(reached, type) else None


def pickled(client):
    stream = io.BytesIO()
    Whole(stream).dump(client)
    return stream.getvalue()


@pytest.mark.parametrize("case", ["afd", "fedkd", "fedavg, int8", "implicit", "MF", "BPR", "WideDeep", "DIN", "SASRec"])
def test_a_pickled_client_names_nobody_and_grows_with_its_own_rows_alone(prepared, case):
    model, keys = CASES[case]
    config, trainer, loaders, _ = prepared(model, **keys)
    dataset = loaders[0]._dataset
    before = pickled(trainer.engine.clients[0])
    for token in dataset.field2id_token["user_id"][1:]:
        as_text, as_array = b"\x8c" + bytes([len(token)]) + token.encode(), token.encode("utf-32-le")
        assert as_text not in before and as_array not in before, token
    owners, schema = trainer.model.client_of_user, read_schema(dataset, len(trainer.engine.clients))

    def size(kept):
        dataset.inter_feat = dataset.inter_feat[torch.nonzero(kept).flatten()]
        return len(pickled(build_client(config, schema, rows_of_clients(dataset, owners)[0], 0)))

    owner = owners[dataset.inter_feat["user_id"]]
    whole = size(owner >= 0)
    assert size(owner != 1) == whole
    owner = owner[owner != 1]
    assert size((owner != 0) | (torch.arange(len(owner)) % 2 == 0)) < whole


def _in_another_process(pipe, config_keys, model, folder, file, number):
    """A client of the files alone; what it hears and says goes through a pipe."""
    torch.set_num_threads(1)
    config = FedKDConfig(model, "tiny", config_dict=config_keys)
    client = build_client(config, DataSchema.load(folder), ClientRows.load(file), number)
    for index in range(ROUNDS):
        client.receive(pipe.recv_bytes())
        client.train(index)
        pipe.send_bytes(client.send(index))
    pipe.send({name: value.numpy() for name, value in client.task.network.state_dict().items()})


@pytest.mark.parametrize("case", ["afd", "fedavg"])
def test_a_client_in_a_process_of_its_own_is_the_one_of_the_run(prepared, tmp_path, data_path, case):
    model, keys = CASES[case]
    keys = {"data_path": str(data_path), **SMALL, **keys, "serve_after": "training", "client_num": 2}
    config, trainer, loaders, _ = prepared(model, **keys)
    schema = read_schema(loaders[0]._dataset, 2)
    schema.save(tmp_path)
    start, pipes, processes = multiprocessing.get_context("spawn"), [], []
    for number, rows in enumerate(rows_of_clients(loaders[0]._dataset, trainer.model.client_of_user)):
        rows.save(tmp_path / f"{number}.npz")
        here, there = start.Pipe()
        arguments = (there, keys, model, tmp_path, tmp_path / f"{number}.npz", number)
        processes.append(start.Process(target=_in_another_process, args=arguments))
        processes[-1].start()
        pipes.append(here)
    server = build_server(config, schema)
    for index in range(ROUNDS):
        for number, pipe in enumerate(pipes):
            pipe.send_bytes(server.send(number, index))
        assert not refused(server, {number: pipe.recv_bytes() for number, pipe in enumerate(pipes)}, index)
        trainer.engine.run_round(index)
    for client, pipe, process in zip(trainer.engine.clients, pipes, processes, strict=True):
        found = pipe.recv()
        process.join()
        for name, value in client.task.network.state_dict().items():
            np.testing.assert_array_equal(found[name], value.numpy(), err_msg=name)


# Schema and rows


def test_a_schema_survives_its_files(prepared, tmp_path):
    _, _, loaders, _ = prepared()
    schema = read_schema(loaders[0]._dataset, 3)
    schema.save(tmp_path)
    read = DataSchema.load(tmp_path)
    assert read == DataSchema.load(tmp_path) and read.columns == schema.columns and read.item == schema.item
    assert read.clients == 3 and read.user_num == 31 and list(read.label_values) == [1, 2, 3, 4, 5]
    assert all(torch.equal(read.items[name], column) for name, column in schema.items.items())
    assert read.columns["user_id"].tokens == 31 and "u17" not in (tmp_path / "schema.json").read_text()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"version": 1}', '{"version": 99}', '{"version": 1, "columns": 3}', "\x00"]
)
def test_a_file_that_is_no_schema_is_one_sentence(prepared, tmp_path, content):
    _, _, loaders, _ = prepared()
    read_schema(loaders[0]._dataset, 3).save(tmp_path)
    (tmp_path / "schema.json").write_text(content)
    with pytest.raises(InputError, match=r"schema\.json' is "):
        DataSchema.load(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"\x80\x04N.", "schema"])
def test_a_file_that_holds_no_rows_is_one_sentence(prepared, tmp_path, content):
    file = tmp_path / "rows.npz"
    if content == "schema":
        _, _, loaders, _ = prepared()
        read_schema(loaders[0]._dataset, 3).save(tmp_path)
        file = tmp_path / "schema.npz"
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"\.npz' does not hold"):
        ClientRows.load(file)


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(1, 4), st.randoms())
def test_the_latest_rows_of_each_user_are_those_of_a_slow_look(users, length, dice):
    recency = list(range(len(users)))
    dice.shuffle(recency)
    found = latest_rows(torch.tensor(users, dtype=torch.long), torch.tensor(recency, dtype=torch.long), 5, length)
    for user in range(5):
        own = sorted((row for row, each in enumerate(users) if each == user), key=lambda row: -recency[row])[:length]
        assert found[user].tolist() == own + [-1] * (length - len(own))


@pytest.mark.parametrize("model", ["AttnFedKD", "BPR"])
def test_what_clients_hold_is_all_there_is_and_nothing_twice(prepared, model):
    config, trainer, loaders, _ = prepared(model, strategy="fedavg", partition="quantity:0.5")
    dataset, owners = loaders[0]._dataset, trainer.model.client_of_user
    whole, parts = all_rows(dataset), rows_of_clients(dataset, owners)
    assert torch.equal(torch.cat([part.users for part in parts]).sort().values, whole.users)
    for number, part in enumerate(parts):
        mask = owners[whole.interactions["user_id"]] == number
        for name, column in whole.interactions.items():
            assert torch.equal(part.interactions[name], column[mask]), name
        own = client_dataset(config, read_schema(dataset, 3), part)
        elsewhere = torch.nonzero(owners != number).flatten()
        assert not own.user_feat["group"][elsewhere].any()
        assert torch.equal(own.user_feat["group"][part.users], dataset.user_feat["group"][part.users])
        assert not hasattr(own, "fingerprint") and own.item_interactions is None and own._all_rows is None


def test_fewer_clients_asked_for_are_those_of_all(prepared):
    _, trainer, loaders, _ = prepared()
    dataset, owners = loaders[0]._dataset, trainer.model.client_of_user
    (one,), all_of_them = rows_of_clients(dataset, owners, [2]), rows_of_clients(dataset, owners)
    assert torch.equal(one.users, all_of_them[2].users)
    assert torch.equal(one.interactions["item_id"], all_of_them[2].interactions["item_id"])
