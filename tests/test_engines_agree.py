"""What one engine does the other does: every entry of the registries, on both, without a test of its own.

``PLUGINS=mine.py pytest tests/test_engines_agree.py`` holds a plugin of yours against it, too.
"""

import os
from itertools import product

import pytest
import torch
from conftest import SMALL, write_dataset
from plugged import NAMED, entries_with, registered

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.optim.server import SERVER_OPTIMIZERS
from recbole_fedkd.quick_start import _prepare_data, _prepare_trainer
from recbole_fedkd.trainer import FedKDTrainer

ENTRIES = entries_with(NAMED)
(STRATEGIES, KNOWLEDGE, AGGREGATIONS, CODECS, STAGES, PARTITIONS, ROBUST_MEANS) = (
    {name: entry for name, (entry, _) in ENTRIES[plural].items()}
    for plural in (
        "strategies",
        "knowledge",
        "aggregations",
        "codecs",
        "stages",
        "partitions",
        "robust means",
    )
)

ARGUMENTS = {"attribute": "attribute:group", "dirichlet": "dirichlet:0.3", "quantity": "quantity:0.5"}
"""Partitions that need an argument, with one."""

KEYS = {"learner": "sgd", "learning_rate": 0.2, "train_batch_size": 16, "client_num": 5, "label_mode": "rating"}
KEYS |= {"factor_size": 3, "sketch_width": 3, "sketch_passes": 2, "em_steps": 1}


def kinds(strategy):
    """Kinds of knowledge that a strategy can exchange; `gram` is that of `sums` alone, `fold_in` runs on `local` alone."""
    return (
        [kind for kind in KNOWLEDGE if kind not in ("gram", "fold_in")]
        if STRATEGIES[strategy].exchanges_knowledge
        else ["label"]
    )


# What trains nothing has no network to batch: `sums` runs on the local engine, see tests/test_gram.py.
LEARNT = [(strategy, knowledge) for strategy in STRATEGIES if strategy != "sums" for knowledge in kinds(strategy)]


def cases():
    """Every strategy and kind of knowledge with every codec and with every partition; with ``AGREE=all`` with every pair."""
    for number, (strategy, knowledge) in enumerate(LEARNT):
        pairs = list(product([None, *CODECS], PARTITIONS))
        if os.environ.get("AGREE") != "all":
            codecs, partitions = [None, *CODECS], list(PARTITIONS)
            turns = range(max(len(codecs), len(partitions)))
            pairs = [(codecs[turn % len(codecs)], partitions[(turn + number) % len(partitions)]) for turn in turns]
        for codec, partition in pairs:
            yield f"{strategy}-{knowledge}-{codec}-{partition}", (strategy, knowledge, codec, partition)


CASES = dict(cases())


@pytest.fixture(autouse=True)
def plugged():
    with registered(ENTRIES):
        yield


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """Data of a partition, prepared once."""
    folder, known = write_dataset(tmp_path_factory.mktemp("agree"), users=12, items=10, rows=7), {}

    def data(config):
        key = config["partition"], config["label_mode"]
        if key not in known:
            known[key] = _prepare_data(config)
        return known[key]

    return folder, data


def trainers(data_of, **keys):
    """The same federation on both engines."""
    folder, data = data_of
    made = []
    for engine in ("local", "fleet"):
        config = FedKDConfig(
            "AttnFedKD", "tiny", config_dict={"data_path": str(folder), **SMALL, **KEYS, **keys, "engine": engine}
        )
        trainer = _prepare_trainer(config, data(config))
        assert isinstance(trainer, FedKDTrainer) and trainer.engine is not None
        if NAMED and trainer.fallback is not None and "overrides" in trainer.fallback:
            pytest.skip(trainer.fallback)  # a plugin that the fleet leaves to the local engine, and says so
        assert trainer.engine.name == engine
        made.append(trainer)
    return made


def apart(found, expected):
    """How far two tensors are apart, as a share of the larger one's norm."""
    difference, whole = (found.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / whole.clamp(min=1e-3))


