"""Time order by the file's own numbers, ties, and what is said of the rows that are held out."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.data.order import HeldOutRows
from recbole_fedkd.errors import InputError
from recbole_fedkd.quick_start import _prepare, create_dataset

LEAVE_ONE_OUT = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": None}
BY_USER = {"split": {"RS": [8, 1, 1]}, "order": "TO", "group_by": "user"}
ALL_ROWS = {"split": {"RS": [8, 1, 1]}, "order": "TO", "group_by": None}
BY_TIME = {"split": {"TS": [8, 1, 1]}, "order": "TO", "group_by": "user"}


def write(folder, rows, name="dated", header="user_id:token\titem_id:token\ttimestamp:float"):
    target = Path(folder) / name
    target.mkdir(parents=True, exist_ok=True)
    lines = [header, *("\t".join(map(str, row)) for row in rows)]
    (target / f"{name}.inter").write_text("\n".join(lines) + "\n")
    return folder


def config_of(folder, model="BPR", **keys):
    keys = {
        "label_mode": None, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "state": "ERROR",
        "data_path": str(folder), "show_progress": False, **keys,
    }  # fmt: skip
    keys["eval_args"] = {"mode": "full" if keys["label_mode"] else "uni1", **keys.get("eval_args", LEAVE_ONE_OUT)}
    return FedKDConfig(model, keys.pop("dataset", "dated"), config_dict=keys)


def built(folder, model="BPR", **keys):
    """The dataset and its splits."""
    dataset = create_dataset(config_of(folder, model, **keys))
    return dataset, dataset.build()


def pairs(split):
    """User and item tokens of a split's rows, in order."""
    tokens = split.field2id_token
    users, items = (tokens[field][split.inter_feat[field].numpy()].tolist() for field in ("user_id", "item_id"))
    return list(zip(users, items, strict=True))


def newest_first(times):
    """20 users x 10 rows at ten moments, the latest of each user on top; the item is named by its place in time."""
    return [(f"u{user}", f"i{place}", times[place]) for user in range(20) for place in range(9, -1, -1)]


MOMENTS = {
    "seconds": [1_700_000_000 + second for second in range(10)],
    "milliseconds": [1_700_000_000_000 + each for each in range(10)],
    "nanoseconds": [1_700_000_000_000_000_000 + each for each in range(10)],
    "fractions": [f"1700000000.{each}" for each in range(10)],
    "before 1970": [-1_700_000_000 + second for second in range(10)],
    "around zero": [-5 + second for second in range(10)],
    "exponents": [f"{1.7e9 + second:.9e}" for second in range(10)],
}


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"label_mode": "implicit"},
        {"normalize_all": True},
        {"label_mode": "implicit", "normalize_all": True},
        {"model": "SASRec", "train_neg_sample_args": None},
        {"model": "DIN"},
        {"model": "DIEN"},
        {"model": "DIN", "label_mode": "implicit"},
    ],
    ids=str,
)
def test_the_latest_is_held_out_whatever_the_unit_and_the_model(tmp_path, kind, keys):
    _, splits = built(write(tmp_path, newest_first(MOMENTS[kind])), **keys)
    assert sorted(pairs(splits[2])) == sorted((f"u{user}", "i9") for user in range(20))
    assert sorted(pairs(splits[1])) == sorted((f"u{user}", "i8") for user in range(20))
    assert splits[2].held_out == HeldOutRows(20, 0, 0)


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
def test_a_ratio_of_each_user_in_time_order_trains_on_the_earliest_rows(tmp_path, model):
    folder = write(tmp_path, newest_first(MOMENTS["seconds"]))
    _, splits = built(folder, model, eval_args=BY_USER, train_neg_sample_args=None if model == "SASRec" else {})
    first = 1 if model == "SASRec" else 0  # there, a user's first row is only history
    expected = [range(first, 8), [8], [9]]
    for split, places in zip(splits, expected, strict=True):
        assert sorted(pairs(split)) == sorted((f"u{user}", f"i{place}") for user in range(20) for place in places)


