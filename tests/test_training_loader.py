"""Training rows come in the batches that RecBole's loader makes of them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from recbole.data.dataloader import TrainDataLoader

from recbole_fedkd.data import rows

CASES = [
    ("AttnStudent", {}),
    ("AttnStudent", {"shuffle": False}),
    ("AttnStudent", {"label_mode": "implicit"}),
    ("BPR", {}),
    ("FM", {"threshold": {"rating": 3}}),
    ("SASRec", {"train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 5}),
]


def _drawn(loader, make):
    """Two epochs of batches from the same streams, and where the loader's stream is then."""
    random.seed(1), np.random.seed(1)
    loader.generator.manual_seed(3)
    epochs = [[dict(batch.interaction) for batch in make(loader)] for _ in range(2)]
    return epochs, loader.generator.get_state()


@pytest.mark.parametrize(("model", "keys"), CASES)
@pytest.mark.parametrize("block", [1, 50, rows.BLOCK])
def test_batches_are_those_of_recbole_row_by_row_and_draw_by_draw(prepared, monkeypatch, model, keys, block):
    monkeypatch.setattr(rows, "BLOCK", block)
    _, _, (loader, *_), _ = prepared(model, train_batch_size=48, **keys)
    assert type(loader) is rows.TrainingLoader
    (ours, state), (theirs, expected) = _drawn(loader, iter), _drawn(loader, TrainDataLoader.__iter__)
    assert torch.equal(state, expected)
    own = model == "AttnStudent"
    for epoch, other in zip(ours, theirs, strict=True):
        for batch, whole in zip(epoch, other, strict=True):
            # An attentive network holds the features of users and items, and needs none of a batch.
            missing = set(whole) - set(batch)
            assert missing <= {"group", "genre"} and bool(missing) == (own and "label_mode" not in keys)
            assert all(torch.equal(values, whole[name]) for name, values in batch.items())
