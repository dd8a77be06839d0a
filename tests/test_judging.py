"""Judging: metrics by hand, several protocols in one run, and the rows behind each number."""

import numpy as np
import pytest
import torch
from conftest import write_dataset
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, mean_absolute_error, ndcg_score, roc_auc_score

from recbole_fedkd.data.rows import FullSortLoader
from recbole_fedkd.evaluation import judge
from recbole_fedkd.evaluation.metrics import labelled_ndcg, register_metric


def test_labelled_ndcg_equals_sklearn_user_by_user():
    generator = np.random.default_rng(0)
    users = generator.integers(0, 20, 300)
    labels = generator.integers(1, 6, 300).astype(float)
    scores = generator.normal(size=300).round(1)  # with ties
    expected = [
        ndcg_score([2 ** labels[users == user] - 1], [scores[users == user]], k=5)
        for user in range(20)
        if (users == user).sum() >= 2
    ]
    np.testing.assert_allclose(labelled_ndcg(scores, labels, users, 5), expected)


@given(seed=st.integers(0, 1000), k=st.integers(1, 20))
def test_a_perfect_order_is_worth_one_and_nothing_is_worth_more(seed, k):
    generator = np.random.default_rng(seed)
    users, labels = generator.integers(0, 5, 40), generator.integers(1, 6, 40).astype(float)
    np.testing.assert_allclose(labelled_ndcg(labels, labels, users, k), 1.0)
    assert (labelled_ndcg(generator.normal(size=40), labels, users, k) <= 1 + 1e-12).all()


def test_a_constant_prediction_gets_what_a_random_order_is_worth():
    labels = np.array([5.0, 1.0, 1.0, 3.0])
    users = np.zeros(4, int)
    constant = labelled_ndcg(np.ones(4), labels, users, 4)[0]
    generator = np.random.default_rng(0)
    shuffled = [labelled_ndcg(generator.normal(size=4), labels, users, 4)[0] for _ in range(4000)]
    assert constant == pytest.approx(np.mean(shuffled), abs=0.01)


def test_users_without_an_order_to_judge_are_left_out():
    labels, users = np.array([5.0, 3.0, 1.0, 0.0, 0.0]), np.array([0, 1, 1, 2, 2])
    assert len(labelled_ndcg(labels, labels, users, 3)) == 1


@pytest.fixture
def judged(prepared):
    """Result of an untrained student, and its test rows with distributions, for computing the same by hand."""
    _, trainer, loaders, evaluations = prepared("AttnStudent")
    result = trainer.evaluate(evaluations[1], load_best_model=False)
    rows = loaders[2]._dataset.inter_feat
    with torch.no_grad():
        distribution = trainer.model.eval().predict_distribution(rows).numpy()
    return result, rows, distribution, trainer, evaluations


def test_value_metrics_equal_a_computation_by_hand(judged):
    result, rows, distribution, _, _ = judged
    stars = rows["rating"].numpy()
    values = np.arange(1, 6)
    expected = distribution @ values
    assert result["mae"] == pytest.approx(mean_absolute_error(stars, expected), abs=1e-4)
    assert result["nmae"] == pytest.approx(mean_absolute_error(stars, expected) / 4, abs=1e-4)
    assert result["rmse"] == pytest.approx(np.sqrt(((stars - expected) ** 2).mean()), abs=1e-4)
    assert result["accuracy"] == pytest.approx((values[distribution.argmax(1)] == stars).mean(), abs=1e-4)
    liked = distribution[:, 3:].sum(1)
    assert result["auc"] == pytest.approx(roc_auc_score(stars >= 4, liked), abs=1e-4)
    assert result["logloss"] == pytest.approx(log_loss(stars >= 4, liked.astype(float)), abs=1e-4)


def test_ranking_metrics_equal_a_computation_by_hand(judged, prepared):
    result, rows, _, trainer, _ = judged
    _, _, loaders, _ = prepared("AttnStudent")
    seen = [loader._dataset.inter_feat for loader in loaders[:2]]
    hits, recalls = [], []
    for user in rows["user_id"].unique().tolist():
        own = rows["user_id"] == user
        relevant = set(rows["item_id"][own & (rows["rating"] >= 4)].tolist())
        if not relevant:
            continue
        items = torch.arange(1, 41)
        with torch.no_grad():
            logits = trainer.model.logits(torch.tensor([user]), items[None])[0]
            scores = logits.softmax(-1) @ trainer.model.label_values
        for split in seen:
            scores[split["item_id"][split["user_id"] == user] - 1] = -np.inf
        top = set(items[scores.topk(10).indices].tolist())
        hits.append(bool(top & relevant))
        recalls.append(len(top & relevant) / len(relevant))
    assert result["hit@10"] == pytest.approx(np.mean(hits), abs=1e-4)
    assert result["recall@10"] == pytest.approx(np.mean(recalls), abs=1e-4)


