"""Clients that fail or send rubbish: left out, named and counted; the round is that of the good ones alone."""

import json
import os
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from engines import refused
from test_engines_agree import apart
from test_fleet import read_state
from torch import nn

from recbole_fedkd.engine import ClientError, LocalEngine
from recbole_fedkd.engine.fleet.training import PackTraining
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.federated.client import Client, ClientSettings
from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.server import Intake, Server
from recbole_fedkd.federated.task import Step, Task, shuffled
from recbole_fedkd.model.shared import SharedState
from recbole_fedkd.trainer import FedKDTrainer

CLIENTS = int(os.environ.get("FEDKD_TEST_CLIENTS", "240"))
"""Clients of the large round; it is the same with 10,000."""


class Regression(Task):
    """A linear model of a few numbers."""

    labels = 1

    def __init__(self, number):
        generator = torch.Generator().manual_seed(number)
        self.network = nn.Linear(3, 1)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.fill_(0.5)
        self.shared = SharedState(self.network, dict)
        self.generator = torch.Generator()
        self.rows = torch.randn(1 + number % 5, 3, generator=generator)

    def __len__(self):
        return len(self.rows)

    def batches(self):
        for places in shuffled(len(self.rows), 2, self.generator):
            yield self.rows[places]

    def clean_batches(self):
        yield self.rows

    def step(self, batch, with_logits):
        return Step((self.network(batch)[:, 0] - batch.sum(1)).pow(2).mean(), len(batch))


class Failing(Regression):
    def step(self, batch, with_logits):
        raise RuntimeError("the battery\nis empty")


def another_name(message, payload):
    return Message(message.kind, message.round, message.sender + 1, message.arrays, message.training).to_bytes()


def with_nan(message, payload):
    arrays = {name: np.full_like(array, np.nan) for name, array in message.arrays.items()}
    return Message(message.kind, message.round, message.sender, arrays, message.training).to_bytes()


