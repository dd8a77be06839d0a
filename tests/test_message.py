"""Messages: round trip, byte count, and refusal of everything that is not a message."""

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from recbole_fedkd.federated.message import (
    SCHEMA_VERSION,
    ArraySpec,
    Message,
    MessageError,
    Schema,
    all_taken,
    check_arrays,
)

DTYPES = st.sampled_from([np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_, np.float16, np.int8])


@given(
    content=st.dictionaries(
        st.text(max_size=8),
        DTYPES.flatmap(lambda d: arrays.arrays(d, arrays.array_shapes(min_dims=0, min_side=0))),
        max_size=3,
    ),
    kind=st.text(max_size=10),
    number=st.integers(0, 10**6),
)
def test_a_message_comes_back_as_it_was_sent(content, kind, number):
    read = Message.from_bytes(Message(kind, number, -1, content).to_bytes())
    assert (read.kind, read.round, read.sender) == (kind, number, -1)
    assert read.arrays.keys() == content.keys()
    for name, array in content.items():
        assert read.arrays[name].dtype == array.dtype and read.arrays[name].shape == array.shape
        np.testing.assert_array_equal(read.arrays[name], array)


def test_bytes_are_the_arrays_plus_a_small_header():
    means, counts = np.zeros((5, 5), np.float32), np.zeros(5, np.int32)
    payload = Message("label_knowledge", 3, 1, {"means": means, "counts": counts}).to_bytes()
    assert means.nbytes + counts.nbytes < len(payload) < means.nbytes + counts.nbytes + 100
    larger = Message("label_knowledge", 3, 1, {"means": np.zeros((50, 50), np.float32), "counts": counts}).to_bytes()
    assert len(larger) - len(payload) == pytest.approx(50 * 50 * 4 - 5 * 5 * 4, abs=8)


def test_a_big_endian_array_arrives_with_its_values():
    read = Message.from_bytes(Message("k", 0, 0, {"x": np.array([1.5, 2.5], dtype=">f4")}).to_bytes())
    np.testing.assert_array_equal(read.arrays["x"], np.array([1.5, 2.5], np.float32))


def test_objects_cannot_be_sent():
    with pytest.raises(MessageError, match="dtype object"):
        Message("k", 0, 0, {"x": np.array([object()])}).to_bytes()


@pytest.mark.parametrize("damage", [b"", b"\x80", b"garbage", b"\x93\x01\x02\x03"])
def test_bytes_that_are_no_message_are_refused(damage):
    with pytest.raises(MessageError):
        Message.from_bytes(damage)


def test_a_truncated_message_is_refused():
    payload = Message("k", 0, 0, {"x": np.arange(100)}).to_bytes()
    for length in range(len(payload)):
        with pytest.raises(MessageError):
            Message.from_bytes(payload[:length])


def test_another_schema_version_is_named():
    content = msgpack.unpackb(Message("k", 0, 0, {}).to_bytes())
    content["v"] = SCHEMA_VERSION + 1
    with pytest.raises(MessageError, match=f"version {SCHEMA_VERSION + 1}"):
        Message.from_bytes(msgpack.packb(content))


def test_a_shape_that_does_not_fit_is_refused():
    content = msgpack.unpackb(Message("k", 0, 0, {"x": np.arange(4)}).to_bytes())
    content["a"]["x"][1] = [5]
    with pytest.raises(MessageError, match="malformed"):
        Message.from_bytes(msgpack.packb(content))


def is_taken(of_client, schema):
    try:
        check_arrays(of_client, schema)
    except MessageError:
        return False
    return True


@given(
    values=arrays.arrays(
        np.float32, st.tuples(st.integers(1, 3), st.just(2)), elements=st.sampled_from([0, 1, 2e19, np.nan])
    ),
    counts=st.sampled_from([(), (2,), (2, 3), (0,)]).flatmap(
        lambda shape: st.integers(1, 3).flatmap(
            lambda count: arrays.arrays(np.int32, (count, *shape), elements=st.sampled_from([0, 1, 1, 1, -1]))
        )
    ),
    empty=st.booleans(),
    names=st.sampled_from([("means", "counts"), ("means",), ("counts",), ("means", "counts", "more")]),
)
def test_all_are_taken_at_once_exactly_where_each_is_taken_alone(values, counts, empty, names):
    count = min(len(values), len(counts))
    given = {"means": values[:count], "counts": counts[:count], "more": values[:count]}
    specs = {
        "means": ArraySpec((2,)),
        "counts": ArraySpec(counts.shape[1:], np.int32, counts=True, optional=True, empty=empty),
    }
    together, schema = {name: given[name] for name in names}, Schema("any", specs)
    alone = [is_taken({name: array[place] for name, array in together.items()}, schema) for place in range(count)]
    assert all_taken(together, schema, count) == all(alone)
