"""A transport that is used from another process."""

import socket
import sys
import threading

import pytest

from recbole_fedkd.engine import InProcess
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.machines.relay import RelayedTransport, relay


class Gathered(InProcess):
    """Parties that have come already."""

    def await_parties(self, numbers, timeout):
        return numbers & self.answering.keys()


@pytest.fixture
def relayed(tmp_path):
    """A transport to three parties, each of which answers with its number and what it was asked."""
    address = tmp_path / "s"
    inner = Gathered({number: lambda request, number=number: b"%d " % number + request for number in range(3)})
    thread = threading.Thread(target=relay, args=(inner, str(address)))
    made = RelayedTransport(address, thread.start, 60)
    yield made
    made.close()
    thread.join(60)
    assert not thread.is_alive()


def test_parties_and_answers_are_those_of_the_transport_there(relayed):
    assert relayed.await_parties({0, 2, 7}, 1) == {0, 2}
    assert list(relayed.exchange({0: b"a", 2: b"\x00" * 3_000_000}, 1)) == [
        (0, b"0 a"),
        (2, b"2 " + b"\x00" * 3_000_000),
    ]


def test_a_question_that_was_left_early_leaves_nothing_for_the_next(relayed):
    first = relayed.exchange(dict.fromkeys(range(3), b"a"), 1)
    assert next(first) == (0, b"0 a")
    first.close()
    assert list(relayed.exchange({1: b"b"}, 1)) == [(1, b"1 b")]


def test_a_run_over_flower_where_it_is_not_installed_ends_in_a_sentence(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(
        InputError, match=r"Flower is not installed; pip install -c constraints\.txt 'recbole-fedkd\[flower\]'"
    ):
        run(engine="flower", strategy="fedavg", epochs=1, saved=False)


def test_where_the_other_end_does_not_come_or_goes_it_is_said(tmp_path):
    with pytest.raises(TrainingError, match="has not started within"):
        RelayedTransport(tmp_path / "nobody", lambda: None, 0.01)
    other = socket.socket(socket.AF_UNIX)
    made = RelayedTransport(tmp_path / "s", lambda: other.connect(str(tmp_path / "s")), 60)
    other.close()
    with pytest.raises(TrainingError, match="has ended in the middle of the run"):
        made.await_parties({0}, 1)
