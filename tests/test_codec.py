"""Codecs: the way back, what is lost and what is not, and that both sides agree."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from scipy import stats

from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.bits import bridged
from recbole_fedkd.federated.codec import (
    CODECS,
    CodecStack,
    squared_error,
)
from recbole_fedkd.federated.encoding import LowRank, LowRankSettings, energy_rank
from recbole_fedkd.federated.message import Message, MessageError, decoded
from recbole_fedkd.federated.random_k import common_places
from recbole_fedkd.federated.stage import applied, difference, named
from recbole_fedkd.federated.wire import Broadcast

FLOATS = st.floats(-1e4, 1e4, width=32)
SHAPES = arrays_of.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=12)
ARRAYS = arrays_of.arrays(np.float32, SHAPES, elements=FLOATS)
WIDE = {"embedding_size": 32, "hidden_sizes": [16, 64]}
SETTINGS = {"low_rank_start": 0.5, "low_rank_end": 1.0, "low_rank_rounds": 5, "top_k_share": 0.1}
STACKS = [["fp16"], ["int8"], ["row_sparse"], ["row_sparse", "int8"], ["row_sparse", "fp16"], ["int8", "fp16"]]


@pytest.mark.parametrize("names", STACKS, ids="+".join)
@given(array=ARRAYS)
def test_shape_and_type_come_back_and_the_error_is_bounded(names, array):
    stack = CodecStack.of(names, SETTINGS)
    back = stack.decode(stack.encode({"w": array}, 0))
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
    codec = CODECS["row_sparse"]()
    encoded = codec.encode(array, 0)
    assert codec.decode(encoded).tobytes() == array.tobytes()
    stacked = CodecStack.of(["row_sparse"], SETTINGS).encode({"w": array}, 0)
    assert sum(part.nbytes for part in stacked.values()) <= array.nbytes


def test_values_by_hand():
    stack = CodecStack.of(["int8"], SETTINGS)
    array = np.repeat(np.array([[127.0, -63.5, 0.4], [0.0, 0.0, 0.0]], dtype=np.float32), 5, 1)
    encoded = stack.encode({"w": array, "few": array[0, :3]}, 0)
    assert encoded["w|0.codes"][:, ::5].tolist() == [[127, -64, 0], [0, 0, 0]]
    assert encoded["w|0.scales"].tolist() == [[1.0], [0.0]]
    assert np.array_equal(encoded["few"], array[0, :3])  # the names of its parts would outweigh the gain
    large = np.full(40, 1e9, dtype=np.float32)
    half = CodecStack.of(["fp16"], SETTINGS).encode({"w": np.full(40, 0.1, dtype=np.float32), "large": large}, 0)
    assert half["w|0.half"].tolist() == [float(np.float16(0.1))] * 40
    assert half["large"].tolist() == large.tolist()  # 65504 would be another number altogether


def test_what_is_no_float_stays_as_it_is():
    counts = np.arange(6, dtype=np.int32)
    for name in CODECS:
        encoded = CodecStack.of([name], SETTINGS).encode({"counts": counts}, 0)
        assert encoded["counts"] is counts


def test_the_error_is_that_of_the_arrays_by_hand():
    before = {"w": np.array([3.0, 4.0], dtype=np.float32), "n": np.array([7])}
    after = {"w": np.array([3.0, 5.0], dtype=np.float32), "n": np.array([7])}
    assert squared_error(before, after) == (1.0, 25.0)


def test_parts_that_do_not_belong_together_are_a_message_error():
    message = Message("model", 0, 0, {"w|0.codes": np.zeros((2, 2), np.int8)})
    with pytest.raises(MessageError, match="'model' cannot be decoded"):
        decoded(message, CodecStack.of(["int8"], SETTINGS))


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
    # A knowledge message loses a share of itself, an update a share of what changed.
    assert all(0 < each["codec_error"] < 0.05 for each in small["rounds"])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_matrix_that_holds_no_number_is_not_decomposed_and_refused_by_who_reads_it(bad):
    array = np.ones((3, 4), dtype=np.float32)
    array[1, 2] = bad
    stack = CodecStack.of(["low_rank"], SETTINGS)
    assert np.array_equal(stack.decode(stack.encode({"weight": array}, 0))["weight"], array, equal_nan=True)


@given(matrix=arrays_of.arrays(np.float32, (40, 6), elements=st.floats(-1, 1, width=32)))
def test_low_rank_keeps_the_share_of_the_energy_that_the_round_asks_for(matrix):
    codec = LowRank()
    for round_index in (0, 2, 4, 9):
        parts = codec.encode(matrix, round_index)
        back = matrix if parts is None else codec.decode(parts)
        whole = float((matrix.astype(np.float64) ** 2).sum())
        lost = float(((matrix - back).astype(np.float64) ** 2).sum())
        assert lost <= (1 - codec.energy(round_index) + 1e-5) * whole + 1e-12


def test_the_share_of_the_energy_grows_over_the_rounds_and_then_stays():
    assert [LowRank(LowRankSettings(0.5, 1.0, 5)).energy(each) for each in (0, 2, 4, 99)] == [0.5, 0.75, 1.0, 1.0]


def test_the_rank_is_the_fewest_singular_values_that_hold_the_share():
    values = np.array([3.0, 2.0, 1.0])  # energies 9, 4, 1 of 14
    assert [energy_rank(values, share) for share in (0.5, 9 / 14, 0.65, 0.93, 1.0)] == [1, 1, 2, 3, 3]
    assert energy_rank(np.zeros(3), 0.9) == 0


def test_a_matrix_of_rank_one_comes_back_whole_in_a_fraction_of_the_bytes():
    matrix = np.outer(np.arange(1, 51), [1.0, -2.0, 0.5, 4.0]).astype(np.float32).reshape(50, 2, 2)
    stack = CodecStack.of(["low_rank"], SETTINGS)
    encoded = stack.encode({"w": matrix}, 0)
    assert encoded["w|0.left"].shape == (50, 1) and encoded["w|0.right"].shape == (1, 4)
    np.testing.assert_allclose(stack.decode(encoded)["w"], matrix, rtol=1e-5)


def test_top_k_sends_the_largest_numbers_and_nothing_else():
    array = np.zeros((10, 10), dtype=np.float32)
    array[0, 3], array[4, 4], array[9, 9] = 5.0, -7.0, 0.5
    array[2, 2] = 0.1
    stack = CodecStack.of(["top_k"], {"top_k_share": 0.03})
    encoded = stack.encode({"w": array}, 0)
    assert encoded["w|0.gaps"].tolist() == [4, 41, 55] and encoded["w|0.values"].tolist() == [5.0, -7.0, 0.5]
    back = stack.decode(encoded)["w"]
    array[2, 2] = 0.0
    assert np.array_equal(back, array)


def test_random_k_sends_the_same_places_of_every_client_and_others_in_the_next_round():
    stack = CodecStack.of(["random_k"], {"random_k_share": 0.1})
    ones, twos = np.ones((10, 10), np.float32), np.full((10, 10), 2.0, np.float32)
    seen = [stack.decode(stack.encode({"w": array}, each))["w"] for array in (ones, twos) for each in (0, 1, 0)]
    assert [int((each != 0).sum()) for each in seen] == [10] * 6
    assert np.array_equal(seen[0] * 2, seen[3]) and np.array_equal(seen[0], seen[2]) and (seen[0] != seen[1]).any()
    drawn = np.concatenate([common_places(1000, 100, each) for each in range(400)])
    assert stats.chisquare(np.bincount(drawn, minlength=1000)).pvalue > 1e-4  # a public draw: it never varies


def test_sign_sends_a_bit_a_number_and_the_magnitude_of_each_row_in_steps():
    array = np.array([[1.0, -3.0, 2.0], [0.5, 0.5, -0.5], [1.3, 1.3, 1.7], [1e-4, 0.0, 0.0]], dtype=np.float32)
    codec = CODECS["sign"]()
    encoded = codec.encode(array, 0)
    assert encoded["signs"].tolist() == [0b10111011, 0b11000000]
    assert encoded["steps"].tolist() == [0x04, 0x1F] and encoded["largest"].tolist() == [2.0]
    step = float(np.float32(2**0.5))
    back = [[2.0, -2.0, 2.0], [0.5, 0.5, -0.5], [step] * 3, [0.0] * 3]
    np.testing.assert_allclose(codec.decode(encoded), back, rtol=1e-6)
    assert codec.decode(codec.encode(array[0], 0)).tolist() == [2.0, -2.0, 2.0]
    assert not codec.decode(codec.encode(np.zeros((3, 2), dtype=np.float32), 0)).any()


@given(array=ARRAYS)
def test_sign_keeps_signs_and_misses_the_mean_magnitude_of_a_row_by_less_than_a_step(array):
    codec = CODECS["sign"]()
    back = codec.decode(codec.encode(array, 0))
    assert back.shape == array.shape and (back * array >= 0).all()
    rows = np.abs(array.astype(np.float64)).reshape(len(array) if array.ndim > 1 else 1, -1).mean(1)
    told = np.abs(back).reshape(len(rows), -1)[:, 0]
    # Below the least normal number single precision knows no steps of a quarter.
    heard = (rows >= rows.max() * 2**-7) & (rows > 1e-37)
    assert (told[heard] <= rows[heard] * 2**0.26).all() and (told[heard] >= rows[heard] * 2**-0.26).all()


def test_int4_sends_half_a_byte_a_number_and_a_bound_of_each_row_in_steps():
    array = np.array([[7.0, -3.4, 0.6], [3.5, -1.0, 0.2], [3.0, 0.0, -1.3], [1e-3, 0.0, 0.0]], dtype=np.float32)
    codec = CODECS["int4"]()
    encoded = codec.encode(array, 0)
    # 7 and 3.5 are whole steps, 3 is between two: its row is told the larger, 3.5.
    assert encoded["steps"].tolist() == [0x02, 0x2F] and encoded["largest"].tolist() == [7.0]
    assert encoded["codes"].tolist() == [0xF5, 0x9F, 0x68, 0xE8, 0x58, 0x88]
    back = [[7.0, -3.0, 1.0], [3.5, -1.0, 0.0], [3.0, 0.0, -1.5], [0.0] * 3]
    np.testing.assert_allclose(codec.decode(encoded), back, rtol=1e-6)
    assert not codec.decode(codec.encode(np.zeros(3, dtype=np.float32), 0)).any()


@given(array=ARRAYS)
def test_int4_misses_a_number_by_less_than_a_seventh_of_the_largest_of_its_row(array):
    codec = CODECS["int4"]()
    back = codec.decode(codec.encode(array, 0))
    assert back.shape == array.shape and back.dtype == np.float32
    rows = array.astype(np.float64).reshape(len(array) if array.ndim > 1 else 1, -1)
    largest = np.abs(rows).max(1, keepdims=True)
    allowed = np.where(largest >= largest.max() * 2**-7, largest * 2**0.5 / 14 * 1.0001, largest)
    allowed = allowed + np.finfo(np.float32).smallest_subnormal  # a seventh of which is no number
    assert (np.abs(back.reshape(rows.shape) - rows) <= allowed).all()


@given(places=st.sets(st.integers(0, 5000), min_size=1))
def test_no_gap_of_top_k_is_longer_than_a_byte_and_no_place_is_lost_or_doubled(places):
    ordered = np.array(sorted(places))
    filled = bridged(ordered, 255)
    gaps = np.diff(filled, prepend=-1)
    assert gaps.min() >= 1 and gaps.max() <= 255
    assert places <= set(filled.tolist())
    assert len(filled) - len(places) <= (ordered[-1] + 1) // 255


@pytest.mark.parametrize(
    ("codecs", "down"),
    [
        (["int8"], None),
        (["top_k"], None),
        (["low_rank", "fp16"], None),
        (["row_sparse", "top_k", "int8"], None),
        (["sign"], ["int4"]),
        ([], ["int8"]),
    ],
)
def test_server_and_clients_hold_the_same_numbers_after_lossy_rounds(prepared, codecs, down):
    _, trainer, _, _ = prepared(strategy="fedavg", codecs=codecs, broadcast_codecs=down, **WIDE)
    engine = trainer.engine
    for round_index in range(3):
        engine.run_round(round_index)
    replica = engine.server.link.broadcast.replica
    changed = sum(float(np.abs(replica[name] - value.numpy()).max()) for name, value in engine.server.state.items())
    assert changed > 0  # a lossy codec: what the clients hold is not all that the server knows
    for client in engine.clients:
        for name, value in client.task.shared.parameters().items():
            assert np.array_equal(value.detach().numpy(), replica[f"p:{name}"])


def test_what_was_dropped_is_sent_later():
    # One array and one number a round: with the feedback every number arrives in its turn.
    stack = CodecStack.of(["top_k"], {"top_k_share": 0.01})
    target = {"w": np.linspace(1, 2, 40, dtype=np.float32)}
    broadcast = Broadcast({"w": np.zeros(40, dtype=np.float32)})
    for _ in range(40):
        broadcast.advance(target, stack, 0)
    assert np.array_equal(broadcast.replica["w"], target["w"])


def test_a_client_adds_what_was_dropped_to_its_next_update(prepared):
    dropped = {}
    for feedback in (True, False):
        _, trainer, _, _ = prepared(strategy="fedavg", codecs=["top_k"], error_feedback=feedback, **WIDE)
        trainer.engine.run_round(0)
        client = trainer.engine.clients[0]
        dropped[feedback] = sum(float(np.abs(value).sum()) for value in client.link.stages[-1].residual.values())
        if feedback:
            before = named(client.link.stages[-1].residual, client.received)
            start = {name: value.numpy().copy() for name, value in client.received.items()}
            client.train(1)
            own = {f"p:{name}": value.detach().numpy() for name, value in client.task.shared.parameters().items()}
            wire = decoded(Message.from_bytes(client.send(1)), client.link.codecs.up)
            sent = named(wire.arrays, start)
            for name, value in applied(difference(own, start), before).items():
                np.testing.assert_allclose(
                    sent[name] + named(client.link.stages[-1].residual, start)[name], value, atol=1e-6
                )
    assert dropped[True] > 0 and dropped[False] == 0


def test_a_client_that_was_away_gets_the_whole_network_and_one_that_was_not_the_update(prepared):
    _, trainer, _, _ = prepared(strategy="fedavg", codecs=["top_k", "int8"], clients_per_round=1, client_num=3, **WIDE)
    engine = trainer.engine
    assert engine.server.send(0, 0) == b""  # version 0 is built from the seed
    for round_index in range(6):
        engine.run_round(round_index)
    server = engine.server
    told = dict(server.link.broadcast.acknowledged)
    for client in range(3):
        message = server.send(client, 6)
        behind = server.link.broadcast.version - told.get(client, 0)
        kind = Message.from_bytes(message).kind
        assert kind == ("update" if behind == 1 else "network")
        engine.clients[client].receive(message)
        assert engine.clients[client].link.version == 6
    with pytest.raises(MessageError, match="update to version 9 came to a client that holds version 6"):
        arrays = {"version": np.array([9], dtype=np.int32)}
        engine.clients[0].receive(Message("update", 9, -1, arrays).to_bytes())


@pytest.mark.parametrize(("up", "down"), [(["sign"], []), ([], ["sign"]), (["sign"], ["int4"]), (["fp16"], None)])
def test_each_direction_has_the_codecs_that_the_config_gives_it(run, up, down):
    rounds = run(strategy="fedavg", epochs=3, codecs=up, broadcast_codecs=down, **WIDE)["rounds"]
    plain = run(strategy="fedavg", epochs=3, **WIDE)["rounds"]
    share = {"sign": (0, 0.1), "int4": (0.1, 0.2), "fp16": (0.5, 0.6)}
    for direction, names in (("bytes_up", up), ("bytes_down", up if down is None else down)):
        low, high = share[names[0]] if names else (0.98, 1.05)
        assert low < rounds[2][direction] / plain[2][direction] < high


def test_row_sparse_updates_give_the_run_without_codecs(run):
    keys = {"strategy": "fedavg", "epochs": 3}
    plain, sparse = run(**keys), run(**keys, codecs=["row_sparse"])
    assert sparse["test_result"]["mae"] == pytest.approx(plain["test_result"]["mae"], abs=1e-4)
    assert sparse["rounds"][0]["bytes_down"] == 0 < plain["rounds"][0]["bytes_down"]


def test_what_a_client_takes_off_the_totals_is_what_the_server_saw_of_it(prepared):
    keys = {"strategy": "afd", "knowledge": "item", "knowledge_use": "distil", "codecs": ["fp16"], "client_num": 2}
    _, trainer, _, _ = prepared(**keys)
    engine = trainer.engine
    engine.run_round(0)
    one, other = engine.clients
    payload = engine.server.send(0, 1)
    one.receive(payload)
    total = decoded(Message.from_bytes(payload), CodecStack.of(["fp16"], SETTINGS)).arrays["sums"]
    left = torch.tensor(total) - one.link.sent["sums"]
    seen = other.link.sent["seen"] > 0
    torch.testing.assert_close(left[seen], other.link.sent["sums"][seen], atol=0.2, rtol=2e-3)
    assert torch.equal(one.received["known"], seen)


@pytest.mark.parametrize("codecs", [["int8"], ["row_sparse", "top_k", "fp16"], ["low_rank"]], ids="+".join)
def test_resume_is_exact_with_codecs(run, codecs):
    keys = {"strategy": "fedavg", "codecs": codecs, "clients_per_round": 2}
    whole, part = run(epochs=3, **keys), run(epochs=1, **keys)
    resumed = run(epochs=3, resume=part["run_folder"], **keys)
    assert resumed["test_result"] == whole["test_result"]
    assert resumed["communication"] == whole["communication"]


def test_an_unknown_codec_is_told(run):
    with pytest.raises(
        InputError,
        match=r"codecs is \['zip'\]; it must be a list of any of fp16, int8, int4, row_sparse, low_rank, top_k",
    ):
        run(codecs=["zip"])
