"""What a stranger may send: what was not asked for is refused by one error, and nothing large is made of it."""

import contextlib
import tracemalloc

import msgpack
import numpy as np
import pytest
import torch
from engines import refused
from hypothesis import given
from hypothesis import strategies as st

from recbole_fedkd.federated.codec import CODECS, CodecStack, WireCodecs
from recbole_fedkd.federated.message import SERVER, ArraySpec, Message, MessageError, Schema, Training, decoded
from recbole_fedkd.federated.server import Server
from recbole_fedkd.federated.strategy import Strategy

SETTINGS = {"low_rank_start": 0.5, "low_rank_end": 1.0, "low_rank_rounds": 5, "top_k_share": 0.1}
SHAPE = (64, 8)
SCHEMA = Schema("model", {"w": ArraySpec(SHAPE), "n": ArraySpec((3,), np.int32, counts=True)})
STACKS = [
    [],
    *([name] for name in CODECS),
    ["row_sparse", "top_k", "int8"],
    ["low_rank", "fp16"],
    ["row_sparse", "int4"],
]
LITTLE = 2**20


def upload(arrays=None, kind="model", number=3, sender=1, training=(7, 7, 1.5), names=()):
    """Bytes of an upload as an honest client of these codecs makes it."""
    generator = np.random.default_rng(0)
    default = {"w": generator.normal(size=SHAPE).astype(np.float32), "n": np.array([1, 0, 2], np.int32)}
    stack = CodecStack.of(list(names), SETTINGS)
    arrays = stack.encode({**default, **(arrays or {})}, number)
    return Message(kind, number, sender, arrays, Training(*training)).to_bytes()


def read(payload, names=()):
    """What a server makes of an upload; memory that it took is little, whatever the bytes declare."""
    tracemalloc.start()
    try:
        return decoded(Message.from_bytes(payload), CodecStack.of(list(names), SETTINGS), SCHEMA)
    finally:
        assert tracemalloc.get_traced_memory()[1] < LITTLE + 40 * len(payload)
        tracemalloc.stop()


def refusal(payload, names=()):
    with pytest.raises(MessageError) as caught:
        read(payload, names)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    return caught.value.fault


def test_a_message_of_very_many_arrays_is_refused_before_room_is_made_for_them():
    payload = upload({str(number): np.zeros(0, np.float32) for number in range(2**15)})
    assert refusal(payload) == "malformed"


def test_maps_inside_of_each_other_take_little_room():
    assert refusal(b"\xde\x40\x00\xa0" * 1020 + b"\xc0") == "malformed"


def is_as_asked(message):
    return all(
        message.arrays[name].shape == spec.shape
        and message.arrays[name].dtype == spec.dtype
        and np.isfinite(message.arrays[name]).all()
        for name, spec in SCHEMA.arrays.items()
    )


