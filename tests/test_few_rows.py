"""Clients with one row or none: what serves their users, in a run, from a checkpoint and for somebody new."""

import numpy as np
import pytest
import torch
from conftest import SMALL, write_dataset

from recbole_fedkd import load, run_recbole_fedkd
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.quick_start import _prepare

FACTORS = {"preset": "factors", "factor_size": 3, "sketch_width": 3, "sketch_passes": 2, "em_steps": 1, "epochs": 7}
FACTORS |= {"metrics": ["MAE"], "valid_metric": "MAE"}
SPLIT = {"split": {"RS": [0.6, 0.2, 0.2]}, "group_by": None, "order": "TO", "mode": "full"}
"""Of rows that lie user by user in time: some users have held-out rows alone."""


@pytest.fixture
def keys_of(tmp_path):
    """Keys of a run on 12 users, a client each, of whom the first or the last have no training row."""

    def keys(engine, first=False, **more):
        folder = tmp_path / str(first)
        if not folder.exists():
            file = write_dataset(folder, users=12, items=10, rows=7) / "tiny" / "tiny.inter"
            if first:
                head, *rows = file.read_text().splitlines()
                turned = [f"{row.rpartition(chr(9))[0]}\t{10**9 - number}" for number, row in enumerate(rows)]
                file.write_text("\n".join([head, *turned]) + "\n")
        return {"data_path": str(folder), **SMALL, "partition": "user", "eval_args": SPLIT, "engine": engine, **more}

    return keys


@pytest.fixture
def model_of(keys_of):
    """A trained model on an engine, loaded from its checkpoint."""

    def model(engine, **more):
        result = run_recbole_fedkd("AttnFedKD", "tiny", config_dict=keys_of(engine, **{**FACTORS, **more}))
        assert result["engine"] == engine
        return load(result["run_folder"]), result

    return model


def test_what_serves_a_client_without_a_row_is_part_of_a_checkpoint(model_of):
    scores = []
    for engine in ("local", "fleet"):
        model, result = model_of(engine)
        run_recbole_fedkd(config_dict={"resume": result["run_folder"], "epochs": 8})
        again = load(result["run_folder"])
        for loaded in (model, again):
            scores.append(loaded.recommend([f"u{user}" for user in (0, 10, 11)], k=10)["score"].to_numpy())
            assert np.ptp(scores[-1].reshape(3, 10)[1:]) < 1e-6 < np.ptp(scores[-1].reshape(3, 10)[0])
    np.testing.assert_allclose(scores[2], scores[0], rtol=1e-3)
    np.testing.assert_allclose(scores[3], scores[1], rtol=1e-3)


@pytest.mark.parametrize("engine", ["local", "fleet"])
def test_somebody_new_is_not_answered_by_a_client_that_has_learned_nothing(model_of, engine):
    model, _ = model_of(engine, first=True)
    answer = model.recommend_for([("i1", 5.0), ("i2", 1.0)], k=8)["score"]
    assert np.ptp(answer) > 1e-3


def test_engines_answer_somebody_new_by_the_same_client(model_of):
    history = [("i1", 5.0), ("i2", 1.0)]
    local, fleet = (model_of(engine)[0] for engine in ("local", "fleet"))
    for client in (None, 0, 3, 11):
        expected, found = (model.recommend_for(history, k=8, client=client) for model in (local, fleet))
        np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-3)


def test_nothing_is_left_of_the_features_of_a_lone_row(keys_of):
    """What rounding left of them, Adam took steps by that were as large as any."""
    split = {**SPLIT, "split": {"RS": [0.25, 0.25, 0.5]}, "order": "RO"}
    for engine in ("local", "fleet"):
        keys = keys_of(engine, eval_args=split, **FACTORS)
        trainer, _, _ = _prepare(FedKDConfig("AttnFedKD", "tiny", config_dict=keys))
        for number in range(6):
            trainer.engine.run_round(number)
        lone = [number for number, size in trainer.engine.sizes.items() if size == 1]
        assert lone
        if engine == "local":
            features = torch.cat([trainer.model.networks[number].of_rows[1] for number in lone])
        else:
            task = trainer.engine.task
            features = task.features[torch.isin(task.owner, torch.tensor(lone))]
        assert not features.any()
