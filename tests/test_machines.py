"""Parties that are asked in bytes: the run of one process to the same bit, whatever is lost, late, doubled or wrong."""

import copy
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import lose_at_the_end
from hypothesis import given
from hypothesis import strategies as st
from tapped import Tap, marked_dataset, marks_of

from recbole_fedkd.data.schema import read_schema, rows_of_clients
from recbole_fedkd.engine import InProcess, RemoteEngine
from recbole_fedkd.federated.envelope import DECLARED, HELLO, Answer, Request, check_numbers, read_hello
from recbole_fedkd.federated.message import Message, MessageError
from recbole_fedkd.federation.parties import build_server
from recbole_fedkd.machines import processes
from recbole_fedkd.machines.folders import party_folders
from recbole_fedkd.machines.manifest import Manifest, write_manifest, write_party
from recbole_fedkd.machines.party import STATE, Party, served
from recbole_fedkd.machines.sockets import SocketTransport

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
        self.folders = party_folders(folder, range(schema.clients))
        write_manifest(config, schema, folder / "manifest", self.folders)
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
def test_the_command_lines_run_in_processes_is_that_of_one_process(run, case, tmp_path, monkeypatch):
    """And no token of a user, and no row of a party, is among the bytes of its sockets."""
    taps, parts, data = [], [], {"data_path": str(marked_dataset(tmp_path / "marked"))}

    def listening(address, *told):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen()
        taps.append(Tap(listener, f"{address}-behind"))
        return SocketTransport(f"{address}-behind", *told)

    def writes(manifest, number, rows, folder):
        parts.append(rows)
        write_party(manifest, number, rows, folder)

    monkeypatch.setattr(processes, "SocketTransport", listening)
    monkeypatch.setattr(processes, "write_party", writes)
    assert result_of(run, "processes", case, **data) == result_of(run, "local", case, **data)
    heard = taps[0].heard
    assert len(parts) == 3 and heard.count(b"train") >= 3 * 3 * 2  # each question, and its answer
    assert not any(mark in heard for mark in marks_of(parts))
    taps[0].listener.close()


def test_a_run_in_processes_is_resumed_as_one_that_was_never_stopped(run):
    whole = result_of(run, "local", "codecs", epochs=4)
    part = run(engine="processes", **CASES["codecs"], epochs=2, stopping_step=10)
    assert result_of(run, "processes", "codecs", epochs=4, resume=part["run_folder"]) == whole


class Unreliable(InProcess):
    """Does to the answers of a round what ``faults[round][party]`` says: each is a function of bytes to a list of bytes."""

    def __init__(self, answering):
        super().__init__(answering)
        self.faults, self.late = {}, {}

    def exchange(self, requests, timeout):
        for number, request in requests.items():
            asked = Request.from_bytes(request)
            operation = "test" if asked.phase == "test" else asked.operation
            fault = self.faults.get((operation, asked.round), {}).get(number)
            if fault == "away":
                continue
            yield from ((number, each) for each in self.late.pop(number, []))
            answer = self.answering[number](request)
            if fault == "late":
                self.late[number] = [answer]
            elif fault == "doubled":
                assert self.answering[number](request) == answer
                yield from ((number, answer), (number, answer))
            else:
                yield number, fault(answer) if fault is not None else answer


def answered(**changes):
    """An answer with other parts."""
    return lambda packed: replace(Answer.from_bytes(packed), **changes).to_bytes()


def numbers(**changes):
    """An answer with other numbers; None: without one."""

    def changed(packed):
        answer = Answer.from_bytes(packed)
        told = {name: value for name, value in {**(answer.numbers or {}), **changes}.items() if value is not None}
        return replace(answer, numbers=told).to_bytes()

    return changed


def replayed(packed):
    """What it has answered to an earlier question."""
    return replace(Answer.from_bytes(packed), request=b"of another").to_bytes()


def said(change):
    """An answer with another message inside."""

    def changed(packed):
        answer = Answer.from_bytes(packed)
        return replace(answer, said=change(Message.from_bytes(answer.said)).to_bytes()).to_bytes()

    return changed


def arrays(change):
    return said(lambda message: replace(message, arrays={name: change(each) for name, each in message.arrays.items()}))


