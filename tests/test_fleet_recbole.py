"""RecBole's own models on the fleet engine: what the local engine gives, or that engine and one line that says why."""

import json
from pathlib import Path

import pytest
import torch
from engines import assert_same_round
from recbole.data.interaction import Interaction
from recbole.model.general_recommender.bpr import BPR

from recbole_fedkd.checkpoint.reading import read_checkpoint
from recbole_fedkd.engine.fleet.agreement import TOLERANCES, _difference
from recbole_fedkd.engine.fleet.batching import ClientTable, WeightedLoss
from recbole_fedkd.engine.fleet.group import ClientGroup
from recbole_fedkd.federated.client import own_streams
from recbole_fedkd.model.dropout import HandedAttention
from recbole_fedkd.model.population import user_rows
from recbole_fedkd.record import write_record

SAMPLING = {"distribution": "uniform", "sample_num": 2, "alpha": 1.0, "dynamic": False, "candidate_num": 0}
IMPLICIT = {"label_mode": "implicit", "train_neg_sample_args": SAMPLING}
SIZES = {"mf_embedding_size": 4, "mlp_embedding_size": 4, "mlp_hidden_size": [8, 4], "dropout_prob": 0.3}
# Its gradients are so small at first that Adam makes steps of what rounding leaves.
NEUMF = {**IMPLICIT, **SIZES, "learner": "sgd", "learning_rate": 1.0}
CLICKS = {"label_mode": "threshold", "mlp_hidden_size": [8, 4], "dropout_prob": 0.3}


def engines_of(prepared, model, **keys):
    _, local, _, _ = prepared(model, **{"learner": "adam", **keys}, engine="local")
    _, fleet, _, _ = prepared(model, **{"learner": "adam", **keys}, engine="fleet")
    assert (local.engine.name, fleet.engine.name) == ("local", "fleet")
    return local, fleet


def state_of(trainer, client):
    """A client's parameters in the model's own shapes; of the users' rows those of the client's users."""
    model = trainer.model
    members = torch.nonzero(model.client_of_user == client).flatten()
    if trainer.engine.name == "local":
        network = model.networks[client]
        state = dict(network.named_parameters())
        rows = user_rows(network, model.user_field, model.user_num, model.item_num)
        for name, (start, stop) in rows.items():
            table = state[name]
            state[name] = torch.cat([table[:start], table[start:stop][members], table[stop:]])
        return state
    (group,) = model.groups
    pack = group.pack(torch.tensor([client]), torch.arange(group.item_count).unsqueeze(0))
    base = group.base()
    named = {name: value[0] for name, value in group.named(group.weights(pack, base, serving=True)).items()}
    for path, table in group.whole.named_modules():
        name = f"{path}.weight"
        if isinstance(table, ClientTable) and table.of_users:
            named[name] = named[name][1:]
        elif isinstance(table, ClientTable) and table.users is not None:
            rest, own = named[name], named.pop(f"{path}.users")[1:]
            named[name] = torch.cat([rest[: table.start], own, rest[table.start :]])
    return named


def assert_same_rounds(local, fleet, rounds, tolerance=2e-4):
    for index in range(rounds):
        assert_same_round(local, fleet, index, state_of, tolerance)


@pytest.mark.parametrize("partition", ["user", "random"])
@pytest.mark.parametrize(
    ("model", "keys"),
    [("BPR", IMPLICIT), ("NeuMF", NEUMF), ("DeepFM", CLICKS)],
    ids=["BPR", "NeuMF", "DeepFM"],
)
@pytest.mark.parametrize("strategy", ["local", "fedavg"])
def test_a_recbole_model_trains_as_on_the_local_engine(prepared, model, keys, partition, strategy):
    local, fleet = engines_of(prepared, model, **keys, partition=partition, strategy=strategy)
    assert_same_rounds(local, fleet, 2)


