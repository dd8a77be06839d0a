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
    with pytest.raises(InputError, match="computed from all data at once"):
        run("Bias", strategy="fedavg", saved=False)