def test_a_disliked_held_out_item_competes_like_any_other(prepared):
    # RecBole's sampler would hide the held-out rows that are not relevant, a hint that no user gives.
    _, _, loaders, evaluations = prepared("AttnStudent")
    (ranking,) = [protocol for protocol in evaluations[1] if not protocol.primary]
    rows = loaders[2]._dataset.inter_feat
    disliked = rows["rating"] < 4
    assert disliked.any()
    hidden = ranking.loader.uid2history_item
    for user, item in zip(rows["user_id"][disliked].tolist(), rows["item_id"][disliked].tolist(), strict=True):
        if hidden[user] is not None:
            assert item not in hidden[user].tolist()


def write_stars(folder, stars):
    """The small dataset with its ratings replaced: five stars become ``stars[4]``, and so on."""
    folder = write_dataset(folder)
    file = folder / "tiny" / "tiny.inter"
    header, *rows = file.read_text().splitlines()
    cells = [row.split("\t") for row in rows]
    rows = ["\t".join([user, item, str(stars[int(rating) - 1]), time]) for user, item, rating, time in cells]
    file.write_text("\n".join([header, *rows]) + "\n")
    return str(folder)


def test_ratings_with_decimals_are_the_labels_they_say(prepared, tmp_path):
    stars = [0.2, 0.4, 0.6, 0.8, 1.0]
    path = write_stars(tmp_path / "data", stars)
    _, _, loaders, _ = prepared("AttnFedKD", data_path=path, rating_threshold=0.8)
    dataset = loaders[0]._dataset
    assert dataset.label_values == stars
    np.testing.assert_allclose(
        np.array(stars)[dataset.label_indices()], dataset.inter_feat["rating"].numpy(), rtol=1e-6
    )


def test_two_rating_values_are_judged_like_the_same_two_labels(prepared, tmp_path):
    path = write_stars(tmp_path / "data", [1, 1, 1, 5, 5])
    _, trainer, _, evaluations = prepared("AttnStudent", data_path=path)
    result = trainer.evaluate(evaluations[1], load_best_model=False)
    assert 0 < result["logloss"] < 3 and 0 <= result["auc"] <= 1


def test_sampled_candidates_rank_while_value_metrics_keep_the_stars(run):
    result = run(epochs=1, eval_args={"mode": "uni5"}, valid_metric="NDCG@10")
    assert result["protocols"]["mae"] == "held-out test rows, ratings in stars"
    assert result["protocols"]["ndcg@10"].startswith("5 uniform negatives")
    assert result["test_result"]["mae"] < 2


def test_validation_and_test_may_have_different_modes(run):
    result = run(epochs=1, eval_args={"mode": {"valid": "labeled", "test": "uni5"}})
    assert result["protocols"]["ndcg@10"].startswith("5 uniform negatives")


@pytest.mark.parametrize("mode", ["full", None])
@pytest.mark.parametrize("valid_metric", ["AUC", "NDCG@10"])
def test_leave_one_out_works_with_implicit_labels(run, mode, valid_metric):
    eval_args = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}
    if mode:
        eval_args["mode"] = mode
    result = run(epochs=1, label_mode="implicit", eval_args=eval_args, valid_metric=valid_metric)
    held_out = "held-out test rows (leave-one-out, the latest of each user)"
    assert result["protocols"]["ndcg@10"] == f"full sort of all items, relevant: {held_out}"


def test_value_metrics_alone_need_no_mode(run):
    assert "rmse" in run(epochs=1, metrics=["MAE", "RMSE"], eval_args={"split": {"RS": [0.7, 0.2, 0.1]}})["test_result"]


def test_no_validation_rows_mean_no_validation(run):
    result = run(epochs=2, eval_args={"split": {"RS": [0.8, 0.0, 0.2]}})
    assert result["best_valid_result"] is None and result["test_result"]["mae"] > 0
    assert result["timing"]["rounds"] == 2


def test_every_number_names_its_protocol(run):
    result = run(epochs=1)
    assert result["protocols"].keys() == result["test_result"].keys()
    assert result["protocols"]["mae"] == "held-out test rows, ratings in stars"
    relevant = "held-out test rows with rating >= 4, three quarters of the scale 1..5"
    assert result["protocols"]["ndcg@10"] == f"full sort of all items, relevant: {relevant}"


def test_one_run_reports_all_kinds_of_metrics(run):
    names = {"accuracy", "mae", "rmse", "nmae", "auc", "logloss", "labelledndcg@10", "ndcg@10", "recall@10", "mrr@10"}
    for mode in ("rating", "threshold", "implicit"):
        result = run(epochs=1, label_mode=mode)["test_result"]
        assert names <= result.keys()
        assert all(isinstance(value, float) and np.isfinite(value) for value in result.values())


