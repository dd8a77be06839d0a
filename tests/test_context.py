"""The context of an interaction: columns of the ``.inter`` file that describe the row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from context_data import write_context_dataset
from recbole.data.interaction import Interaction
from recbole.utils.case_study import full_sort_scores

from recbole_fedkd import run_recbole_fedkd
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.data.features import features_of
from recbole_fedkd.quick_start import _prepare, create_dataset

ROWS = ["user_id", "item_id", "rating", "timestamp"]
CLICKS = {"label_mode": "threshold", "load_col": {"inter": [*ROWS, "daytime", "tags", "weather"]}}


@pytest.fixture(scope="session")
def daily(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_context_dataset(tmp_path_factory.mktemp("context"))


def keys_of(daily: Path, **keys: Any) -> dict[str, Any]:
    return {"data_path": str(daily), "show_progress": False, "epochs": 1, "client_num": 3, **keys}


def prepared(daily: Path, model: str, **keys: Any) -> Any:
    config = FedKDConfig(model, "daily", config_dict=keys_of(daily, **keys))
    return config, *_prepare(config)


def rank_by_hand(config: Any, trainer: Any, loaders: Any) -> tuple[float, dict[int, dict[str, torch.Tensor]]]:
    """Hit@10 of a full sort, user by user and item by item, and the context that each user is ranked in."""
    train, valid, test = (loader._dataset for loader in loaders)
    rows, met = test.inter_feat, {}
    for split in (train, valid):
        for user, item in zip(split.inter_feat["user_id"].tolist(), split.inter_feat["item_id"].tolist(), strict=True):
            met.setdefault(user, set()).add(item)
    liked = rows[config["LABEL_FIELD"]] >= (config["rating_threshold"] if config["LABEL_FIELD"] == "rating" else 0.5)
    hits, contexts = [], {}
    for user in sorted(set(rows["user_id"][liked].tolist())):
        own = torch.nonzero((rows["user_id"] == user) & liked).flatten()
        first = own[rows["timestamp"][own].argmin()]
        contexts[user] = {name: rows[name][first : first + 1] for name in ("daytime", "tags", "weather")}
        scores = {}
        for item in range(1, test.item_num):
            if item not in met[user] or item in rows["item_id"][own].tolist():
                pair = {"user_id": torch.tensor([user]), "item_id": torch.tensor([item]), **contexts[user]}
                scores[item] = float(trainer.model.predict(test.join(Interaction(pair))))
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:10]
        hits.append(bool(set(best) & set(rows["item_id"][own].tolist())))
    return float(np.mean(hits)), contexts


@pytest.mark.parametrize("model", ["WideDeep", "DeepFM"])
def test_a_click_model_with_context_columns_is_ranked_in_the_context_of_a_row(daily, model):
    config, trainer, loaders, evaluations = prepared(daily, model, **CLICKS)
    result = trainer.evaluate(evaluations[1], load_best_model=False)
    trainer.model.eval()
    by_hand, contexts = rank_by_hand(config, trainer, loaders)
    assert result["hit@10"] == pytest.approx(by_hand, abs=1e-4)
    context = "each user in the context (daytime, tags) of the first of its relevant rows"
    assert trainer.protocols["hit@10"].endswith(context)
    user = next(iter(contexts))
    told = evaluations[1].ranking_loader
    scores = full_sort_scores([user], trainer.model, told)[0]
    items = torch.nonzero(torch.isfinite(scores)).flatten()
    rows = Interaction({"user_id": torch.tensor([user]), **contexts[user]}).repeat(len(items))
    rows["item_id"] = items
    torch.testing.assert_close(scores[items], trainer.model.predict(told._dataset.join(rows)))


def test_recbole_alone_would_miss_the_column(daily):
    # The loader that RecBole makes holds the user's own columns; ours adds those of the row.
    _, trainer, _, evaluations = prepared(daily, "WideDeep", **CLICKS)
    loader = evaluations[1].ranking_loader
    assert {"daytime", "tags"} <= set(loader.user_df.columns)
    with pytest.raises(KeyError, match="daytime"):
        trainer.model.predict(Interaction({"user_id": torch.tensor([1]), "item_id": torch.tensor([1])}))


@pytest.mark.parametrize("mode", ["full", "uni5"])
def test_a_click_model_with_its_own_threshold_runs_to_its_ranking(daily, mode):
    keys = {**CLICKS, "label_mode": None, "threshold": {"rating": 4}, "metrics": ["NDCG"], "valid_metric": "NDCG@10"}
    result = run_recbole_fedkd("WideDeep", "daily", None, keys_of(daily, **keys, eval_args={"mode": mode}), False)
    assert 0 < result["test_result"]["ndcg@10"] <= 1
    assert "context (daytime, tags)" in result["protocols"]["ndcg@10"]


@pytest.mark.parametrize("engine", ["local", "fleet"])
def test_clients_of_a_click_model_are_ranked_in_context_too(daily, engine):
    config, trainer, loaders, evaluations = prepared(
        daily, "WideDeep", **CLICKS, strategy="fedavg", engine=engine, train_batch_size=32
    )
    assert trainer.engine.name == engine
    trainer.fit(loaders[0], evaluations[0], saved=False)
    result = trainer.evaluate(evaluations[1], load_best_model=False)
    trainer.model.eval()
    assert result["hit@10"] == pytest.approx(rank_by_hand(config, trainer, loaders)[0], abs=1e-4)


def test_numbers_of_a_row_rank_where_numerical_features_names_them(daily):
    _, trainer, _, evaluations = prepared(daily, "WideDeep", **CLICKS, numerical_features=["weather"])
    result = trainer.evaluate(evaluations[1], load_best_model=False)
    assert 0 <= result["hit@10"] <= 1
    assert "(daytime, weather, tags)" in trainer.protocols["hit@10"]


@pytest.mark.parametrize("model", ["DSSM", "DIN", "BPR"])
def test_what_a_model_does_not_read_is_told(daily, model, caplog):
    with caplog.at_level("INFO"):
        _, trainer, _, evaluations = prepared(daily, model, **CLICKS)
        trainer.evaluate(evaluations[1], load_best_model=False)
    (line,) = (message for message in caplog.messages if message.startswith("features:"))
    assert "context: none" in line
    assert f"not used: daytime, weather, tags ({model} reads no " in line
    assert "in the context" not in trainer.protocols["hit@10"]


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (
            "DIN",
            "features: user: group; item: kind; context: none; not used: height (float, not in numerical_features)",
        ),
        ("SASRecF", "features: user: none; item: kind; context: none; not used: group, height, daytime"),
    ],
)
def test_sequential_models_that_read_features_are_not_said_to_read_none(daily, model, line):
    keys: dict[str, Any] = {"load_col": None, "unload_col": None}
    if model == "SASRecF":
        keys |= {"selected_features": ["kind"], "train_neg_sample_args": None}
    config = FedKDConfig(model, "daily", config_dict=keys_of(daily, **keys))
    assert str(features_of(config, create_dataset(config))).startswith(line)
