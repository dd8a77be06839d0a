"""A class from outside that overrides anything runs alike on both engines, or the fleet says why it does not run it.

Every name of the base classes has a case here, so that none can be added that one engine does not know of.
"""

from dataclasses import replace
from types import FunctionType

import numpy as np
import pytest
import torch
from conftest import SMALL, write_dataset
from test_engines_agree import KEYS, assert_agree

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.engine.base import ClientError
from recbole_fedkd.errors import InputError
from recbole_fedkd.extend import (
    SERVER,
    ArraySpec,
    AttentiveFederatedDistillation,
    FederatedAveraging,
    Knowledge,
    LabelKnowledge,
    Message,
    Schema,
    Strategy,
    register_knowledge,
    register_strategy,
)
from recbole_fedkd.federated.aggregate import WeightedMean
from recbole_fedkd.quick_start import _prepare_data, _prepare_trainer


def scaled(values, factor):
    """What is given with all its numbers that are not whole made larger."""
    if isinstance(values, Message):
        return replace(values, arrays=scaled(values.arrays, factor))
    if isinstance(values, dict):
        return {name: scaled(value, factor) for name, value in values.items()}
    whole = not isinstance(values, float) and str(values.dtype).removeprefix("torch.").startswith(("int", "bool"))
    return values if whole else values * type(values)(factor) if isinstance(values, float) else values * factor


def more(base, method, factor=0.9):
    """The base's own method, whose result is scaled; nothing stays nothing."""

    def overriding(self, *arguments):
        made = getattr(base, method)(self, *arguments)
        return None if made is None else scaled(made, factor)

    return overriding


def same(base, name):
    """The base's own answer, said anew."""
    own = vars(next(each for each in base.__mro__ if name in vars(each)))[name]
    made = getattr(own, "fget", None) or getattr(own, "__func__", own)
    if not isinstance(made, FunctionType):
        return own
    anew = FunctionType(made.__code__, made.__globals__, name, made.__defaults__, made.__closure__)
    return anew if own is made else type(own)(anew)


AVERAGING, EXCHANGE, LABEL = FederatedAveraging, AttentiveFederatedDistillation, LabelKnowledge


def from_all_weights(self, step, received, shared):
    return step.loss + 0.1 * sum(value.pow(2).sum() for value in shared.parameters().values())


def from_all_rows(self, step, received, shared):
    return EXCHANGE.loss(self, step, received, shared) + 3.0 * step.logits.pow(2).sum() / step.size**1.5


def network_of_client(self, result, client, round_index):
    made = scaled(AVERAGING.upload(self, result, client, round_index), 1 + 0.1 * client)
    return scaled(made, 1.1) if result.first else made


def knowledge_of_client(self, result, client, round_index):
    result = replace(result, collected=scaled(result.collected, 1 + 0.1 * client))
    weights = torch.cat([value.flatten() for value in result.shared.parameters().values()])
    return scaled(EXCHANGE.upload(self, result, client, round_index), 1 + float(weights.abs().mean()))


def understood_of(base):
    def understood(self, received, own, fresh):
        made = base.understood(self, received, own, fresh)
        return scaled(made, 0.5 if fresh else 0.9)

    return understood


def told_own(self, state, client, round_index):
    return scaled(AVERAGING.download(self, state, client, round_index), 1 + 0.1 * max(client, 0))


def without_own(self, received, own, fresh):
    return {name: value - 0.1 * own.get(name, 0) for name, value in received.items()}


def by_sender(self, state, samples):
    return WeightedMean(lambda upload: 1.0 + upload.sender, sum(1.0 + client for client in samples))


def mean_of(self, state, uploads):
    arrays = [upload.arrays for upload in uploads]
    return {name: torch.tensor(np.mean([each[name] for each in arrays], 0)) for name in arrays[0]}


def taught(self, step, received, shared):
    return step.loss if step.teacher is None else step.loss + (step.logits - step.teacher).pow(2).mean()


def zeroed(self, task, received, own):
    with torch.no_grad():
        for value in task.network.parameters():
            value.mul_(0.9)


def counted(self, task, received):
    return {"counts": torch.full((5,), 3)}