@pytest.mark.parametrize("model", ["WideDeep", "NeuMF"])
def test_recboles_own_models_are_judged_by_the_new_metrics_too(run, model):
    metrics = ["AUC", "MAE", "Accuracy", "NMAE", "LabelledNDCG", "NDCG", "Hit", "ItemCoverage", "GiniIndex"]
    result = run(model, epochs=1, label_mode="threshold", metrics=metrics, valid_metric="AUC", topk=[5, 10])
    assert {"auc", "accuracy", "labelledndcg@5", "ndcg@5", "itemcoverage@10", "giniindex@10"} <= result[
        "test_result"
    ].keys()
    assert result["protocols"]["ndcg@5"].endswith("rating >= 4, three quarters of the scale 1..5")


def test_a_ranking_metric_can_decide_early_stopping(run):
    result = run(epochs=1, valid_metric="NDCG@10")
    assert set(result["best_valid_result"]) == {"ndcg@10", "recall@10", "mrr@10", "hit@10"}
    assert "mae" in result["test_result"]


def test_validation_judges_only_what_decides(run):
    result = run(epochs=1)
    assert "mae" in result["best_valid_result"] and "ndcg@10" not in result["best_valid_result"]


def test_a_metric_can_be_added_from_outside(run):
    from recbole.evaluator import register
    from recbole.evaluator.base_metric import LossMetric

    @register_metric
    class Bias(LossMetric):
        """Mean of predicted minus true."""

        def calculate_metric(self, dataobject):
            predicted, true = self.used_info(dataobject)
            return {"bias": float((predicted - true).mean())}

    try:
        assert np.isfinite(run(epochs=1, metrics=["MAE", "Bias"])["test_result"]["bias"])
    finally:
        for registry in (register.metrics_dict, register.metric_information, register.metric_types):
            del registry["bias"]


def test_a_run_leaves_the_processor_as_it_was(run):
    threads = torch.get_num_threads()
    run(epochs=1, torch_threads=2)
    assert torch.get_num_threads() == threads
    assert float(torch.tensor(1e-40)) * 1.0 != 0.0 and float(torch.tensor(1e-40) * 1.0) != 0.0


def test_the_split_is_the_same_for_every_model(prepared):
    def test_rows(model, **keys):
        _, _, loaders, _ = prepared(model, **keys)
        rows = loaders[2]._dataset.inter_feat
        return sorted(zip(rows["user_id"].tolist(), rows["item_id"].tolist(), strict=True))

    rows = test_rows("AttnFedKD")
    assert rows == test_rows("AttnStudent") == test_rows("WideDeep", label_mode="threshold")


def test_nothing_of_a_trainer_changes_while_a_protocol_judges(prepared, monkeypatch):
    from recbole_fedkd.evaluation import Judge

    config, trainer, _, evaluations = prepared("AttnFedKD", metrics=["MAE", "NDCG"])
    before, seen = dict(vars(trainer)), []
    kept = ("config", "eval_collector", "evaluator", "eval_type")

    def judged(self, *arguments):
        seen.append((self.config, [vars(trainer)[name] is before[name] for name in kept]))
        return original(self, *arguments)

    original = Judge.judged
    monkeypatch.setattr(Judge, "judged", judged)
    trainer.evaluate(evaluations[1], load_best_model=False)
    assert [told is protocol.config for (told, _), protocol in zip(seen, evaluations[1], strict=True)] == [True, True]
    assert all(all(same) for _, same in seen) and trainer.config is config


def test_rows_of_a_client_are_judged_one_after_the_other_and_judged_alike(prepared, monkeypatch):
    _, trainer, _, evaluations = prepared("AttnFedKD", client_num=5)
    with monkeypatch.context() as as_they_come:
        as_they_come.setattr(judge, "bring_together", lambda loader, client_of_user: None)
        expected = trainer.evaluate(evaluations[1], load_best_model=False)
    rows = [protocol.loader._dataset.inter_feat for protocol in evaluations[1].protocols]
    before = [torch.stack([part["user_id"], part["item_id"]]) for part in rows]
    assert trainer.evaluate(evaluations[1], load_best_model=False) == pytest.approx(expected, abs=1e-4)
    for protocol, (users, items) in zip(evaluations[1].protocols, before, strict=True):
        if isinstance(protocol.loader, FullSortLoader):
            found = trainer.model.client_of_user[protocol.loader.ranked_users]
        else:
            judged = protocol.loader._dataset.inter_feat
            found = trainer.model.client_of_user[judged["user_id"]]
            for user in users.unique():
                assert torch.equal(judged["item_id"][judged["user_id"] == user], items[users == user])
        assert (found.diff() >= 0).all() and len(found.unique()) == 5