@pytest.mark.parametrize("names", STACKS, ids="+".join)
def test_what_was_asked_for_is_taken(names):
    assert is_as_asked(read(upload(names=names), names))


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"w": np.full(SHAPE, np.nan, np.float32)}, "not finite"),
        ({"w": np.full(SHAPE, np.inf, np.float32)}, "not finite"),
        ({"w": np.full(SHAPE, -np.inf, np.float32)}, "not finite"),
        ({"w": np.full(SHAPE, 1e38, np.float32)}, "not finite"),
        ({"w": np.zeros((1,), np.float32)}, "arrays"),
        ({"w": np.zeros((8, 64), np.float32)}, "arrays"),
        ({"w": np.zeros(SHAPE, np.float64)}, "arrays"),
        ({"w": np.zeros(SHAPE, np.int32)}, "arrays"),
        ({"n": np.array([1, -1, 5], np.int32)}, "counts"),
        ({"n": np.zeros(3, np.int32)}, "counts"),
        ({"n": np.zeros(3, np.float32)}, "arrays"),
        ({"more": np.zeros(3, np.float32)}, "arrays"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_arrays_that_were_not_asked_for_are_refused(arrays, fault):
    assert refusal(upload(arrays)) == fault


def test_a_number_too_large_to_be_squared_is_told_as_that_and_no_other_as_it():
    for value, told in ((-1e20, "not finite: 'w' holds -1e+20, of which single precision"), (np.inf, "'w' holds inf$")):
        with pytest.raises(MessageError, match=told.replace("+", r"\+")):
            read(upload({"w": np.full(SHAPE, value, np.float32)}))


def test_a_missing_array_and_another_kind_are_refused():
    assert refusal(Message("model", 3, 1, {"w": np.zeros(SHAPE, np.float32)}).to_bytes()) == "arrays"
    assert refusal(upload(kind="teacher")) == "kind"
    assert refusal(upload(training=(7, 7, float("nan")))) == "not finite"


# What unfolds


BOMBS = {
    "sign": {"signs": np.zeros(2**20, np.uint8), "steps": np.zeros(1, np.uint8), "largest": np.ones(1, np.float32)},
    "int4": {"codes": np.zeros(2**20, np.uint8), "steps": np.zeros(1, np.uint8), "largest": np.ones(1, np.float32)},
    "random_k": {"values": np.ones(1, np.float32), "round": np.zeros(1, np.int32)},
    "top_k": {"gaps": np.ones(1, np.uint8), "values": np.ones(1, np.float32)},
    "low_rank": {"left": np.ones((30000, 1), np.float32), "right": np.ones((1, 30000), np.float32)},
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize(
    "shape", [(2**14, 2**14), (2**23,), (2**31 - 1,) * 8, (30000, 30000), (-1, 5), (0,), (0, 2**31 - 1)]
)
def test_a_shape_that_a_codec_declares_is_held_against_what_was_asked_for(name, shape):
    parts = {**BOMBS[name], "shape": np.array(shape, np.int64).astype(np.int32)}
    small = {part: array[:1] if name in ("sign", "int4") else array for part, array in parts.items() if part != "shape"}
    for each in (parts, {**small, "shape": parts["shape"]}):
        arrays = {f"w|0.{part}": array for part, array in each.items()} | {"n": np.ones(3, np.int32)}
        assert refusal(Message("model", 3, 1, arrays).to_bytes(), [name]) == "arrays"


def test_codes_do_not_unfold_by_broadcasting_nor_rows_by_a_count():
    wide = {"codes": np.ones((4000, 1), np.int8), "scales": np.ones((1, 4000), np.float32)}
    assert refusal(Message("model", 3, 1, {f"w|0.{k}": v for k, v in wide.items()}).to_bytes(), ["int8"]) == "arrays"
    for count, rows in ((2**31 - 1, 0), (64, 0), (-1, 0), (10**8, 10**8 // 8)):
        few = {"present": np.zeros(rows, np.uint8), "count": np.array([count], np.int32)}
        for width in (8, 2**20):
            parts = {**few, "values": np.zeros((0, width), np.float32)}
            payload = Message("model", 3, 1, {f"w|0.{k}": v for k, v in parts.items()}).to_bytes()
            if len(payload) < LITTLE:
                assert refusal(payload, ["row_sparse"]) == "arrays"


@given(data=st.data())
def test_random_parts_of_any_codec_raise_nothing_else(data):
    name = data.draw(st.sampled_from(list(CODECS)))
    sizes = st.lists(st.integers(0, 70), min_size=0, max_size=3)
    arrays = {"n": np.ones(3, np.int32)}
    for part, dtype in CODECS[name].parts.items():
        if data.draw(st.integers(0, 9)):
            kind = (
                dtype if data.draw(st.integers(0, 9)) else data.draw(st.sampled_from([np.float64, np.bool_, np.int8]))
            )
            if part in ("shape", "count"):
                values = data.draw(st.lists(st.integers(-2, 2**31 - 1) | st.sampled_from([*SHAPE, 1]), max_size=3))
                arrays[f"w|0.{part}"] = np.array(values, np.int64).astype(kind)
            else:
                shape = tuple(data.draw(sizes | st.just(list(SHAPE))))
                arrays[f"w|0.{part}"] = np.full(shape, data.draw(st.integers(0, 255)), np.int64).astype(kind)
    with contextlib.suppress(MessageError):
        assert is_as_asked(read(Message("model", 3, 1, arrays).to_bytes(), [name]))


# Bytes


@given(payload=st.binary(max_size=200))
def test_random_bytes_raise_nothing_else(payload):
    with pytest.raises(MessageError):
        read(payload)


@pytest.mark.parametrize("names", STACKS, ids="+".join)
@given(data=st.data())
def test_a_changed_message_is_refused_or_is_still_what_was_asked_for(names, data):
    payload = bytearray(upload(names=names))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(payload) - 1) | st.integers(0, min(200, len(payload) - 1)))
        payload[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MessageError):
        assert is_as_asked(read(bytes(payload), names))


@given(content=st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["v", "k", "r", "s", "a", "t", "e", "w", "n"]) | st.text(max_size=2), inner, max_size=8),
    max_leaves=12,
))  # fmt: skip
def test_any_other_content_is_refused(content):
    if isinstance(content, dict):
        content |= {"v": 2}
    with pytest.raises(MessageError):
        read(msgpack.packb(content))


@pytest.mark.parametrize("key", ["v", "k", "r", "s", "a", "t"])
@given(
    value=st.none()
    | st.booleans()
    | st.integers(-5, 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=20)
    | st.lists(st.integers(-5, 2**64 - 1), max_size=3)
    | st.dictionaries(
        st.text(max_size=2),
        st.lists(
            st.integers(-3, 2**40) | st.text(max_size=3) | st.binary(max_size=9) | st.lists(st.integers(-3, 2**62)),
            max_size=4,
        ),
        max_size=3,
    )
)
def test_a_header_of_other_types_is_refused(key, value):
    content = msgpack.unpackb(upload())
    content[key] = value
    with contextlib.suppress(MessageError):
        assert is_as_asked(read(msgpack.packb(content)))


