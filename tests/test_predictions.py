"""Predictions up, soft labels down: what is sampled, what the server's model learns, and what clients are told."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_fedkd.distillation.hidden_model import learned, logits_of, said_to, started
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.knowledge.prediction import sampled

PTF = {"strategy": "afd", "knowledge": "prediction", "partition": "user", "told_items": 6, "learner": "adam"}


@settings(max_examples=60)
@given(
    rows=st.integers(0, 30),
    share=st.floats(0.01, 1),
    swapped=st.floats(0, 1, allow_subnormal=False),  # runs in this process flush them
    seed=st.integers(0, 99),
)
def test_a_share_of_the_rows_is_told_and_swapped_ones_are_others(rows, share, swapped, seed):
    table = np.zeros((40, 2), np.float32)
    table[5 : 5 + rows] = np.random.default_rng(seed).random((rows, 2)) + 0.1
    told = sampled(table, share, swapped, np.random.default_rng(seed))
    kept = told.any(1)
    assert kept.sum() == (max(1, round(share * rows)) if rows else 0) and not kept[~table.any(1)].any()
    assert (told[kept] != table[kept]).any(1).sum() == 2 * min(round(swapped * kept.sum() / 2), kept.sum() // 2)
    assert sorted(told[kept].tolist()) == sorted(table[kept].tolist())


def test_the_servers_model_learns_what_it_is_told_and_generalises_over_clients_that_agree():
    generator = torch.Generator().manual_seed(3)
    liked = torch.rand(12, generator=generator) > 0.5
    truth = torch.where(liked[:, None], torch.tensor([0.1, 0.9]), torch.tensor([0.9, 0.1])).repeat(8, 1, 1)
    truth[4:] = truth[4:].flip(-1)  # two kinds of clients
    told = truth.clone()
    told[0, :3] = told[5, 4:6] = 0  # of which nothing is told
    model = learned(started(8, 12, 2, 4, generator), told, 300, 0.05, generator)
    everything = torch.cartesian_prod(torch.arange(8), torch.arange(12))
    found = logits_of(model, *everything.T).softmax(-1).view(8, 12, 2)
    assert (found - truth).abs().max() < 0.1


def test_a_client_is_told_of_what_many_know_and_of_what_the_model_likes_most_for_it_and_never_of_the_padding():
    model = started(2, 9, 2, 3, torch.Generator().manual_seed(4))
    known = torch.tensor([99, 0, 5, 0, 1, 4, 0, 0, 2])
    table = said_to(model, 1, known, 4)
    rows = set(table.any(1).nonzero().flatten().tolist())
    assert len(rows) == 4 and {2, 5} <= rows and 0 not in rows
    likes = logits_of(model, torch.ones(9, dtype=torch.long), torch.arange(9)).softmax(-1)[:, 1]
    others = [item for item in range(1, 9) if item not in (2, 5)]
    assert rows - {2, 5} == set(sorted(others, key=lambda item: -float(likes[item]))[:2])
    assert said_to(model, 0, known, 1000)[1:].any(1).all()


def test_no_model_travels_and_what_is_told_is_a_sample(prepared):
    _, trainer, _, _ = prepared(**PTF, predicted_share=0.5, swapped_share=0.0)
    engine, items = trainer.engine, trainer.model.item_num
    for index in range(2):
        for client in engine.clients:
            client.receive(engine.server.send(client.number, index))
            client.train(index)
            told = engine.server.intake(index, {client.number: len(client.task)}).add(client.number, client.send(index))
            (table,) = told.arrays.values()
            met = client.task.samples.items.unique()
            assert table.shape == (items, trainer.model.networks[0].architecture.labels)
            assert table.any(1).sum() == max(1, round(0.5 * len(met)))
            np.testing.assert_allclose(table[table.any(1)].sum(1), 1, rtol=1e-5)
        engine.run_round(index)


@pytest.mark.parametrize("model", ["MF", "AttnFedKD"])
def test_it_resumes_exactly_and_the_fleet_does_the_same(run, model):
    keys = {**PTF, "model": model, "label_mode": "implicit", "codecs": ["row_sparse"]}
    whole, part = run(epochs=3, **keys), run(epochs=1, **keys)
    assert run(epochs=3, resume=part["run_folder"], **keys)["test_result"] == whole["test_result"]
    fleet = run(epochs=3, engine="fleet", **keys)
    assert fleet["engine"] == "fleet" and fleet["communication"] == whole["communication"]
    for name, value in whole["test_result"].items():
        assert fleet["test_result"][name] == pytest.approx(value, abs=2e-2)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"predicted_share": 0.0}, "predicted_share is 0.0"),
        ({"told_items": 0}, "told_items is 0"),
        ({"secure_aggregation": True}, "knowledge=prediction needs every client's own"),
    ],
)
def test_what_it_does_not_go_with_is_told(run, keys, sentence):
    with pytest.raises(InputError, match=sentence):
        run(**{**PTF, **keys})
