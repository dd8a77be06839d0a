"""On a device that is not the processor every method runs, and gives what it gives on the processor."""

from fnmatch import fnmatch

import pandas as pd
import pytest
from conftest import SMALL
from elsewhere import elsewhere

from recbole_fedkd import load, run_recbole_fedkd
from recbole_fedkd.config.files import PROPERTIES

METRICS = {"metrics": ["MAE", "NDCG"], "valid_metric": "MAE", "epochs": 1, "fleet_threads": 1}
ALIKE = {"afd_*", "fd*", "fwd*", "factors_*", "fedpuresvd"}
"""Presets whose parts other cases have."""

PRESETS = [file.stem for file in sorted((PROPERTIES / "preset").glob("*.yaml"))]
WHOLE = {"sketch_passes": 1, "em_steps": 1, "epochs": 6}
"""An exchange of item factors that ends, and rounds after it that train."""
SMALLER = {
    "factors": WHOLE,
    "taught": WHOLE,
    # Of a model that has learned next to nothing rounding decides the ranks.
    "feddf": {"unlabelled_pairs": 64, "learning_rate": 0.02, "epochs": 12},
    "fedrec": {"clients_per_round": 8},
}
CASES = {
    **{
        preset: (None, {"preset": preset, **SMALLER.get(preset, {})})
        for preset in PRESETS
        if not any(fnmatch(preset, alike) for alike in ALIKE)
    },
    **{model: (model, {}) for model in ("FoldIn", "MFEM", "GramEASE", "PureSVD")},
    "BPR": ("BPR", {"metrics": ["NDCG"], "valid_metric": "NDCG@10"}),
    "known features": ("AttnStudent", {"known_features": True}),
    "one user a client": ("AttnFedKD", {"preset": "factors", "partition": "user", "codecs": ["int8"]}),
    "item knowledge": ("AttnFedKD", {"knowledge": "item", "knowledge_use": "both", "clients_per_round": 2}),
    "server optimiser": ("AttnFedKD", {"preset": "fedavg", "server_optimizer": "fedadam", "row_mean": "changed"}),
    "another model": ("WideDeep", {"preset": "fwd"}),
    # As above: sign gives a network of which next to nothing is learned in one round.
    "codecs": (
        "AttnFedKD",
        {"preset": "fedavg", "codecs": ["row_sparse", "sign", "fp16"], "learning_rate": 0.02, "epochs": 12},
    ),
    "strangers": ("AttnFedKD", {"preset": "factors", "holdout_clients": 0.3}),
    **{f"{preset} on local": (None, {"preset": preset, "engine": "local"}) for preset in ("afd", "factors", "fedavg")},
}


@pytest.fixture
def run(data_path):
    def run(model, keys, **more):
        given = {"data_path": str(data_path), **SMALL, **METRICS, "state": "ERROR", "engine": "fleet", **keys}
        return run_recbole_fedkd(model, "tiny", config_dict=given, **more)

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_run_elsewhere_is_that_of_the_processor(case, run, monkeypatch):
    model, keys = CASES[case]
    here = run(model, keys, saved=False)["test_result"]
    with elsewhere(monkeypatch):
        assert run(model, keys, saved=False)["test_result"] == here


@pytest.mark.parametrize("preset", ["factors", "fedavg", "fedease"])
def test_a_run_from_elsewhere_recommends_and_goes_on_there_and_here(preset, run, tmp_path, monkeypatch):
    def answers(folder):
        model = load(folder)
        items = model.recommend(["u1"], 3)["item_id"].tolist()
        model.recommend_for([(items[0], 5.0), (items[1], 2.0)], 3)
        return pd.concat([model.recommend(["u1", "u2"], 3), model.score([("u1", items[0]), ("u2", items[1])])])

    monkeypatch.chdir(tmp_path)
    with elsewhere(monkeypatch):
        folder = run(None, {"preset": preset}, saved=True)["run_folder"]
        there = answers(folder)
        run_recbole_fedkd(config_dict={"resume": folder, "epochs": 2})
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    pd.testing.assert_frame_equal(answers(folder), there)
