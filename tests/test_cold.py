"""Users and items without a training row have the prior, and what is judged of them is told apart; so are flat predictions."""

import logging
import math

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_fedkd.evaluation.rows import JudgedRows

COLD_USERS, COLD_ITEMS = ("c0", "c1"), ("j0", "j1")
FEDAVG = {"strategy": "fedavg", "client_num": 2}


@pytest.fixture
def cold_data(tmp_path):
    """Benchmark files in which two users and two items stand in the test rows alone."""
    folder = tmp_path / "data" / "cold"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(5)
    users, items = [f"u{number}" for number in range(16)], [f"i{number}" for number in range(20)]
    taste = {name: generator.normal() for name in users + items}
    rows = {"train": [], "valid": [], "test": []}
    for user in users:
        chosen = generator.permutation(items)
        for part, own in (("train", chosen[:12]), ("valid", chosen[12:14]), ("test", chosen[14:16])):
            for item in own:
                stars = int(np.clip(round(3 + taste[user] + taste[item]), 1, 5))
                rows[part].append(f"{user}\t{item}\t{stars}\t{len(rows[part])}")
    for user in COLD_USERS:
        rows["test"].append(f"{user}\ti1\t4\t900")
    for item in COLD_ITEMS:
        rows["test"].append(f"u1\t{item}\t2\t901")
    rows["test"].append("c0\tj0\t5\t902")
    for part, lines in rows.items():
        head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
        (folder / f"cold.{part}.inter").write_text("\n".join([head, *lines]) + "\n")
    return str(tmp_path / "data")


@pytest.fixture
def run_cold(cold_data):
    from recbole_fedkd import run_recbole_fedkd

    small = {
        "data_path": cold_data, "benchmark_filename": ["train", "valid", "test"], "embedding_size": 4, "epochs": 2,
        "hidden_sizes": [4, 8], "attention_heads": 2, "history_length": 5, "train_batch_size": 32, "show_progress": False,
        "state": "WARNING", "metrics": ["MAE"], "valid_metric": "MAE", "label_mode": "rating", "learning_rate": 0.01,
    }  # fmt: skip

    def run(model="AttnStudent", **keys):
        return run_recbole_fedkd(model, "cold", None, {**small, **keys})

    return run


def predicted(result, pairs):
    from recbole_fedkd import load_data_and_model

    _, model, dataset, *_ = load_data_and_model(result["run_folder"])
    ids = [
        [dataset.token2id(field, pair[place]) for pair in pairs] for place, field in ((0, "user_id"), (1, "item_id"))
    ]
    with torch.no_grad():
        return model.predict(Interaction({"user_id": torch.tensor(ids[0]), "item_id": torch.tensor(ids[1])}))


@pytest.mark.parametrize(("model", "keys"), [
    ("AttnStudent", {}),
    ("AttnStudent", {"weight_decay": 0.1}),
    ("AttnTeacher", {"attention": False}),
    ("AttnFedKD", FEDAVG),
    ("AttnFedKD", {"strategy": "afd", "engine": "fleet", "partition": "user"}),
    ("AttnFedKD", {"strategy": "fedkd", "client_num": 2, "serve": "both"}),
    ("AttnFedKD", {"strategy": "afd", "knowledge": "factors", "client_num": 2, "epochs": 8}),
    ("MF", {"label_mode": "threshold", "metrics": ["AUC", "MAE"], "valid_metric": "AUC"}),
    ("MF", {**FEDAVG, "label_mode": "threshold", "metrics": ["AUC", "MAE"], "valid_metric": "AUC"}),
    ("PFedRec", {"label_mode": "threshold", "metrics": ["AUC", "MAE"], "valid_metric": "AUC"}),
    ("Bias", {}), ("FoldIn", {}), ("MFEM", {}),
])  # fmt: skip
def test_cold_users_and_items_are_all_alike_and_told_apart(run_cold, model, keys):
    result = run_cold(model, **keys)
    found = predicted(result, [("c0", "i1"), ("c1", "i1"), ("u1", "j0"), ("u1", "j1"), ("c0", "j0"), ("u1", "i1")])
    if keys.get("serve") != "both":  # a teacher is the client's own
        assert float(found[0]) == pytest.approx(float(found[1]), abs=1e-6)
    assert float(found[2]) == pytest.approx(float(found[3]), abs=1e-6)
    cold = result["cold"]
    assert (cold["rows"], cold["user_rows"], cold["item_rows"]) == (5, 3, 3)
    labels = [4, 4, 2, 2, 5] if "label_mode" not in keys else [1, 1, 0, 0, 1]
    expected = np.abs(found[:5].numpy() - labels).mean()
    assert cold["mae"] == pytest.approx(float(expected), abs=1e-5)