@pytest.mark.parametrize(
    "eval_args",
    [ALL_ROWS, BY_TIME, {**BY_TIME, "order": "RO"}],
    ids=["ratio of all rows", "by time", "by time, whatever the order"],
)
def test_the_latest_of_all_rows_are_held_out(tmp_path, eval_args):
    # Users' rows interleave, a nanosecond apart, in random order.
    generator = np.random.default_rng(3)
    rows = [(f"u{place % 7}", f"i{place}", 1_700_000_000_000_000_000 + place) for place in range(100)]
    generator.shuffle(rows)
    _, splits = built(write(tmp_path, rows), eval_args=eval_args)
    assert {item for _, item in pairs(splits[2])} == {f"i{place}" for place in range(90, 100)}
    if "RS" in eval_args["split"]:
        assert {item for _, item in pairs(splits[1])} == {f"i{place}" for place in range(80, 90)}
    for user in {user for user, _ in pairs(splits[1])}:
        latest = [max((int(item[1:]) for each, item in pairs(split) if each == user)) for split in splits[:2]]
        assert latest[0] < latest[1]


def slowly_split(rows, mode):
    """Train, validation and test rows in plain Python; the sort is stable, so equal times stay in file order."""
    users = list(dict.fromkeys(user for user, _, _ in rows))
    parts = [[], [], []]
    for user in users:
        own = sorted((row for row in rows if row[0] == user), key=lambda row: row[2])
        held = min(2, len(own) - 1) if mode == "LS" else None
        if mode == "LS":
            cuts = [len(own) - held, len(own) - max(held - 1, 0)] if held else [len(own)] * 2
            if held == 1:
                cuts = [len(own) - 1, len(own) - 1]
        else:
            sizes = [0, int(len(own) * 0.1), int(len(own) * 0.1)]
            sizes[0] = len(own) - sum(sizes[1:])
            for place in (2, 1):
                if sizes[0] > 1 and 0 < len(own) * 0.1 < 1:
                    sizes[place] += 1
                    sizes[0] -= 1
            cuts = [sizes[0], sizes[0] + sizes[1]]
        for part, piece in zip(parts, (own[: cuts[0]], own[cuts[0] : cuts[1]], own[cuts[1] :]), strict=True):
            part.extend(piece)
    return parts


def slowly_tied(parts, number):
    others = {(user, time) for place, part in enumerate(parts) if place != number for user, _, time in part}
    return sum((user, time) in others for user, _, time in parts[number])


