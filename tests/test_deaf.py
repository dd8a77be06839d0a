"""Clients that cannot take in what the server says: left out and named, alike on both engines."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_fleet import read_state

from recbole_fedkd.engine import ClientError
from recbole_fedkd.federated.message import MessageError

DEAF = 7
KEYS = {"partition": "user", "learner": "sgd", "learning_rate": 0.05, "min_clients": 10}


def engines(prepared, **keys):
    """Trainers of both engines after a round."""
    trainers = [prepared(engine=engine, **KEYS | keys)[1] for engine in ("local", "fleet")]
    for trainer in trainers:
        trainer.engine.run_round(0)
    return trainers


def renamed(message):
    return replace(message, arrays={f"{name}x": array for name, array in message.arrays.items()})


def with_arrays(change):
    return lambda message: replace(message, arrays={name: change(array) for name, array in message.arrays.items()})


SPOILED = {
    "names": renamed,
    "shape": with_arrays(lambda array: array[None]),
    "dtype": with_arrays(lambda array: array.astype(np.float64)),
    "not finite": with_arrays(lambda array: array * np.float32(np.nan)),
    "kind": lambda message: replace(message, kind="gossip"),
    "sender": lambda message: replace(message, sender=3),
    "nothing": lambda message: replace(message, arrays={}),
}


@pytest.mark.parametrize("keys", [{"strategy": "afd"}, {"strategy": "fd", "codecs": ["int8"]}], ids=str)
def test_who_is_told_what_is_no_message_is_left_out_with_the_same_reason_on_both_engines(prepared, monkeypatch, keys):
    trainers = engines(prepared, **keys)
    for trainer in trainers:
        monkeypatch.setattr(trainer.engine.server.strategy, "audience", lambda state, client: None)
    spoils = dict(enumerate(SPOILED.values(), DEAF))
    before, reports = [read_state(trainers[1], number) for number in spoils], []
    for trainer in trainers:
        server = trainer.engine.server
        download = server.message_for

        def told(client, round_index, download=download):
            return spoils.get(client, lambda message: message)(download(client, round_index))

        monkeypatch.setattr(server, "message_for", told)
        reports.append(trainer.engine.run_round(1))
    local, fleet = reports
    assert local.missing == fleet.missing and set(local.missing) == set(spoils)
    assert fleet.loss == pytest.approx(local.loss, rel=1e-4)
    assert fleet.bytes_down == local.bytes_down and fleet.bytes_up == local.bytes_up
    for number, state in zip(spoils, before, strict=True):
        for name, value in read_state(trainers[1], number).items():
            assert torch.equal(value, state[name])
    for name, value in trainers[0].engine.server.state.items():
        torch.testing.assert_close(trainers[1].engine.server.state[name], value, rtol=2e-4, atol=2e-4)


NOT_FOR_ME = ValueError("not for me")


@pytest.mark.parametrize(
    ("method", "fault"), [("understood", NOT_FOR_ME), ("installed", SystemExit(3)), ("learns", NOT_FOR_ME)], ids=str
)
def test_who_can_make_nothing_of_a_message_is_left_out_on_both_engines(prepared, monkeypatch, method, fault):
    missing = []
    for trainer in engines(prepared, strategy="afd"):
        engine = trainer.engine
        kind = type(engine.server.strategy)
        links = {client.number: client.link for client in engine.clients} if engine.name == "local" else engine.links
        mine, asked, understood = links[DEAF].sent["sums"], getattr(kind, method), kind.understood

        def failing(strategy, *arguments, mine=mine, asked=asked):
            if any(torch.equal(row, mine) for tensors in arguments[:2] for row in rows(tensors, mine)):
                raise fault
            return asked(strategy, *arguments)

        def own(strategy, said, sent, fresh, understood=understood):
            return {**understood(strategy, said, sent, fresh), "sums": sent["sums"]}

        with monkeypatch.context() as patched:
            patched.setattr(kind, "understood", own)
            patched.setattr(kind, method, failing)
            missing.append(engine.run_round(1).missing)
    assert missing[0] == missing[1] and set(missing[0]) == {DEAF}


def rows(tensors, mine):
    """Sums of one client or of many."""
    return tensors["sums"].reshape(-1, *mine.shape) if isinstance(tensors, dict) and "sums" in tensors else ()


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy": "fedavg"},
        {"strategy": "fedavg", "codecs": ["int8"]},
        {"strategy": "afd"},
        {"strategy": "afd", "knowledge": "factors", "label_mode": "rating", "factor_size": 3, "sketch_width": 3},
    ],
    ids=str,
)
def test_what_nobody_can_take_in_ends_the_run_in_one_sentence_that_both_engines_say(prepared, monkeypatch, keys):
    said = []
    for trainer in engines(prepared, **keys):
        link = type(trainer.engine.server.link)
        with monkeypatch.context() as patched:
            patched.setattr(link, "write_once", lambda *arguments, **named: b"rubbish")
            with pytest.raises(
                ClientError, match=r"^round 2: 0 of \d+ clients answered, min_clients asks for 10"
            ) as error:
                trainer.engine.run_round(1)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_what_cannot_serve_users_ends_the_run_in_one_sentence_on_both_engines(prepared, monkeypatch):
    for trainer in engines(prepared, strategy="fedavg"):
        server = trainer.engine.server
        serve = type(server).serve
        monkeypatch.setattr(
            server, "serve", lambda index, whole=False, s=server, f=serve: b"rubbish" if index == 2 else f(s, index)
        )
        with pytest.raises(
            ClientError, match=r"^(client 0|all clients), round 2, serving its users: malformed: "
        ) as error:
            trainer.engine.run_round(1)
        assert isinstance(error.value.__cause__, MessageError)
