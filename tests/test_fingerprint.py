"""A checkpoint knows its data: the same rows in any order give the same run, other data are told in a sentence."""

import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL, write_dataset

from recbole_fedkd import load_data_and_model, run_recbole_fedkd
from recbole_fedkd.checkpoint.reading import read_checkpoint
from recbole_fedkd.checkpoint.sealed import write_sealed
from recbole_fedkd.data.fingerprint import Fingerprint, row_hashes
from recbole_fedkd.errors import InputError
from recbole_fedkd.quick_start import build_trainer

# Models of all kinds of rows: labelled ones in a federation and centrally, RecBole's pairs, its own sequences.
RUNS = {
    "AttnFedKD": {"model": "AttnFedKD", "switch_threshold": 0.05, "switch_reach": 1e9},
    "AttnStudent": {"model": "AttnStudent", "label_mode": "rating"},
    "BPR": {"model": "BPR", "eval_args": {"order": "RO", "split": {"RS": [0.8, 0.1, 0.1]}}},
    "SASRec": {"model": "SASRec", "MAX_ITEM_LIST_LENGTH": 4, "train_neg_sample_args": None, "n_layers": 1},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows of which many share their time, so that their order in the file decides something."""
    folder = write_dataset(tmp_path_factory.mktemp("data"))
    file = folder / "tiny" / "tiny.inter"
    header, *rows = file.read_text().splitlines()
    rows = [row.rsplit("\t", 1)[0] + f"\t{int(row.rsplit(chr(9), 1)[1]) // 50}" for row in rows]
    random.Random(1).shuffle(rows)
    file.write_text("\n".join([header, *rows]) + "\n")
    return folder


def start(data: Path, epochs: int = 2, **keys):
    return run_recbole_fedkd(dataset="tiny", config_dict={"data_path": str(data), **SMALL, **keys, "epochs": epochs})


def edited(data: Path, to: Path, change, name: str = "tiny.inter") -> Path:
    """A copy of the data whose rows are changed by a function from header and rows to header and rows."""
    shutil.copytree(data, to)
    file = to / "tiny" / name
    header, *rows = file.read_text().splitlines()
    header, rows = change(header, rows)
    file.write_text("\n".join([header, *rows]) + "\n")
    return to


def shuffled(header, rows):
    return header, random.Random(5).sample(rows, len(rows))


@pytest.mark.parametrize("name", RUNS)
def test_rows_in_another_order_are_the_same_data(data, tmp_path, name):
    result = start(data, **RUNS[name])
    other = edited(data, tmp_path / "other", shuffled)
    for file in ("tiny.user", "tiny.item"):
        header, *rows = (other / "tiny" / file).read_text().splitlines()
        (other / "tiny" / file).write_text("\n".join([header, *rows[::-1]]) + "\n")
    loaded = [load_data_and_model(result["run_folder"], {"data_path": str(each)}) for each in (data, other)]
    results = [dict(build_trainer(each[0], each[1]).evaluate(each[5], load_best_model=False)) for each in loaded]
    assert results[0] == results[1] == result["test_result"]
    first, second = (each[2] for each in loaded)
    assert list(first.field2id_token["user_id"]) == list(second.field2id_token["user_id"])
    assert all(torch.equal(first.inter_feat[field], second.inter_feat[field]) for field in first.inter_feat.interaction)


@pytest.mark.parametrize("name", ["AttnFedKD", "BPR"])
def test_a_run_resumed_on_shuffled_rows_ends_as_one_never_stopped(data, tmp_path, name):
    whole = start(data, epochs=3, **RUNS[name])
    part = start(data, epochs=1, **RUNS[name])
    other = edited(data, tmp_path / "other", shuffled)
    resumed = start(other, epochs=3, **RUNS[name], resume=part["run_folder"])
    assert resumed["test_result"] == whole["test_result"]
    ends = [read_checkpoint(each["run_folder"])["state_dict"] for each in (whole, resumed)]
    assert all(torch.equal(each, ends[1][key]) for key, each in ends[0].items())
    again = start(edited(data, tmp_path / "third", shuffled), epochs=3, **RUNS[name], resume=resumed["run_folder"])
    assert again["test_result"] == whole["test_result"]


def one_more_row(header, rows):
    user, item, rating, time = rows[0].split("\t")
    return header, [*rows, "\t".join([user, "i39" if item != "i39" else "i38", rating, str(int(time) + 1)])]


def one_more_user(header, rows):
    return header, [*rows, "u99" + rows[0][rows[0].index("\t") :]]


def one_less_row(header, rows):
    return header, rows[1:]


def one_rating_changed(header, rows):
    user, item, rating, time = rows[3].split("\t")
    return header, [*rows[:3], "\t".join([user, item, "1" if rating != "1" else "2", time]), *rows[4:]]


def two_users_swapped(header, rows):
    return header, [row.replace("u1\t", "u0\t", 1) if row.startswith("u1\t") else row.replace("u0\t", "u1\t", 1)
                    if row.startswith("u0\t") else row for row in rows]  # fmt: skip


def rating_renamed(header, rows):
    return header.replace("rating:float", "stars:float"), rows


def columns_swapped(header, rows):
    swap = [line.split("\t") for line in (header, *rows)]
    swapped = ["\t".join([user, item, time, rating]) for user, item, rating, time in swap]
    return swapped[0], swapped[1:]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (one_more_row, "has 601 rows, which was 600"),
        (one_less_row, "has 599 rows, which was 600"),
        (one_more_user, "601 rows, which was 600 and 31 different 'user_id', which was 30"),
        (one_rating_changed, r"has as many rows \(600\) as it had, with other values in them"),
        (two_users_swapped, "with other values in them"),
        (columns_swapped, "has its columns in another order"),
    ],
)
def test_other_data_are_told_in_one_sentence(data, tmp_path, change, told):
    result = start(data, epochs=1, **RUNS["AttnStudent"])
    other = edited(data, tmp_path / "other", change)
    uses = [
        lambda: load_data_and_model(result["run_folder"], {"data_path": str(other)}),
        lambda: start(other, **RUNS["AttnStudent"], resume=result["run_folder"]),
    ]
    for use in uses:
        with pytest.raises(
            InputError, match=rf"the data are not those of checkpoint .*: file \.inter .*{told}"
        ) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_column_that_is_gone_and_one_that_is_new_are_named(data, tmp_path):
    keys = {"model": "BPR", "load_col": None}
    result = start(data, epochs=1, **keys)
    other = edited(data, tmp_path / "other", rating_renamed)
    with pytest.raises(InputError, match=r"file \.inter lacks column\(s\) rating and has new column\(s\) stars"):
        load_data_and_model(result["run_folder"], {"data_path": str(other)})


def test_a_changed_side_feature_and_a_missing_file_are_noticed(data, tmp_path):
    result = start(data, epochs=1, **RUNS["AttnStudent"])
    other = edited(data, tmp_path / "other", lambda header, rows: (header, ["u0\tb", *rows[1:]]), "tiny.user")
    with pytest.raises(InputError, match=r"file \.user has as many rows"):
        load_data_and_model(result["run_folder"], {"data_path": str(other)})
    shutil.copytree(data, tmp_path / "third")
    (tmp_path / "third" / "tiny" / "tiny.item").unlink()
    with pytest.raises(InputError, match=r"\.item is missing"):
        load_data_and_model(result["run_folder"], {"data_path": str(tmp_path / "third")})


def test_the_best_checkpoint_alone_loads_and_says_what_other_orders_need(data, tmp_path):
    result = start(data, epochs=1, **RUNS["BPR"])
    alone = shutil.copy(Path(result["run_folder"]) / "best.pth", tmp_path / "model.pth")
    load_data_and_model(alone)
    other = edited(data, tmp_path / "other", shuffled)
    with pytest.raises(InputError, match=r"another order .* rows.pth"):
        load_data_and_model(alone, {"data_path": str(other)})


def test_rows_that_are_split_in_another_way_are_noticed(data, monkeypatch):
    from recbole.data.dataset import Dataset

    result = start(data, epochs=1, **RUNS["BPR"])
    monkeypatch.setattr(Dataset, "_calcu_split_ids", lambda self, tot, ratios: [tot // 2, tot * 3 // 4])
    with pytest.raises(InputError, match="they are split in another way"):
        load_data_and_model(result["run_folder"])


def test_a_fingerprint_without_splits_is_refused(data):
    state = read_checkpoint(start(data, **RUNS["AttnStudent"], epochs=1)["run_folder"])
    write_sealed({**state, "data": {**state["data"], "splits": {}}}, Path("crafted.pth"))
    with pytest.raises(InputError, match="split in another way"):
        load_data_and_model("crafted.pth")


def test_benchmark_files_are_restored_each_by_itself(data, tmp_path):
    source = tmp_path / "parts" / "tiny"
    source.mkdir(parents=True)
    header, *rows = (data / "tiny" / "tiny.inter").read_text().splitlines()
    parts = {"train": rows[:400], "valid": rows[400:500], "test": rows[500:]}
    for name, part in parts.items():
        (source / f"tiny.{name}.inter").write_text("\n".join([header, *part]) + "\n")
    keys = {"model": "BPR", "benchmark_filename": list(parts), "load_col": {"inter": ["user_id", "item_id"]}}
    result = start(tmp_path / "parts", epochs=1, **keys)
    for name, part in parts.items():
        (source / f"tiny.{name}.inter").write_text("\n".join([header, *part[::-1]]) + "\n")
    config, model, _, _, _, test = load_data_and_model(result["run_folder"])
    assert dict(build_trainer(config, model).evaluate(test, load_best_model=False)) == result["test_result"]
    (source / "tiny.valid.inter").write_text("\n".join([header, *parts["valid"], *parts["test"][:1]]) + "\n")
    with pytest.raises(InputError, match=r"file \.valid\.inter has 101 rows"):
        load_data_and_model(result["run_folder"])


def test_nothing_that_a_run_writes_holds_a_token_or_a_row(data, tmp_path):
    secret = edited(data, tmp_path / "other", lambda header, rows: (header, ["zz" + row for row in rows]))
    keys = {**RUNS["AttnStudent"], "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]}}
    one, other = (Path(start(secret, epochs=1, **keys)["run_folder"]) for _ in range(2))
    for file in one.glob("*.pth"):
        assert b"zzu" not in file.read_bytes(), file
    # The key is another one for every run: what one run's digests tell says nothing about another's.
    prints = [read_checkpoint(each)["data"] for each in (one, other)]
    assert prints[0]["key"] != prints[1]["key"]
    assert prints[0]["files"]["inter"]["content"] != prints[1]["files"]["inter"]["content"]


class TestRowHashes:
    KEY = b"k" * 16

    def test_equal_rows_and_no_others_have_equal_hashes(self):
        generator = np.random.default_rng(0)
        table = pd.DataFrame(
            {
                "a": generator.integers(0, 6, 400).astype(str),
                "b": generator.integers(0, 5, 400).astype(float),
                "c": np.where(generator.random(400) < 0.2, np.nan, generator.integers(0, 3, 400)),
            }
        )
        table["d"] = [np.array(list("xyz"[: int(length)])) for length in generator.integers(0, 4, 400)]
        texts = ["|".join([*map(str, row[:3]), " ".join(row[3])]) for row in table.itertuples(index=False)]
        hashes = [tuple(each) for each in row_hashes(table, self.KEY)]
        assert len(set(texts)) == len(set(hashes)) == len(set(zip(texts, hashes, strict=True)))

    def test_a_text_is_no_number_and_a_column_is_not_another(self):
        tables = [
            pd.DataFrame({"a": ["1"]}), pd.DataFrame({"a": [1.0]}), pd.DataFrame({"b": ["1"]}), pd.DataFrame({"a": [""]}),
            pd.DataFrame({"a": ["1"], "b": ["2"]}), pd.DataFrame({"a": ["2"], "b": ["1"]}), pd.DataFrame({"a": [np.nan]}),
        ]  # fmt: skip
        assert len({tuple(row_hashes(table, self.KEY)[0]) for table in tables}) == len(tables)

    def test_integers_are_exact_and_the_same_whatever_holds_them(self):
        large = pd.DataFrame({"t": np.array([2**62 + 1, 2**62 + 2])})
        assert len({tuple(each) for each in row_hashes(large, self.KEY)}) == 2
        as_float, as_integer = (pd.DataFrame({"t": np.array([5, 7], dtype=kind)}) for kind in (float, int))
        assert (row_hashes(as_float, self.KEY) == row_hashes(as_integer, self.KEY)).all()


def test_repeated_rows_do_not_confuse_the_order():
    kinds = {"a": "token", "n": "float"}
    table = pd.DataFrame({"a": list("xyxzxyx"), "n": [1.0, 2, 1, 3, 2, 2, 1]})
    made = Fingerprint()
    made.take("inter", table, kinds)
    for seed in range(20):
        other = table.sample(frac=1, random_state=seed).reset_index(drop=True)
        found = Fingerprint(made.state(), made.places, "c.pth").take("inter", other, kinds)
        pd.testing.assert_frame_equal(found, table)


@pytest.mark.parametrize(
    "spoiled", [{}, {"key": "zz"}, {"key": "00" * 16, "files": {"inter": {}}, "splits": {}}, {"key": 3}]
)
def test_a_crafted_fingerprint_is_refused(spoiled):
    with pytest.raises(InputError, match="fingerprint"):
        Fingerprint(spoiled, source="c.pth")
