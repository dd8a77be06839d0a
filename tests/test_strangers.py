"""Strangers: they change nothing before they come, they know what the server knows, and they are judged like everybody."""

import json

import numpy as np
import pytest
import torch

from recbole_fedkd import load_data_and_model
from recbole_fedkd.data.partition import held_out_clients
from recbole_fedkd.errors import InputError
from recbole_fedkd.quick_start import build_trainer

FEDAVG = {"strategy": "fedavg", "epochs": 2, "metrics": ["MAE"], "valid_metric": "MAE", "client_num": 5}
CLICKS = {"metrics": ["Hit", "NDCG"], "valid_metric": "NDCG@10", "eval_args": {"mode": "uni20"}}


def test_a_share_of_the_clients_is_held_out_at_least_one_and_never_all():
    assert len(held_out_clients(943, 0.1, 1)) == 94 and len(held_out_clients(4, 0.1, 1)) == 1
    assert len(held_out_clients(4, 0.0, 1)) == 0
    assert held_out_clients(50, 0.2, 1).tolist() != held_out_clients(50, 0.2, 2).tolist()
    for clients, share in ((1, 0.1), (2, 0.9)):
        with pytest.raises(InputError, match="leaves none"):
            held_out_clients(clients, share, 1)


@pytest.mark.parametrize("keys", [
    {"strategy": "afd"},
    {"strategy": "afd", "knowledge": "item"},
    {"strategy": "afd", "knowledge": "factors", "epochs": 8},
    {"strategy": "fedkd"},
    {"strategy": "fedgkd"},
    {"strategy": "local"},
    {"codecs": ["row_sparse", "int8"]},
    {"serve_after": "training"},
    {"serve_average": 0.5, "strategy": "afd"},
    {"strategy": "afd", "student_pool": [{"embedding_size": 4}, {"embedding_size": 8}]},
    {"partition": "user"},
    {"model": "MF", "partition": "user", "label_mode": "implicit", **CLICKS},
    {"model": "PFedRec", "partition": "user", "label_mode": "implicit", "private_parameters": ["score.*"], **CLICKS},
    {"model": "BPR", **CLICKS},
    {"model": "DeepFM", "label_mode": "threshold", "metrics": ["AUC"], "valid_metric": "AUC"},
])  # fmt: skip
def test_strangers_are_judged_whatever_the_strategy(run, keys):
    result = run(**{**FEDAVG, "holdout_clients": 0.2, "user_metrics": True, **keys})
    strangers, held_out = result["strangers"], result["partition"]["held_out_clients"]
    clients = result["partition"]["clients"]
    assert strangers["clients"] == len(held_out) == round(0.2 * len(clients))
    assert strangers["users"] == sum(clients[number]["users"] for number in held_out)
    assert strangers["test_result"].keys() == result["test_result"].keys()
    assert np.isfinite(list(strangers["test_result"].values())).all()
    assert set(strangers["user_metrics"]["client"]) <= set(held_out)
    assert not set(result["user_metrics"]["client"]) & set(held_out)
    for record in result["communication"]["clients_per_round"]:
        assert not set(record) & set(held_out)
    assert bool(strangers["bytes_down"]) == (keys.get("strategy") != "local")
    json.dumps(strangers)


def test_what_the_others_learn_owes_nothing_to_the_strangers_rows(run, data_path, tmp_path):
    """Other ratings of a stranger leave the server where it was, and the others' numbers too."""
    source = data_path / "tiny" / "tiny.inter"
    keys = {**FEDAVG, "partition": "user", "holdout_clients": 0.2, "knowledge": "item", "strategy": "afd"}
    before = run(**keys, saved=False)
    stranger = f"u{before['partition']['held_out_clients'][0]}"
    lines = source.read_text().splitlines()
    changed = [line.split("\t") for line in lines]
    for cells in changed[1:]:
        if cells[0] == stranger:
            cells[2] = str(6 - int(cells[2]))
    folder = tmp_path / "changed" / "tiny"
    folder.mkdir(parents=True)
    for name in ("tiny.user", "tiny.item"):
        (folder / name).write_text((data_path / "tiny" / name).read_text())
    (folder / "tiny.inter").write_text("\n".join("\t".join(cells) for cells in changed) + "\n")
    after = run(**keys, saved=False, data_path=str(tmp_path / "changed"))
    assert after["partition"]["held_out_clients"] == before["partition"]["held_out_clients"]
    assert after["test_result"] == before["test_result"]
    assert after["strangers"]["test_result"] != before["strangers"]["test_result"]


