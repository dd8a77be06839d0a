"""Floors: their numbers by hand, and what they owe to users and items that nobody knows."""

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_fedkd import load_data_and_model
from recbole_fedkd.errors import InputError


def predict(model, users, items):
    return model.predict(Interaction({"user_id": torch.tensor(users), "item_id": torch.tensor(items)})).double()


def test_bias_is_the_mean_and_two_shrunk_offsets(prepared):
    config, trainer, loaders, _ = prepared("Bias", bias_shrinkage=3.0)
    train = loaders[0]._dataset
    users, items, ratings = (train.inter_feat[name].numpy() for name in ("user_id", "item_id", "rating"))
    mean, user_bias, item_bias = ratings.astype(float).mean(), np.zeros(train.user_num), np.zeros(train.item_num)
    for _ in range(5):
        for item in range(train.item_num):
            own = items == item
            item_bias[item] = (ratings[own] - mean - user_bias[users[own]]).sum() / (own.sum() + 3)
        for user in range(train.user_num):
            own = users == user
            user_bias[user] = (ratings[own] - mean - item_bias[items[own]]).sum() / (own.sum() + 3)
    low, high = config["label_values"] or (train.label_values[0], train.label_values[-1])
    margin = 0.01 * (high - low)
    expected = np.clip(mean + user_bias[users] + item_bias[items], low + margin, high - margin)
    np.testing.assert_allclose(predict(trainer.model, users.tolist(), items.tolist()), expected, atol=2e-3)


@pytest.mark.parametrize("model", ["Bias", "FoldIn", "MFEM"])
def test_a_floor_runs_is_loaded_again_and_knows_nothing_of_cold_users_but_the_items(run, model, tmp_path):
    result = run(model, epochs=3, checkpoint_dir=str(tmp_path), metrics=["Accuracy", "MAE", "NDCG"], valid_metric="MAE")
    assert result["test_result"]["mae"] < 2 and len(result["rounds"]) == 1
    _, loaded, dataset, *_ = load_data_and_model(result["run_folder"])
    # User 0 is padding: it has no row, as a user that came later has none.
    item = int(dataset.inter_feat["item_id"][0])
    cold = float(loaded.predict_distribution(Interaction({"user_id": torch.tensor([0]), "item_id": torch.tensor([item])}))
                 @ loaded.label_values)  # fmt: skip
    assert cold == pytest.approx(float(loaded.score_mean + loaded.item_bias[item]), abs=2e-3)
    assert predict(loaded, [1], [0]) == pytest.approx(float(loaded.score_mean + loaded.user_bias[1]), abs=2e-3)


@pytest.mark.parametrize("model", ["FoldIn", "MFEM"])
def test_vectors_find_tastes_that_biases_cannot_tell(prepared, model):
    _, trainer, loaders, _ = prepared(model, factor_size=2, em_steps=20, vector_shrinkage=0.1, count_shrinkage=0.1)
    floor = trainer.model
    rows = loaders[0]._dataset.inter_feat
    users, items = rows["user_id"], rows["item_id"]
    ratings = rows["rating"].double()
    fitted = floor.means(users, items.unsqueeze(1)).squeeze(1)
    biases = floor.score_mean + floor.user_bias[users] + floor.item_bias[items]
    assert (fitted - ratings).square().mean() < 0.9 * (biases - ratings).square().mean()


def test_floors_refuse_labels_without_ratings_and_strategies(run):
    with pytest.raises(InputError, match="predicts ratings"):
        run("Bias", label_mode="implicit", saved=False)
    with pytest.raises(InputError, match="made of sums"):
        run("Bias", strategy="fedavg", saved=False)


@pytest.mark.parametrize("model", ["Bias", "FoldIn", "MFEM"])
@pytest.mark.parametrize("partition", ["user", "random"])
def test_a_floor_over_clients_is_that_of_one_place(run, model, partition):
    keys = {"sketch_width": 4, "sketch_passes": 2, "factor_size": 3, "em_steps": 2, "metrics": ["MAE", "RMSE"]}
    central = run(model, valid_metric="MAE", **keys)
    clients = run(model, valid_metric="MAE", strategy="sums", partition=partition, **keys)
    stages = {"Bias": 2, "FoldIn": 6, "MFEM": 5}[model]
    assert [bool(each["bytes_up"]) for each in clients["rounds"]] == [True] * stages + [False]
    everybody = torch.arange(1, 31).repeat_interleave(40).tolist(), torch.arange(1, 41).repeat(30).tolist()
    found = [predict(load_data_and_model(each["run_folder"])[1], *everybody) for each in (central, clients)]
    # In one place biases are alternated until they stand still, over clients twice.
    torch.testing.assert_close(found[0], found[1], atol=2e-2 if model == "Bias" else 1e-4, rtol=0)
    assert clients["test_result"]["mae"] == pytest.approx(central["test_result"]["mae"], abs=5e-3)


def test_floors_of_single_clients_know_nothing_of_others(run):
    alone = run("FoldIn", strategy="local", partition="user", metrics=["MAE"], valid_metric="MAE")
    together = run(
        "FoldIn", strategy="sums", partition="user", metrics=["MAE"], valid_metric="MAE", holdout_clients=0.2
    )
    assert alone["communication"]["total_bytes"] == 0 and len(alone["rounds"]) == 1
    assert together["test_result"]["mae"] < alone["test_result"]["mae"]
    assert together["strangers"]["test_result"]["mae"] < 1.2 and together["strangers"]["bytes_down"]


def test_a_floor_that_was_stopped_in_its_exchange_goes_on(run, tmp_path, monkeypatch):
    from recbole_fedkd.trainer import FedKDTrainer

    keys = {"strategy": "sums", "metrics": ["MAE"], "valid_metric": "MAE", "codecs": ["row_sparse", "int8"]}
    whole = run("FoldIn", checkpoint_dir=str(tmp_path / "whole"), **keys)
    kept, stopped = FedKDTrainer._train_once, []

    def stop(self, data, epoch, *rest):
        if epoch == 4 and not stopped:
            stopped.append(self.run_folder)
            raise KeyboardInterrupt
        return kept(self, data, epoch, *rest)

    monkeypatch.setattr(FedKDTrainer, "_train_once", stop)
    with pytest.raises(KeyboardInterrupt):
        run("FoldIn", checkpoint_dir=str(tmp_path / "part"), **keys)
    again = run("FoldIn", checkpoint_dir=str(tmp_path / "part"), resume=str(stopped[0]), **keys)
    assert again["test_result"] == whole["test_result"]
