"""RecBole's models that learn without gradients, against a slow count by hand at several batch sizes and label modes."""

from collections import Counter

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import Pop as RecBolePop

from recbole_fedkd import load_data_and_model
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.errors import InputError
from recbole_fedkd.model.without_gradients import uniform_of_pairs
from recbole_fedkd.quick_start import _prepare, build_trainer

SMALL = {"ItemKNN": {"k": 7}, "AsymKNN": {"k": 7}, "NCEPLRec": {"rank": 3}, "SLIMElastic": {"alpha": 0.02}}
MODELS = ["Pop", "Random", "ItemKNN", "AsymKNN", "EASE", "SLIMElastic", "NCEPLRec", "ADMMSLIM"]
RANKED = {"metrics": ["NDCG", "AUC"], "valid_metric": "NDCG@10"}
LABEL_MODES = {
    "None": {},
    "implicit": {"label_mode": "implicit", **RANKED},
    "threshold": {"label_mode": "threshold", "rating_threshold": 3, **RANKED},
}


@pytest.fixture(scope="module")
def repeated_path(tmp_path_factory):
    """A dataset in which users come back to items, and one item is everybody's favourite."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "again").mkdir()
    generator = np.random.default_rng(7)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for number in range(400):
        user, item = generator.integers(12), int(generator.geometric(0.15)) % 20
        lines.append(f"u{user}\ti{item}\t{generator.integers(1, 6)}\t{number}")
    (folder / "again" / "again.inter").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def trained(repeated_path):
    def train(model, **keys):
        given = {"data_path": str(repeated_path), "show_progress": False, "state": "ERROR", **SMALL.get(model, {})}
        config = FedKDConfig(model, "again", config_dict={**given, **keys})
        trainer, loaders, evaluations = _prepare(config)
        trainer.fit(loaders[0], evaluations[0], saved=False)
        return trainer.model.eval(), loaders[0]._dataset

    return train


def pairs(dataset):
    feat = dataset.inter_feat
    return list(zip(feat[dataset.uid_field].tolist(), feat[dataset.iid_field].tolist(), strict=True))


def counts(dataset):
    """Interactions of every user and item, row by row."""
    matrix = np.zeros((dataset.user_num, dataset.item_num))
    for user, item in pairs(dataset):
        matrix[user, item] += 1
    return matrix


def scores(model, dataset):
    """Scores ``[users, items]`` of full sort, which RecBole's ranking takes."""
    users = Interaction({dataset.uid_field: torch.arange(dataset.user_num)})
    return model.full_sort_predict(users).view(dataset.user_num, dataset.item_num).double().numpy()


@pytest.mark.parametrize("batch_size", [1, 7, 4096])
@pytest.mark.parametrize("mode", LABEL_MODES)
def test_pop_counts_every_training_interaction_and_nothing_else(trained, mode, batch_size):
    model, dataset = trained("Pop", train_batch_size=batch_size, epochs=3, **LABEL_MODES[mode])
    seen = Counter(item for _, item in pairs(dataset))
    assert max(seen.values()) > 20
    expected = np.array([seen[item] for item in range(dataset.item_num)]) / max(seen.values())
    assert scores(model, dataset) == pytest.approx(np.tile(expected, (dataset.user_num, 1)))
    assert model.item_cnt.sum() == len(dataset.inter_feat)


def test_recboles_class_itself_is_run_as_ours(repeated_path):
    keys = {"data_path": str(repeated_path)}
    assert FedKDConfig(RecBolePop, "again", config_dict=keys).model_class is FedKDConfig("Pop", "again").model_class


@pytest.mark.parametrize("mode", LABEL_MODES)
@pytest.mark.parametrize("model", MODELS)
def test_one_pair_has_one_score(trained, model, mode):
    """``predict`` and ``full_sort_predict`` agree, whatever was judged in between."""
    found, dataset = trained(model, **LABEL_MODES[mode])
    users, items = torch.arange(dataset.user_num), torch.arange(dataset.item_num)
    grid = Interaction(
        {
            dataset.uid_field: users.repeat_interleave(len(items)),
            dataset.iid_field: items.repeat(len(users)),
        }
    )
    first = scores(found, dataset)
    single = found.predict(grid).view(len(users), len(items)).double().numpy()
    assert single == pytest.approx(first, abs=1e-6)
    assert (scores(found, dataset) == first).all()