def nothing(self, *arguments):
    return None


def mixed(method):
    """The base's own, scaled by what is said on the whole: a client's own is none of many clients' at once."""

    def overriding(self, said, *arguments):
        made = getattr(LABEL, method)(self, said, *arguments)
        return scaled(made, 1 / (1 + sum(float(abs(value).sum()) for value in said.values())))

    return overriding


SAYS_NOTHING = {"upload": nothing, "upload_schema": nothing}

STRATEGY = {
    "loss": [(AVERAGING, {"loss": from_all_weights}), (EXCHANGE, {"loss": from_all_rows})],
    "loss and download": [(AVERAGING, {"loss": from_all_weights, "download": more(AVERAGING, "download")})],
    "objective": [(base, {"objective": more(base, "objective", 2.0)}) for base in (AVERAGING, EXCHANGE)],
    "upload": [(AVERAGING, {"upload": network_of_client}), (EXCHANGE, {"upload": knowledge_of_client})],
    "understood": [(base, {"understood": understood_of(base)}) for base in (AVERAGING, EXCHANGE)],
    "audience": [(AVERAGING, {"audience": lambda self, state, client: client, "download": told_own})],
    "same_for_all": [(AVERAGING, {"same_for_all": False, "download": told_own})],
    "download": [(base, {"download": more(base, "download")}) for base in (AVERAGING, EXCHANGE)],
    "remembers_sent": [(AVERAGING, {"remembers_sent": True, "understood": without_own})],
    "serves_aggregate": [(AVERAGING, {"serves_aggregate": False})],
    "shares_parameters": [(AVERAGING, {"shares_parameters": False})],
    "accumulates": [(AVERAGING, {"accumulates": True})],
    "learns": [
        (AVERAGING, {"learns": lambda self, received: False}),
        (EXCHANGE, {"learns": lambda self, received: bool(received)}),
    ],
    "collects": [(EXCHANGE, {"collects": False, **SAYS_NOTHING})],
    "keeps": [(base, {"keeps": False}) for base in (AVERAGING, EXCHANGE)],
    "exchange_rounds": [(AVERAGING, {"exchange_rounds": 1})],
    "installed": [(base, {"installed": more(base, "installed")}) for base in (AVERAGING, EXCHANGE)],
    "statistics": [(EXCHANGE, {"statistics": counted})],
    "taken_in": [(AVERAGING, {"taken_in": zeroed})],
    "initial_state": [(AVERAGING, {"initial_state": more(AVERAGING, "initial_state")})],
    "delivered": [(AVERAGING, {"delivered": more(AVERAGING, "delivered"), "step": more(AVERAGING, "step")})],
    "step": [(base, {"step": more(base, "step")}) for base in (AVERAGING, EXCHANGE)],
    "empty": [(AVERAGING, {"empty": by_sender})],
    "aggregate": [(AVERAGING, {"empty": Strategy.empty, "aggregate": mean_of})],
    "taught_by_received": [(AVERAGING, {"taught_by_received": True, "loss": taught})],
    "exchanges_knowledge": [(EXCHANGE, {"exchanges_knowledge": True, "loss": from_all_rows})],
    "pads": [(base, {"pads": False}) for base in (AVERAGING, EXCHANGE)],
    "adds_nothing": [(AVERAGING, {"adds_nothing": False})],
    "elementwise": [(EXCHANGE, {"elementwise": False})],
}

OF_SERVERS = ["settings_type", "trains_teacher", "distils_on_server", "of", "needs_each", "without_effect", "possible"]
OF_SERVERS += ["upload_schema", "download_schema", "reads_hidden"]
"""What no client does, and what decides which network is trained."""

