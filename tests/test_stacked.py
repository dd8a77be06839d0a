"""Messages of many clients at once: what comes of them, their bytes and what is remembered are as one after the other."""

from copy import deepcopy
from itertools import permutations

import numpy as np
import pytest
import torch

from recbole_fedkd.federated.codec import CodecStack, WireCodecs
from recbole_fedkd.federated.encoding import CODECS
from recbole_fedkd.federated.message import ArraySpec, Message, MessageError, Schema, Training
from recbole_fedkd.federated.row_codecs import ROW_WISE, Block
from recbole_fedkd.federated.server import Intake, Server
from recbole_fedkd.federated.stacked import Stacked
from recbole_fedkd.federated.stage import STAGES, Clip, Encoding, Stage
from recbole_fedkd.federated.strategy.federated_averaging import AveragingSettings, FederatedAveraging
from recbole_fedkd.federated.wire import ClientLink

pytestmark = pytest.mark.without_loops

CLIENTS, ITEMS = (3, 130, 70000, 5), 90
SHAPES = {"p:cube": (2, 3, 5), "p:matrix": (6, 7), "p:one": (), "p:table": (ITEMS, 8), "p:vector": (40,)}
ROW_BY_ROW = [name for name, codec in CODECS.items() if codec in ROW_WISE]
STACKS = [[], *([name] for name in ROW_BY_ROW), *map(list, permutations(ROW_BY_ROW, 2)), ["row_sparse", "int8", "fp16"]]


class Ends:
    """A server and its clients, whose messages go over the wire one by one or all at once."""

    def __init__(self, codecs, stages, **settings):
        generator = np.random.default_rng(1)
        network = {name: torch.from_numpy(generator.normal(size=shape).astype("f4")) for name, shape in SHAPES.items()}
        wire = WireCodecs(CodecStack.of(codecs, {}), CodecStack(), tuple((name, None) for name in stages))
        self.server = Server(FederatedAveraging(AveragingSettings(**settings)), codecs=wire)
        self.server.state = network
        self.network = {name: value.numpy() for name, value in network.items()}
        follows = ClientLink(-1, self.server.strategy, wire, False, network)
        self.links = [ClientLink(number, self.server.strategy, wire, True, network, follows) for number in CLIENTS]
        self.intake = self.server.intake(0, self.samples)

    samples = {number: 2 + number % 7 for number in CLIENTS}

    def networks(self, round_index, scale=1.0):
        """Each client's, of whose table a few rows have moved."""
        generator = np.random.default_rng(round_index)
        told = []
        for number in CLIENTS:
            rows = np.sort(generator.choice(ITEMS, generator.integers(0, 9), replace=False))
            moved = {name: generator.normal(size=array.shape) * scale for name, array in self.network.items()}
            moved["p:table"][np.setdiff1d(np.arange(ITEMS), rows)] = 0
            arrays = {name: (array + moved[name]).astype("f4") for name, array in self.network.items()}
            told.append((number, rows, arrays))
        return told

    def one_by_one(self, networks, round_index):
        sizes = {}
        for link, (number, _, arrays) in zip(self.links, networks, strict=True):
            message = Message("model", round_index, number, arrays, self.training(number))
            wire = link.encoded(message)
            sizes[number] = len(wire.to_bytes())
            self.intake.add(number, wire.to_bytes())
        return sizes

    def stacked(self, networks, round_index):
        rows = [rows for _, rows, _ in networks]
        blocks = {
            name: Block.of(np.stack([arrays[name] for *_, arrays in networks])) for name in SHAPES if name != "p:table"
        }
        values = np.concatenate([arrays["p:table"][rows] for _, rows, arrays in networks])
        counts = np.array([len(own) for own in rows])
        blocks["p:table"] = Block(values, counts, (ITEMS, 8), np.concatenate(rows))
        training = {number: self.training(number) for number in CLIENTS}
        return Stacked("model", round_index, training, blocks, common={"p:table": self.network["p:table"]})

    def at_once(self, networks, round_index):
        encoded = ClientLink.encoded_by_many(self.links, self.stacked(networks, round_index))
        assert encoded is not None and self.intake.add_stacked(encoded[0]) == {}
        encoded[1]()
        return encoded[0].lengths()

    def training(self, number):
        return Training(self.samples[number], self.samples[number], 0.5)

    def begin(self, round_index):
        self.intake = self.server.intake(round_index, self.samples)