@given(
    moments=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(-3, 8)), min_size=12, max_size=60),
    start=st.sampled_from([0, 1_700_000_000, 1_700_000_000_000_000_000]),
    mode=st.sampled_from(["LS", "RS"]),
    label_mode=st.sampled_from([None, "implicit"]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_splits_ties_and_repetitions_equal_a_slow_version(tmp_path, moments, start, mode, label_mode):
    rows = [(f"u{user}", f"i{item}", start + time) for user, item, time in dict.fromkeys(moments)]
    expected = slowly_split(rows, mode)
    eval_args = LEAVE_ONE_OUT if mode == "LS" else BY_USER
    _, splits = built(write(tmp_path, rows), eval_args=eval_args, label_mode=label_mode)
    trained = {row[:2] for row in expected[0]}
    for number, (split, part) in enumerate(zip(splits, expected, strict=True)):
        assert sorted(pairs(split)) == sorted(row[:2] for row in part)
        if number:
            repeated = sum(row[:2] in trained for row in part)
            assert split.held_out == HeldOutRows(len(part), slowly_tied(expected, number), repeated)


def test_ties_decide_415_of_943_test_rows_of_ml_100k_and_none_is_older_than_what_is_trained_on():
    config = FedKDConfig(
        "BPR", "ml-100k", config_dict={"label_mode": "implicit", "eval_args": {**LEAVE_ONE_OUT, "mode": "full"}}
    )
    dataset = create_dataset(config)
    file = Path(config["data_path"]) / "ml-100k.inter"
    rows = [line.split("\t") for line in file.read_text().splitlines()[1:]]
    train, _, test = dataset.build()
    assert (test.held_out.rows, test.held_out.tied, test.held_out.repeated) == (943, 415, 0)
    time_of = {(user, item): float(time) for user, item, _, time in rows}
    latest = {}
    for user, _, _, time in rows:
        latest[user] = max(float(time), latest.get(user, 0))
    assert all(time_of[user, item] == latest[user] for user, item in pairs(test))
    # Among a user's latest, the one that stands last in the file.
    last = {user: item for user, item, _, time in rows if float(time) == latest[user]}
    assert dict(pairs(test)) == last
    assert "recency_rank" in train.inter_feat


@pytest.mark.parametrize("model", ["SASRec", "DIN", "DIEN", "GRU4Rec"])
def test_histories_of_sequential_models_are_in_time_order(tmp_path, model):
    keys = {} if model in ("DIN", "DIEN") else {"train_neg_sample_args": None}
    dataset, splits = built(write(tmp_path, newest_first(MOMENTS["seconds"])), model, **keys)
    items = dataset.field2id_token["item_id"]
    for split in splits:
        rows = split.inter_feat
        for target, history, length in zip(
            rows["item_id"], rows["item_id_list"], rows["item_length"].tolist(), strict=True
        ):
            place = int(items[target][1:])
            assert items[history[:length].numpy()].tolist() == [f"i{earlier}" for earlier in range(place)]
        assert not [name for name in rows.columns if name.startswith("recency")], "a model is shown a column of ours"
        assert rows["timestamp"].dtype == torch.float64


def test_negatives_of_dien_are_those_of_the_row_that_they_stand_beside(tmp_path):
    # RecBole samples them row by row and then sorts the rows, but not the negatives.
    _, splits = built(write(tmp_path, newest_first(MOMENTS["seconds"])), "DIEN")
    for split in splits:
        rows = split.inter_feat
        some = torch.arange(rows["item_id_list"].shape[1]) < rows["item_length"].unsqueeze(1)
        assert (rows["neg_item_id_list"] != rows["item_id_list"])[some].all()


def test_history_of_an_attentive_client_and_of_din_on_labelled_rows_is_the_latest(tmp_path):
    folder = write(tmp_path, newest_first(MOMENTS["nanoseconds"]))
    dataset, splits = built(folder, "DIN", label_mode="implicit", MAX_ITEM_LIST_LENGTH=3)
    names = dataset.field2id_token["item_id"]
    items, _ = splits[0].history(3)
    assert names[items[1]].tolist() == ["i7", "i6", "i5", "i4"]
    joined = splits[2][torch.tensor([0])]
    assert names[joined["item_id_list"][0]].tolist() == ["i5", "i6", "i7"]


def test_places_beyond_what_32_bits_tell_apart_are_in_order(tmp_path):
    _, splits = built(write(tmp_path, newest_first(MOMENTS["seconds"])), label_mode="implicit")
    train = splits[0]
    assert train.inter_feat["recency_rank"].dtype == torch.int64
    expected, _ = train.history(4)
    train.inter_feat["recency_rank"] = train.inter_feat["recency_rank"] + 2**40
    assert torch.equal(train.history(4)[0], expected)
    assert expected[1:].unique(dim=0).shape[0] == 1  # all users have the same history


def test_benchmark_files_keep_their_own_split_and_order(tmp_path):
    rows = newest_first(MOMENTS["seconds"])
    write(tmp_path, rows[:100])
    folder = Path(tmp_path) / "dated"
    header, *lines = (folder / "dated.inter").read_text().splitlines()
    for name, part in (("one", lines[:60]), ("two", lines[60:80]), ("three", lines[80:])):
        (folder / f"dated.{name}.inter").write_text("\n".join([header, *part]) + "\n")
    for label_mode in (None, "implicit"):
        _, splits = built(tmp_path, benchmark_filename=["one", "two", "three"], label_mode=label_mode)
        for split, part in zip(splits, (rows[:60], rows[60:80], rows[80:100]), strict=True):
            assert pairs(split) == [row[:2] for row in part]
        assert splits[2].held_out == HeldOutRows(20, None, 0)


@pytest.mark.parametrize(("keep", "kept"), [("first", "early"), ("last", "late")])
def test_of_repeated_pairs_the_first_or_last_in_time_stays_and_of_equal_times_that_in_the_file(tmp_path, keep, kept):
    start = 1_700_000_000
    rows = [("u1", "i1", start + 1, "late"), ("u1", "i1", start, "early"), ("u1", "i2", start + 5, "early")]
    rows += [("u1", "i2", start + 5, "between"), ("u1", "i2", start + 5, "late"), ("u2", "i1", start, kept)]
    header = "user_id:token\titem_id:token\ttimestamp:float\twhich:token"
    folder = write(tmp_path, rows, header=header)
    load = {"inter": ["user_id", "item_id", "timestamp", "which"]}
    dataset = create_dataset(config_of(folder, load_col=load, rm_dup_inter=keep))
    assert len(dataset.inter_feat) == 3
    assert set(dataset.field2id_token["which"][dataset.inter_feat["which"].to_numpy()]) == {kept}


def with_contexts():
    """Users meet the same two items over and over, in another context each time, as in logs of apps."""
    others = [("u9", f"i{item}", 0, "hour0") for item in (7, 8, 9)]
    return [
        (f"u{user}", f"i{(user + turn) % 2}", turn, f"hour{turn}") for user in range(5) for turn in range(6)
    ] + others


CONTEXT = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp", "hour"]}, "label_mode": "implicit", "metrics": ["AUC", "Hit"],
    "valid_metric": "AUC", "topk": [1],
}  # fmt: skip