@pytest.mark.parametrize("model", ["LR", "FM", "AFM", "FNN", "FwFM", "PNN", "WideDeep", "AutoInt", "FiGNN", "KD_DAGFM"])
def test_every_model_that_passes_trains_as_on_the_local_engine(prepared, model):
    keys = {**CLICKS, "learner": "sgd", "learning_rate": 0.3, "partition": "user", "strategy": "fedavg"}
    local, fleet = engines_of(prepared, model, **keys)
    assert_same_rounds(local, fleet, 1)


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("DeepFM", {**CLICKS, "strategy": "fedavg", "attention": True}),
        ("NeuMF", {**NEUMF, "strategy": "afd", "partition": "user"}),
        ("WideDeep", {**CLICKS, "strategy": "afd", "partition": "random"}),
        ("WideDeep", {**CLICKS, "strategy": "fd", "partition": "user", "knowledge_pass": "last_epoch"}),
        ("BPR", {**IMPLICIT, "strategy": "fedavg", "clients_per_round": 7, "local_epochs": 2, "partition": "user"}),
        ("BPR", {**IMPLICIT, "strategy": "local", "clients_per_round": 7, "partition": "user"}),
        ("NeuMF", {**NEUMF, "strategy": "fedavg", "proximal_weight": 0.5, "partition": "user"}),
        ("NeuMF", {**NEUMF, "strategy": "fedavg", "row_mean": "changed", "client_weights": "uniform"}),
        (
            "NeuMF",
            {**NEUMF, "strategy": "fedavg", "private_parameters": ["predict_layer.*"], "serve_after": "training"},
        ),
        ("DeepFM", {**CLICKS, "strategy": "fedavg", "proximal_weight": 0.5, "row_mean": "changed"}),
        ("DeepFM", {**CLICKS, "strategy": "fedavg", "server_optimizer": "fedadam", "server_learning_rate": 0.01}),
        ("DeepFM", {**CLICKS, "strategy": "fedavg", "learning_rates": {"*table.embedding.weight": 0.2, "*": 0.001}}),
        ("DeepFM", {**CLICKS, "strategy": "local", "reset_optimizer": True, "clip_grad_norm": {"max_norm": 0.05}}),
        ("DeepFM", {**CLICKS, **IMPLICIT, "strategy": "local", "partition": "user", "fleet_memory": 0.01}),
    ],
    ids=str,
)
def test_every_choice_trains_as_on_the_local_engine(prepared, model, keys):
    local, fleet = engines_of(prepared, model, **keys)
    assert_same_rounds(local, fleet, 3)


@pytest.mark.parametrize("strategy", ["local", "fedavg"])
@pytest.mark.parametrize(("model", "keys"), [("BPR", IMPLICIT), ("NeuMF", NEUMF)], ids=["BPR", "NeuMF"])
def test_users_are_judged_as_on_the_local_engine(prepared, model, keys, strategy):
    results = []
    for engine in ("local", "fleet"):
        _, trainer, _, evaluations = prepared(model, **keys, partition="user", strategy=strategy, engine=engine)
        trainer.engine.run_round(0)
        results.append(trainer.evaluate(evaluations[1], load_best_model=False))
    local, fleet = results
    assert fleet.keys() == local.keys() and len(local) > 3
    for name, value in local.items():
        assert fleet[name] == pytest.approx(value, abs=2e-3), name


@pytest.mark.parametrize("strategy", ["local", "fedavg"])
@pytest.mark.parametrize(
    ("model", "keys", "method"),
    [("BPR", IMPLICIT, "full_sort_predict"), ("NeuMF", NEUMF, "predict"), ("DeepFM", CLICKS, "predict")],
    ids=["BPR", "NeuMF", "DeepFM"],
)
def test_scores_are_those_of_the_local_engine(prepared, model, keys, method, strategy):
    local, fleet = engines_of(prepared, model, **keys, strategy=strategy, partition="user")
    dataset = local.engine.clients[0].task._build_loader.args[1]
    users, items = torch.tensor([5, 3, 3, 30, 8]), torch.tensor([1, 9, 39, 4, 12])
    interaction = dataset.join(Interaction({"user_id": users, "item_id": items}))
    found = []
    for trainer in (local, fleet):
        trainer.engine.run_round(0)
        trainer.model.eval()
        found.append(getattr(trainer.model, method)(interaction))
    torch.testing.assert_close(found[1], found[0].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "keys"),
    [("BPR", {**IMPLICIT, "strategy": "local"}), ("NeuMF", {**NEUMF, "strategy": "fedavg", "clients_per_round": 9})],
    ids=["BPR", "NeuMF"],
)
def test_a_fleet_stopped_after_a_round_ends_as_one_never_stopped(run, model, keys):
    keys = {"engine": "fleet", "partition": "user", **keys}
    whole, part = run(model, **keys, epochs=3), run(model, **keys, epochs=1)
    resumed = run(model, **keys, epochs=3, resume=part["run_folder"])
    for key in ("test_result", "best_valid_result", "communication"):
        assert resumed[key] == whole[key]
    first, second = (read_checkpoint(Path(each["run_folder"]) / "last.pth")["state_dict"] for each in (whole, resumed))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


