"""Interval keys mean the same in a file, a dictionary and on the command line; transforms run or are refused by name."""

from collections import Counter

import numpy as np
import pytest
import yaml
from recbole.data import transform

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.errors import InputError
from recbole_fedkd.quick_start import create_dataset

# Interactions of users 0..5, and the stars of each in turn.
ROWS = {0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6}
WAYS = ["dict", "file", "command line"]


@pytest.fixture(scope="module")
def counted_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "counted").mkdir()
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user, rows in ROWS.items():
        lines += [f"u{user}\ti{user}{row}\t{row}\t{row}" for row in range(rows)]
    (folder / "counted" / "counted.inter").write_text("\n".join(lines) + "\n")
    return folder


def config_of(way, path, folder, **keys):
    base = {"data_path": str(path), "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]}}
    if way == "dict":
        return FedKDConfig("BPR", "counted", config_dict={**base, **keys})
    if way == "command line":
        return FedKDConfig("BPR", "counted", config_dict=base, command_line={k: str(v) for k, v in keys.items()})
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(keys))
    return FedKDConfig("BPR", "counted", [str(file)], base)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("interval", "users"),
    [
        ("[2,3]", [1, 2]),
        ("(2,3]", [2]),
        ("[2,3)", [1]),
        ("(2,5)", [2, 3]),
        ("[4,4]", [3]),
        ("[ 2 , 3 ]", [1, 2]),
        ("(2,inf)", [2, 3, 4, 5]),
        ("[2,inf]", [1, 2, 3, 4, 5]),
        ("(-inf,2]", [0, 1]),
        ("[2,3);[5,inf)", [1, 4, 5]),
        ("[1,1];(3,4]", [0, 3]),
        ("[1,1]; [6,6]", [0, 5]),
        ("[2.0,3.0]", [1, 2]),
    ],
)
def test_user_intervals_keep_whom_they_name(counted_path, tmp_path, way, interval, users):
    dataset = create_dataset(config_of(way, counted_path, tmp_path, user_inter_num_interval=interval))
    kept = Counter(dataset.id2token("user_id", np.asarray(dataset.inter_feat["user_id"])))
    assert kept == {f"u{user}": ROWS[user] for user in users}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("interval", [[2, 3], "[2,3]"])
@pytest.mark.parametrize("key", ["user_inter_num_interval", "item_inter_num_interval"])
def test_a_list_of_two_numbers_is_a_closed_interval(counted_path, tmp_path, way, interval, key):
    assert config_of(way, counted_path, tmp_path, **{key: interval})[key] == "[2,3]"


def test_a_pair_in_round_brackets_is_an_open_interval(counted_path):
    keys = {"data_path": str(counted_path), "item_inter_num_interval": (2, float("inf"))}
    assert FedKDConfig("BPR", "counted", config_dict=keys)["item_inter_num_interval"] == "(2,inf)"


@pytest.mark.parametrize("key", ["entity_kg_num_interval", "relation_kg_num_interval"])
def test_intervals_of_a_knowledge_graph_are_intervals_too(key):
    assert FedKDConfig("CKE", "ml-100k", command_line={key: "[2,30]"})[key] == "[2,30]"
    with pytest.raises(InputError, match=f"{key} is 'often'; it must be an interval"):
        FedKDConfig("CKE", "ml-100k", command_line={key: "often"})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("interval", "stars"),
    [
        ("[3,4]", {3, 4}),
        ([3, 4], {3, 4}),
        ("(3,inf)", {4, 5}),
        ("(-inf,2);(4,inf)", {0, 1, 5}),
        ("[0,0]", {0}),
    ],
)
def test_val_interval_keeps_rows_by_value(counted_path, tmp_path, way, interval, stars):
    dataset = create_dataset(config_of(way, counted_path, tmp_path, val_interval={"rating": interval}))
    expected = Counter(row for rows in ROWS.values() for row in range(rows) if row in stars)
    assert Counter(dataset.inter_feat["rating"].astype(int).tolist()) == expected


