"""Context columns as features of the package's networks: in training, judging, ranking and the history."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from context_data import HOURS, write_context_dataset
from recbole.data.interaction import Interaction

from recbole_fedkd import load_data_and_model, run_recbole_fedkd
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.data.schema import all_rows, history_of, read_schema
from recbole_fedkd.errors import InputError
from recbole_fedkd.model.network import AttentiveNetwork
from recbole_fedkd.quick_start import _prepare

SMALL = {
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "attention_heads": 2,
    "history_length": 5,
    "train_batch_size": 32,
    "learning_rate": 0.02,
    "dropout_prob": 0.0,
    "client_num": 2,
    "show_progress": False,
}


@pytest.fixture(scope="session")
def daily(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_context_dataset(tmp_path_factory.mktemp("context"))


def prepared(daily: Path, model: str, **keys: Any) -> Any:
    config = FedKDConfig(model, "daily", config_dict={"data_path": str(daily), **SMALL, **keys})
    return config, *_prepare(config)


def test_what_lies_there_is_read_unless_told_otherwise(daily, caplog):
    def line(**keys: Any) -> str:
        caplog.clear()
        with caplog.at_level("INFO"):
            prepared(daily, "AttnStudent", **keys)
        (told,) = (message for message in caplog.messages if message.startswith("features:"))
        return told

    assert line() == (
        "features: user: group, height; item: kind; context: daytime, weather, tags; "
        "not used: visit (384 different values in 384; feature_fields names it to use it)"
    )
    left = "group, height, kind, weather, tags, visit (not in feature_fields)"
    assert line(feature_fields=["daytime"]) == f"features: user: none; item: none; context: daytime; not used: {left}"
    assert line(feature_fields=["visit"]).startswith("features: user: none; item: none; context: visit;")
    chosen = {"inter": ["user_id", "item_id", "rating", "timestamp", "visit"], "item": ["item_id", "kind"]}
    assert line(load_col=chosen) == "features: user: none; item: kind; context: visit"
    assert "tags (" not in line(unload_col={"inter": ["tags"]}) and "tags" not in line(unused_col={"inter": ["tags"]})


@pytest.mark.parametrize(("suffix", "key"), [("user", "USER_ID_FIELD"), ("item", "ITEM_ID_FIELD")])
def test_a_file_that_nobody_named_and_nothing_joins_is_left_out_with_a_word(tmp_path, suffix, key, caplog):
    caplog.set_level("WARNING")
    path = write_context_dataset(tmp_path / "data")
    file = path / "daily" / f"daily.{suffix}"
    file.write_text(file.read_text().replace(f"{suffix}_id:token", "who:token", 1))
    _, _, loaders, _ = prepared(path, "AttnStudent")
    features = loaders[0]._dataset.features
    assert (list(features.user), list(features.item)) == (
        ([], ["kind"]) if suffix == "user" else (["group", "height"], [])
    )
    (told,) = [each for each in caplog.messages if "is not read" in each]
    assert (
        f"daily.{suffix}' is not read: it has no column '{suffix}_id' ({key}) to join it by; its columns are who, "
        in told
    )
    for keys in ({"load_col": {"inter": ["rating", "timestamp"], suffix: "*"}}, {"unload_col": {suffix: ["kind"]}}):
        with pytest.raises(InputError, match=rf"has no column '{suffix}_id' \({key}\)"):
            prepared(path, "AttnStudent", **keys)


@pytest.mark.parametrize("label_mode", ["rating", "threshold", "implicit"])
def test_what_is_to_be_predicted_is_no_feature(daily, label_mode):
    _, _, loaders, _ = prepared(daily, "AttnStudent", label_mode=label_mode)
    assert list(loaders[0]._dataset.features.context) == ["daytime", "weather", "tags"]
    with pytest.raises(InputError, match="feature_fields names 'rating', but the loaded feature columns are"):
        prepared(daily, "AttnStudent", label_mode=label_mode, feature_fields=["rating"])


@pytest.mark.parametrize("label_mode", ["rating", "threshold", "implicit"])
def test_a_column_that_is_the_label_under_another_name_is_told(tmp_path, caplog, label_mode):
    rows = ["user_id:token\titem_id:token\trating:float\tliked:token\tnoise:token\tlabel:float"]
    generator = np.random.default_rng(0)
    for number in range(120):
        stars = int(generator.integers(1, 6))
        liked = int(stars >= 4)
        rows.append(
            f"u{number % 12}\ti{(number // 12 + number) % 15}\t{stars}\t{'ny'[liked]}\t{generator.integers(3)}\t{liked}"
        )
    (tmp_path / "leak").mkdir()
    (tmp_path / "leak" / "leak.inter").write_text("\n".join(rows) + "\n")
    keys = {"data_path": str(tmp_path), **SMALL, "history_length": 0, "label_mode": label_mode}
    with caplog.at_level("WARNING"):
        _, loaders, _ = _prepare(FedKDConfig("AttnStudent", "leak", config_dict=keys))
    assert list(loaders[0]._dataset.features.context) == ["liked", "noise"]
    told = [message for message in caplog.messages if "tells high labels from low" in message]
    assert len(told) == (label_mode != "implicit") and all("'liked'" in message for message in told)


def test_files_that_nobody_asked_for_bring_no_users_and_no_items(daily):
    _, _, loaders, _ = prepared(daily, "AttnStudent")
    dataset = loaders[0]._dataset
    assert dataset.item_num == 31 and len(dataset.item_feat) == 31 and "i34" not in dataset.field2token_id["item_id"]
    _, _, others, _ = prepared(daily, "MF", label_mode="threshold")
    assert others[0]._dataset.item_num == 31
    asked = {"inter": "*", "item": "*"}
    assert prepared(daily, "AttnStudent", load_col=asked)[2][0]._dataset.item_num == 36


def test_a_user_without_a_line_of_features_keeps_its_rows(tmp_path):
    folder = write_context_dataset(tmp_path)
    file = folder / "daily" / "daily.user"
    file.write_text("\n".join(file.read_text().splitlines()[:6]) + "\n")
    _, _, loaders, _ = prepared(folder, "AttnStudent")
    assert sum(len(loader._dataset) for loader in loaders) == 24 * 16
    group = loaders[0]._dataset.user_feat["group"]
    assert (group[1:6] > 0).all() and (group[6:] == 0).all()


def test_a_name_in_two_files_is_the_first_ones(tmp_path, caplog):
    caplog.set_level("WARNING")
    folder = write_context_dataset(tmp_path)
    file = folder / "daily" / "daily.item"
    file.write_text(file.read_text().replace("kind:token", "daytime:token"))
    _, _, loaders, _ = prepared(folder, "AttnStudent")
    assert list(loaders[0]._dataset.features.item) == []
    assert loaders[0]._dataset.num("daytime") == 1 + len(HOURS)
    assert "and the .inter file both have a column 'daytime'; that of .inter is read" in caplog.text
    asked = {"inter": "*", "item": "*"}
    with pytest.raises(InputError, match="both have a column 'daytime'"):
        prepared(folder, "AttnStudent", load_col=asked)


def test_the_history_holds_the_context_of_every_past_row(daily):
    _, _, loaders, _ = prepared(daily, "AttnStudent")
    dataset = loaders[0]._dataset
    rows = dataset.inter_feat
    weather = rows["weather"].double().numpy()
    mean, deviation = weather.mean(), weather.std()
    past = defaultdict(list)
    for row in range(len(rows)):
        past[int(rows["user_id"][row])].append(row)
    items, _, found = history_of(read_schema(dataset), all_rows(dataset), 6)
    for user in range(dataset.user_num):
        latest = sorted(past[user], key=lambda row: -int(rows["recency_rank"][row]))[:6]
        for slot in range(6):
            if slot >= len(latest):
                assert (
                    items[user, slot] == 0 and found["daytime"][user, slot] == 0 and not found["tags"][user, slot].any()
                )
                continue
            row = latest[slot]
            assert items[user, slot] == rows["item_id"][row]
            assert found["daytime"][user, slot] == rows["daytime"][row]
            assert torch.equal(found["tags"][user, slot], rows["tags"][row])
            assert float(found["weather"][user, slot]) == pytest.approx((weather[row] - mean) / deviation, abs=1e-5)


def vector_by_hand(network: AttentiveNetwork, field: str, value: torch.Tensor) -> torch.Tensor:
    """A field's vector for one value: a number, a token, or several tokens padded with 0."""
    name = f"field_{field}"
    if name in network.numbers:
        return value * network.numbers[name].weight[:, 0]
    tokens = [token for token in value.reshape(-1).tolist() if token or value.dim() == 0]
    table = network.embeddings[name].weight
    return torch.stack([table[token] for token in tokens]).mean(0) if tokens else torch.zeros(table.shape[1])