ANYWHERE = {
    "absent": "away",
    "absent: it has not": "late",
    "absent: it has not answered": replayed,
    "sender: it says that it is client 2": answered(party=2),
    "malformed": lambda packed: packed[:-3],
    "malformed: 0 bytes": lambda packed: b"",
    "kind: it does not say": answered(request=b""),
    "kind: it does not say that it answers": answered(operation="hello"),
    "kind: it does not say that it answers '": answered(round=99),
    "malformed:": numbers(loss=float("nan")),
    "failed: KeyError": answered(fault="failed", detail="KeyError, of which the party's own log tells more"),
}
"""Faults of any answer, whatever was asked."""
WRONG = {
    **ANYWHERE,
    "malformed: 9 bytes": answered(said=b"\x81\xa1v\x02rest."),
    "sender: it says that it is client 0": said(lambda message: replace(message, sender=0)),
    "round: its message": said(lambda message: replace(message, round=7)),
    "samples": said(lambda message: replace(message, training=message.training._replace(samples=10**6))),
    "not finite": arrays(lambda array: np.full_like(array, np.nan) if array.dtype.kind == "f" else array),
    "arrays": arrays(lambda array: array[:1]),
    "numbers: 'loss' is missing": numbers(loss=None),
    "numbers: 'loss' is": numbers(seen=0),
}


@pytest.mark.parametrize("case", ["codecs", "items"])
def test_a_wrong_or_missing_answer_is_named_and_nothing_else_changes(federation, monkeypatch, case):
    """One fault after the other, against clients of one process that fail at the end of the same rounds."""
    remote, local = federation(case, Unreliable, min_clients=1)
    local.min_clients = 1
    wrongs = [name for name in WRONG if case == "codecs" or name == "absent" or name not in ANYWHERE]
    faulty = {place + 1: wrong for place, wrong in enumerate(wrongs)}
    lose_at_the_end(monkeypatch, local, 1, faulty)
    remote.transport.faults = {("train", index): {1: WRONG[wrong]} for index, wrong in faulty.items()}
    for index in range(max(faulty) + 2):
        found, expected = remote.engine.run_round(index), local.run_round(index)
        assert found.loss == expected.loss
        assert list(found.missing) == list(expected.missing) == ([1] if index in faulty else [])
        if index in faulty:
            assert found.missing[1].startswith(faulty[index])
    assert_same(state_of(remote), state_of(local))


@pytest.mark.parametrize("case", ["codecs"])
def test_what_is_late_doubled_or_replayed_is_counted_and_changes_nothing(federation, case):
    remote, local = federation(case, Unreliable, min_clients=1)
    replayed = {}

    def keep(packed):
        replayed.setdefault("answer", packed)
        return packed

    remote.transport.faults = {("train", 0): {0: "doubled", 1: keep}, ("train", 2): {2: "doubled"}}
    # The last answer of a round ends it, and nobody hears it twice.
    expected = [{0: {"doubled": 1}}, {}, {0: {"late": 1}, 1: {"late": 1}}, {}]
    for index in range(ROUNDS):
        if index == 2:
            remote.transport.late = {0: [replayed["answer"]], 1: [replayed["answer"]]}
        report = remote.engine.run_round(index)
        assert (report.loss, report.ignored) == (local.run_round(index).loss, expected[index])
    assert_same(state_of(remote), state_of(local))


@pytest.mark.parametrize("case", ["codecs", "items"])
def test_a_party_that_was_away_for_two_rounds_is_told_what_it_missed(federation, case):
    remote, _ = federation(case, Unreliable, min_clients=1)
    for index in (1, 2):
        remote.transport.faults |= {("train", index): {1: "away"}, ("judge", index): {1: "away"}}
    for index in range(ROUNDS):
        report = remote.engine.run_round(index)
        assert list(report.missing) == ([1] if index in (1, 2) else [])
    clients = [party.client for party in remote.parties.values()]
    assert clients[0].link.version == clients[1].link.version
    if case == "codecs":
        for name, value in clients[0].task.shared.parameters().items():
            assert torch.equal(clients[1].task.shared.parameters()[name], value), name


@pytest.mark.parametrize("case", ["codecs", "items"])
def test_a_party_that_is_started_anew_at_any_moment_goes_on_from_its_folder(federation, case):
    remote, local = federation(case)
    ask = dict(remote.transport.answering)

    def died(number):
        def answer(request):
            remote.start(number)  # killed before it was asked
            first = ask[number](request)
            remote.start(number)  # and before its answer had arrived
            assert ask[number](request) == first
            return first

        return answer

    remote.transport.answering = {number: died(number) for number in ask}
    for index in range(ROUNDS):
        assert remote.engine.run_round(index).loss == local.run_round(index).loss
    assert_same(state_of(remote), state_of(local))


def test_a_server_that_goes_back_to_its_checkpoint_asks_again_and_comes_to_the_same(federation):
    remote, local = federation("codecs")
    for index in range(ROUNDS):
        before = copy.deepcopy(remote.engine.state_dict())
        remote.engine.run_round(index)
        remote.engine.load_state_dict(before)
        remote.transport.answering = {number: remote.ask(number) for number in remote.parties}
        assert remote.engine.run_round(index).loss == local.run_round(index).loss
    assert_same(state_of(remote), state_of(local))