def test_warm_users_and_items_keep_what_was_drawn_for_them(prepared):
    """The expected vector of the unknown is written over what they drew, and moves nobody else's draws."""
    from recbole_fedkd.model import network

    kept = network.expect_unknown
    _, trainer, loaders, _ = prepared("AttnStudent")
    try:
        network.expect_unknown = lambda table, known: None
        _, before, _, _ = prepared("AttnStudent")
    finally:
        network.expect_unknown = kept
    known = torch.zeros(loaders[0]._dataset.item_num, dtype=torch.bool)
    known[loaders[0]._dataset.inter_feat["item_id"]] = True
    for name, value in trainer.model.state_dict().items():
        other = before.model.state_dict()[name]
        if name.endswith("field_item_id.weight"):
            assert torch.equal(value[known], other[known]) and not value[~known].any()
        elif name.endswith("field_user_id.weight"):
            assert torch.equal(value[1:], other[1:]) and not value[0].any()
        else:
            assert torch.equal(value, other)


def test_negatives_touch_items_of_clicks_which_are_known_by_that(prepared):
    _, trainer, _, _ = prepared("MF", label_mode="implicit", metrics=["AUC"], valid_metric="AUC")
    assert bool((trainer.model.network.item_embedding.weight != 0).all())


def test_sums_of_judged_rows_by_hand():
    rows = JudgedRows(torch.tensor([False, True, False]), torch.tensor([False, True, True]))
    rows.add(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 5.0]), torch.tensor([1, 2]), torch.tensor([1, 2]))
    rows.add(torch.tensor([[3.5]]), torch.tensor([4.0]), torch.tensor([1]), torch.tensor([0]))
    assert rows.cold_summary() == {"rows": 2, "user_rows": 1, "item_rows": 1, "mae": 0.75}
    found = rows.spread()
    assert found["predictions"] == pytest.approx(math.sqrt(1 / 6)) and not found["flat"]
    assert found["labels"] == pytest.approx(np.std([1, 5, 4]))
    flat = JudgedRows(torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    flat.add(torch.tensor([3.0, 3.01]), torch.tensor([1.0, 5.0]), torch.tensor([1, 1]), torch.tensor([1, 1]))
    assert flat.spread()["flat"] and flat.cold_summary()["mae"] is None


@pytest.mark.parametrize("keys", [
    {"label_mode": "rating"},
    {"label_mode": "threshold", "metrics": ["Accuracy"], "valid_metric": "Accuracy"},
    {"label_mode": "implicit", "metrics": ["AUC"], "valid_metric": "AUC"},
])  # fmt: skip
def test_a_run_that_has_learned_next_to_nothing_says_so(run, keys, caplog):
    base = {"metrics": ["MAE"], "valid_metric": "MAE", "epochs": 1, "saved": False}
    logging.getLogger().addHandler(caplog.handler)  # a run sets up the handlers of its own
    flat = run("AttnStudent", **{**base, **keys, "learning_rate": 1e-9})
    assert flat["spread"]["flat"] and flat["spread"]["predictions"] < 0.1 * flat["spread"]["labels"]
    assert (flat["cold"] is None) == (keys["label_mode"] == "implicit")


def test_rows_without_labels_are_not_judged_for_their_spread(run):
    result = run("BPR", epochs=1, metrics=["Recall"], valid_metric="Recall@10", saved=False)
    assert result["spread"] is None and result["cold"] is None
