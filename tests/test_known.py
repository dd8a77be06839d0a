"""Features that a network's own rows say of a pair: nothing leaks, training starts there, and a loaded model has them again."""

import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_fedkd import load_data_and_model
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.fitted import fit_features, fitted
from recbole_fedkd.distillation.exchange import FactorExchange, FactorSettings
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.distillation.features import middles
from recbole_fedkd.errors import InputError
from recbole_fedkd.model import known as of_pairs
from recbole_fedkd.model.compiled import has_compiler
from recbole_fedkd.model.known import KnownPairs
from recbole_fedkd.model.network import Architecture, AttentiveNetwork, FeatureTable

VALUES = torch.tensor([1.0, 2.0, 3.0])
USERS, ITEMS = 40, 15
SETTINGS = FactorSettings(factor_size=3, sketch_width=4, sketch_passes=2, em_steps=2)


def noise_rows() -> tuple[KnownPairs, Rows, torch.Tensor]:
    """Labels without any pattern: whoever predicts them on rows has seen them."""
    generator = torch.Generator().manual_seed(1)
    users, items = torch.nonzero(torch.rand(USERS, ITEMS, generator=generator) < 0.5, as_tuple=True)
    labels = torch.randint(0, 3, (len(users),), generator=generator)
    rows = Rows(users + 1, items, VALUES.double()[labels], USERS + 1, ITEMS)
    return KnownPairs(FactorExchange(SETTINGS, rows, labels, VALUES)), rows, labels


def correlation(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([predicted.float(), labels.float()]))[0, 1])


def test_a_row_that_is_trained_on_is_described_without_its_label():
    known, rows, labels = noise_rows()
    mean, features = known.described(rows.users, rows.items)
    fitted, _ = known.pair_features.users.of_pairs(rows.users, rows.items)
    assert correlation(fitted, labels) > 0.3 > 0.1 > correlation(mean, labels)
    histograms = features[:, 8:].T
    assert all(correlation(column, labels) < 0.15 for column in histograms)


def test_a_pair_that_is_no_row_is_described_by_all_rows():
    known, rows, _ = noise_rows()
    taken = set((rows.users * ITEMS + rows.items).tolist())
    user, item = next((u, i) for u in range(1, 5) for i in range(ITEMS) if u * ITEMS + i not in taken)
    mean, _ = known.described(torch.tensor([user]), torch.tensor([item]))
    expected, _ = known.pair_features.users.of_pairs(torch.tensor([user]), torch.tensor([item]))
    users = known.pair_features.users
    torch.testing.assert_close(mean, middles(expected, users.tables.noise, users.values))


def test_all_items_of_a_user_are_described_as_pairs_by_themselves():
    known, rows, labels = noise_rows()
    twice = [torch.cat([each, each[:50]]) for each in (rows.users, rows.items, rows.values, labels)]
    doubled = KnownPairs(FactorExchange(SETTINGS, Rows(*twice[:3], USERS + 1, ITEMS), twice[3], VALUES))
    for pairs in (known, doubled):
        for user in (0, 1, USERS):
            described = pairs.described(torch.full((ITEMS,), user), torch.arange(ITEMS))
            for all_items, each in zip(pairs.pair_features.of_user(user), described, strict=True):
                torch.testing.assert_close(all_items, each)


@pytest.mark.parametrize("compiles", [True, False])
def test_pairs_that_are_rows_are_found_and_no_others(monkeypatch, compiles):
    monkeypatch.setattr(of_pairs, "has_compiler", lambda: compiles and has_compiler())
    known, rows, _ = noise_rows()
    users, items = torch.cartesian_prod(torch.arange(USERS + 1), torch.arange(ITEMS)).T
    expected = torch.full((USERS + 1, ITEMS), -1)
    expected[rows.users, rows.items] = torch.arange(len(rows.users))
    assert torch.equal(known.pair_features._rows(users, items), expected.flatten())
    nothing = Rows(rows.users[:0], rows.items[:0], rows.values[:0], USERS + 1, ITEMS)
    empty = KnownPairs(FactorExchange(SETTINGS, nothing, rows.items[:0], VALUES))
    assert (empty.pair_features._rows(users, items) == -1).all()


@pytest.mark.parametrize("backbone", ["cnn", "mlp"])
def test_a_network_starts_at_what_is_known(backbone):
    known, _, _ = noise_rows()
    architecture = Architecture(
        labels=3,
        embedding_size=4,
        backbone=backbone,
        hidden_sizes=[6, 8],
        dropout_prob=0.0,
        attention=True,
        attention_heads=2,
        use_user_id=True,
        history_length=0,
        item_prior=False,
        factors=SETTINGS,
    )
    tables = FeatureTable("user_id", USERS + 1, {}, {}), FeatureTable("item_id", ITEMS, {}, {})
    network = AttentiveNetwork(architecture, *tables, None, known=known).eval()
    users, items = torch.tensor([3, 7]), torch.tensor([[1, 2], [3, 4]])
    mean, features = known.described(users.repeat_interleave(2), items.flatten())
    torch.testing.assert_close(network(users, items).flatten(0, 1), known(mean, features))