@pytest.mark.parametrize(
    "payload",
    [
        b"\x91" * 10**5,
        b"\x81\xa1a" * 10**5,
        b"\xdd\x00\x00\xff\xff" * 2000,  # lists of 65,535, each inside the one before
        b"\xdf\x00\x00\xff\xff" * 2000,
        b"\xdd\x7f\xff\xff\xff",
        b"\xdf\x7f\xff\xff\xff",
        b"\xc6\x7f\xff\xff\xff",
        b"\xdb\x7f\xff\xff\xff",
        b"\xc9\x7f\xff\xff\xff\x01",
        b"\xc7\x0c\xff" + b"\x00" * 12,
        b"\xd6\xff\xff\xff\xff\xff",
        b"\xd4\x01\x00",
        b"\xc1",
        b"\x81\x90\x01",
        b"\x81\xc0\x01",
        b"\xa1\xff",
    ],
)
def test_what_is_made_to_break_a_reader_is_refused(payload):
    assert refusal(payload) == "malformed"
    content = msgpack.packb({"v": 2, "k": "model", "r": 3, "s": 1, "t": b"\0" * 16})
    assert refusal(b"\x86" + content[1:] + b"\xa1a" + payload) == "malformed"


def test_what_stands_twice_or_behind_the_end_is_refused():
    payload = upload()
    assert refusal(payload + payload) == "malformed"
    assert refusal(payload + b"\x00") == "malformed"
    header, more = payload[0], b"\xa1r\x03"
    assert refusal(bytes([header + 1]) + more + payload[1:]) == "malformed"
    for length in (0, 1, len(payload) // 2, len(payload) - 1):
        assert refusal(payload[:length]) == "malformed"


# The server


class Collecting(Strategy):
    """Sums up one array."""

    name = "collecting"

    def __init__(self):
        pass

    def download(self, state, client, round_index):
        return None

    def loss(self, step, received, shared):
        return step.loss

    def upload(self, result, client, round_index):
        return None

    def upload_schema(self, state):
        return SCHEMA

    def aggregate(self, state, uploads):
        return {"w": sum(torch.tensor(upload.arrays["w"]) for upload in uploads)}


def honest(sender, number=3, **arrays):
    return upload({"w": np.full(SHAPE, sender, np.float32), **arrays}, sender=sender, number=number)


def test_what_is_wrong_is_left_out_and_named_and_the_rest_counts():
    server = Server(Collecting())
    payloads = {client: honest(client) for client in range(1, 11)}
    payloads[2] = honest(1)
    payloads[3] = honest(3, number=77)
    payloads[4] = honest(4, w=np.full(SHAPE, np.nan, np.float32))
    payloads[5] = honest(5)[:-9]
    payloads[6] = honest(6) + honest(6)
    payloads[7] = Message("update", 3, 7, {}, Training(1, 1, 0.0)).to_bytes()
    payloads[8] = b""
    payloads[9] = Message("model", 3, SERVER, {}).to_bytes()
    faults = refused(server, payloads, 3)
    assert {client: error.fault for client, error in faults.items()} == {
        2: "sender", 3: "round", 4: "not finite", 5: "malformed", 6: "malformed", 7: "kind", 8: "silent", 9: "sender",
    }  # fmt: skip
    assert "says that it is client 1" in str(faults[2]) and "of round 78" in str(faults[3])
    assert torch.equal(server.state["w"], torch.full(SHAPE, 1.0 + 10.0))


def test_nobody_answers_twice_nor_for_more_samples_than_it_has_nor_unasked():
    server = Server(Collecting())
    intake = server.intake(3, {1: 7, 2: 8})
    intake.add(1, honest(1))
    for client, fault in ((1, "doubled"), (2, "samples"), (5, "sender")):
        with pytest.raises(MessageError) as caught:
            intake.add(client, honest(client))
        assert caught.value.fault == fault
    intake.finish()
    assert torch.equal(server.state["w"], torch.ones(SHAPE))


def test_where_all_are_refused_the_server_keeps_what_it_has():
    server = Server(Collecting())
    server.state = {"w": torch.ones(SHAPE)}
    assert refused(server, {1: b"", 2: b"?"}, 0).keys() == {1, 2}
    assert torch.equal(server.state["w"], torch.ones(SHAPE))


def test_a_server_that_asks_for_nothing_takes_nothing_and_a_client_that_knows_not_what_comes_unfolds_little():
    arrays = {"w|0.gaps": np.ones(1, np.uint8), "w|0.values": np.ones(1, np.float32)}
    payload = Message("any", 0, 1, {**arrays, "w|0.shape": np.array([2**30], np.int32)}, Training(1, 1, 0.0)).to_bytes()
    strategy = Collecting()
    strategy.upload_schema = lambda state: None
    stack = CodecStack.of(["top_k"], SETTINGS)
    faults = refused(Server(strategy, codecs=WireCodecs(stack, stack)), {1: payload, 2: b""}, 0)
    assert {client: error.fault for client, error in faults.items()} == {1: "kind"}
    with pytest.raises(MessageError, match="arrays"):
        decoded(Message.from_bytes(payload), stack)