class RegularisedBPR(BPR):
    """BPR with a norm over the batch, which is no mean over its samples."""

    def calculate_loss(self, interaction):
        users, items = self.forward(interaction[self.USER_ID], interaction[self.ITEM_ID])
        return super().calculate_loss(interaction) + 1e-6 * (users.norm() + items.norm())


class DroppingBPR(BPR):
    """BPR that drops parts of its vectors without a layer for it."""

    def get_user_embedding(self, user):
        return torch.nn.functional.dropout(super().get_user_embedding(user), 0.5, self.training)


class WholeTableBPR(BPR):
    """BPR with a norm of its whole table, most of which a client does not hold."""

    def calculate_loss(self, interaction):
        return super().calculate_loss(interaction) + 1e-6 * self.item_embedding.weight.pow(2).sum()


@pytest.mark.parametrize(
    ("model", "keys", "told"),
    [
        (RegularisedBPR, IMPLICIT, "model 'RegularisedBPR' is not the same for many clients at once: its loss"),
        (WholeTableBPR, IMPLICIT, "model 'WholeTableBPR' is not the same for many clients at once: its loss"),
        ("LightGCN", IMPLICIT, "model 'LightGCN' cannot be called"),
        ("DCN", CLICKS, "model 'DCN' cannot be called for many clients at once: it has a batch normalisation"),
        (
            DroppingBPR,
            IMPLICIT,
            "model 'DroppingBPR' cannot be called for many clients at once: it draws random numbers",
        ),
        (
            "SASRec",
            {"train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 4, "n_layers": 1},
            "model 'SASRec' is neither",
        ),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_batched_runs_on_the_local_engine_as_if_never_tried(prepared, caplog, model, keys, told):
    keys = {**keys, "strategy": "fedavg", "learner": "adam"}
    _, local, _, _ = prepared(model, **keys)
    caplog.clear()
    _, trainer, _, _ = prepared(model, **keys, engine="fleet")
    lines = [record.getMessage() for record in caplog.records if "engine fleet cannot run this" in record.getMessage()]
    assert len(lines) == 1 and told in lines[0]
    assert trainer.engine.name == "local"
    assert trainer.engine.run_round(0) == local.engine.run_round(0)
    for one, other in zip(local.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("place", ["pack", "base", "called"])
def test_a_fault_of_the_package_is_not_taken_for_the_models(prepared, monkeypatch, place):
    def broken(*_arguments, **_keys):
        raise KeyError("a fault of our own")

    monkeypatch.setattr(ClientGroup, place, broken)
    with pytest.raises(KeyError, match="a fault of our own"):
        prepared("BPR", **IMPLICIT, strategy="fedavg", learner="adam", engine="fleet")


@pytest.mark.parametrize("fault", [KeyError, AttributeError, TypeError, NameError, AssertionError])
def test_nor_is_one_that_a_model_calls(prepared, monkeypatch, fault):
    where = {"__name__": ClientTable.__module__, "fault": fault}
    exec("def broken(*_arguments): raise fault('a fault of our own')", where)  # a line of that module
    monkeypatch.setattr(ClientTable, "_rows", where["broken"])
    with pytest.raises(fault, match="a fault of our own"):
        prepared("BPR", **IMPLICIT, strategy="fedavg", learner="adam", engine="fleet")


def test_nor_is_a_name_that_it_does_not_have(prepared, monkeypatch):
    monkeypatch.delattr(ClientTable, "_rows")
    with pytest.raises(AttributeError, match="_rows"):
        prepared("BPR", **IMPLICIT, strategy="fedavg", learner="adam", engine="fleet")


class ReadingBPR(BPR):
    """Looks at a number of the batch, which nobody can do for many clients at once."""

    def calculate_loss(self, interaction):
        return super().calculate_loss(interaction) * (1.0 if float(interaction["item_id"].sum()) > 0 else 2.0)


def test_a_result_and_its_record_name_the_engine_that_ran_and_why(run, tmp_path):
    keys = {**IMPLICIT, "strategy": "fedavg", "learner": "adam", "epochs": 1}
    asked = [run("BPR", **keys), run("BPR", **keys, engine="fleet"), run(ReadingBPR, **keys, engine="fleet")]
    assert [result["engine"] for result in asked] == ["local", "fleet", "local"]
    assert [result["engine_fallback"] for result in asked[:2]] == [None, None]
    assert asked[2]["engine_fallback"].startswith("model 'ReadingBPR' cannot be called for many clients at once: ")
    central = run("BPR", **IMPLICIT, epochs=1)
    assert central["engine"] is None and central["engine_fallback"] is None
    write_record(tmp_path / "record.jsonl", tmp_path / "users.npz", {"cell": "one"}, asked[2])
    last = json.loads((tmp_path / "record.jsonl").read_text().splitlines()[-1])
    assert (last["engine"], last["engine_fallback"]) == ("local", asked[2]["engine_fallback"])


def test_the_number_of_threads_changes_no_bit(run):
    keys = {**NEUMF, "engine": "fleet", "partition": "user", "strategy": "afd", "fleet_memory": 0.05, "epochs": 2}
    alone, together = run("NeuMF", **keys, fleet_threads=1), run("NeuMF", **keys, fleet_threads=3)
    assert [each["loss"] for each in together["rounds"]] == [each["loss"] for each in alone["rounds"]]
    assert together["test_result"] == alone["test_result"]


def test_a_sample_that_only_fills_up_moves_no_weighted_loss():
    loss, generator = WeightedLoss(torch.nn.BCEWithLogitsLoss()), torch.Generator().manual_seed(0)
    scores, labels = torch.randn(5, generator=generator), torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores[:3], labels[:3])
    loss.weights = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(loss(scores, labels), expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_attention_that_is_handed_masks_drops_what_torchs_does(batch_first):
    theirs = torch.nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=batch_first)
    ours = HandedAttention(theirs)
    values = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for layer in (theirs, ours):
        with own_streams(3, torch.device("cpu")):
            found.append(layer(values, values, values))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)
    with own_streams(3, torch.device("cpu")):
        shape = (3, 2, 5, 5) if batch_first else (5, 2, 3, 3)
        ours.dropout.handed = [torch.empty(shape).bernoulli_(0.6).div(0.6)]
    torch.testing.assert_close(ours(values, values, values)[0], found[0][0])
    assert not ours.dropout.handed


def test_a_table_of_several_fields_gives_each_row_wherever_a_client_holds_it():
    table = torch.nn.Embedding(9, 2)  # fields of 3, of 4 users and of 2
    local_id = torch.tensor([0, 1, 1, 2])  # of the users' clients
    split = ClientTable(table, (3, 7), local_id)
    index = torch.tensor([[0, 4, 8], [2, 6, 7]])
    assert torch.equal(split(index), table(index))
    # The client holds rows 0, 2, 7 and 8 of the table and users 2 and 3 of the four.
    whole = split.weight, split.users
    with torch.no_grad():
        split.weight = torch.nn.Parameter(table.weight[[0, 2, 7, 8]])
        split.users = torch.nn.Parameter(table.weight[[3, 5, 6]])
    split.handed = torch.tensor([0, 0, 1, 2, 3], dtype=torch.int32)
    held = torch.tensor([[0, 5, 8], [2, 6, 7]])
    assert torch.equal(split(held), table(held))
    assert len(whole[0]) == 5 and len(whole[1]) == 4


def test_what_cancels_out_may_differ_by_rounding_and_what_does_not_may_not():
    tolerance = TOLERANCES[torch.float32]
    said = {"loss": torch.tensor(0.7), "weight": torch.tensor([0.3, 0.0]), "bias": torch.tensor([2e-8])}
    rounded = {**said, "bias": torch.tensor([-3e-8]), "weight": torch.tensor([0.300001, 0.0])}
    assert _difference(said, rounded, tolerance) is None
    assert "gradient of 'weight'" in _difference(said, {**said, "weight": torch.tensor([0.3, 1e-4])}, tolerance)
    assert "its loss" in _difference(said, {**said, "loss": torch.tensor(0.701)}, tolerance)
    assert "gradient of 'bias' cannot" in _difference(said, {"loss": said["loss"], "weight": said["weight"]}, tolerance)