def assert_agree(local, fleet, rounds, lossy):
    """The same rounds: bytes, loss, the server's state, and what every user is served.

    A codec that drops numbers drops others where rounding turns the balance.
    """
    tolerance = 2e-2 if lossy else 1e-3
    for index in range(rounds):
        one, other = local.engine.run_round(index), fleet.engine.run_round(index)
        assert other.loss == pytest.approx(one.loss, rel=tolerance)
        assert not one.missing and not other.missing
        assert other.codec_error == pytest.approx(one.codec_error, rel=0.1, abs=1e-6)
        for mine, theirs in ((one.bytes_down, other.bytes_down), (one.bytes_up, other.bytes_up)):
            assert theirs.keys() == mine.keys()
            assert sum(theirs.values()) == pytest.approx(sum(mine.values()), rel=tolerance if lossy else 0)
        assert fleet.engine.server.state.keys() == local.engine.server.state.keys()
        for name, value in local.engine.server.state.items():
            assert apart(fleet.engine.server.state[name], value) < tolerance, name
    users = torch.arange(1, len(local.model.client_of_user))
    items = torch.arange(1, local.model.item_num).expand(len(users), -1)
    with torch.no_grad():
        expected, found = (trainer.model.eval().logits(users, items) for trainer in (local, fleet))
    assert apart(found.softmax(-1), expected.softmax(-1)) < tolerance


@pytest.mark.parametrize("case", CASES)
def test_the_fleet_does_what_the_local_engine_does(data_of, case):
    strategy, knowledge, codec, partition = CASES[case]
    keys = {"strategy": strategy, "knowledge": knowledge, "partition": ARGUMENTS.get(partition, partition)}
    keys["codecs"] = [codec] if codec else []
    local, fleet = trainers(data_of, **keys)
    before = local.engine.server.strategy.knowledge.exchange_rounds if STRATEGIES[strategy].exchanges_knowledge else 0
    assert_agree(local, fleet, before + 2, lossy=bool(codec) and not CODECS[codec].lossless)


def one_of_each():
    """What else is registered, one by one, with the keys that have it at work; aggregations with partitions as in `cases`."""
    for number, name in enumerate(AGGREGATIONS):
        for turn, strategy in enumerate(("afd", "fd")):
            partitions = list(PARTITIONS)
            if os.environ.get("AGREE") != "all":
                partitions = ["user", "random", partitions[(number + turn) % len(partitions)]]
            for partition in dict.fromkeys(partitions):
                keys = {"strategy": strategy, "aggregation": name, "trim_ratio": 0.3}
                yield (
                    f"aggregation {name}, {strategy}, {partition}",
                    {**keys, "partition": ARGUMENTS.get(partition, partition)},
                )
    for name in STAGES:
        for strategy in ("afd", "fedavg"):
            yield f"stage {name}, {strategy}", {"strategy": strategy, "stages": ["codecs", name], "clip_norm": 0.5}
    for knowledge in ("item", "prototype"):  # a bound that leaves none of their counts
        yield (
            f"clip, {knowledge}",
            {"strategy": "afd", "knowledge": knowledge, "stages": ["codecs", "clip"], "clip_norm": 0.5},
        )
    for name in ROBUST_MEANS:
        yield f"robust mean {name}", {"strategy": "fedavg", "robust_mean": name, "trim_ratio": 0.3}
        few = {"clients_per_round": 3, "partition": "quantity:0.5"}
        yield f"robust mean {name} of few", {"strategy": "fedavg", "robust_mean": name, "trim_ratio": 0.3, **few}
    for name in SERVER_OPTIMIZERS:
        yield f"server optimizer {name}", {"strategy": "fedavg", "server_optimizer": name, "server_learning_rate": 0.1}


OTHERS = dict(one_of_each())


@pytest.mark.parametrize("case", OTHERS)
def test_and_so_it_is_for_whatever_else_is_registered(data_of, case):
    keys = {"partition": "user", **OTHERS[case]}
    keys["stages"] = list(dict.fromkeys(keys.get("stages", ["codecs"])))
    assert_agree(*trainers(data_of, **keys), rounds=3, lossy=False)


STACKS = [
    ["row_sparse", "int4", "int8", "fp16"],
    ["row_sparse", "sign", "fp16"],
    ["row_sparse", "int8", "fp16"],
    ["row_sparse", "fp16"],
    ["row_sparse", "int8", "int4"],
    ["row_sparse", "top_k"],
    ["row_sparse", "row_sparse", "int8"],
    ["fp16", "row_sparse"],
]


@pytest.mark.parametrize("stack", STACKS, ids=str)
@pytest.mark.parametrize("keys", [{}, {"codec_arrays": {"int4": "[pg]*", "int8": "h*", "fp16": "*"}}], ids=str)
def test_stacks_of_codecs_over_item_factors_say_the_same_to_the_byte(data_of, stack, keys):
    local, fleet = trainers(data_of, strategy="afd", knowledge="factors", partition="user", codecs=stack, **keys)
    for index in range(5):
        one, other = local.engine.run_round(index), fleet.engine.run_round(index)
        assert (other.bytes_up, other.bytes_down) == (one.bytes_up, one.bytes_down)
        for name, value in local.engine.server.state.items():
            assert apart(fleet.engine.server.state[name], value) < 1e-2, name