def test_a_party_does_what_no_request_of_its_run_asks_for_never(federation):
    remote, _ = federation("fedavg")
    party = remote.parties[0]
    for index in range(2):
        remote.engine.run_round(index)
    before = (remote.folders[0] / STATE).read_bytes()
    good = Request(RUN, "train", 2, 1, b"", "")
    wrong = {
        "malformed": [b"", b"x", good.to_bytes()[:-1], good.to_bytes() + b"x", b"\x81\xa1v\x01", b"\x90"],
        "round": [replace(good, round=0).to_bytes()],
        "run": [replace(good, run="0-older").to_bytes()],
    }
    for fault, requests in wrong.items():
        for request in requests:
            assert Answer.from_bytes(party.answer(request)).fault == fault
    assert (remote.folders[0] / STATE).read_bytes() == before


def test_numbers_that_are_not_those_that_were_asked_for_are_not_taken():
    good = {"seen": 3.0, "loss": -0.5}
    assert check_numbers(good, {"seen": 5}, {"loss": (-1.0, 1.0)}) == good
    wrong = [{}, {"seen": 3.0}, {**good, "luck": 1.0}, {**good, "seen": -1.0}, {**good, "seen": 0.5}]
    for numbers in [*wrong, {**good, "seen": 6.0}, {**good, "loss": 1.5}, {**good, "loss": -1.5}, None]:
        with pytest.raises(MessageError, match=r"^numbers: '(seen|loss|luck)'"):
            check_numbers(numbers, {"seen": 5}, {"loss": (-1.0, 1.0)})
    assert check_numbers(good, {"seen": 5}, {"loss": (-1.0, 1.0)}, [("loss", "seen"), ("loss", "luck")]) == good
    with pytest.raises(MessageError, match=r"numbers: 'seen' is 3, and 'loss', of which it is a part, -0.5"):
        check_numbers(good, {"seen": 5}, {"loss": (-1.0, 1.0)}, [("seen", "loss")])
    hello = Answer(1, "", HELLO, 0, b"m", numbers=dict.fromkeys(DECLARED, 2.0))
    assert read_hello(hello.to_bytes(), b"m", 2, {0: replace(hello, numbers={}), 1: hello}) == hello
    with pytest.raises(MessageError, match="client 1 came with other rows before"):
        read_hello(hello.to_bytes(), b"m", 2, {1: replace(hello, numbers=dict.fromkeys(DECLARED, 3.0))})
    wrong = [replace(hello, **{part: value}) for part, value in (("party", 2), ("party", -1), ("operation", "judge"))]
    wrong += [
        replace(hello, said=b"x"),
        replace(hello, round=1),
        replace(hello, round=-7),
        replace(hello, fault="x"),
        replace(hello, request=b"n"),
        replace(hello, numbers=None),
    ]
    for numbers in (
        {"test": None},
        {"more": 1.0},
        {"valid": -1.0},
        {"users": 1.5},
        {"samples": 1e12},
        {"samples": np.nan},
    ):
        told = {name: value for name, value in {**hello.numbers, **numbers}.items() if value is not None}
        wrong.append(replace(hello, numbers=told))
    for each in [each.to_bytes() for each in wrong] + [b"", hello.to_bytes()[:-1]]:
        with pytest.raises(MessageError):
            read_hello(each, b"m", 2, {})


@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 255))
def test_any_bytes_at_all_are_an_envelope_or_a_fault(packed, place, byte):
    good = Request("1", "train", 3, 2, b"abc").to_bytes()
    damaged = good[: place % len(good)] + bytes([byte]) + good[place % len(good) + 1 :]
    for each in (packed, damaged):
        for kind in (Request, Answer):
            try:
                assert isinstance(kind.from_bytes(each), kind)
            except MessageError as error:
                assert error.fault == "malformed"


def test_nothing_of_a_party_is_on_the_wire_or_at_the_server(federation, tmp_path):
    remote, _ = federation("fedavg")
    captured = []
    ask = dict(remote.transport.answering)

    def listened(number):
        def answer(request):
            answered = ask[number](request)
            captured.extend((request, answered))
            return answered

        return answer

    remote.transport.answering = {number: listened(number) for number in ask}
    for index in range(2):
        remote.engine.run_round(index)
    public = [file.read_bytes() for file in (tmp_path / "manifest").iterdir()]
    for content in [*captured, *public]:
        assert b"u17" not in content  # the token of a user
        for party in remote.parties.values():
            for name in ("item_id", "rating", "timestamp"):
                column = party.rows.interactions[name].numpy()
                assert column[:6].tobytes() not in content, name


def test_parties_that_are_killed_at_any_moment_change_nothing(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import kills

    found = kills.measured({"strategy": "fedavg", **CODECS}, kills=6, seed=5, tell=str)
    assert (found["kills"], found["differences"]) == (6, 0)