@pytest.mark.parametrize("mode", ["uni5", "pop5"])
@pytest.mark.parametrize("model", MODELS)
def test_sampled_candidates_are_ranked_whatever_the_precision_of_the_scores(trained, model, mode):
    eval_args = {"split": {"RS": [8, 1, 1]}, "order": "RO", "group_by": "user", "mode": mode}
    trained(model, eval_args=eval_args, metrics=["Hit"], valid_metric="Hit@10")


@pytest.mark.parametrize("model", MODELS)
def test_batch_size_and_epochs_change_no_score(trained, model):
    few, dataset = trained(model, train_batch_size=4096, epochs=1)
    many, _ = trained(model, train_batch_size=9, epochs=4, train_neg_sample_args=None)
    assert (scores(few, dataset) == scores(many, dataset)).all()


@pytest.mark.parametrize("model", MODELS)
def test_federation_over_a_model_without_gradients_is_refused(repeated_path, model):
    with pytest.raises(InputError, match=f"model '{model}' learns nothing by gradient"):
        FedKDConfig(model, "again", config_dict={"data_path": str(repeated_path), "strategy": "fedavg"})


@pytest.mark.parametrize("model", MODELS)
def test_a_loaded_model_gives_the_scores_it_was_judged_by(run, model):
    result = run(model, **SMALL.get(model, {}))
    config, loaded, dataset, _, _, test = load_data_and_model(result["run_folder"])
    assert dict(build_trainer(config, loaded).evaluate(test, load_best_model=False)) == result["test_result"]
    again = load_data_and_model(result["run_folder"])[1]
    assert (scores(loaded.eval(), dataset) == scores(again.eval(), dataset)).all()


@pytest.mark.parametrize("mode", LABEL_MODES)
@pytest.mark.parametrize("shrink", [0.0, 3.7])
def test_itemknn_is_cosine_to_the_k_nearest(trained, mode, shrink):
    model, dataset = trained("ItemKNN", shrink=shrink, **LABEL_MODES[mode])
    matrix = counts(dataset)
    items = dataset.item_num
    expected = np.zeros_like(matrix)
    for item in range(items):
        similar = np.zeros(items)
        for other in range(items):
            if other != item:
                norms = np.linalg.norm(matrix[:, item]) * np.linalg.norm(matrix[:, other])
                similar[other] = matrix[:, item] @ matrix[:, other] / (norms + shrink + 1e-6)
        nearest = np.argsort(-similar)[:7]
        assert similar[nearest[-1]] > np.sort(similar)[-8] or similar[nearest[-1]] == 0  # no tie decides who is near
        for user in range(dataset.user_num):
            expected[user, item] = sum(matrix[user, other] * similar[other] for other in nearest)
    assert scores(model, dataset) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mode", LABEL_MODES)
def test_ease_is_ridge_regression_with_an_empty_diagonal(trained, mode):
    """Column by column: the least squares of an item on all others, with the weights' squares as a penalty."""
    model, dataset = trained("EASE", reg_weight=10.0, **LABEL_MODES[mode])
    matrix = counts(dataset)
    expected = np.zeros_like(matrix)
    for item in range(dataset.item_num):
        others = np.delete(matrix, item, axis=1)
        weights = np.linalg.solve(others.T @ others + 10.0 * np.eye(others.shape[1]), others.T @ matrix[:, item])
        expected[:, item] = others @ weights
    assert scores(model, dataset) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("seed", [0, 2020])