@pytest.mark.parametrize("codecs", [["int8"], ["row_sparse"], ["row_sparse", "sign"]], ids="-".join)
def test_item_factors_that_codecs_lengthen_are_shortened_again_by_the_server(data_of, codecs):
    keys = {"strategy": "afd", "knowledge": "factors", "partition": "user", "stages": ["clip", "codecs"]}
    local, fleet = trainers(data_of, **keys, clip_norm=0.5, codecs=codecs)
    for index in range(5):
        one, other = local.engine.run_round(index), fleet.engine.run_round(index)
        assert other.bytes_up == one.bytes_up
        for name, value in local.engine.server.state.items():
            assert apart(fleet.engine.server.state[name], value) < 1e-4, name


CHOICES = [
    {"strategy": "fedavg", "serve_average": 0.7},
    {"strategy": "local", "serve_average": 0.7, "clients_per_round": 3},
    {"strategy": "afd", "serve_average": 0.7, "knowledge": "item"},
    {"strategy": "fedgkd", "serve_average": 0.5, "private_parameters": ["backbone.*"], "gamma": 0.5},
    {"strategy": "fedgkd", "clients_per_round": 3, "codecs": ["int8"], "alpha": 0.5},
    {"strategy": "fedavg", "codecs": ["row_sparse", "int8"], "broadcast_codecs": [], "clients_per_round": 2},
    {"strategy": "fedavg", "codecs": [], "broadcast_codecs": ["int8"], "proximal_weight": 0.3},
    # What a codec downwards drops is no change of a client's, and no direction of the server's.
    {"strategy": "fedavg", "codecs": [], "broadcast_codecs": ["int8"], "row_mean": "changed"},
    {"strategy": "fedavg", "codecs": [], "broadcast_codecs": ["sign"], "row_mean": "changed", "clients_per_round": 3},
    {"strategy": "fedavg", "codecs": [], "broadcast_codecs": ["int8"], "server_optimizer": "fedadam", "min_clients": 2},
    {"strategy": "fedavg", "codecs": [], "broadcast_codecs": ["int8"], "robust_mean": "median"},
    {"strategy": "fedavg", "codecs": ["fp16"], "serve_after": "training"},
    # What travels as an update is known before anything has come down, to losses, too.
    {"strategy": "fedavg", "codecs": ["row_sparse"], "serve_after": "training", "proximal_weight": 0.3},
    {"strategy": "fedgkd", "codecs": ["int8"], "serve_after": "training", "proximal_weight": 0.3, "min_clients": 2},
    {
        "strategy": "fedgkd",
        "codecs": ["fp16"],
        "serve_after": "training",
        "proximal_weight": 0.3,
        "clients_per_round": 3,
    },
    {
        "strategy": "fedavg",
        "codecs": ["int8"],
        "error_feedback": False,
        "server_momentum": 0.5,
        "server_optimizer": "fedavgm",
    },
    # At a rate of 1 every number moves by about 1 in a round, and by up to a hundred times what it was off, 0.1 / server_tau:
    # where rounding turns one code of int8 over, nothing is left of the agreement four rounds later. No bound fits that.
    {"strategy": "fedavg", "codecs": ["int8"], "server_optimizer": "fedadam", "server_learning_rate": 0.01},
    {"strategy": "afd", "knowledge": "item", "clients_per_round": 3, "codecs": ["fp16"]},
    {
        "strategy": "afd",
        "knowledge": "item",
        "knowledge_use": "prior",
        "local_epochs": 2,
        "knowledge_pass": "last_epoch",
    },
    {"strategy": "afd", "knowledge": "item", "knowledge_use": "distil", "min_clients": 2},
    {"strategy": "fd", "knowledge": "item", "student_pool": [{"embedding_size": 3}, {"backbone": "mlp"}]},
    {"strategy": "afd", "student_pool": [{"embedding_size": 3}, {}], "codecs": ["fp16"], "serve_average": 0.4},
    {"strategy": "afd", "knowledge": "factors", "serve_average": 0.5, "reg_weight": 0.01},
    {"strategy": "afd", "knowledge": "item", "label_mode": "implicit"},
]


@pytest.mark.parametrize("keys", CHOICES, ids=str)
@pytest.mark.parametrize("partition", ["user", "random"])
def test_every_choice_that_meets_others_is_the_same_on_both(data_of, keys, partition):
    local, fleet = trainers(data_of, partition=partition, **keys)
    assert_agree(local, fleet, 7 if keys.get("knowledge") == "factors" else 4, lossy=bool(keys.get("codecs")))