KNOWLEDGE_METHODS = {
    "collect": {"collect": more(LABEL, "collect", 2.0)},
    "upload": {"upload": mixed("upload")},
    "disguised": {"disguised": lambda self, arrays, client, round_index: scaled(arrays, 1 + 0.1 * client)},
    "understood": {"understood": mixed("understood")},
    "penalty": {"penalty": lambda self, received, step: 3.0 * step.logits.pow(2).sum() / step.size**1.5},
    "teacher": {"teacher": lambda self, received, step: (None, None)},
    "installed": {"installed": more(LABEL, "installed")},
    "learns": {"learns": lambda self, received: bool(received)},
    "statistics": {"statistics": counted},
    "taken_in": {"taken_in": zeroed},
    "keeps": {"keeps": False},
    "accumulates": {"accumulates": True},
    "reads_hidden": {"reads_hidden": True},
    "elementwise": {"elementwise": False},
    "step": {"step": more(LABEL, "step")},
    "download": {"download": more(LABEL, "download")},
    "delivered": {"delivered": more(LABEL, "delivered")},
    "exchange_rounds": {"exchange_rounds": 1},
}
KNOWLEDGE_OF_SERVERS = [
    "settings_type",
    "of_network",
    "of",
    "needs_each",
    "differs_first",
    "without_effect",
    "same_for_all",
]
KNOWLEDGE_OF_SERVERS += ["audience", "upload_arrays", "download_arrays", "empty", "possible", "version", "versions_of"]
KNOWLEDGE_OF_SERVERS += ["collect_of_many", "pads"]


def hooks(base):
    """What a subclass may override."""
    return {name for name in vars(base) if not name.startswith("_")} - {"name", "knowledge"}


def test_every_name_of_the_base_classes_has_a_case():
    assert hooks(Strategy) == {*STRATEGY, *OF_SERVERS} - {"loss and download"}
    assert hooks(Knowledge) == {*KNOWLEDGE_METHODS, *KNOWLEDGE_OF_SERVERS}


def cases():
    """For every name of the base classes what overrides it; those of servers are said anew together."""
    for base in (AVERAGING, EXCHANGE):
        yield "server", (base, {name: same(base, name) for name in OF_SERVERS}, None)
    for hook, overriding in STRATEGY.items():
        yield from ((hook, (base, methods, None)) for base, methods in overriding)
    yield "server", (LABEL, {name: same(LABEL, name) for name in KNOWLEDGE_OF_SERVERS}, "label")
    yield from ((hook, (LABEL, methods, "label")) for hook, methods in KNOWLEDGE_METHODS.items())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = write_dataset(tmp_path_factory.mktemp("outside"), users=12, items=10, rows=7)
    config = FedKDConfig("AttnFedKD", "tiny", config_dict={"data_path": str(folder), **SMALL, **KEYS})
    return folder, _prepare_data(config)


def trainers_of(prepared, **keys):
    """The same federation on both engines, or on what runs in place of the fleet."""
    folder, data = prepared
    keys = {"data_path": str(folder), **SMALL, **KEYS, **keys}
    configs = (FedKDConfig("AttnFedKD", "tiny", config_dict={**keys, "engine": name}) for name in ("local", "fleet"))
    return [_prepare_trainer(config, data) for config in configs]


@pytest.mark.parametrize(
    ("hook", "case"), cases(), ids=lambda value: value if isinstance(value, str) else value[0].name
)
def test_what_overrides_anything_runs_alike_on_both_engines_or_the_fleet_names_it(prepared, forgotten, hook, case):
    base, methods, knowledge = case
    outside = type("Outside", (base,), {"name": "outside", **methods})
    keys = {"strategy": "afd", "knowledge": "outside"} if knowledge else {"strategy": "outside"}
    keys["train_batch_size"] = 20  # clients of 16 to 24 rows fill their last batches up to different sizes
    (register_knowledge if knowledge else register_strategy)(outside)
    local, fleet = trainers_of(prepared, **keys)
    if fleet.engine.name == "fleet":
        assert_agree(local, fleet, 2, lossy=False)
    else:
        assert f"'outside' overrides {hook}" in fleet.fallback


def test_what_overrides_an_objective_is_not_derived_by_hand():
    doubled = type("Doubled", (AVERAGING,), {"objective": more(AVERAGING, "objective", 2.0)})
    assert AVERAGING().adds_nothing and not doubled().adds_nothing