def test_a_past_interaction_is_the_sum_of_its_item_label_and_context(daily, monkeypatch):
    _, trainer, loaders, _ = prepared(daily, "AttnStudent")
    network, dataset = trainer.model.network.eval(), loaders[0]._dataset
    seen = []
    attend = type(network.history_attention).over
    monkeypatch.setattr(
        type(network.history_attention),
        "over",
        lambda own, query, past, items: (seen.append((query, past.keys())), attend(own, query, past, items))[1],
    )
    row = dataset[torch.tensor([7])]
    with torch.no_grad():
        trainer.model.predict(row)
        query, keys = seen[0]
        user = int(row["user_id"])
        items, labels, context = history_of(read_schema(dataset), all_rows(dataset), 6)
        for slot in range(6):
            expected = (
                vector_by_hand(network, "item_id", items[user, slot])
                + network.label_embedding.weight[:, labels[user, slot]]
            )
            for field, values in context.items():
                expected = expected + vector_by_hand(network, field, values[user, slot])
            torch.testing.assert_close(keys[0, slot], expected)
        own = {"item_id": row["item_id"][0], "kind": row["kind"][0]} | {
            k: v[0] for k, v in trainer.model.context_of(row).items()
        }
        target = torch.stack([vector_by_hand(network, field, value) for field, value in own.items()]).mean(0)
        torch.testing.assert_close(query[0, 0], target)


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("AttnStudent", {}),
        ("AttnFedKD", {"strategy": "local"}),
        ("AttnFedKD", {"strategy": "local", "engine": "fleet"}),
        ("AttnFedKD", {"strategy": "fedkd", "engine": "fleet", "teacher": {"hidden_sizes": [8, 8]}}),
    ],
)
def test_labels_that_only_the_hour_explains_are_learned_with_it_and_not_without(daily, model, keys):
    def auc(**more: Any) -> float:
        chosen = {
            "data_path": str(daily),
            **SMALL,
            "label_mode": "threshold",
            "epochs": 12,
            "metrics": ["AUC"],
            **keys,
            **more,
        }
        return run_recbole_fedkd(model, "daily", None, chosen, saved=False)["test_result"]["auc"]

    assert auc(feature_fields=["daytime", "kind"]) > 0.9
    assert auc(feature_fields=["kind", "weather"]) < 0.75