def cut(message, payload):
    return payload[: len(payload) // 2]


def spoiled_upload(send, spoil, round_index):
    payload = send(round_index)
    return spoil(Message.from_bytes(payload), payload)


WRONG = {1: another_name, 2: with_nan, 3: cut}
KINDS = {0: "failed", 1: "sender", 2: "not finite", 3: "malformed"}


def how(number):
    """What is wrong with a client: one of twenty each raises, sends another's name, NaN and half its bytes."""
    return number % 20 if number % 20 in KINDS else None


def federation(strategy, clients, only_good=False, min_clients=None):
    settings = ClientSettings(1, True, False, 2020, None, True)
    built = []
    for number in range(clients):
        if only_good and how(number) is not None:
            continue
        task = (Failing if how(number) == 0 else Regression)(number)
        client = Client(
            number, task, lambda net: torch.optim.SGD(net.parameters(), 0.05), strategy, settings, torch.device("cpu")
        )
        if how(number) in WRONG:
            client.send = partial(spoiled_upload, client.send, WRONG[how(number)])
        built.append(client)
    server = Server(strategy, 2020)
    server.start(SharedState(Regression(0).network, dict))
    return LocalEngine(server, built, min_clients)


def check_round_of(strategy, clients):
    engine = federation(strategy, clients, min_clients=clients // 2)
    good = federation(strategy, clients, only_good=True)
    for index in range(2):
        report, expected = engine.run_round(index), good.run_round(index)
        assert {number: reason.partition(":")[0] for number, reason in report.missing.items()} == {
            number: KINDS[how(number)] for number in range(clients) if how(number) is not None
        }
        counted = Counter(reason.partition(":")[0] for reason in report.missing.values())
        assert counted == dict.fromkeys(KINDS.values(), clients // 20)
        assert report.loss == pytest.approx(expected.loss, rel=1e-4)
        assert all("\n" not in reason for reason in report.missing.values())
        for name, value in good.server.state.items():
            torch.testing.assert_close(engine.server.state[name], value, rtol=1e-5, atol=1e-6)


@pytest.fixture
def averaging(prepared):
    def strategy(**keys):
        _, trainer, _, _ = prepared("MF", strategy="fedavg", **keys)
        return trainer.engine.server.strategy

    return strategy


@pytest.mark.parametrize(
    "keys", [{}, {"client_weights": "uniform"}, {"row_mean": "changed"}, {"server_optimizer": "fedadam"}]
)
def test_a_round_is_that_of_those_that_answered(averaging, keys):
    check_round_of(averaging(**keys), CLIENTS)


def test_without_min_clients_the_first_that_fails_ends_the_run(averaging):
    with pytest.raises(TrainingError, match="client 0, round 1, training: the battery"):
        federation(averaging(), 20).run_round(0)


def test_too_few_answers_end_the_run_by_one_sentence_and_change_nothing(averaging):
    engine = federation(averaging(), 40, min_clients=33)
    before = {name: value.clone() for name, value in engine.server.state.items()}
    said = r"^round 1: 32 of 40 clients answered, min_clients asks for 33 \(client 0, failed: the battery is empty .*3 more\)$"
    with pytest.raises(TrainingError, match=said):
        engine.run_round(0)
    assert all(torch.equal(value, engine.server.state[name]) for name, value in before.items())


def spoiled(trainer, number, monkeypatch):
    """One client of either engine that raises, and one whose weights turn into NaN."""
    engine = trainer.engine
    if engine.name == "local":
        parameter = next(engine.clients[number + 1].task.network.parameters())
        parameter.register_hook(lambda gradient: gradient * float("nan"))
        monkeypatch.setattr(engine.clients[number].task, "step", lambda *arguments: 1 / 0)
        return
    train = engine.training._trained_on

    def failing(training, *arguments):
        numbers = training.group.numbers[training.pack.clients].tolist()
        if number in numbers:
            raise ZeroDivisionError("division by zero")
        losses = train(training, *arguments)
        if number + 1 in numbers:
            training.weights.dense[numbers.index(number + 1), 0] = float("nan")
        return losses

    monkeypatch.setattr(engine.training, "_trained_on", failing)


CASES = [
    {"strategy": "fedavg"},
    {"strategy": "fedavg", "client_weights": "uniform", "learner": "adam"},
    {"strategy": "fedavg", "row_mean": "changed"},
    {"strategy": "afd"},
    {"strategy": "fd", "clients_per_round": 20},
    {"strategy": "local"},
]


@pytest.mark.parametrize("keys", CASES)
def test_both_engines_leave_out_the_same_clients_and_keep_them_as_they_were(prepared, monkeypatch, keys):
    keys = {"partition": "user", "learner": "sgd", "learning_rate": 0.05, "min_clients": 10, **keys}
    trainers = [prepared(engine=engine, **keys)[1] for engine in ("local", "fleet")]
    reports = []
    for trainer in trainers:
        trainer.engine.run_round(0)
        with monkeypatch.context() as patched:
            spoiled(trainer, 7, patched)
            reports.append(trainer.engine.run_round(1))
            if trainer.engine.name == "local":
                trainer.engine.clients[8].task.network.zero_grad()
    local, fleet = reports
    assert {number: reason[:10] for number, reason in local.missing.items()} == {
        number: reason[:10] for number, reason in fleet.missing.items()
    }
    drawn = trainers[0].engine.server.choose(list(trainers[0].engine.samples), 1)
    assert set(local.missing) == {7, 8} & set(drawn) and local.missing
    assert fleet.loss == pytest.approx(local.loss, rel=1e-4)
    for name, value in trainers[0].engine.server.state.items():
        torch.testing.assert_close(trainers[1].engine.server.state[name], value, rtol=2e-4, atol=2e-4)
    for number in (7, 8):
        one, other = (read_state(trainer, number) for trainer in trainers)
        for name, value in one.items():
            assert value.isfinite().all()
            torch.testing.assert_close(other[name], value.detach(), rtol=2e-4, atol=2e-4)


def test_for_a_fault_of_packing_nobody_is_left_out(prepared, monkeypatch):
    engine = prepared(engine="fleet", strategy="afd", partition="user", min_clients=1)[1].engine
    monkeypatch.setattr(engine.training, "settings", None)
    with pytest.raises(
        ClientError, match=r"^clients \d+ to \d+, round 1, training: AttributeError: 'NoneType' object has no attribute"
    ):
        engine.run_round(0)


def test_a_fault_of_packing_is_not_taken_for_codecs_that_see_whole_messages(prepared, monkeypatch):
    keys = {"strategy": "afd", "knowledge": "factors", "factor_size": 3, "sketch_width": 3, "sketch_passes": 2}
    engine = prepared(engine="fleet", label_mode="rating", partition="user", codecs=["int8"], **keys)[1].engine

    room = {"__name__": "recbole_fedkd.federated.row_codecs"}
    exec("def mistaken(*arguments, **named):\n    return row", room)
    monkeypatch.setattr("recbole_fedkd.engine.fleet.factor_exchange.seen_rows", room["mistaken"])
    with pytest.raises(NameError, match="row"):
        for index in range(4):
            engine.run_round(index)


REFUSED = [
    {"strategy": "fedavg", "codecs": ["top_k"]},
    {"strategy": "fedavg", "codecs": ["int8"], "learner": "adam", "reset_optimizer": False},
    {"strategy": "afd", "codecs": ["int8"], "knowledge": "item"},
    {"strategy": "afd"},
]


@pytest.mark.parametrize("keys", REFUSED)
def test_the_ends_of_the_wire_of_a_client_whose_message_is_refused_are_as_before_on_both_engines(
    prepared, monkeypatch, keys
):
    read = Intake.add_read

    def refusing(intake, client, message):
        late = client == 2 and intake.round_index == 1
        return read(intake, client, replace(message, round=9) if late else message)

    monkeypatch.setattr(Intake, "add_read", refusing)
    monkeypatch.setattr(Intake, "add_many", lambda *arguments: False)
    monkeypatch.setattr(Intake, "add_stacked", lambda *arguments: None)
    keys = {"client_num": 6, "learner": "sgd", "learning_rate": 0.1, "min_clients": 2, **keys}
    local, fleet = (prepared(engine=engine, **keys)[1].engine for engine in ("local", "fleet"))
    for index in range(4):
        one, other = local.run_round(index), fleet.run_round(index)
        assert list(one.missing) == list(other.missing) == ([2] if index == 1 else [])
        assert one.bytes_up == other.bytes_up
    for name, value in local.server.state.items():
        torch.testing.assert_close(fleet.server.state[name], value, rtol=2e-4, atol=2e-5)


def spoiled_sums(trainer, monkeypatch):
    """A client whose rows hold a NaN, one of too large numbers, and one that raises while its loss is measured."""
    engine, changed = trainer.engine, {3: float("nan"), 6: 1e25}
    if engine.name == "local":
        for number, value in changed.items():
            rows = engine.clients[number].task.head.exchange.rows
            kept = rows.values.clone()
            kept[0] = value
            monkeypatch.setattr(engine.clients[number].task.head.exchange, "rows", replace(rows, values=kept))
        monkeypatch.setattr(engine.clients[5].task, "step", lambda *arguments: 1 / 0)
        return
    task, step = engine.task, engine.training._step
    values = task.rows.values.clone()
    for number, value in changed.items():
        values[task._start[number]] = value
    monkeypatch.setattr(task, "rows", replace(task.rows, values=values))

    def failing(training, *arguments):
        if 5 in training.group.numbers[training.pack.clients].tolist():
            raise ZeroDivisionError("division by zero")
        return step(training, *arguments)

    monkeypatch.setattr(engine.training, "_step", failing)


@pytest.mark.parametrize("codecs", [[], ["row_sparse", "int8"], ["top_k"]], ids=str)
@pytest.mark.parametrize("stage", range(1, 5))  # label counts, which come first, are not made of values
def test_an_exchange_of_sums_goes_on_without_clients_that_fail_on_both_engines(prepared, monkeypatch, stage, codecs):
    keys = {"strategy": "afd", "knowledge": "factors", "factor_size": 3, "sketch_width": 3, "sketch_passes": 2}
    keys |= {"em_steps": 1, "partition": "user", "label_mode": "rating", "min_clients": 10, "codecs": codecs}
    if codecs == ["top_k"]:
        keys |= {"codec_arrays": {"top_k": "[!h]*"}}
    local, fleet = (prepared(engine=engine, **keys)[1] for engine in ("local", "fleet"))
    assert fleet.engine.name == "fleet"
    for index in range(7):
        reports = []
        for trainer in (local, fleet):
            with monkeypatch.context() as patched:
                if index == stage:
                    spoiled_sums(trainer, patched)
                reports.append(trainer.engine.run_round(index))
        one, other = reports
        assert other.missing.keys() == one.missing.keys() == ({3, 5, 6} if index == stage else set())
        assert {number: why[:10] for number, why in other.missing.items()} == {
            number: why[:10] for number, why in one.missing.items()
        }
        assert other.bytes_down == one.bytes_down and other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.bytes_up == one.bytes_up or codecs
        for name, value in local.engine.server.state.items():
            assert apart(fleet.engine.server.state[name], value) < (2e-2 if codecs else 1e-3), name


def test_who_lacks_totals_serves_its_users_by_those_that_it_has_on_both_engines(prepared, monkeypatch):
    keys = {"strategy": "afd", "knowledge": "factors", "factor_size": 3, "sketch_width": 3, "sketch_passes": 2}
    keys |= {"em_steps": 1, "partition": "user", "label_mode": "rating", "min_clients": 10}
    trainers = [prepared(engine=engine, **keys)[1] for engine in ("local", "fleet")]
    saved = prepared(engine="fleet", **keys)[1].model
    users = torch.arange(1, len(saved.client_of_user))
    items = torch.arange(1, saved.item_num).expand(len(users), -1)
    for index in range(7):
        reports, served = [], []
        for trainer in trainers:
            with monkeypatch.context() as patched:
                if 2 <= index < 5:
                    spoiled_sums(trainer, patched)
                reports.append(trainer.engine.run_round(index))
        saved.load_state_dict(trainers[1].model.state_dict())
        saved.load_other_parameter(trainers[1].model.other_parameter())
        with torch.no_grad():
            for model in (trainers[0].model, trainers[1].model, saved):
                served.append(model.eval().logits(users, items).softmax(-1))
        assert torch.equal(served[2], served[1])
        assert reports[0].missing.keys() == reports[1].missing.keys()
        assert bool(reports[0].missing) == (2 <= index < 5)
        assert apart(served[1], served[0]) < 1e-3


@pytest.mark.parametrize("engine", ["local", "fleet"])
def test_a_run_names_the_missing_in_its_records_and_goes_on(run, monkeypatch, engine, tmp_path):
    train, trained = Client._train, PackTraining._trained_on

    def failing(self, round_index, on_step):
        if (self.number, round_index) == (1, 1):
            raise RuntimeError("gone")
        return train(self, round_index, on_step)

    def failing_pack(self, training, *arguments):
        if 1 in training.group.numbers[training.pack.clients].tolist() and len(seen) == 1:
            raise RuntimeError("gone")
        return trained(self, training, *arguments)

    seen = []
    monkeypatch.setattr(Client, "_train", failing)
    monkeypatch.setattr(PackTraining, "_trained_on", failing_pack)
    after = FedKDTrainer._after_epoch
    monkeypatch.setattr(FedKDTrainer, "_after_epoch", lambda self, epoch: (seen.append(epoch), after(self, epoch))[1])
    result = run(strategy="fedavg", engine=engine, epochs=3, min_clients=2, result_file=str(tmp_path / "result.json"))
    said = [{client: reason.split(" (")[0] for client, reason in each["missing"].items()} for each in result["rounds"]]
    assert said == [{}, {1: "failed: gone"}, {}]
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["rounds"][1]["missing"]["1"].startswith("failed: gone")


def test_min_clients_beyond_the_clients_of_a_round_is_refused(run):
    with pytest.raises(InputError, match="min_clients is 4, but only 3 clients take part"):
        run(strategy="fedavg", min_clients=4)
    with pytest.raises(InputError, match="min_clients is 3, but only 2 clients take part"):
        run(strategy="fedavg", min_clients=3, clients_per_round=2)


def test_a_refused_histogram_comes_again_and_one_that_was_counted_does_not_count_twice(prepared):
    _, trainer, _, _ = prepared(strategy="afd", knowledge="item", knowledge_use="prior", min_clients=1)
    engine = trainer.engine
    one = engine.clients[1]
    send = one.send
    one.send = lambda index: send(index)[:-3]
    assert engine.run_round(0).missing.keys() == {1}
    one.send = send
    assert not engine.run_round(1).missing
    total = sum(client.link.sent["histogram"] for client in engine.clients)
    assert torch.equal(engine.server.state["histogram"], total)
    again = Message("knowledge", 2, 1, {"histogram": total.numpy()}, one._training)
    faults = refused(engine.server, {1: again.to_bytes()}, 2)
    assert faults[1].fault == "doubled"
    assert torch.equal(engine.server.state["histogram"], total)


@pytest.mark.parametrize("codecs", [["int8"], ["top_k"]])
def test_an_update_that_got_lost_leaves_versions_and_feedback_whole(prepared, codecs):
    _, trainer, _, _ = prepared(strategy="fedavg", codecs=codecs, min_clients=1)
    engine = trainer.engine
    engine.run_round(0)
    client = engine.clients[2]
    residual = {name: array.copy() for name, array in client.link.stages[-1].residual.items()}
    send = client.send
    client.send = lambda index: send(index)[:-3]
    assert engine.run_round(1).missing.keys() == {2}
    assert all(np.array_equal(array, client.link.stages[-1].residual[name]) for name, array in residual.items())
    client.send = send
    for index in (2, 3):
        assert not engine.run_round(index).missing
    replica = engine.server.link.broadcast.replica
    for name, value in client.task.shared.parameters().items():
        assert np.array_equal(value.detach().numpy(), replica[f"p:{name}"])


@pytest.mark.parametrize("stages", [["codecs"], ["clip"], []], ids=str)
def test_a_message_of_another_kind_is_refused_whatever_the_stages(prepared, monkeypatch, stages):
    trainer = prepared(strategy="fedavg", client_num=3, min_clients=2, stages=stages)[1]
    said = type(trainer.engine.clients[1].strategy).upload

    def other(strategy, result, client, round_index):
        message = said(strategy, result, client, round_index)
        return replace(message, kind="label_knowledge") if client == 1 else message

    monkeypatch.setattr(type(trainer.engine.clients[1].strategy), "upload", other)
    assert trainer.engine.run_round(0).missing == {1: "kind: 'label_knowledge' came where 'model' was due"}


LARGEST_OF_TYPE = {
    "i": lambda array: np.full_like(array, np.iinfo(array.dtype).max),
    "f": lambda array: np.full_like(array, 9e18),
}


@pytest.mark.parametrize("kinds", ["i", "if"])
@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": "afd", "aggregation": "weighted"},
        {"strategy": "afd", "knowledge": "item", "knowledge_use": "both"},
        {"strategy": "afd", "knowledge": "prototype"},
        {"strategy": "afd", "knowledge": "factors"},
        {"strategy": "fedavg"},
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_the_largest_numbers_that_a_message_may_hold_silence_nobody_else(prepared, keys, kinds):
    """Each upload is checked alone; what they come to must be a message that clients take, and counts may not wrap around."""
    engine = prepared(client_num=4, min_clients=3, **keys)[1].engine
    liars = engine.clients[:2] if kinds == "if" else engine.clients[:1]

    def lying(send):
        def sent(index):
            message = Message.from_bytes(send(index))
            arrays = {
                name: LARGEST_OF_TYPE[array.dtype.kind](array) if array.dtype.kind in kinds else array
                for name, array in message.arrays.items()
            }
            return replace(message, arrays=arrays).to_bytes()

        return sent

    if kinds == "if":
        engine.min_clients = 2
    for client in liars:
        client.send = lying(client.send)
    for index in range(3):
        missing = engine.run_round(index).missing
        assert missing.keys() <= {client.number for client in liars}
    for name, value in engine.server.state.items():
        if name in ("weights", "seen", "histogram", "counts"):
            assert (value >= 0).all(), name
        assert torch.isfinite(value.double()).all(), name


class Wordless(Exception):
    def __str__(self):
        raise ValueError("no words")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (MemoryError(), "failed: MemoryError"),
        (RuntimeError(""), "failed: RuntimeError"),
        (KeyError("w"), "failed: KeyError: 'w'"),
        (AssertionError(), "failed: AssertionError"),
        (Wordless(), "failed: Wordless"),
        (SystemExit(3), "failed: 3"),
    ],
)
def test_whatever_a_client_raises_it_is_left_out_with_a_reason(prepared, fault, says):
    engine = prepared(client_num=4, min_clients=1, strategy="fedavg")[1].engine

    def failing(*_):
        raise fault

    engine.clients[1].task.step = failing
    missing = engine.run_round(0).missing
    assert missing.keys() == {1} and missing[1].startswith(says), missing
