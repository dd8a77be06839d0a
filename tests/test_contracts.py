"""Contracts: whatever is registered keeps to them, this package's and the plugins of the docs, without a test of its own.

``PLUGINS=mine.py pytest tests/test_contracts.py`` holds them against a plugin of yours, too.
"""

import io
import itertools
import math
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from plugged import NAMED, entries_with, registered

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.keys import Key
from recbole_fedkd.data.partition import UserBase
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.codec import CodecStack
from recbole_fedkd.federated.knowledge import Sizes
from recbole_fedkd.federated.message import ArraySpec, Message, MessageError, Schema, Training, check_arrays, decoded
from recbole_fedkd.federated.stage import Encoding
from recbole_fedkd.federated.strategy import check_additive
from recbole_fedkd.federated.task import Step
from recbole_fedkd.quick_start import _prepare_data, _prepare_trainer
from recbole_fedkd.registry import settings_of

PLUGINS = [str(file) for file in sorted((Path(__file__).parent.parent / "docs" / "plugins").glob("*.py"))]
ENTRIES = entries_with(PLUGINS + NAMED)


def every(plural):
    """A test for each of a registry."""
    return pytest.mark.parametrize("name", ENTRIES[plural])


def built(plural, name, *more):
    """One of a registry, with its default settings."""
    kind, settings_type = ENTRIES[plural][name]
    return kind(settings_type(), *more)


def restored(state):
    """A state as a checkpoint gives it back: plain values and tensors alone."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def equal(one, other):
    """Whether two states are the same to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# Settings


@pytest.mark.parametrize("plural", ENTRIES)
def test_declared_keys_are_whole_and_their_defaults_are_allowed(plural):
    for _, settings_type in ENTRIES[plural].values():
        for setting in settings_of(settings_type).values():
            key = Key.of(setting)
            assert key.types and key.sentence.endswith("."), key.name
            key.check(setting.default)
            if key.rule:
                with pytest.raises(InputError, match=key.name):
                    key.check("no such value" if str in key.types or list in key.types else -1e9)


# Codecs

FLOATS = st.one_of(st.floats(-1e4, 1e4, width=32), st.just(0.0), st.floats(-(2.0**-20), 2.0**-20, width=32))
ARRAYS = arrays_of.arrays(
    np.float32, arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9), elements=FLOATS
)


@every("codecs")
@settings(max_examples=40)
@given(array=ARRAYS)
def test_a_codec_gives_back_name_shape_and_type_and_loses_no_more_than_it_says(name, array):
    codec = built("codecs", name)
    parts = codec.encode(array, 0)
    if parts is None:
        return
    assert {part: value.dtype for part, value in parts.items()} == {p: np.dtype(t) for p, t in codec.parts.items()}
    assert codec.shape_of(parts) == array.shape
    back = codec.checked(parts, array.size)
    assert (back.shape, back.dtype) == (array.shape, np.float32)
    lost = float(np.linalg.norm(back.astype(np.float64) - array))
    assert lost <= codec.error_bound(array) * (1 + 1e-6) + 1e-30
    assert not codec.lossless or np.array_equal(back.view(np.uint32), array.view(np.uint32))


@every("codecs")
def test_a_codec_makes_fewer_bytes_of_a_table_and_the_stack_gives_it_back(name):
    table = np.zeros((60, 40), np.float32)
    table[::3] = np.random.default_rng(0).normal(size=(20, 40)) / 50
    stack = CodecStack((built("codecs", name),))
    schema = Schema("x", {"table": ArraySpec(table.shape), "counts": ArraySpec((3,), np.int32)})
    counts = np.arange(3, dtype=np.int32)
    sent = Message("x", 0, 0, stack.encode({"table": table, "counts": counts}, 0))
    assert len(sent.to_bytes()) < len(Message("x", 0, 0, {"table": table, "counts": counts}).to_bytes())
    back = decoded(Message.from_bytes(sent.to_bytes()), stack, schema).arrays
    assert back.keys() == {"table", "counts"} and np.array_equal(back["counts"], counts)
    check_arrays(back, schema)


