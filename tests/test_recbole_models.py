"""RecBole's own models under our runner: they train, save, load, evaluate and resume, and give stock RecBole's numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

from recbole_fedkd import load_data_and_model, run_recbole_fedkd
from recbole_fedkd.quick_start import build_trainer

QUIET = {"show_progress": False, "state": "WARNING"}

# Stock RecBole 1.2.1 on numpy 1.26, default seed and config, ml-100k, 2 epochs.
STOCK = [
    ("WideDeep", "auc", 0.7496),
    ("DeepFM", "auc", 0.7631),
    ("AutoInt", "auc", 0.763),
    ("LightGCN", "recall@10", 0.1361),
]


@pytest.mark.parametrize(("model", "metric", "value"), STOCK)
def test_our_runner_gives_what_stock_recbole_gives(model, metric, value):
    result = run_recbole_fedkd(model, "ml-100k", config_dict={**QUIET, "epochs": 2, "eval_batch_size": 409600})
    assert result["test_result"][metric] == pytest.approx(value, abs=5e-4)


def test_naming_a_sequential_model_does_not_slow_the_process_down():
    code = (
        "import torch; from recbole_fedkd.config import FedKDConfig; FedKDConfig('DIN', 'ml-100k');"
        "print(torch.is_anomaly_enabled())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "False"


SEQUENTIAL = {"MAX_ITEM_LIST_LENGTH": 4, "label_mode": None}
MODELS = {
    "BPR": {},
    "NeuMF": {},
    "LightGCN": {},
    "Pop": {},
    "EASE": {},
    "WideDeep": {"label_mode": "threshold"},
    "DeepFM": {"label_mode": "threshold"},
    "AutoInt": {"label_mode": "threshold"},
    "DIN": {**SEQUENTIAL, "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni5"}},
    "SASRec": {**SEQUENTIAL, "train_neg_sample_args": None, "n_layers": 1, "hidden_size": 8, "inner_size": 8},
}


@pytest.mark.parametrize("model", MODELS)
def test_recboles_models_train_save_load_and_resume(run, model):
    keys = MODELS[model]
    result = run(model, epochs=2, **keys)
    assert result["test_result"]
    folder = Path(result["run_folder"])
    config, trained, _, _, _, test = load_data_and_model(folder)
    reloaded = build_trainer(config, trained).evaluate(test, load_best_model=False)
    assert dict(reloaded) == result["test_result"]
    resumed = run(model, epochs=3, resume=str(folder), **keys)
    trained_once = model in ("Pop", "EASE")  # one epoch, whatever is asked for
    assert resumed["timing"]["rounds"] == (1 if trained_once else 3)
    assert resumed["timing"]["seconds"][: result["timing"]["rounds"]] == result["timing"]["seconds"]