def test_nobody_and_one_user_are_described_too():
    nobody = torch.zeros(0, dtype=torch.long)
    empty = KnownPairs(FactorExchange(SETTINGS, Rows(nobody, nobody, nobody.double(), 3, ITEMS), nobody, VALUES))
    one = torch.tensor([1, 1])
    alone = KnownPairs(FactorExchange(SETTINGS, Rows(one, one + 1, one.double(), 2, ITEMS), one * 0, VALUES))
    for known in (empty, alone):
        mean, features = known.described(torch.tensor([1]), torch.tensor([2]))
        assert torch.isfinite(mean).all() and torch.isfinite(known(mean, features)).all()


KNOWN = {"known_features": True, "metrics": ["MAE"], "valid_metric": "MAE", "epochs": 2, "factor_size": 3}


@pytest.mark.parametrize(("model", "keys"), [
    ("AttnStudent", {}),
    ("AttnFedKD", {}),
    ("AttnFedKD", {"strategy": "fedavg", "partition": "user"}),
    ("AttnFedKD", {"strategy": "fedkd", "metrics": ["MAE", "NDCG"]}),
    ("AttnFedKD", {"label_mode": "threshold", "metrics": ["AUC"], "valid_metric": "AUC"}),
])  # fmt: skip
def test_a_model_that_is_loaded_knows_the_same(run, tmp_path, model, keys):
    result = run(model, checkpoint_dir=str(tmp_path), **{**KNOWN, **keys})
    _, first, _, *_ = load_data_and_model(result["run_folder"])
    _, again, _, *_ = load_data_and_model(result["run_folder"])
    pairs = Interaction({"user_id": torch.tensor([1, 2, 3]), "item_id": torch.tensor([1, 2, 3])})
    assert torch.equal(first.predict(pairs), again.predict(pairs))


def test_known_features_need_labels(run):
    keys = {**KNOWN, "label_mode": "implicit", "metrics": ["AUC"], "valid_metric": "AUC"}
    with pytest.raises(InputError, match="known_features is made of labels"):
        run("AttnFedKD", saved=False, **keys)


def test_the_fleet_hands_known_features_on_to_the_local_engine(run, caplog):
    run("AttnFedKD", saved=False, engine="fleet", **KNOWN)
    assert "known_features are found client by client" in caplog.text


@pytest.mark.parametrize(("model", "keys", "known"), [
    ("AttnStudent", {}, True),
    ("AttnTeacher", {"label_mode": "threshold"}, True),
    ("AttnStudent", {"label_mode": "implicit"}, False),
    ("AttnStudent", {"known_features": None}, True),
    ("AttnFedKD", {"preset": "afd"}, False),
    ("AttnFedKD", {"preset": "afd", "known_features": True}, True),
    (None, {"preset": "fedavg"}, False),
    (None, {"preset": "central"}, True),
    (None, {"preset": "central", "known_features": False}, False),
])  # fmt: skip
def test_features_are_known_where_labels_are_in_one_place_and_nothing_else_is_said(model, keys, known):
    assert FedKDConfig(model, "ml-100k", config_dict=keys)["known_features"] is known


@pytest.mark.parametrize(("model", "keys", "weight"), [
    ("AttnStudent", {}, 1e-3),
    ("AttnStudent", {"reg_weight": 1e-5}, 1e-5),
    ("AttnStudent", {"known_features": False}, 1e-5),
    ("AttnFedKD", {"preset": "afd", "known_features": True}, 1e-5),
])  # fmt: skip
def test_a_network_on_all_data_is_held_to_what_is_known_and_no_other(model, keys, weight):
    config = FedKDConfig(model, "ml-100k", config_dict=keys)
    fit_features(config, context=False)
    assert config["reg_weight"] == weight


@pytest.mark.parametrize(("rows", "batch", "patience"), [
    (100_000, 1024, 4), (10**6, 1024, 4), (99_999, 1024, 5), (11_000, 128, 37), (1_000, 16, 400), (0, 16, 400_000),
])  # fmt: skip
def test_few_rows_are_seen_in_as_many_steps_and_no_less_patiently(rows, batch, patience):
    assert fitted(1024, 4, rows) == (batch, patience)


def test_training_sizes_that_are_given_are_not_fitted(run):
    keys = {"train_batch_size": 8, "stopping_step": 1, "epochs": 1, "metrics": ["MAE"], "valid_metric": "MAE"}
    given = run("AttnFedKD", saved=False, **keys)["config"]
    assert (given["train_batch_size"], given["stopping_step"]) == (8, 1)


def test_a_run_of_few_rows_goes_on_with_what_was_fitted(run, tmp_path):
    keys = {"metrics": ["MAE"], "valid_metric": "MAE", "epochs": 1, "checkpoint_dir": str(tmp_path)}
    first = run("AttnFedKD", **keys)
    again = run("AttnFedKD", resume=first["run_folder"], epochs=2)
    assert first["config"]["stopping_step"] == again["config"]["stopping_step"] == 667