@pytest.mark.parametrize("label_mode", ["threshold", "implicit"])
@pytest.mark.parametrize(("partition", "strategy"), [("random", "feddf"), ("user", "fedavg"), ("user", "local")])
def test_both_engines_train_and_judge_in_the_same_context(daily, label_mode, partition, strategy):
    chosen = {
        "label_mode": label_mode,
        "partition": partition,
        "strategy": strategy,
        "dropout_prob": 0.2,
        "reg_weight": 1e-3,
        "unlabelled_pairs": 64,
    }
    _, local, loaders, _ = prepared(daily, "AttnFedKD", **chosen)
    _, fleet, _, _ = prepared(daily, "AttnFedKD", engine="fleet", **chosen)
    assert (local.engine.name, fleet.engine.name) == ("local", "fleet")
    for index in range(2):
        one, other = local.engine.run_round(index), fleet.engine.run_round(index)
        assert other.loss == pytest.approx(one.loss, rel=1e-4) and other.bytes_up == one.bytes_up
    rows = loaders[2]._dataset[torch.arange(8)]
    for trainer in (local, fleet):
        trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(fleet.model.predict(rows), local.model.predict(rows), rtol=1e-3, atol=1e-4)
        every = [trainer.model.full_sort_predict(rows).view(8, -1) for trainer in (local, fleet)]
        torch.testing.assert_close(every[1], every[0], rtol=1e-3, atol=1e-4)
        by_pair = rows.repeat_interleave(every[0].shape[1])
        by_pair["item_id"] = torch.arange(every[0].shape[1]).repeat(8)
        torch.testing.assert_close(local.model.predict(by_pair).view(8, -1), every[0])


