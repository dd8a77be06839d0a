"""Every metric that is printed, computed by hand on a few users, through the collector and evaluator that runs use."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from recbole.evaluator import metric_types
from recbole.utils import EvaluatorType
from sklearn.metrics import roc_auc_score

from recbole_fedkd import compat
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.errors import TrainingError
from recbole_fedkd.evaluation import LabelCollector, PlainEvaluator
from recbole_fedkd.evaluation.metrics import label_ranks, labelled_ndcg

OUT = -math.inf

compat.apply()  # as every config does before RecBole's metrics run


class Settings(dict):
    """The keys of a config; what is not set is None."""

    def __missing__(self, key):
        return None


def settings(metric, topk, **keys):
    plain = {"metrics": [metric], "topk": topk, "metric_decimal_place": 6, "device": torch.device("cpu")}
    fields = {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LABEL_FIELD": "label"}
    return Settings(plain, eval_args={"mode": {"valid": "full", "test": "full"}}, **fields, **keys)


def ranked(metric, scores, relevant, topk=(3,), counts=None, **keys):
    """One metric of score lists over items 0 (padding) .. n, and the relevant items of each user; user by user in batches."""
    config = settings(metric, list(topk), **keys)
    collector = LabelCollector(config)
    dataset = SimpleNamespace(num=lambda field: len(scores[0]), item_counter=counts or {})
    collector.data_collect(SimpleNamespace(dataset=dataset))
    for batch in (slice(0, 1), slice(1, None)):
        items = relevant[batch]
        rows = torch.tensor([row for row, own in enumerate(items) for _ in own])
        columns = torch.tensor([item for own in items for item in own])
        if items:
            interaction = Interaction({"user_id": torch.arange(len(items))})
            collector.eval_batch_collect(torch.tensor(scores[batch]), interaction, rows, columns)
    return PlainEvaluator(config).evaluate(collector.get_data_struct())


# Items in the order of their scores: 1 2 3 4 5, 6 5 4 3 2 1, 6 5 and 2 3 4 5 6; what users know is masked.
SCORES = [
    [OUT, 0.9, 0.8, 0.7, 0.6, 0.5, OUT],
    [OUT, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    [OUT, OUT, OUT, OUT, OUT, 0.2, 0.9],
    [OUT, OUT, 0.5, 0.4, 0.3, 0.2, 0.1],
]
RELEVANT = [[1, 4], [1], [5], [2, 3, 4, 5, 6]]
COUNTS = {1: 5, 2: 3, 3: 1, 4: 1, 6: 2}
SECOND = 1 / math.log2(3)
RANKING = [
    # fewer relevant items than k, none among the first k, fewer candidates than k, more relevant items than k
    ("Hit", 3, [1, 0, 1, 1]),
    ("Hit", 1, [1, 0, 0, 1]),
    ("MRR", 3, [1, 0, 1 / 2, 1]),
    ("MRR", 6, [1, 1 / 6, 1 / 2, 1]),
    ("Recall", 3, [1 / 2, 0, 1, 3 / 5]),
    ("Recall", 6, [1, 1, 1, 1]),
    ("Precision", 3, [1 / 3, 0, 1 / 3, 1]),
    ("Precision", 6, [2 / 6, 1 / 6, 1 / 6, 5 / 6]),
    ("NDCG", 3, [1 / (1 + SECOND), 0, SECOND, 1]),
    ("NDCG", 6, [(1 + 1 / math.log2(5)) / (1 + SECOND), 1 / math.log2(7), SECOND, 1]),
    ("MAP", 3, [1 / 2, 0, 1 / 2, 1]),
    ("MAP", 6, [(1 + 2 / 4) / 2, 1 / 6, 1 / 2, 1]),
]


@pytest.mark.parametrize(("metric", "k", "users"), RANKING)
def test_ranking_metrics(metric, k, users):
    assert ranked(metric, SCORES, RELEVANT, (k, 6))[f"{metric.lower()}@{k}"] == pytest.approx(np.mean(users), abs=2e-6)
    for scores, relevant, expected in zip(SCORES, RELEVANT, users, strict=True):
        own = ranked(metric, [scores], [relevant], (k, 6))
        assert own[f"{metric.lower()}@{k}"] == pytest.approx(expected, abs=2e-6)


ELEVENTH, TWO_ELEVENTHS = 1 / 11, 2 / 11
CATALOGUE = [
    ("ItemCoverage", 3, {}, 1.0),
    ("ItemCoverage", 1, {}, 3 / 6),
    ("AveragePopularity", 3, {}, ((5 + 3 + 1) / 3 + (2 + 0 + 1) / 3 + (2 + 0) / 2 + (3 + 1 + 1) / 3) / 4),
    ("AveragePopularity", 1, {}, (5 + 2 + 2 + 3) / 4),
    ("ShannonEntropy", 3, {}, -ELEVENTH * math.log(ELEVENTH) - 5 * TWO_ELEVENTHS * math.log(TWO_ELEVENTHS)),
    ("GiniIndex", 3, {}, (-5 * 1 + 2 * (-3 - 1 + 1 + 3 + 5)) / (6 * 11)),
    ("GiniIndex", 1, {}, (1 * 1 + 3 * 1 + 5 * 2) / (6 * 4)),
    ("TailPercentage", 3, {}, (0 + 1 / 3 + 1 / 2 + 0) / 4),  # item 5, that nobody has trained on
    ("TailPercentage", 3, {"tail_ratio": 0.5}, (1 / 3 + 2 / 3 + 1 / 2 + 2 / 3) / 4),  # 5, 3, 4
    ("TailPercentage", 3, {"tail_ratio": 2}, (1 / 3 + 1 + 1 + 2 / 3) / 4),  # 3, 4, 5, 6
]


@pytest.mark.parametrize(("metric", "k", "keys", "expected"), CATALOGUE)
def test_metrics_of_the_catalogue(metric, k, keys, expected):
    found = ranked(metric, SCORES, RELEVANT, (k, 6), COUNTS, **keys)[f"{metric.lower()}@{k}"]
    assert found == pytest.approx(expected, abs=2e-6)


def test_all_items_recommended_alike_are_full_coverage_no_inequality_and_the_entropy_of_that_many():
    scores = [[OUT, *np.roll(np.arange(10.0), shift)] for shift in range(10)]
    relevant = [[1]] * 10
    assert ranked("ItemCoverage", scores, relevant, (1,))["itemcoverage@1"] == 1.0
    assert ranked("GiniIndex", scores, relevant, (1,))["giniindex@1"] == 0.0
    assert ranked("ShannonEntropy", scores, relevant, (1,))["shannonentropy@1"] == pytest.approx(math.log(10), abs=2e-6)
    alike = [scores[0]] * 10
    assert ranked("ItemCoverage", alike, relevant, (1,))["itemcoverage@1"] == 0.1
    assert ranked("GiniIndex", alike, relevant, (1,))["giniindex@1"] == pytest.approx(0.9)
    assert ranked("ShannonEntropy", alike, relevant, (1,))["shannonentropy@1"] == 0.0


class TestGAUC:
    def test_is_the_mean_over_users_weighted_by_their_relevant_items(self):
        # 4 of 6 pairs, 0 of 5, 0 of 1; the last user has no other candidate.
        assert ranked("GAUC", SCORES, RELEVANT)["gauc"] == pytest.approx((2 * 4 / 6 + 0 + 0) / 4, abs=2e-6)

    def test_counts_ties_half(self):
        assert ranked("GAUC", [[OUT, 0.5, 0.5, 0.5, 0.1]], [[1]])["gauc"] == pytest.approx(
            (0.5 + 0.5 + 1) / 3, abs=2e-6
        )

    def test_is_not_defined_where_no_user_has_both(self, caplog):
        assert math.isnan(ranked("GAUC", [[OUT, OUT, 0.5, 0.4]], [[2, 3]])["gauc"])
        assert "gauc is not defined on what is judged: no user has both" in caplog.text


def judged(metric, scores, labels, users=None, label_set=(0.0, 1.0), topk=(10,)):
    config = settings(metric, list(topk))
    collector = LabelCollector(config, torch.tensor(label_set))
    columns = {"label": torch.tensor(labels), "user_id": torch.tensor(users or [1] * len(labels))}
    collector.eval_batch_collect(torch.tensor(scores), Interaction(columns), None, None)
    evaluator = PlainEvaluator(config)
    return evaluator.evaluate(collector.get_data_struct())


STARS = (1.0, 2.0, 3.0, 4.0, 5.0)
VALUES = [
    ("AUC", [0.9, 0.5, 0.5, 0.1], [1.0, 1.0, 0.0, 0.0], (0.0, 1.0), (1 + 1 + 0.5 + 1) / 4),
    ("AUC", [0.5, 0.5, 0.5], [1.0, 0.0, 0.0], (0.0, 1.0), 0.5),
    ("LogLoss", [0.8, 0.4], [1.0, 0.0], (0.0, 1.0), -(math.log(0.8) + math.log(0.6)) / 2),
    ("LogLoss", [1.0, 0.0], [1.0, 1.0], (0.0, 1.0), 15 * math.log(10) / 2),  # clipped at 1e-15
    ("LogLoss", [1.0, 0.0], [1.0, 0.0], (0.0, 1.0), 0.0),
    ("MAE", [1.5, 4.0, 5.0], [1.0, 5.0, 5.0], STARS, (0.5 + 1 + 0) / 3),
    ("RMSE", [1.5, 4.0, 5.0], [1.0, 5.0, 5.0], STARS, math.sqrt((0.25 + 1 + 0) / 3)),
    ("NMAE", [1.5, 4.0, 5.0], [1.0, 5.0, 5.0], STARS, (0.5 + 1 + 0) / 3 / 4),
    ("NMAE", [-10.0, 0.0], [10.0, 0.0], (-10.0, 0.0, 10.0), 20 / 2 / 20),
    ("Accuracy", [0.5, 0.49, 0.9, 0.1], [1.0, 0.0, 0.0, 1.0], (0.0, 1.0), 0.5),
    ("Accuracy", [1.4, 1.5, 9.0, -3.0], [1.0, 2.0, 5.0, 2.0], STARS, 0.75),  # the nearest label
]


@pytest.mark.parametrize(("metric", "scores", "labels", "label_set", "expected"), VALUES)
def test_value_metrics(metric, scores, labels, label_set, expected):
    assert judged(metric, scores, labels, None, label_set)[metric.lower()] == pytest.approx(expected, abs=2e-6)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=2, max_size=12))
def test_auc_with_ties_is_that_of_scikit_learn(rows):
    scores, labels = [score / 4 for score, _ in rows], [float(label) for _, label in rows]
    found = judged("AUC", scores, labels)["auc"]
    if len(set(labels)) < 2:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(roc_auc_score(labels, scores), abs=2e-6)


class TestLabelledNDCG:
    def test_by_hand(self):
        # One user: a five and a one, in the wrong order; ranks 5 and 1.
        expected = (1 + 31 * SECOND) / (31 + 1 * SECOND)
        found = judged("LabelledNDCG", [0.9, 0.1], [1.0, 5.0], label_set=STARS)["labelledndcg@10"]
        assert found == pytest.approx(expected, abs=2e-6)

    def test_counts_the_first_k_places_alone(self):
        # A one, a five and a three, in this order: gains of 1, 31 and 7.
        found = judged("LabelledNDCG", [0.9, 0.5, 0.1], [1.0, 5.0, 3.0], label_set=STARS, topk=(1, 2))
        expected = {"labelledndcg@1": 1 / 31, "labelledndcg@2": (1 + 31 * SECOND) / (31 + 7 * SECOND)}
        assert found == pytest.approx(expected, abs=2e-6)

    @pytest.mark.parametrize(
        ("label_set", "ranks"),
        [
            ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
            ([0, 1], [0, 1]),
            ([0, 1, 2, 10], [0, 1, 2, 3]),
            ([-10, 0, 10], [0, 1, 2]),
            ([20, 40, 60, 80, 100], [1, 2, 3, 4, 5]),
            ([0.5, 1, 1.5], [1, 2, 3]),
        ],
    )
    def test_gains_are_those_of_the_labels_ranks(self, label_set, ranks):
        labels = np.array(label_set, dtype=np.float32)
        assert label_ranks(labels, labels.astype(np.float64)).tolist() == ranks
        assert label_ranks(labels[-1:], labels).tolist() == ranks[-1:]

    @given(st.sampled_from([-10.0, 0.0, 1.0, 20.0, 1e6]), st.sampled_from([1e-3, 1.0, 20.0]), st.integers(0, 99))
    def test_any_scale_is_between_nothing_and_one_and_judges_like_one_to_five(self, lowest, step, seed):
        generator = np.random.default_rng(seed)
        stars, users = generator.integers(1, 6, 40), generator.integers(0, 6, 40)
        scores, label_set = generator.normal(size=40), lowest + step * np.arange(5)
        found = labelled_ndcg(scores, label_ranks(label_set[stars - 1], label_set), users, 5)
        assert ((found >= 0) & (found <= 1 + 1e-12)).all()
        if lowest > 0:
            np.testing.assert_array_equal(found, labelled_ndcg(scores, stars.astype(float), users, 5))

    def test_thousands_of_labels_overflow_nothing(self):
        ranks, users = np.arange(1.0, 5001.0), np.repeat(np.arange(500), 10)
        assert labelled_ndcg(ranks, ranks, users, 10) == pytest.approx(np.ones(500))
        reversed_order = labelled_ndcg(-ranks, ranks, users, 10)
        assert (reversed_order > 0).all() and (reversed_order < 1).all()

    def test_is_not_defined_where_no_user_has_two_rows(self, caplog):
        assert math.isnan(judged("LabelledNDCG", [0.1, 0.2], [1.0, 5.0], [1, 2], STARS)["labelledndcg@10"])
        assert "labelledndcg@10 is not defined on what is judged" in caplog.text


def test_every_metric_that_there_is_stands_above(without_plugins):
    own = {name for name, *_ in [*RANKING, *CATALOGUE, *VALUES]} | {"GAUC", "LabelledNDCG"}
    assert {name.lower() for name in own} == {name for name in metric_types if metric_types[name] in EvaluatorType}


def test_the_mean_of_single_users_is_the_number_of_all(run):
    metrics = ["Accuracy", "MAE", "LabelledNDCG", "NDCG", "Recall", "MRR", "Hit", "MAP", "Precision"]
    result = run("AttnStudent", epochs=1, metrics=metrics, valid_metric="MAE", topk=[3, 10], user_metrics=True)
    users, test = result["user_metrics"], result["test_result"]
    for name in test.keys() - {"mae", "accuracy"}:
        assert np.nanmean(users[name]) == pytest.approx(test[name], abs=1e-4), name
    assert {"mae", "accuracy"} <= users.keys()


def test_scores_too_large_to_be_judged_are_told():
    with pytest.raises(TrainingError, match="metric rmse is inf"):
        judged("RMSE", [1e30, 0.0], [1.0, 0.0])


@pytest.mark.parametrize("metric", sorted(metric_types))
def test_every_metric_is_known_with_or_without_a_k_before_anything_runs(metric, data_path):
    labelled = metric_types[metric] == EvaluatorType.VALUE or "labelled" in metric
    chosen = {"data_path": str(data_path), "metrics": [metric], "label_mode": "threshold" if labelled else "implicit"}
    assert FedKDConfig("AttnStudent", "tiny", config_dict=chosen)["valid_metric"].lower().split("@")[0] == metric
