"""Tables, samplers and full-sort loaders without loops over rows are RecBole's own, row by row and draw by draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.data.utils import create_samplers as recbole_samplers
from recbole.sampler import Sampler

from recbole_fedkd.data.rows import FullSortLoader, Rows, UserSampler, bring_together, create_samplers

COLUMNS = {"id": torch.arange(6), "value": torch.rand(6, 2), "name": torch.arange(6) * 10}


@pytest.mark.parametrize(
    "index",
    [
        [4, 1, 1],
        [],
        range(2, 5),
        3,
        slice(1, 4),
        np.array([5, 0]),
        np.array([], dtype=np.int64),
        torch.tensor([0, 3]),
        torch.tensor([True, False, True, False, False, True]),
        np.array([False, True, False, False, False, False]),
        [True, False, True, False, False, True],
        torch.tensor(2),
        "value",
    ],
)
def test_rows_are_taken_as_recbole_takes_them(index):
    ours, theirs = Rows(dict(COLUMNS))[index], Interaction(dict(COLUMNS))[index]
    if isinstance(index, str):
        assert ours is COLUMNS["value"] and theirs is COLUMNS["value"]
        return
    assert list(ours.interaction) == list(theirs.interaction)
    for name in COLUMNS:
        assert torch.equal(ours[name], theirs[name]), name


class _Split:
    """As much of a dataset as a sampler and a loader read."""

    uid_field, iid_field, user_num, item_num = "user", "item", 6, 8

    def __init__(self, rows):
        users, items = (np.array([row[side] for row in rows], dtype=np.int64) for side in (0, 1))
        self.inter_feat = Rows({"user": torch.from_numpy(users), "item": torch.from_numpy(items)})

    def sort(self, by, ascending):
        self.inter_feat.sort(by, ascending)

    def join(self, rows):
        return rows


PAIRS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), max_size=12)
SPLITS = st.tuples(PAIRS, PAIRS, PAIRS)


def _samplers(rows):
    """Both samplers, or None where RecBole's refuses."""
    splits = [_Split(each) for each in rows]
    phases = ["train", "valid", "test"]
    try:
        theirs = Sampler(phases, splits)
    except ValueError:
        with pytest.raises(ValueError, match="interacted with all items"):
            UserSampler(phases, splits)
        return None
    return splits, theirs, UserSampler(phases, splits)


@settings(max_examples=60, deadline=None)
@given(SPLITS)
def test_samplers_know_what_recbole_knows_and_draw_the_same(rows):
    made = _samplers(rows)
    if made is None:
        return
    _, theirs, ours = made
    users = np.array([1, 2, 5, 1])
    for phase in ("train", "valid", "test"):
        expected, found = theirs.set_phase(phase), ours.set_phase(phase)
        assert [set(map(int, each)) for each in expected.used_ids] == [found.used_ids[user] for user in range(6)]
        for asked in (users, users[:1]):
            np.random.seed(3)
            drawn = expected.sample_by_user_ids(asked, None, 2)
            np.random.seed(3)
            assert torch.equal(found.sample_by_user_ids(asked, None, 2), drawn)


def test_users_with_every_item_are_refused_even_among_repeated_rows():
    every = [(2, item) for item in range(1, 8)]
    assert _samplers((every[:4], every[4:], [])) is None
    assert _samplers(([*every[:4], *every[:4]], [], [])) is not None


class _Config(dict):
    def __getitem__(self, key):
        return self.get(key)


@settings(max_examples=60, deadline=None)
@given(SPLITS)
def test_full_sort_loader_knows_the_users_and_items_that_recbole_knows(rows):
    made = _samplers(rows)
    if made is None:
        return
    splits, theirs, ours = made
    config = _Config(seed=1, eval_batch_size=16, worker=0, single_spec=True)
    for phase, split in zip(("train", "valid", "test"), splits, strict=True):
        found = FullSortLoader(config, _Split(rows[splits.index(split)]), ours.set_phase(phase))
        if not len(split.inter_feat):
            assert len(found.uid_list) == 0
            continue
        expected = FullSortEvalDataLoader(config, split, theirs.set_phase(phase))
        assert torch.equal(found.uid_list, expected.uid_list)
        assert found.uid2items_num.tolist() == expected.uid2items_num.tolist()
        for name in ("uid2history_item", "uid2positive_item"):
            pairs = zip(getattr(found, name), getattr(expected, name), strict=True)
            for own, other in pairs:
                assert (own is None) == (other is None)
                assert own is None or own.tolist() == sorted(other.tolist())
        homes = torch.arange(len(found.uid2items_num)) % 2
        bring_together(found, homes)
        order = sorted(expected.uid_list.tolist(), key=lambda user: (user % 2, user))
        assert found.uid_list.tolist() == found.user_df[found.uid_field].tolist() == order
        assert [user for batch in found for user in batch[0][found.uid_field].tolist()] == order


@pytest.mark.parametrize("training", ["none", "uniform", "popularity"])
@pytest.mark.parametrize("judging", ["none", "uniform", "popularity"])
@pytest.mark.parametrize("repeatable", [False, True])
def test_a_phase_has_the_sampler_that_recbole_gives_it(training, judging, repeatable):
    rows = [[(1, 2), (1, 3), (2, 3), (3, 1)], [(1, 4), (2, 1)], [(2, 2)]]
    splits = [_Split(each) for each in rows]
    whole = _Split([row for each in rows for row in each])
    arguments = {"distribution": training, "alpha": 0.5}
    judged = {"distribution": judging}
    config = _Config(
        train_neg_sample_args=arguments,
        valid_neg_sample_args=judged,
        test_neg_sample_args=judged,
        repeatable=repeatable,
    )
    for own, other in zip(create_samplers(config, whole, splits), recbole_samplers(config, whole, splits), strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            assert (own.phase, own.distribution, own.alpha) == (other.phase, other.distribution, other.alpha)
            assert getattr(own, "prob", None) == getattr(other, "prob", None)
