"""Rankings of sums: equal to a dense calculation, over clients as in one place, and better than what everybody likes."""

import numpy as np
import pytest
import torch

from recbole_fedkd import load_data_and_model
from recbole_fedkd.distillation import gram
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.distillation.gram import GramSettings
from recbole_fedkd.errors import InputError
from recbole_fedkd.quick_start import build_trainer

USERS, ITEMS = 30, 12
RANKED = {
    "label_mode": "implicit",
    "metrics": ["Hit", "NDCG"],
    "valid_metric": "NDCG@10",
    "eval_args": {"mode": "uni20"},
}
SUMS = {**RANKED, "strategy": "sums", "sketch_width": 8, "sketch_passes": 2, "gram_size": 8}


def interactions(seed: int = 0) -> tuple[Rows, np.ndarray]:
    generator = np.random.default_rng(seed)
    matrix = (generator.random((USERS, ITEMS)) < 0.4).astype(float)
    users, items = np.nonzero(matrix)
    ones = torch.ones(len(users), dtype=torch.double)
    return Rows(torch.from_numpy(users), torch.from_numpy(items), ones, USERS, ITEMS), matrix


def scores_of(found: gram.ItemMap, rows: Rows, matrix: np.ndarray) -> np.ndarray:
    folded = rows.per_user(found.into[rows.items])
    every = torch.arange(ITEMS).expand(USERS, -1)
    return found.scores(folded, every, torch.from_numpy(matrix)).numpy()


def test_products_with_all_directions_give_the_gram_matrix_itself():
    rows, matrix = interactions()
    factors, diagonal = gram.exchanged(GramSettings(6, 2, 1, ITEMS, 1.0), rows)
    np.testing.assert_allclose((factors @ factors.T).numpy(), matrix.T @ matrix, atol=1e-6)
    np.testing.assert_allclose(diagonal.numpy(), matrix.sum(0))


@pytest.mark.parametrize("shrinkage", [0.5, 20.0])
def test_ease_is_that_of_steck_by_a_dense_inverse(shrinkage):
    rows, matrix = interactions()
    inverse = np.linalg.inv(matrix.T @ matrix + shrinkage * np.eye(ITEMS))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    factors, diagonal = gram.exchanged(GramSettings(6, 2, 1, ITEMS, shrinkage), rows)
    found = scores_of(gram.ease_map(factors, diagonal, shrinkage), rows, matrix)
    np.testing.assert_allclose(found, matrix @ weights, atol=1e-5)


def test_ease_of_few_directions_is_that_of_their_gram_matrix_with_the_exact_diagonal():
    rows, matrix = interactions()
    factors, diagonal = gram.exchanged(GramSettings(3, 1, 1, 3, 5.0), rows)
    low = (factors @ factors.T).numpy()
    dense = low + np.diag(np.maximum(np.diag(matrix.T @ matrix) - np.diag(low), 0) + 5.0)
    inverse = np.linalg.inv(dense)
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    found = scores_of(gram.ease_map(factors, diagonal, 5.0), rows, matrix)
    np.testing.assert_allclose(found, matrix @ weights, atol=1e-8)


def test_puresvd_is_that_of_numpy():
    rows, matrix = interactions()
    _, _, right = np.linalg.svd(matrix)
    factors, _ = gram.exchanged(GramSettings(6, 2, 1, ITEMS, 1.0), rows)
    found = scores_of(gram.svd_map(factors, 4), rows, matrix)
    np.testing.assert_allclose(found, matrix @ right[:4].T @ right[:4], atol=1e-6)


def test_two_items_by_hand():
    """G = [[2, 1], [1, 1]], lambda 1: P = [[2, -1], [-1, 3]] / 5, so B_12 = 1/3 and B_21 = 1/2."""
    rows = Rows(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]), torch.ones(3, dtype=torch.double), 2, 2)
    factors, diagonal = gram.exchanged(GramSettings(2, 1, 1, 2, 1.0), rows)
    found = gram.ease_map(factors, diagonal, 1.0)
    folded = rows.per_user(found.into[rows.items])
    scores = found.scores(folded, torch.arange(2).expand(2, -1), torch.tensor([[1.0, 1.0], [1.0, 0.0]]).double())
    np.testing.assert_allclose(scores.numpy(), [[1 / 2, 1 / 3], [0.0, 1 / 3]], atol=1e-9)


def test_recent_interactions_count_more_by_hand_and_the_order_of_rows_decides_between_equal_times():
    users, times = torch.tensor([2, 1, 2, 2, 1]), torch.tensor([5.0, 9.0, 7.0, 5.0, 1.0])
    found = gram.recency(users, times, 1.0)
    assert found.tolist() == [0.25 + 0.75 / 4, 1.0, 1.0, 0.25 + 0.75 / 2, 0.25 + 0.75 / 2]
    assert gram.recency(users, times, 0.0).tolist() == [1.0] * 5


def test_recency_changes_scores_and_no_byte(run):
    plain, recent = (run("GramEASE", **SUMS, saved=False, recent_half_life=half_life) for half_life in (0.0, 2.0))
    assert recent["communication"] == plain["communication"]
    assert recent["test_result"] != plain["test_result"]


