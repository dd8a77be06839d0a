"""Codecs: the way back, what is lost and what is not, and that both sides agree."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.codec import CODECS, CodecStack, squared_error
from recbole_fedkd.federated.message import Message, MessageError, decoded

FLOATS = st.floats(-1e4, 1e4, width=32)
SHAPES = arrays_of.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6)
ARRAYS = arrays_of.arrays(np.float32, SHAPES, elements=FLOATS)
WIDE = {"embedding_size": 32, "hidden_sizes": [16, 64]}
STACKS = [["fp16"], ["int8"], ["row_sparse"], ["row_sparse", "int8"], ["row_sparse", "fp16"], ["int8", "fp16"]]


@pytest.mark.parametrize("names", STACKS, ids="+".join)
@given(array=ARRAYS)
def test_shape_and_type_come_back_and_the_error_is_bounded(names, array):
    stack = CodecStack.of(names)
    back = stack.decode(stack.encode({"w": array}))
    assert back.keys() == {"w"}
    assert back["w"].shape == array.shape and back["w"].dtype == np.float32
    largest = np.abs(array).max(-1, keepdims=True)
    allowed = (largest / 254 * 1.01 if "int8" in names else 0) + (largest * 2**-10 + 1e-7 if "fp16" in names else 0)
    allowed = allowed + (
        127 * 2**-24 if {"int8", "fp16"} <= set(names) else 0
    )  # a scale may be too small for half precision
    assert (np.abs(back["w"] - array) <= allowed + 1e-30).all()


@given(array=arrays_of.arrays(np.float32, (9, 3), elements=FLOATS), absent=st.sets(st.integers(0, 8)))
def test_row_sparse_loses_nothing(array, absent):
    array[list(absent)] = 0.0
    stack = CodecStack.of(["row_sparse"])
    encoded = stack.encode({"w": array})
    assert stack.decode(encoded)["w"].tobytes() == array.tobytes()
    assert sum(part.nbytes for part in encoded.values()) <= array.nbytes


def test_values_by_hand():
    stack = CodecStack.of(["int8"])
    encoded = stack.encode({"w": np.array([[127.0, -63.5, 0.4], [0.0, 0.0, 0.0]], dtype=np.float32)})
    assert encoded["w|0.codes"].tolist() == [[127, -64, 0], [0, 0, 0]]
    assert encoded["w|0.scales"].tolist() == [[1.0], [0.0]]
    half = CodecStack.of(["fp16"]).encode({"w": np.array([1e9, -1e9, 0.1], dtype=np.float32)})
    assert half["w|0.half"].tolist() == [65504, -65504, float(np.float16(0.1))]


def test_what_is_no_float_stays_as_it_is():
    counts = np.arange(6, dtype=np.int32)
    for name in CODECS:
        encoded = CodecStack.of([name]).encode({"counts": counts})
        assert encoded["counts"] is counts


def test_the_error_is_that_of_the_arrays_by_hand():
    before = {"w": np.array([3.0, 4.0], dtype=np.float32), "n": np.array([7])}
    after = {"w": np.array([3.0, 5.0], dtype=np.float32), "n": np.array([7])}
    assert squared_error(before, after) == (1.0, 25.0)


def test_parts_that_do_not_belong_together_are_a_message_error():
    message = Message("model", 0, 0, {"w|0.codes": np.zeros((2, 2), np.int8)})
    with pytest.raises(MessageError, match="'model' cannot be decoded"):
        decoded(message, CodecStack.of(["int8"]))


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"strategy": "fedavg", "codecs": ["fp16"], **WIDE}, 0.55),
        ({"strategy": "fedavg", "codecs": ["int8"], **WIDE}, 0.4),
        ({"strategy": "fedavg", "codecs": ["row_sparse", "int8", "fp16"], **WIDE}, 0.35),
        ({"strategy": "afd", "knowledge": "item", "knowledge_use": "distil", "gamma": 2.0, "codecs": ["fp16"]}, 0.75),
    ],
)
def test_encoded_messages_are_smaller_and_the_run_stays_near_the_plain_one(run, keys, factor):
    plain = run(epochs=3, **{**keys, "codecs": []})
    small = run(epochs=3, **keys)
    ratio = small["communication"]["total_bytes"] / plain["communication"]["total_bytes"]
    assert ratio < factor
    assert [each["loss"] for each in small["rounds"]] != [each["loss"] for each in plain["rounds"]]
    assert small["test_result"]["mae"] == pytest.approx(plain["test_result"]["mae"], abs=0.05)
    assert all(each["codec_error"] == 0 for each in plain["rounds"])
    assert all(0 < each["codec_error"] < 0.02 for each in small["rounds"])


def test_server_and_client_hold_the_same_numbers_after_a_lossy_round(prepared):
    _, trainer, _, _ = prepared(strategy="fedavg", codecs=["int8"])
    engine = trainer.engine
    engine.run_round(0)
    stack = CodecStack.of(["int8"])
    state = {name: value.numpy() for name, value in engine.server.state.items()}
    seen = stack.decode(stack.encode(state))
    for client in engine.clients:
        for name, value in client.task.shared.parameters().items():
            torch.testing.assert_close(value.detach(), torch.tensor(seen[f"p:{name}"]))


def test_what_a_client_takes_off_the_totals_is_what_the_server_saw_of_it(prepared):
    keys = {"strategy": "afd", "knowledge": "item", "knowledge_use": "distil", "codecs": ["fp16"], "client_num": 2}
    _, trainer, _, _ = prepared(**keys)
    engine = trainer.engine
    engine.run_round(0)
    one, other = engine.clients
    payload = engine.server.send(0, 1)
    one.receive(payload)
    total = decoded(Message.from_bytes(payload), CodecStack.of(["fp16"])).arrays["sums"]
    left = torch.tensor(total) - one.sent["sums"]
    seen = other.sent["seen"] > 0
    torch.testing.assert_close(left[seen], other.sent["sums"][seen], atol=0.2, rtol=2e-3)
    assert torch.equal(one.received["known"], seen)


def test_resume_is_exact_with_codecs(run):
    keys = {"strategy": "fedavg", "codecs": ["int8"]}
    whole, part = run(epochs=3, **keys), run(epochs=1, **keys)
    resumed = run(epochs=3, resume=part["run_folder"], **keys)
    assert resumed["test_result"] == whole["test_result"]
    assert resumed["communication"] == whole["communication"]


def test_an_unknown_codec_is_told(run):
    with pytest.raises(
        InputError, match=r"codecs is \['zip'\]; it must be a list each, if any, one of fp16, int8, row_sparse"
    ):
        run(codecs=["zip"])