def compare(codecs, stages, scale=1.0, **settings):
    alone, together = Ends(codecs, stages, **settings), Ends(codecs, stages, **settings)
    for round_index in range(3):
        alone.begin(round_index)
        together.begin(round_index)
        networks = alone.networks(round_index, scale)
        assert together.at_once(networks, round_index) == alone.one_by_one(networks, round_index)
        assert alone.intake.answered == together.intake.answered
        expected, found = alone.intake.fold.finish(), together.intake.fold.finish()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-6, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
            )
        for one, other in zip(alone.links, together.links, strict=True):
            np.testing.assert_allclose(other.codec_error, one.codec_error, rtol=1e-5)
            said, also = one.state_dict(), other.state_dict()
            assert said["sent_in"] == also["sent_in"] and said["stages"].keys() == also["stages"].keys()
            for stage, state in said["stages"].items():
                torch.testing.assert_close(also["stages"][stage], state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codecs", STACKS, ids="-".join)
def test_codecs_over_many_clients_do_what_they_do_over_each(codecs):
    compare(codecs, ["codecs"])


@pytest.mark.parametrize("codecs", STACKS, ids="-".join)
def test_networks_of_which_nobody_has_moved_an_array_are_sent_as_by_each(codecs):
    compare(codecs, ["codecs"], scale=0.0)


@pytest.mark.parametrize("codecs", [[], ["int8"], ["row_sparse", "sign"]], ids="-".join)
def test_a_bound_over_many_clients_is_that_of_each(codecs):
    compare(codecs, ["clip", "codecs"])


def test_an_array_that_one_client_cannot_send_in_half_precision_stays_whole_for_it_alone():
    compare(["fp16", "int8"], ["codecs"], scale=30000.0)


@pytest.mark.parametrize(
    "settings", [{"robust_mean": "median"}, {"row_mean": "changed"}, {"client_weights": "uniform"}]
)
def test_what_the_server_makes_of_many_is_what_it_makes_of_each(settings):
    compare(["int8"], ["codecs"], **settings)


@pytest.mark.parametrize("codec", [name for name, codec in CODECS.items() if codec not in ROW_WISE])
def test_a_codec_that_sees_whole_arrays_goes_one_by_one_and_nothing_is_remembered(codec):
    ends = Ends([codec], ["codecs"])
    assert ClientLink.encoded_by_many(ends.links, ends.stacked(ends.networks(0), 0)) is None
    assert all(link.sent_in is None and not link.stages[-1].dropped for link in ends.links)


def test_numbers_that_nobody_takes_are_left_to_each_by_itself():
    ends = Ends(["int8"], ["codecs"])
    networks = ends.networks(0)
    networks[1][2]["p:vector"][3] = 1e19
    encoded = ClientLink.encoded_by_many(ends.links, ends.stacked(networks, 0))
    assert encoded is not None and ends.intake.add_stacked(encoded[0]) is None
    assert not ends.intake.answered and all(link.sent_in is None for link in ends.links)


@pytest.mark.parametrize("codecs", [["sign"], ["int4"], ["int8"]], ids="-".join)
def test_a_network_of_which_a_codec_makes_numbers_where_there_are_none_is_refused_alone_and_among_others(codecs):
    ends = Ends(codecs, ["codecs"])
    networks = ends.networks(0)
    number, _, arrays = networks[1]
    arrays["p:matrix"][2, 3] = np.nan
    encoded = ClientLink.encoded_by_many(ends.links, ends.stacked(networks, 0))
    assert encoded is None or ends.intake.add_stacked(encoded[0]) is None
    wire = ends.links[1].encoded(Message("model", 0, number, arrays, ends.training(number)))
    with pytest.raises(MessageError, match="not finite"):
        ends.intake.add_read(number, wire)
    assert not ends.intake.answered


def test_arrays_of_other_types_are_in_every_message_and_are_held_against_what_was_asked_for():
    ends = Ends([], ["codecs"])
    counts = np.arange(1, 9, dtype=np.int64).reshape(4, 2)
    training = {number: ends.training(number) for number in CLIENTS}
    sums = Block.of(np.ones((4, 3), dtype=np.float32))
    stacked = Stacked("knowledge", 0, training, {"sums": sums}, others={"counts": counts})
    for message, own in zip(stacked.messages(), counts, strict=True):
        assert message.arrays.keys() == {"sums", "counts"} and message.arrays["counts"].tolist() == own.tolist()
    asked = {"sums": ArraySpec((3,)), "counts": ArraySpec((2,), np.int64)}
    assert stacked.fits(Schema("knowledge", asked))
    assert not stacked.fits(Schema("knowledge", {"sums": asked["sums"]}))


def test_counts_among_floats_are_looked_at_as_counts():
    counts = np.ones((4, 3), dtype=np.float32)
    counts[2] = 0
    training = {number: Training(2, 2, 0.5) for number in CLIENTS}
    stacked = Stacked("knowledge", 0, training, {"counts": Block.of(counts)})
    spec = ArraySpec((3,), counts=True)
    assert not stacked.fits(Schema("knowledge", {"counts": spec}))
    assert stacked.fits(Schema("knowledge", {"counts": spec._replace(empty=True)}))


FLEETS = [
    {"strategy": "fedavg", "codecs": ["int8"]},
    {"strategy": "fedavg", "codecs": ["row_sparse", "sign"], "clients_per_round": 5},
    {"strategy": "fedavg", "stages": ["clip", "codecs"], "codecs": ["fp16"], "error_feedback": False},
    {"strategy": "fedavg", "codecs": ["int4"], "serve_after": "training", "robust_mean": "median", "min_clients": None},
    {"strategy": "fedgkd", "codecs": ["int8"], "broadcast_codecs": ["fp16"], "partition": "user"},
    {"strategy": "afd", "knowledge": "item", "codecs": ["int8"]},
    {"strategy": "afd", "knowledge": "label", "codecs": ["sign"]},
]


@pytest.mark.parametrize("keys", FLEETS, ids=str)
def test_a_fleet_whose_clients_speak_at_once_is_one_whose_clients_speak_in_turn(prepared, monkeypatch, keys):
    keys = {"client_num": 8, "learner": "sgd", "learning_rate": 0.1, "min_clients": 2, **keys}
    together, alone = (prepared(engine="fleet", **keys)[1].engine for _ in range(2))
    at_once, heard = Intake.add_stacked, []
    for round_index in range(3):
        monkeypatch.setattr(Intake, "add_stacked", lambda *arguments: heard.append(at_once(*arguments)) or heard[-1])
        one = together.run_round(round_index)
        monkeypatch.setattr(Intake, "add_stacked", lambda *arguments: None)
        other = alone.run_round(round_index)
        assert one.bytes_up == other.bytes_up and one.bytes_down == other.bytes_down
        np.testing.assert_allclose([one.loss, one.codec_error], [other.loss, other.codec_error], rtol=1e-5)
    assert heard and set(map(str, heard)) == {"{}"}
    for name, value in alone.server.state.items():
        torch.testing.assert_close(together.server.state[name], value, rtol=1e-5, atol=1e-6)
    for number, state in alone.links.state_dict().items():
        torch.testing.assert_close(together.links.state_dict()[number], state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keys", [{}, {"serve_after": "training", "clients_per_round": 20}], ids=str)
def test_a_client_that_is_left_out_is_as_before_to_the_bit_and_holds_no_more_rows_than_it_has_dropped(prepared, keys):
    keys = {"strategy": "fedavg", "codecs": ["row_sparse", "int8"], "min_clients": 2, "partition": "user", **keys}
    engine = prepared(engine="fleet", learner="sgd", **keys)[1].engine
    engine.run_round(0)
    number = engine.server.choose(list(engine.samples), 1)[0]
    link = engine.links[number]
    before, rows = deepcopy(link.state_dict()), [len(own.values) for own in link.stages[-1].dropped.values()]
    snapshot = engine.downlink.snapshot(number)
    engine.run_round(1)
    assert link.sent_in == 1
    engine.downlink.restore(number, snapshot)
    state = link.state_dict()
    assert (state["version"], state["sent_in"]) == (before["version"], before["sent_in"])
    for name in ("reference", "sent", "stages"):
        torch.testing.assert_close(state[name], before[name], rtol=0, atol=0)
    assert [len(own.values) for own in link.stages[-1].dropped.values()] == rows


def test_every_stage_says_how_it_goes_over_many_or_goes_one_by_one():
    for stage in STAGES.values():
        own = stage.encode_many is not Stage.encode_many
        assert own == (stage in (Encoding, Clip))


def test_a_stage_that_changes_what_its_base_does_is_not_taken_for_it():
    class Longer(Clip):
        def encode(self, message):
            return message

    assert Longer.encode_many is Stage.encode_many and Longer.decode_many is Stage.decode_many

    class Remembering(Encoding):
        def state_dict(self):
            return {**super().state_dict(), "more": 1}

    assert Remembering.snapshot is Stage.snapshot and Remembering.restore is Stage.restore