def test_a_stranger_keeps_the_servers_network_and_fits_its_own_rows_alone(run, monkeypatch, tmp_path):
    from recbole_fedkd import strangers

    settled = []
    settle = strangers.settle

    def watched(client, server, rounds):
        before = {name: value.clone() for name, value in client.task.network.state_dict().items()}
        told = settle(client, server, rounds)
        settled.append((client, server, before, rounds))
        return told

    monkeypatch.setattr(strangers, "settle", watched)
    keys = {**FEDAVG, **CLICKS, "label_mode": "implicit", "partition": "user", "checkpoint_dir": str(tmp_path)}
    result = run("MF", **{**keys, "holdout_clients": 0.1, "epochs": 3})
    assert len(settled) == 3
    for client, server, before, rounds in settled:
        assert rounds == result["best_round"]
        state = client.task.network.state_dict()
        assert torch.equal(state["item_embedding.weight"], server.state["p:item_embedding.weight"])
        assert not torch.equal(state["user_embedding.weight"], before["user_embedding.weight"])
        assert torch.equal(state["user_embedding.weight"][0], before["user_embedding.weight"][0])


def test_strangers_are_the_same_on_both_engines(run):
    keys = {**FEDAVG, **CLICKS, "label_mode": "implicit", "partition": "user", "holdout_clients": 0.1, "saved": False}
    local, fleet = run("MF", **keys), run("MF", engine="fleet", **keys)
    assert fleet["strangers"]["test_result"] == pytest.approx(local["strangers"]["test_result"], abs=1e-6)
    assert fleet["test_result"] == pytest.approx(local["test_result"], abs=1e-6)


def test_a_run_that_was_stopped_or_is_loaded_again_has_the_same_strangers(run, tmp_path):
    keys = {**FEDAVG, "holdout_clients": 0.3, "knowledge": "factors", "strategy": "afd"}
    whole = run(**{**keys, "epochs": 9}, checkpoint_dir=str(tmp_path / "whole"))
    part = run(**{**keys, "epochs": 4}, checkpoint_dir=str(tmp_path / "part"))
    again = run(**{**keys, "epochs": 9}, checkpoint_dir=str(tmp_path / "part"), resume=part["run_folder"])
    finished = run(**{**keys, "epochs": 9}, checkpoint_dir=str(tmp_path / "part"), resume=again["run_folder"])
    for each in (again, finished):
        assert each["strangers"] == whole["strangers"] and each["test_result"] == whole["test_result"]
    config, model, _, _, _, test = load_data_and_model(whole["run_folder"])
    judged = build_trainer(config, model).evaluate(test, load_best_model=False)
    assert judged["mae"] == pytest.approx(whole["test_result"]["mae"])


@pytest.mark.parametrize(("model", "keys", "sentence"), [
    ("AttnStudent", {"strategy": "central"}, "has no clients"),
    ("Bias", {}, "has no clients"),
    ("AttnFedKD", {"client_num": 1}, "leaves none"),
    ("AttnFedKD", {"clients_per_round": 3, "client_num": 3}, "clients_per_round is 3"),
    ("AttnFedKD", {"holdout_clients": 1.0}, "holdout_clients is 1.0"),
    ("AttnFedKD", {"holdout_clients": -0.1}, "holdout_clients is -0.1"),
])  # fmt: skip
def test_what_cannot_be_held_out_is_refused(run, model, keys, sentence):
    with pytest.raises(InputError, match=sentence):
        base = {"holdout_clients": 0.1, "saved": False, **({} if model != "AttnFedKD" else {"strategy": "fedavg"})}
        run(model, **{**base, **keys})
