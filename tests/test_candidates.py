"""Sampled candidates: distinct, never met, and the same for everything that is judged on the same data."""

import numpy as np
import pytest
import torch
from conftest import needs_numba, write_dataset
from hypothesis import given
from hypothesis import strategies as st

from recbole_fedkd.evaluation.candidates import draw, draw_candidates, user_stream

LEAVE_ONE_OUT = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": None}
SAMPLED = {
    "label_mode": "implicit",
    "eval_args": {**LEAVE_ONE_OUT, "mode": "uni7"},
    "metrics": ["Hit", "NDCG"],
    "valid_metric": "NDCG@10",
}


def slowly_drawn(stream, wanted, free, weights):
    """One draw after the other until there are enough."""
    weights = np.ones(len(free)) if weights is None else weights
    bounds, found = np.cumsum(weights), []
    while len(found) < wanted:
        position = int(np.searchsorted(bounds, stream.random() * bounds[-1], side="right"))
        if free[position] and position not in found:
            found.append(position)
    return found


@given(seed=st.integers(0, 10_000), size=st.integers(30, 80), weighted=st.booleans())
def test_draws_equal_a_slow_version_and_more_of_them_begin_alike(seed, size, weighted):
    generator = np.random.default_rng(seed)
    free = generator.random(size) < 0.8
    weights = generator.integers(1, 20, size).astype(float) if weighted else None
    wanted = min(10, free.sum() - 1)
    drawn = draw(user_stream(seed, "test", "anna"), wanted, free, weights)
    assert drawn.tolist() == slowly_drawn(user_stream(seed, "test", "anna"), wanted, free, weights)
    fewer = draw(user_stream(seed, "test", "anna"), wanted // 2, free, weights)
    assert drawn[: wanted // 2].tolist() == fewer.tolist()


def chi_square(counts, expected):
    return (((counts - expected) ** 2) / expected).sum()


@pytest.mark.parametrize("free_items", [50, 6], ids=["most of the catalogue", "little of it, so that lots decide"])
def test_every_item_is_drawn_equally_often(free_items):
    free = np.zeros(50_000 if free_items == 6 else 60, dtype=bool)
    chosen = np.arange(free_items) * (len(free) // free_items)
    free[chosen] = True
    counts, users = np.zeros(len(free)), 4000
    for user in range(users):
        drawn = draw(user_stream(1, "test", f"u{user}"), 3, free, None)
        assert len(set(drawn.tolist())) == 3
        counts[drawn] += 1
    assert counts[~free].sum() == 0
    # Draws without replacement vary less than a multinomial, of which this is the 99.9 % bound.
    assert chi_square(counts[chosen], users * 3 / free_items) < {50: 85.4, 6: 20.5}[free_items]


@pytest.mark.parametrize("scale", [1, 1e-6], ids=["by draws", "by lots"])
def test_popular_items_are_drawn_as_often_as_sampling_without_replacement_says(scale):
    # Item 0 stands for everything that the user has met; where it weighs nearly all, lots decide among the others.
    weights = np.array([1.0, 5 * scale, 3 * scale, scale, scale])
    free = np.array([False, True, True, True, True])
    pairs, users = np.zeros((5, 5)), 20_000
    for user in range(users):
        first, second = draw(user_stream(3, "test", f"u{user}"), 2, free, weights)
        pairs[first, second] += 1
    shares = np.array([0, 0.5, 0.3, 0.1, 0.1])
    expected = shares[:, None] * shares / (1 - shares[:, None]) * users
    possible = expected * (1 - np.eye(5)) > 0
    assert pairs[~possible].sum() == 0
    assert chi_square(pairs[possible], expected[possible]) < 31.3  # 11 degrees of freedom, 99.9 %


def test_where_fewer_are_left_all_of_them_are_candidates():
    met, all_items = [np.array([1, 2, 3]), np.array([1])], np.array([0, 9, 9, 9, 1, 1])
    drawn = draw_candidates(0, "test", ["a", "b"], ["[PAD]", *"vwxyz"], met, np.array([3, 3]), all_items)
    assert sorted(drawn.items[:2].tolist()) == [4, 5]
    assert drawn.counts.tolist() == [2, 3] and drawn.short == 1


@pytest.mark.parametrize("popular", [False, True])
def test_items_that_nobody_interacted_with_are_never_drawn_and_change_no_draw(popular):
    # Few free items among many, so that lots decide as well.
    tokens, counts = [f"i{item:04}" for item in range(400)], np.arange(1, 401)
    met = [np.arange(1, 390), np.arange(1, 200), np.arange(1, 2)]
    wanted, users = np.array([5, 20, 20]), ["a", "b", "c"]
    few = draw_candidates(0, "test", users, ["[PAD]", *tokens], met, wanted, np.array([0, *counts]), popular)
    more = [*tokens, *(f"i{item:04}x" for item in range(0, 400, 2))]
    interactions = np.array([0, *counts, *[0] * 200])
    many = draw_candidates(0, "test", users, ["[PAD]", *more], met, wanted, interactions, popular)
    assert few.counts.tolist() == [5, 20, 20]
    assert many.items.tolist() == few.items.tolist()


def by_token(loader):
    """User token to the tokens of the candidates."""
    dataset, drawn = loader._dataset, loader.candidates
    users, items = (dataset.field2id_token[field] for field in ("user_id", "item_id"))
    parts = np.split(drawn.items, drawn.starts[1:])
    return {users[user]: set(items[part]) for user, part in zip(loader.uid_list, parts, strict=True)}


def candidates(evaluations):
    loaders = [evaluation.protocols[0].loader for evaluation in evaluations]
    return [by_token(loader) for loader in loaders]


@pytest.mark.parametrize("mode", ["uni7", "pop7"])
def test_every_model_strategy_and_engine_is_judged_on_the_same_candidates(prepared, mode):
    keys = {**SAMPLED, "eval_args": {**LEAVE_ONE_OUT, "mode": mode}}
    reference = candidates(prepared("Pop", **keys)[3])
    for model, changes in {
        "EASE": {},
        "MF": {"strategy": "fedavg", "partition": "user"},
        "BPR": {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 1, "alpha": 0.5}},
        "AttnFedKD": {"engine": "fleet", "eval_batch_size": 64},
        "SASRec": {"label_mode": None, "train_neg_sample_args": None},
        "MultiVAE": {"label_mode": None, "train_neg_sample_args": None},
    }.items():
        np.random.seed(len(model))
        assert candidates(prepared(model, **{**keys, **changes})[3]) == reference, model
    valid, test = reference
    assert all(len(items) == 7 for part in reference for items in part.values())
    assert valid != test, "both phases drew the same"
    assert candidates(prepared("Pop", **keys, seed=7)[3]) != reference


def test_candidates_are_items_that_the_user_has_not_met(prepared):
    _, _, loaders, evaluations = prepared("Pop", **{**SAMPLED, "eval_args": {**LEAVE_ONE_OUT, "mode": "uni99"}})
    met = {user: set() for user in range(1, 31)}
    for loader, evaluation in zip(loaders, [None, *evaluations], strict=True):
        rows = loader._dataset.inter_feat
        for user, item in zip(rows["user_id"].tolist(), rows["item_id"].tolist(), strict=True):
            met[user].add(item)
        if evaluation is not None:
            drawn = evaluation.protocols[0].loader.candidates
            for user, items in enumerate(np.split(drawn.items, drawn.starts[1:]), start=1):
                assert set(items.tolist()) == set(range(1, 41)) - met[user]
            told = evaluation.protocols[0].name
            assert told.endswith("30 of 30 users have fewer items left: all of theirs are candidates]"), told


def test_rows_in_another_order_have_the_same_candidates(prepared, tmp_path):
    reference = candidates(prepared("Pop", **SAMPLED)[3])
    folder = write_dataset(tmp_path / "shuffled")
    file = folder / "tiny" / "tiny.inter"
    header, *rows = file.read_text().splitlines()
    np.random.default_rng(5).shuffle(rows)
    file.write_text("\n".join([header, *rows]) + "\n")
    assert candidates(prepared("Pop", **SAMPLED, data_path=str(folder))[3]) == reference


@pytest.mark.parametrize("mode", ["uni7", "pop7", "uni99"])
def test_an_item_file_with_more_items_changes_no_candidate(prepared, tmp_path, mode):
    folder = write_dataset(tmp_path / "more")
    with (folder / "tiny" / "tiny.item").open("a") as file:
        file.writelines(f"cold{item}\tx1\n" for item in range(50))
    keys = {**SAMPLED, "eval_args": {**LEAVE_ONE_OUT, "mode": mode}, "data_path": str(folder)}
    inter = {"inter": ["user_id", "item_id", "timestamp"]}
    reference = candidates(prepared("Pop", **keys, load_col=inter)[3])
    item = {**inter, "item": ["item_id", "genre"]}
    for model, changes in {
        "Pop": {"load_col": item},
        "AttnFedKD": {"load_col": item},
        "FDSA": {"load_col": item, "label_mode": None, "train_neg_sample_args": None, "selected_features": ["genre"]},
    }.items():
        _, _, loaders, evaluations = prepared(model, **{**keys, **changes})
        assert loaders[0]._dataset.item_num == 91, "the catalogue has the items of the file"
        assert candidates(evaluations) == reference, model


def test_judging_again_judges_the_same_and_draws_from_no_global_stream(prepared):
    _, trainer, _, evaluations = prepared("BPR", **SAMPLED, user_metrics=True)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    results, of_users = [], []
    for _ in range(3):
        results.append(trainer.evaluate(evaluations[1], load_best_model=False))
        of_users.append(trainer.user_metrics)
    assert results[0] == results[1] == results[2]
    assert of_users[0] == of_users[1] == of_users[2]
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("batch_size", [1, 40, 100_000])
def test_a_batch_holds_whole_users_rows_first_and_the_size_of_batches_decides_nothing(prepared, batch_size):
    # Several held-out rows per user: N candidates for each, all of them different.
    split = {"split": {"RS": [8, 1, 1]}, "order": "TO", "group_by": "user"}
    keys = {**SAMPLED, "eval_args": {**split, "mode": "uni3"}, "eval_batch_size": batch_size}
    _, _, _, evaluations = prepared("BPR", **keys)
    loader = evaluations[1].protocols[0].loader
    rows = loader._dataset.inter_feat
    seen = []
    for batch, place, positive_place, positive_item in loader:
        for here in place.unique().tolist():
            own = place == here
            user = batch["user_id"][own].unique().item()
            held_out = rows["item_id"][rows["user_id"] == user].tolist()
            items, labels = batch["item_id"][own].tolist(), batch["label"][own].tolist()
            assert items[:2] == held_out == positive_item[positive_place == here].tolist()
            assert labels == [1, 1, 0, 0, 0, 0, 0, 0]
            assert len(set(items)) == 8
            times = batch["timestamp"][own].tolist()
            assert times == times[:2] * 4, "a candidate has the context of one of the user's rows"
            # Features are those of the candidate, not of the row whose context it has.
            genres = loader._dataset.item_feat["genre"][batch["item_id"][own]]
            assert torch.equal(batch["genre"][own], genres)
            seen.append(user)
    assert sorted(seen) == list(range(1, 31))


def test_value_metrics_of_implicit_labels_judge_the_first_of_the_same_candidates(prepared):
    keys = {**SAMPLED, "metrics": ["AUC", "NDCG"], "valid_metric": "AUC"}
    _, trainer, _, evaluations = prepared("MF", **{**keys, "eval_args": {**LEAVE_ONE_OUT, "mode": "full"}})
    value = evaluations[1].protocols[0].loader
    assert value.candidates.counts.tolist() == [1] * 30
    more = candidates(prepared("MF", **SAMPLED)[3])[1]
    assert all(items <= more[user] for user, items in by_token(value).items())
    results = [trainer.evaluate(evaluations[1], load_best_model=False) for _ in range(2)]
    assert results[0] == results[1]


@needs_numba
@pytest.mark.parametrize("model", ["AttnFedKD", "AttnStudent"])
def test_all_candidates_of_a_user_at_once_are_judged_as_one_by_one(prepared, monkeypatch, model):
    split = {"split": {"RS": [8, 1, 1]}, "order": "TO", "group_by": "user"}
    keys = {**SAMPLED, "eval_args": {**split, "mode": "uni7"}, "topk": [3], "valid_metric": "NDCG@3"}
    _, trainer, _, evaluations = prepared(model, **keys, client_num=3)
    kind, asked = type(trainer.model), []
    own = kind.score_chosen
    monkeypatch.setattr(kind, "score_chosen", lambda *arguments: asked.append(1) or own(*arguments))
    at_once = trainer.evaluate(evaluations[1], load_best_model=False)
    assert asked, "there were candidates to be scored at once"
    monkeypatch.setattr(kind, "ranks_chosen", False)
    assert at_once == trainer.evaluate(evaluations[1], load_best_model=False)


def test_workers_load_the_same_batches(prepared):
    loaders = [prepared("BPR", **SAMPLED, worker=worker)[3][1].protocols[0].loader for worker in (0, 1)]
    one, other = (list(loader) for loader in loaders)
    assert all(torch.equal(a[0]["item_id"], b[0]["item_id"]) for a, b in zip(one, other, strict=True))