class Levels(Strategy):
    """Clients say how large their weights are, which the others' losses are scaled by."""

    name = "levels"

    def download(self, state, client, round_index):
        return Message("level", round_index, SERVER, {"v": state["v"].numpy()}) if state else None

    def loss(self, step, received, shared):
        return step.loss * (1 + received["v"].mean()) if received else step.loss

    def upload(self, result, client, round_index):
        weights = next(iter(result.shared.parameters().values())).detach()
        return Message("level", round_index, client, {"v": np.array([float(weights.abs().mean()), client], np.float32)})

    def aggregate(self, state, uploads):
        return mean_of(self, state, uploads)


def test_a_strategy_that_says_not_what_arrives_is_refused_by_class_and_method_and_one_that_does_reads_its_network(
    prepared, forgotten
):
    with pytest.raises(InputError, match=r"strategy 'levels' \(.*test_outside.py, Levels\) has no upload_schema"):
        register_strategy(Levels)

    def upload_schema(self, state):
        return Schema("level", {"v": ArraySpec((2,), np.float32)})

    register_strategy(type("Levels", (Levels,), {"upload_schema": upload_schema}))
    assert_agree(*trainers_of(prepared, strategy="levels"), 3, lossy=False)


def test_a_strategy_over_item_factors_that_uploads_by_itself_runs_where_it_is_asked(prepared, forgotten):
    register_strategy(type("Outside", (EXCHANGE,), {"name": "outside", "upload": more(EXCHANGE, "upload")}))
    _, fleet = trainers_of(prepared, strategy="outside", knowledge="factors")
    assert fleet.engine.name == "local" and "'outside' overrides upload" in fleet.fallback


def with_counts(self, shared):
    state = AVERAGING.initial_state(self, shared)
    return {**state, **{f"rounds:{name}": torch.zeros_like(value) for name, value in state.items()}}


def counting(self, state, statistics):
    counts = {name: value for name, value in state.items() if name.startswith("rounds:")}
    shared = {name: value for name, value in state.items() if name not in counts}
    return {**AVERAGING.step(self, shared, statistics), **{name: value + 1 for name, value in counts.items()}}


@pytest.mark.parametrize("download_schema", [AVERAGING.download_schema, Strategy.download_schema], ids=["named", "any"])
@pytest.mark.parametrize("codecs", [[], ["int8"]], ids=["plain", "int8"])
def test_what_the_server_begins_with_and_keeps_to_itself_does_not_travel(prepared, forgotten, codecs, download_schema):
    methods = {"name": "outside", "initial_state": with_counts, "step": counting, "download_schema": download_schema}
    register_strategy(type("Outside", (AVERAGING,), methods))
    local, fleet = trainers_of(prepared, strategy="outside", codecs=codecs)
    assert fleet.engine.name == "fleet"
    assert_agree(local, fleet, 3, lossy=bool(codecs))
    assert all((value == 3).all() for name, value in fleet.engine.server.state.items() if name.startswith("rounds:"))


def branching(self, step, received, shared):
    return step.loss * 2 if step.logits.mean() > 0 else step.loss


def branching_later(self, step, received, shared):
    return step.loss * float(step.logits.abs().mean()) if received else step.loss


def test_a_loss_that_no_many_clients_can_have_at_once_is_left_to_local_with_the_same_result(prepared, forgotten):
    register_strategy(type("Outside", (AVERAGING,), {"name": "outside", "loss": branching}))
    local, fleet = trainers_of(prepared, strategy="outside")
    assert fleet.engine.name == "local"
    assert "the loss of strategy 'outside'" in fleet.fallback and "test_outside.py, line" in fleet.fallback
    assert_agree(local, fleet, 2, lossy=False)


def test_a_loss_that_branches_in_later_rounds_ends_the_run_by_its_line_and_the_engine_that_runs_it(prepared, forgotten):
    register_strategy(type("Outside", (EXCHANGE,), {"name": "outside", "loss": branching_later}))
    _, fleet = trainers_of(prepared, strategy="outside")
    fleet.engine.run_round(0)
    said = r"vmap: .*; engine=local asks one client at a time \(test_outside.py, line"
    with pytest.raises(ClientError, match=said):
        fleet.engine.run_round(1)