@every("codecs")
@settings(max_examples=60)
@given(data=st.data())
def test_a_codec_refuses_rubbish_and_makes_no_room_for_it(name, data):
    codec = built("codecs", name)
    stack, schema = CodecStack((codec,)), Schema("x", {"table": ArraySpec((6, 4))})
    whole = codec.encode(np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32) / 100, 0)
    parts = dict(whole)
    for part in data.draw(st.sets(st.sampled_from(sorted(parts)))):
        how = data.draw(st.sampled_from(["cut", "gone", "other", "huge"]))
        if how == "gone":
            del parts[part]
        elif how == "cut":
            parts[part] = parts[part].reshape(-1)[: parts[part].size // 2]
        elif how == "huge" and parts[part].dtype.kind in "iu":
            parts[part] = np.full_like(parts[part], np.iinfo(parts[part].dtype).max)
        else:
            parts[part] = data.draw(arrays_of.arrays(parts[part].dtype, arrays_of.array_shapes(max_side=5)))
    message = Message("x", 0, 0, {f"table|0.{part}": np.asarray(value) for part, value in parts.items()})
    tracemalloc.start()
    try:
        with suppress(MessageError):
            back = decoded(message, stack, schema)
            check_arrays(back.arrays, schema)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# Aggregations


def knowledge_of_clients(clients=6, labels=3):
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(0, 4, (clients, labels), generator=generator)
    counts[0], counts[1] = 2, 3
    return torch.randn(clients, labels, labels, generator=generator) * (counts > 0).unsqueeze(-1), counts


@every("aggregations")
def test_an_aggregation_cares_for_who_says_what_and_not_for_their_order(name):
    how, (means, counts) = built("aggregations", name), knowledge_of_clients()
    teachers = how.teachers(means, counts)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(how.teachers(means[order], counts[order]), teachers[order])
    assert teachers.shape == means.shape and torch.isfinite(teachers).all()


@every("aggregations")
def test_an_aggregation_gives_back_what_everybody_says_alike_and_nothing_of_ones_own(name):
    how, (means, counts) = built("aggregations", name), knowledge_of_clients()
    counts = counts + 1
    alike = means[:1].expand_as(means)
    torch.testing.assert_close(how.teachers(alike, counts).float(), alike)
    if name != "attentive":  # whose weights are one's own likeness to the others
        changed = means.clone()
        changed[2] += 100
        torch.testing.assert_close(how.teachers(changed, counts)[2], how.teachers(means, counts)[2])


@every("aggregations")
def test_an_aggregation_is_additive_where_it_says_so(name):
    how, (_, counts) = built("aggregations", name), knowledge_of_clients()
    assert how.additive == hasattr(how, "weights")
    if how.additive:
        weights = how.weights(counts)
        assert (weights >= 0).all() and ((weights > 0) == (counts > 0)).all()
        assert torch.equal(how.weights(counts[2]), weights[2])
        assert torch.equal(weights.to(how.weight_type).double(), weights)


# Stages


def said(strength=1.0, sender=2):
    generator = np.random.default_rng(3)
    arrays = {"table": (strength * generator.normal(size=(9, 5))).astype(np.float32), "n": np.arange(4, dtype=np.int32)}
    return Message("knowledge", 1, sender, arrays, Training(7, 7, 1.5))


SAID = Schema("knowledge", {"table": ArraySpec((9, 5)), "n": ArraySpec((4,), np.int32)})


def stage_of(name):
    return Encoding(CodecStack.of(["int8"], {}), feedback=True) if name == "codecs" else built("stages", name)


@every("stages")
def test_a_stage_keeps_the_header_and_the_other_end_knows_what_came(name):
    here, there, message = stage_of(name), stage_of(name), said()
    wire = Message.from_bytes(here.encode(message).to_bytes())
    assert (wire.kind, wire.round, wire.sender, wire.training) == ("knowledge", 1, 2, message.training)
    known = here.schema_behind(SAID)
    if known is not None:
        check_arrays(wire.arrays, known)
    back = there.decode(wire, SAID)
    check_arrays(back.arrays, SAID)
    assert not any(np.shares_memory(array, message.arrays[key]) and (array != message.arrays[key]).any()
                   for key, array in wire.arrays.items() if key in message.arrays)  # fmt: skip


@every("stages")
def test_a_stage_that_goes_on_says_what_one_that_was_never_stopped_says(name):
    whole, stopped = stage_of(name), stage_of(name)
    for index in range(2):
        whole.encode(said(index + 1.0))
        stopped.encode(said(index + 1.0))
    resumed = stage_of(name)
    resumed.load_state_dict(restored(stopped.state_dict()))
    assert resumed.encode(said(0.3)).to_bytes() == whole.encode(said(0.3)).to_bytes()


@every("stages")
def test_a_stage_refuses_what_it_never_makes_in_its_own_words(name):
    stage, wire = stage_of(name), stage_of(name).encode(said())
    for changed in (
        {key: array.reshape(-1)[:1] for key, array in wire.arrays.items()},
        {**wire.arrays, "more": np.zeros(3, np.float32)},
        {},
    ):
        with pytest.raises(MessageError):
            check_arrays(stage.decode(replace(wire, arrays=changed), SAID).arrays, SAID)


# Partitions

ARGUMENTS = ["", ":group", ":0.5"]


def user_base(users=40):
    generator = np.random.default_rng(4)
    groups = {"group": generator.permutation(np.arange(users) % 5)}
    return UserBase(generator.integers(0, 6, size=(users, 3)), groups, client_num=7)


def dealt(name, seed, users=40):
    function, settings_type = ENTRIES["partitions"][name]
    own = [settings_type()] if settings_of(settings_type) else []
    for argument in ARGUMENTS:
        with suppress(InputError):
            return function(user_base(users), argument[1:] or None, np.random.default_rng(seed), *own)
    raise AssertionError(f"partition {name} takes none of {ARGUMENTS}")


@every("partitions")
@pytest.mark.parametrize("seed", [0, 1])
def test_every_user_lives_on_one_client_and_the_same_seed_deals_alike(name, seed):
    clients = dealt(name, seed)
    assert clients.shape == (40,) and clients.dtype.kind == "i"
    assert set(clients.tolist()) == set(range(int(clients.max()) + 1))
    assert np.array_equal(clients, dealt(name, seed))


# Kinds of knowledge

SIZES = Sizes(clients=3, labels=3, items=8, hidden=4)


def answers(knowledge, count=3):
    """Uploads of a few clients: of what a network says of them, or what the schema asks for."""
    generator = torch.Generator().manual_seed(5)
    for client in range(count):
        later = [] if knowledge.of_network else knowledge.settings.stages[1:]  # a round each
        if knowledge.of_network:
            arrays = knowledge.upload(knowledge.collect(step_of(generator)), True)
        else:
            arrays = {
                key: (torch.rand(spec.shape, generator=generator).numpy() * 4).astype(spec.dtype)
                for key, spec in knowledge.upload_arrays().items()
                if key not in later
            }
        yield Message("knowledge", 0, client, arrays)


def step_of(generator, size=12):
    labels = torch.arange(size) % SIZES.labels
    items = torch.randint(1, SIZES.items, (size,), generator=generator)
    logits, hidden = (torch.randn(size, width, generator=generator) for width in (SIZES.labels, SIZES.hidden))
    return Step(torch.zeros(()), size, logits, labels, items, hidden=hidden)


def folded(knowledge, messages):
    fold = knowledge.empty({})
    for message in messages:
        fold.add(message)
    return fold


@every("knowledge")
def test_knowledge_sends_what_its_schema_says_and_is_told_what_its_schema_says(name):
    knowledge = built("knowledge", name, SIZES)
    schema = Schema("knowledge", knowledge.upload_arrays())
    messages = list(answers(knowledge))
    for message in messages:
        check_arrays(Message.from_bytes(message.to_bytes()).arrays, schema)
    state = knowledge.step({}, folded(knowledge, messages).finish())
    assert equal(restored(state), state)
    downs = [knowledge.download(state, client, 1) for client in range(3)]
    for down in downs:
        check_arrays(down, Schema("teacher", knowledge.download_arrays()))
    alike = all(down.keys() == downs[0].keys() for down in downs) and all(
        np.array_equal(down[key], downs[0][key]) for down in downs for key in down
    )
    assert alike or not knowledge.same_for_all


@every("knowledge")
def test_knowledge_of_many_is_that_of_each(name):
    knowledge = built("knowledge", name, SIZES)
    if not knowledge.of_network:
        pytest.skip("no network is asked")
    step = step_of(torch.Generator().manual_seed(6), 30)
    clients = torch.arange(30) % 4
    many = knowledge.collect_of_many(step, clients, 4)
    for client in range(4):
        for key, value in knowledge.collect(step.select(clients == client)).items():
            torch.testing.assert_close(many[key][client].to(value.dtype), value)


@every("knowledge")
def test_knowledge_folds_alike_in_any_order_and_in_parts_and_as_a_sum_where_it_is_additive(name):
    knowledge = built("knowledge", name, SIZES)
    messages = list(answers(knowledge))
    expected = folded(knowledge, messages).finish()
    ways = [folded(knowledge, order).finish() for order in itertools.permutations(messages)]
    parts = folded(knowledge, messages[:1])
    parts.merge(folded(knowledge, messages[1:]))
    ways.append(parts.finish())
    if knowledge.needs_each is None:
        one, other, third = messages
        total = replace(one, arrays={key: one.arrays[key] + other.arrays[key] for key in one.arrays})
        ways.append(folded(knowledge, [total, third]).finish())
    for found in ways:
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if value.dtype != torch.bool:  # who has spoken is in the header, not in the sums
                torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


# Strategies


@pytest.fixture(scope="module")
def prepared_data(tmp_path_factory):
    folder = write_dataset(tmp_path_factory.mktemp("contracts"), users=12, items=10, rows=7)
    config = FedKDConfig("AttnFedKD", "tiny", config_dict={**SMALL, "data_path": str(folder), "client_num": 4})
    return folder, _prepare_data(config)


# Strategies that do not run over the attentive model, with one that they run over.
MODELS = {"sums": "FoldIn"}


@pytest.fixture
def engine_of(prepared_data):
    def build(name, **keys):
        folder, data = prepared_data
        keys = {**SMALL, "data_path": str(folder), "client_num": 4, "strategy": name, **keys}
        config = FedKDConfig(MODELS.get(name, "AttnFedKD"), "tiny", config_dict=keys)
        return _prepare_trainer(config, data)

    with registered(ENTRIES):
        yield build


def uploads(engine, index):
    """What every client says in a round that the server has not folded yet."""
    told = {}
    for client in engine.clients:
        client.receive(engine.server.send(client.number, index))
        client.train(index)
        told[client.number] = client.send(index)
    return told


def assert_taken_alike_at_once(engine, messages, one_by_one):
    """All messages of a round in one go come to the same bits; not one of them does where one is wrong."""
    intake, first = engine.server.intake(0, engine.samples), next(iter(messages[0].arrays))
    together = {name: np.stack([message.arrays[name] for message in messages]) for name in messages[0].arrays}
    beyond = together[first].copy()
    beyond[-1] = np.nan if beyond.dtype.kind == "f" else -1
    for wrong in ({**together, first: beyond}, {**together, "more": np.zeros(len(messages))}):
        assert not intake.add_many(messages[0].kind, engine.samples, wrong) and not intake.answered
    assert not intake.add_many("nonsense", engine.samples, together)
    if intake.add_many(messages[0].kind, engine.samples, together):
        torch.testing.assert_close(intake.fold.finish(), one_by_one.fold.finish(), rtol=0, atol=0)
        assert intake.answered == one_by_one.answered
        assert not intake.add_many(messages[0].kind, engine.samples, together)


@every("strategies")
def test_a_strategys_messages_are_taken_from_their_sender_of_their_round_and_kind_alone(engine_of, name):
    engine = engine_of(name).engine
    payloads = uploads(engine, 0)
    samples = engine.samples
    intake = engine.server.intake(0, samples)
    if not payloads[1]:
        assert engine.server.strategy.needs_each is None  # it says nothing at all
        return
    assert engine.server.link.schema is not None, f"upload_schema of '{name}' does not say what arrives"
    message = Message.from_bytes(payloads[1])
    first = next(iter(message.arrays))
    for spoiled in (
        replace(message, sender=2),
        replace(message, round=5),
        replace(message, kind="nonsense"),
        *([] if engine.server.link.schema.may_be_silent else [replace(message, arrays={})]),
        replace(message, arrays={**message.arrays, first: message.arrays[first].astype(np.float64)}),
        replace(message, arrays={**message.arrays, "more": np.zeros(2, np.float32)}),
    ):
        with pytest.raises(MessageError):
            intake.add(1, spoiled.to_bytes())
    with pytest.raises(MessageError):
        intake.add(1, payloads[1][:-3])
    messages = [intake.add(number, payload) for number, payload in payloads.items()]
    assert_taken_alike_at_once(engine, messages, intake)
    intake.finish()


@every("strategies")
def test_a_strategy_goes_on_from_a_state_as_if_it_had_never_stopped(engine_of, name):
    whole, stopped = engine_of(name), engine_of(name)
    for trainer in (whole, stopped):
        trainer.engine.run_round(0)
    resumed = engine_of(name)
    resumed.model.load_state_dict(restored(stopped.model.state_dict()))
    resumed.engine.load_state_dict(restored(stopped.engine.state_dict()))
    reports = [trainer.engine.run_round(1) for trainer in (whole, resumed)]
    assert reports[0] == reports[1]
    assert equal(resumed.engine.state_dict(), whole.engine.state_dict())
    assert equal(resumed.model.state_dict(), whole.model.state_dict())


@every("strategies")
def test_a_strategy_that_needs_sums_alone_takes_the_sum_of_two_clients_for_both(engine_of, name):
    engine = engine_of(name).engine
    strategy, state = engine.server.strategy, engine.server.state
    payloads = uploads(engine, 0)
    if strategy.needs_each is not None or not payloads[0]:
        return
    messages = [Message.from_bytes(payload) for payload in payloads.values()]
    sizes = {message.sender: message.training.samples for message in messages}

    def step_after(told):
        fold = strategy.empty(state, sizes)
        for message in told:
            fold.add(message)
        return strategy.step(state, fold.finish())

    one, other, *rest = messages
    samples = one.training.samples + other.training.samples
    shares = [message.training.samples / samples for message in (one, other)] if strategy.shares_parameters else [1, 1]
    total = {
        key: (shares[0] * one.arrays[key] + shares[1] * other.arrays[key]).astype(one.arrays[key].dtype)
        for key in one.arrays
    }
    both = replace(one, arrays=total, training=one.training._replace(samples=samples))
    expected, found = step_after(messages), step_after([both, *rest])
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"strategy": "afd", "aggregation": "attentive"}, "aggregation=attentive"),
        ({"strategy": "afd", "aggregation": "median"}, "aggregation=median"),
        ({"strategy": "afd", "aggregation": "trimmed_mean"}, "aggregation=trimmed_mean"),
        ({"strategy": "fedavg", "row_mean": "changed"}, "row_mean=changed"),
        ({"strategy": "afd", "clients_per_round": 2}, "clients_per_round"),
        ({"strategy": "afd"}, None),
        ({"strategy": "afd", "aggregation": "weighted"}, None),
        ({"strategy": "afd", "knowledge": "item"}, None),
        ({"strategy": "fd", "aggregation": "median"}, "aggregation=median"),
        ({"strategy": "fd"}, None),
        ({"strategy": "fedavg"}, None),
        ({"strategy": "local"}, None),
    ],
)
def test_what_needs_every_clients_own_upload_is_refused_in_one_sentence(engine_of, keys, reason):
    strategy = engine_of(keys.pop("strategy"), **keys).engine.server.strategy
    if reason is None:
        check_additive(strategy, "secure_aggregation")
        return
    with pytest.raises(InputError) as refused:
        check_additive(strategy, "secure_aggregation")
    told = str(refused.value)
    assert told.startswith("secure_aggregation ") and reason in told and "\n" not in told and math.isfinite(len(told))