def test_val_interval_of_a_token_column_lists_tokens(counted_path, tmp_path):
    dataset = create_dataset(config_of("dict", counted_path, tmp_path, val_interval={"user_id": ["u1", "u4"]}))
    assert set(dataset.id2token("user_id", np.asarray(dataset.inter_feat["user_id"]))) == {"u1", "u4"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("wrong", [5, "5", "[3,2]", "[2,3", "2,3", "[a,b]", "[1,2,3]", "", "[]", "(2,2)", "[nan,3]"])
def test_what_is_no_interval_is_refused_by_the_key(counted_path, tmp_path, way, wrong):
    with pytest.raises(InputError, match=r"user_inter_num_interval is .*; it must be an interval such as \[2,inf\)"):
        config_of(way, counted_path, tmp_path, user_inter_num_interval=wrong)


def test_val_interval_names_the_column_whose_interval_is_none(counted_path, tmp_path):
    with pytest.raises(InputError, match=r"val_interval\.rating is 'good'; it must be an interval"):
        config_of("dict", counted_path, tmp_path, val_interval={"rating": "good"})
    with pytest.raises(InputError, match=r"val_interval is \[3, 4\]; it must be a dict of columns and intervals"):
        config_of("dict", counted_path, tmp_path, val_interval="[3,4]")


SEQUENTIAL = {"MAX_ITEM_LIST_LENGTH": 6, "train_neg_sample_args": None, "hidden_size": 8, "embedding_size": 4}


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("BERT4Rec", {"transform": "mask_itemseq", "mask_ratio": 0.4, "hidden_size": 8, "n_layers": 1}),
        ("SHAN", {"transform": "inverse_itemseq"}),
        ("GRU4Rec", {"transform": "crop_itemseq", "eta": 0.6}),
        ("GRU4Rec", {"transform": "reorder_itemseq", "beta": 0.9}),
        ("GRU4Rec", {"transform": "mask_itemseq", "mask_ratio": 0.5}),
        ("GRU4Rec", {"transform": "inverse_itemseq"}),
    ],
)
def test_a_run_with_a_transform_trains_and_resumes(run, model, keys):
    keys = {**SEQUENTIAL, **keys, "load_col": None}
    first = run(model, epochs=1, **keys)
    assert first["test_result"]
    assert run(model, epochs=2, resume=first["run_folder"], **keys)["timing"]["rounds"] == 2


def test_cropping_keeps_a_share_and_reordering_every_item(prepared):
    _, _, loaders, _ = prepared("GRU4Rec", **SEQUENTIAL, transform="crop_itemseq", eta=0.5)
    for batch in loaders[0]:
        for sequence, length, crop in zip(
            batch["item_id_list"].tolist(),
            batch["item_length"].tolist(),
            batch["Crop_item_id_list"].tolist(),
            strict=True,
        ):
            kept = [item for item in crop if item]
            assert len(kept) == length // 2
            assert any(sequence[start : start + len(kept)] == kept for start in range(length - len(kept) + 1))
    _, _, loaders, _ = prepared("GRU4Rec", **SEQUENTIAL, transform="reorder_itemseq", beta=1.0)
    batch = next(iter(loaders[0]))
    order = batch["Reorder_item_id_list"].numpy()
    assert (np.sort(order) == np.sort(batch["item_id_list"].numpy())).all()
    assert (order != batch["item_id_list"].numpy()).any()


@pytest.mark.parametrize(
    ("model", "keys", "says"),
    [
        (
            "GRU4Rec",
            {"transform": "crop"},
            "transform 'crop' is unknown; it must be one of mask_itemseq, inverse_itemseq, crop_itemseq",
        ),
        ("GRU4Rec", {"transform": "crop_itemseq"}, "transform=crop_itemseq needs eta, which is None"),
        ("GRU4Rec", {"transform": "crop_itemseq", "eta": 2}, r"eta is 2; it must be a number in \[0, 1\]"),
        ("GRU4Rec", {"transform": "reorder_itemseq", "beta": -1}, "transform=reorder_itemseq needs beta, which is -1"),
        ("GRU4Rec", {"transform": "mask_itemseq", "mask_ratio": 0.1}, "is less than one item to hide"),
        (
            "BERT4Rec",
            {"transform": "crop_itemseq", "eta": 0.5},
            "model 'BERT4Rec' reads what transform=mask_itemseq makes",
        ),
        ("SHAN", {"transform": "reorder_itemseq"}, "model 'SHAN' reads what transform=inverse_itemseq makes"),
        ("BPR", {"transform": "inverse_itemseq"}, "model 'BPR' does not have"),
        ("GRU4Rec", {"transform": "user_defined"}, "UserDefinedTransform is empty"),
        ("GRU4Rec", {"et": 0.5}, "key 'et' is unknown; did you mean 'eta'"),
    ],
)
def test_a_transform_that_cannot_run_is_refused_before_training(model, keys, says):
    sequential = SEQUENTIAL if model != "BPR" else {}
    with pytest.raises(InputError, match=says):
        FedKDConfig(model, "tiny", config_dict={**sequential, **keys})


def test_a_transform_of_the_users_own_is_called(prepared, monkeypatch):
    class Doubled:
        def __init__(self, config):
            pass

        def __call__(self, dataset, interaction):
            interaction["item_length"] *= 2
            return interaction

    _, _, plain, _ = prepared("GRU4Rec", **SEQUENTIAL)
    lengths = next(iter(plain[0]))["item_length"]
    monkeypatch.setattr(transform, "UserDefinedTransform", Doubled)
    _, _, doubled, _ = prepared("GRU4Rec", **SEQUENTIAL, transform="user_defined")
    assert (next(iter(doubled[0]))["item_length"] == 2 * lengths).all()