def test_random_scores_of_users_differ_and_are_uniform(trained, seed):
    model, dataset = trained("Random", seed=seed)
    table = scores(model, dataset)
    assert len(np.unique(table)) == table.size
    assert abs(table.mean() - 0.5) < 0.07
    drawn = uniform_of_pairs(torch.arange(300).unsqueeze(1), torch.arange(300), seed).numpy()
    assert np.abs(np.histogram(drawn, bins=10, range=(0, 1))[0] / drawn.size - 0.1).max() < 0.005
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("mode", LABEL_MODES)
def test_slimelastic_solves_its_elastic_net(trained, mode):
    """Per item: non-negative weights of the other items at which no weight alone can lower the penalised error."""
    model, dataset = trained("SLIMElastic", alpha=0.02, l1_ratio=0.3, **LABEL_MODES[mode])
    matrix, weights = counts(dataset), model.item_similarity.toarray()
    assert (weights >= 0).all()
    assert (np.diag(weights) == 0).all()
    assert (weights > 0).any()
    for item in range(dataset.item_num):
        error = matrix[:, item] - matrix @ weights[:, item]
        slope = -matrix.T @ error / len(matrix) + 0.02 * 0.3 + 0.02 * 0.7 * weights[:, item]
        others = np.arange(dataset.item_num) != item
        assert np.abs(slope[(weights[:, item] > 0) & others]).max(initial=0) < 0.03
        assert slope[others].min() > -0.03
    assert scores(model, dataset) == pytest.approx(matrix @ weights, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mode", LABEL_MODES)
def test_nceplrec_projects_the_weighted_interactions(trained, mode):
    """Interactions weighted by rarity, their first singular vectors, and a ridge regression on them."""
    model, dataset = trained("NCEPLRec", rank=3, beta=0.8, reg_weight=5.0, **LABEL_MODES[mode])
    matrix = counts(dataset)
    weighted = np.zeros_like(matrix)
    for user, item in pairs(dataset):
        weighted[user, item] = max(np.log(dataset.user_num / matrix[:, item].sum() ** 0.8), 0)
    _, singular, right = np.linalg.svd(weighted)
    projected = matrix @ (right[:3].T * np.sqrt(singular[:3]))
    ridge = np.linalg.solve(projected.T @ projected + 5.0 * np.eye(3), projected.T @ matrix)
    assert scores(model, dataset) == pytest.approx(projected @ ridge, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("centred", [True, False])
def test_admmslim_alternates_between_regression_and_shrinkage(trained, centred):
    keys = {"lambda1": 3.0, "lambda2": 20.0, "alpha": 0.5, "rho": 40.0, "k": 30, "positive_only": True}
    model, dataset = trained("ADMMSLIM", center_columns=centred, **keys)
    matrix = counts(dataset)
    mean = matrix.mean(axis=0)
    data = matrix - mean if centred else matrix
    gram, count = data.T @ data, dataset.item_num
    inverse = np.linalg.inv(gram + 20.0 * np.diag(mean**0.5) + 40.0 * np.eye(count))
    sparse, dual = np.zeros((count, count)), np.zeros((count, count))
    for _ in range(30):
        free = inverse @ (gram + 40.0 * sparse - dual)
        dense = np.array(
            [[free[i, j] - inverse[i, j] * free[j, j] / inverse[j, j] for j in range(count)] for i in range(count)]
        )
        sparse = np.maximum(dense + dual / 40.0 - 3.0 / 40.0, 0)
        dual += 40.0 * (dense - sparse)
    assert (sparse > 0).any()
    expected = data @ sparse + (mean if centred else 0)
    assert scores(model, dataset) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("mode", LABEL_MODES)
def test_asymknn_of_users_is_asymmetric_cosine_of_the_k_nearest(trained, mode):
    model, dataset = trained("AsymKNN", knn_method="user", k=20, alpha=0.3, beta=0.4, q=1, **LABEL_MODES[mode])
    matrix = counts(dataset)
    rows = matrix.sum(axis=1)
    similar = np.zeros((dataset.user_num, dataset.user_num))
    for user in range(dataset.user_num):
        for other in range(dataset.user_num):
            if other != user:
                similar[user, other] = matrix[user] @ matrix[other] / (rows[user] ** 0.3 * rows[other] ** 0.7 + 1e-6)
    norms = np.outer(np.linalg.norm(similar, axis=1) ** 0.8, np.linalg.norm(matrix, axis=0) ** 1.2) + 1e-6
    assert scores(model, dataset) == pytest.approx(similar @ matrix / norms, rel=1e-3, abs=1e-4)