@pytest.mark.parametrize("codec", ["int8", "sign"])
def test_a_server_compares_networks_with_what_clients_started_from_and_not_with_what_codecs_dropped(data_of, codec):
    keys = {"codecs": [], "broadcast_codecs": [codec], "row_mean": "changed", "server_optimizer": "fedavgm"}
    for trainer in trainers(data_of, strategy="fedavg", partition="user", **keys):
        server, seen = trainer.engine.server, []
        trainer.engine.run_round(0)
        started = {name: torch.tensor(array) for name, array in server.link.reference.items()}
        assert any(not torch.equal(server.state[name], value) for name, value in started.items())
        fold = server.intake(1, dict.fromkeys(range(5), 1)).fold
        step = server.strategy.step
        server.strategy.step = lambda state, mean, step=step, seen=seen: seen.append(state) or step(state, mean)
        trainer.engine.run_round(1)
        for name, value in started.items():
            assert torch.equal(fold.reference[name], value) and torch.equal(seen[0][name], value)


LATE = {"split": {"RS": [0.6, 0.2, 0.2]}, "group_by": None, "order": "TO", "mode": "full"}
"""The last users of the data have held-out rows alone."""


def served(trainer):
    """Label distributions of every user and item, by pairs and as rankings make them."""
    users = torch.arange(1, len(trainer.model.client_of_user))
    items = torch.arange(1, trainer.model.item_num).expand(len(users), -1)
    with torch.no_grad():
        model = trainer.model.eval()
        return model.logits(users, items).softmax(-1), model.rank(users)[:, 1:].softmax(-1)


@pytest.mark.parametrize("serve_average", [0.0, 0.5])
@pytest.mark.parametrize(("strategy", "knowledge"), LEARNT)
def test_users_of_a_client_without_a_training_row_are_served_alike_and_as_the_run_says(
    tmp_path, strategy, knowledge, serve_average
):
    folder = write_dataset(tmp_path, users=12, items=10, rows=7)
    keys = {"strategy": strategy, "knowledge": knowledge, "serve_average": serve_average}
    both = trainers((folder, _prepare_data), partition="user", eval_args=LATE, **keys)
    idle = torch.isin(both[0].model.client_of_user[1:], torch.tensor(both[0].idle_clients))
    assert 3 < int(idle.sum()) < 9 and both[1].idle_clients == both[0].idle_clients
    before = [served(trainer) for trainer in both]
    server = both[0].engine.server.strategy
    assert_agree(*both, rounds=server.exchange_rounds + 2, lossy=False)
    after = [served(trainer) for trainer in both]
    for logits, ranked in after:
        assert apart(ranked, logits) < 1e-4
    for (found, _), (initial, _) in zip(after, before, strict=True):
        assert torch.equal(found[idle], initial[idle]) == (not server.serves_aggregate)


def test_a_client_that_alone_has_rows_leaves_its_users_out_group_by_group_on_both(tmp_path):
    folder = write_dataset(tmp_path, users=12, items=10, rows=7)
    homes = [f"u{user}\t{'ab'[user // 6]}" for user in range(12)]
    (folder / "tiny" / "tiny.user").write_text("\n".join(["user_id:token\tgroup:token", *homes]) + "\n")
    keys = {"eval_args": {**LATE, "split": {"RS": [0.45, 0.2, 0.35]}}, "metrics": ["MAE"], "valid_metric": "MAE"}
    keys |= {"strategy": "afd", "knowledge": "factors", "partition": "attribute:group"}
    both = trainers((folder, _prepare_data), **keys)
    assert [len(trainer.engine.samples) for trainer in both] == [1, 1]
    assert_agree(*both, rounds=both[0].engine.server.strategy.exchange_rounds + 2, lossy=False)


@pytest.mark.parametrize(
    "keys", [{"clients_per_round": 3}, {"holdout_clients": 0.3, "rating_threshold": 2}, {}], ids=str
)
def test_clients_that_sit_out_are_served_by_their_own_tables(tmp_path, keys):
    folder = write_dataset(tmp_path, users=12, items=120, rows=7)  # most items are touched by few
    keys |= {
        "strategy": "fedavg",
        "serve_after": "training",
        "partition": "user",
        "learner": "adam",
        "learning_rate": 0.05,
    }
    local, fleet = trainers((folder, _prepare_data), **keys)
    assert fleet.engine.name == "fleet"
    for trainer in (local, fleet):
        for number in range(4):
            trainer.engine.run_round(number)
    users = torch.arange(1, len(local.model.client_of_user))
    items = torch.arange(1, local.model.item_num).expand(len(users), -1)
    with torch.no_grad():
        expected, found = (trainer.model.eval().logits(users, items) for trainer in (local, fleet))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