def test_repeated_pairs_are_counted_and_the_key_that_decides_is_named(tmp_path, caplog):
    header = "user_id:token\titem_id:token\ttimestamp:float\thour:token"
    folder = write(tmp_path, with_contexts(), header=header)
    with caplog.at_level(logging.WARNING):
        *_, evaluations = _prepare(config_of(folder, "MF", **CONTEXT))
    told = [protocol.name for protocol in evaluations[1]]
    assert all(
        "5 of 6 rows repeat a pair of user and item of the training rows, rm_dup_inter=None" in name for name in told
    )
    (warning,) = [record.message for record in caplog.records if "repeat" in record.message]
    assert warning.startswith("5 of 6 validation rows and 5 of 6 test rows") and "rm_dup_inter" in warning
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        _, splits = built(folder, "MF", **CONTEXT, rm_dup_inter="last")
    assert [len(split) for split in splits] == [6, 1, 6], "one row of each pair stays: nothing is left to repeat"
    assert splits[2].held_out.repeated == 0
    assert not [record for record in caplog.records if "repeat" in record.message]


def test_repeated_pairs_of_sequential_models_include_what_is_only_history(tmp_path):
    # i9 is each user's first and last: RecBole's rows for SASRec have no row whose target is the first.
    rows = [(f"u{user}", item, place) for user in range(4) for place, item in enumerate(["i9", "i1", "i2", "i3", "i9"])]
    _, splits = built(write(tmp_path, rows), "SASRec", train_neg_sample_args=None)
    assert splits[2].held_out == HeldOutRows(4, 0, 4)


def test_ties_are_part_of_the_protocol(tmp_path):
    rows = [(f"u{user}", f"i{place}", 7 if user < 3 else place) for user in range(5) for place in range(6)]
    keys = {"label_mode": "implicit", "metrics": ["Hit"], "topk": [1], "valid_metric": "Hit@1"}
    folder = write(tmp_path, rows + [("u9", f"i{place}", 0) for place in range(6, 9)])
    *_, evaluations = _prepare(config_of(folder, "MF", **keys))
    (protocol,) = evaluations[1]
    assert protocol.name == (
        "full sort of all items, relevant: held-out test rows (leave-one-out, the latest of each user; "
        "file order among equal times decided 4 of 6)"
    )


def test_order_by_time_without_a_time_is_refused_by_name(tmp_path):
    folder = write(tmp_path, newest_first(MOMENTS["seconds"]))
    load = {"inter": ["user_id", "item_id"]}
    for eval_args in (LEAVE_ONE_OUT, BY_TIME):
        with pytest.raises(InputError, match="needs timestamps, but no column 'timestamp' is loaded"):
            _prepare(config_of(folder, load_col=load, eval_args=eval_args))
