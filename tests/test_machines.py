"""Parties that are asked in bytes: the run of one process to the same bit, whatever is lost, late, doubled or wrong."""

import pytest
import torch

from recbole_fedkd.data.schema import read_schema, rows_of_clients
from recbole_fedkd.engine import InProcess, RemoteEngine
from recbole_fedkd.federation import build_server
from recbole_fedkd.machines.manifest import Manifest, party_folders, write_manifest, write_party
from recbole_fedkd.machines.party import STATE, Party, served

ROUNDS = 4
RUN = "1-run"
CODECS = {"codecs": ["row_sparse", "sign", "int8", "fp16"]}
CASES = {
    "afd": {"strategy": "afd"},
    "items": {"strategy": "afd", "knowledge": "item"},
    "factors": {"strategy": "afd", "knowledge": "factors"},
    "fedavg": {"strategy": "fedavg"},
    "codecs": {"strategy": "fedavg", **CODECS},
    "some": {"strategy": "fedavg", "codecs": ["int8"], "clients_per_round": 2},
    "average": {"strategy": "fedavg", "serve_average": 0.5},
    "fedkd": {"strategy": "fedkd", "teacher": {"embedding_size": 6, "hidden_sizes": [6, 12], "attention_heads": 3}},
    "local": {"strategy": "local"},
    "BPR": {"model": "BPR", "strategy": "fedavg"},
}


class Federation:
    """Parties in folders of their own, and an engine that reaches them through a transport."""

    def __init__(self, folder, trainer, loaders, config, transport=InProcess, **keys):
        dataset, owners = loaders[0]._dataset, trainer.model.client_of_user
        schema = read_schema(dataset, int(owners.max()) + 1)
        self.folder, self.config = folder, config
        write_manifest(config, schema, folder / "manifest")
        self.folders = party_folders(folder, range(schema.clients))
        for number, rows in enumerate(rows_of_clients(dataset, owners)):
            write_party(folder / "manifest", number, rows, self.folders[number])
        self.manifest = Manifest.load(folder / "manifest")
        self.parties = {}
        for number in self.folders:
            self.start(number)
        self.transport = transport({number: self.ask(number) for number in self.folders})
        sizes = {number: len(party.client.task) for number, party in self.parties.items()}
        self.engine = RemoteEngine(build_server(config, schema), self.transport, RUN, sizes, 1.0, **keys)

    def start(self, number):
        self.parties[number] = Party(self.folders[number], self.manifest)

    def ask(self, number):
        return lambda request: self.parties[number].answer(request)  # noqa: PLW0108 - a party may be started anew


def state_of(engine_or_federation):
    """Networks and server of a federation."""
    if isinstance(engine_or_federation, Federation):
        networks = [served(folder / STATE)[0] for folder in engine_or_federation.folders.values()]
        return networks, engine_or_federation.engine.server.state
    clients = engine_or_federation.clients
    return [client.task.network.state_dict() for client in clients], engine_or_federation.server.state


def assert_same(found, expected):
    for one, other in zip(found[0], expected[0], strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert torch.equal(one[name], value), name
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert torch.equal(found[1][name], value), name


@pytest.fixture
def federation(prepared, tmp_path):
    def make(case, transport=InProcess, min_clients=None, **more):
        keys = {**CASES[case], **more}
        config, trainer, loaders, _ = prepared(keys.pop("model", "AttnFedKD"), **keys)
        made = Federation(tmp_path, trainer, loaders, config, transport, min_clients=min_clients)
        return made, trainer.engine

    return make


@pytest.mark.parametrize("case", CASES)
def test_parties_that_are_asked_in_bytes_are_the_clients_of_one_process(federation, case):
    remote, local = federation(case)
    for index in range(ROUNDS):
        found, expected = remote.engine.run_round(index), local.run_round(index)
        assert (found.bytes_down, found.bytes_up, found.loss, found.codec_error) == (
            expected.bytes_down,
            expected.bytes_up,
            expected.loss,
            expected.codec_error,
        )
    assert_same(state_of(remote), state_of(local))


def result_of(run, engine, case, **more):
    """A run's result, without what is another each time."""
    keys = {**CASES[case], "epochs": 3, "stopping_step": 10, **more}
    found = run(keys.pop("model", "AttnFedKD"), engine=engine, **keys)
    for name in ("timing", "run_folder", "engine", "config"):
        found.pop(name)
    for each in found["rounds"]:
        each.pop("seconds")
    return found


@pytest.mark.parametrize("case", ["afd", "codecs"])
def test_the_command_lines_run_in_processes_is_that_of_one_process(run, case):
    assert result_of(run, "processes", case) == result_of(run, "local", case)