@pytest.mark.parametrize("order, half_life, recent", [("TO", None, True), ("TO", 0.0, False), ("RO", None, False)])
def test_later_interactions_count_more_where_the_next_ones_are_asked_for(prepared, order, half_life, recent):
    keys = {"eval_args": {**RANKED["eval_args"], "order": order}, "recent_half_life": half_life}
    _, trainer, _, _ = prepared(model="GramEASE", **{**SUMS, **keys})
    assert all((client.task.network.weights is not None) == recent for client in trainer.engine.clients)


@pytest.mark.parametrize("model", ["GramEASE", "PureSVD"])
@pytest.mark.parametrize("partition, half_life", [("user", 0.0), ("random", 0.0), ("user", 2.0)])
def test_clients_come_to_what_one_place_comes_to(run, model, partition, half_life):
    central = run(model, **{**SUMS, "strategy": "central", "recent_half_life": half_life})
    together = run(model, partition=partition, recent_half_life=half_life, **SUMS)
    assert len(together["rounds"]) == 3 and len(central["rounds"]) == 1
    assert [bool(each["bytes_up"]) for each in together["rounds"]] == [True, True, False]
    pairs = {"user_id": torch.arange(1, 31).repeat_interleave(40), "item_id": torch.arange(1, 41).repeat(30)}
    from recbole.data.interaction import Interaction

    found = [load_data_and_model(each["run_folder"])[1].predict(Interaction(pairs)) for each in (central, together)]
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=0)
    assert float(found[0].std()) > 1e-3


def test_a_preset_has_one_client_per_user_and_is_loaded_again(run):
    result = run(None, preset="fedease", **{**RANKED, "user_metrics": True})
    assert result["partition"]["client_num"] == 30
    down, up = (result["communication"][name] for name in ("bytes_down", "bytes_up"))
    assert 0 < up < down
    config, model, _, _, _, test = load_data_and_model(result["run_folder"])
    judged = build_trainer(config, model).evaluate(test, load_best_model=False)
    assert judged["ndcg@10"] == pytest.approx(result["test_result"]["ndcg@10"])


def test_an_exchange_that_was_stopped_goes_on_to_the_same_numbers(run, tmp_path, monkeypatch):
    from recbole_fedkd.trainer import FedKDTrainer

    keys = {**SUMS, "partition": "user", "codecs": ["row_sparse", "int8"]}
    whole = run("GramEASE", checkpoint_dir=str(tmp_path / "whole"), **keys)
    kept, stopped = FedKDTrainer._train_once, []

    def stop_before_the_last(self, data, epoch, *rest):
        if epoch == 2 and not stopped:
            stopped.append(self.run_folder)
            raise KeyboardInterrupt
        return kept(self, data, epoch, *rest)

    monkeypatch.setattr(FedKDTrainer, "_train_once", stop_before_the_last)
    with pytest.raises(KeyboardInterrupt):
        run("GramEASE", checkpoint_dir=str(tmp_path / "part"), **keys)
    again = run("GramEASE", checkpoint_dir=str(tmp_path / "part"), resume=str(stopped[0]), **keys)
    assert again["test_result"] == whole["test_result"]


@pytest.mark.parametrize("keys", [
    {"strategy": "local", "partition": "user"},
    {"partition": "user", "holdout_clients": 0.2},
    {"partition": "user", "engine": "fleet"},
    {"label_mode": "threshold", "client_num": 2},
    {"sketch_width": 64, "sketch_passes": 1, "gram_size": 100},
    {"sketch_passes": 6, "stopping_step": 0, "eval_step": 2, "epochs": 1},
    {"codecs": ["int4"], "broadcast_codecs": ["int8"], "min_clients": 2},
    {"client_num": 1},
    {"eval_args": {"mode": "full"}},
])  # fmt: skip
def test_sums_run_with_other_keys_too(run, keys):
    result = run("GramEASE", **{**SUMS, **keys, "saved": False})
    assert np.isfinite(list(result["test_result"].values())).all()
    if "holdout_clients" in keys:
        assert (
            result["strangers"]["bytes_down"] and np.isfinite(list(result["strangers"]["test_result"].values())).all()
        )


@pytest.mark.parametrize(("model", "keys", "sentence"), [
    ("GramEASE", {"strategy": "fedavg"}, "made of sums"),
    ("MF", {"strategy": "sums"}, "GramEASE, PureSVD"),
    ("DeepFM", {"strategy": "sums"}, "GramEASE, PureSVD"),
    ("AttnFedKD", {"strategy": "sums"}, "GramEASE, PureSVD"),
    ("AttnFedKD", {"strategy": "afd", "knowledge": "gram"}, "strategy=sums"),
    ("GramEASE", {"clients_per_round": 2}, "unset clients_per_round"),
    ("GramEASE", {"label_mode": "rating"}, "use label_mode=threshold"),
    ("GramEASE", {"gram_shrinkage": 0}, "gram_shrinkage is 0"),
])  # fmt: skip
def test_what_cannot_go_with_sums_is_refused(run, model, keys, sentence):
    with pytest.raises(InputError, match=sentence):
        run(model, **{**SUMS, "saved": False, **keys})