def test_a_sampled_negative_has_the_context_of_its_row(daily):
    keys = {"label_mode": "implicit", "strategy": "local"}
    _, trainer, loaders, _ = prepared(daily, "AttnFedKD", **keys)
    rows = loaders[0]._dataset.inter_feat
    task = trainer.engine.clients[0].task
    samples = task._epoch_samples(task.draws.epoch())
    count = len(task.samples)
    assert len(samples) == 2 * count and (samples.labels[count:] == 0).all()
    for name, values in samples.context.items():
        assert torch.equal(values[count:], values[:count]), name
    held = {(int(u), int(i)): int(d) for u, i, d in zip(rows["user_id"], rows["item_id"], rows["daytime"], strict=True)}
    members = {
        int(trainer.model.local_id[u]): int(u) for u in torch.nonzero(trainer.model.client_of_user == 0).flatten()
    }
    for user, item, hour in zip(
        samples.users[:count], samples.items[:count], samples.context["daytime"][:count], strict=True
    ):
        assert held[members[int(user)], int(item)] == int(hour)


def test_a_checkpoint_predicts_what_the_run_predicted(daily, tmp_path):
    keys = {"data_path": str(daily), **SMALL, "label_mode": "threshold", "epochs": 2, "strategy": "fedavg"}
    result = run_recbole_fedkd("AttnFedKD", "daily", None, keys)
    config, model, _, _, _, test = load_data_and_model(result["run_folder"])
    from recbole_fedkd.quick_start import build_trainer

    again = build_trainer(config, model).evaluate(test, load_best_model=False)
    assert dict(again) == pytest.approx(result["test_result"])
    assert "in the context (daytime, weather, tags)" in result["protocols"]["hit@10"]


def test_columns_that_are_loaded_and_not_chosen_change_no_number(daily):
    def run(**keys: Any) -> Any:
        chosen = {"data_path": str(daily), **SMALL, "strategy": "fedavg", "epochs": 2, **keys}
        return run_recbole_fedkd("AttnFedKD", "daily", None, chosen, saved=False)["test_result"]

    four = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    assert run(feature_fields=[]) == run(load_col=four)


def test_a_row_without_its_context_is_refused_in_a_sentence(daily):
    _, trainer, _, _ = prepared(daily, "AttnStudent")
    with pytest.raises(InputError, match="the interaction has no column daytime, weather, tags"):
        trainer.model.full_sort_predict(Interaction({"user_id": torch.tensor([1, 2])}))


@pytest.mark.parametrize("buckets", [None, {"weather": {"method": "ED", "bucket": 4}}])
def test_numbers_that_recbole_prepares_are_read_as_well(daily, buckets):
    _, trainer, loaders, _ = prepared(daily, "AttnStudent", numerical_features=["weather"], discretization=buckets)
    assert loaders[0]._dataset.inter_feat["weather"].shape[1:] == (2,)
    network = trainer.model.network
    assert ("field_weather" in network.embeddings) == (buckets is not None)
    values = trainer.model.context_of(loaders[0]._dataset.inter_feat)["weather"]
    if buckets is None:
        assert float(values.mean()) == pytest.approx(0, abs=1e-5) and float(values.std(correction=0)) == pytest.approx(
            1, abs=1e-4
        )
    else:
        assert values.unique().tolist() == [1, 2, 3, 4]


def test_the_regulariser_counts_the_context_rows_of_batch_and_history_once(daily):
    _, trainer, loaders, _ = prepared(daily, "AttnStudent", feature_fields=["tags", "weather"])
    network, dataset = trainer.model.network, loaders[0]._dataset
    batch = dataset[torch.tensor([0, 1, 2])]
    users, items, context = batch["user_id"], batch["item_id"].unsqueeze(1), trainer.model.context_of(batch)
    context = {name: values.unsqueeze(1) for name, values in context.items()}
    past_items, _, past_context = history_of(read_schema(dataset), all_rows(dataset), 6)
    touched = set(batch["tags"].flatten().tolist()) | set(past_context["tags"][users].flatten().tolist())
    expected = network.embeddings["field_tags"].weight[sorted(touched)].pow(2).sum()
    expected += network.embeddings["field_user_id"].weight[users.unique()].pow(2).sum()
    past = torch.cat([items.flatten(), past_items[users].flatten()]).unique()
    expected += network.embeddings["field_item_id"].weight[past].pow(2).sum()
    expected += sum(
        weight.pow(2).sum() for name, weight in network.named_parameters() if not name.startswith("embeddings.")
    )
    torch.testing.assert_close(network.touched_squared_norm(users, items, context), expected)
