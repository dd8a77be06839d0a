"""Every dataset class reads files alike, keeps every row that nobody asked it to drop, and says what it does."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recbole.data.dataset as recbole_datasets
from conftest import SMALL, write_dataset
from slow_reader import random_file, read_slowly
from test_all_models import VECTORS

from recbole_fedkd import run_recbole_fedkd
from recbole_fedkd.command_line import main
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.data import creation
from recbole_fedkd.data.loading import AtomicFiles, recbole_dataset_class
from recbole_fedkd.errors import InputError
from recbole_fedkd.quick_start import _prepare, create_dataset

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
USERS, ITEMS = 12, 20
ROWS = "".join(
    f"u{user}\ti{item}\t{1 + (3 * user + item) % 5}\t{1000 + 20 * user + item}\n"
    for user in range(USERS)
    for item in range(ITEMS)
    if (user + item) % 2
)
Build = Callable[..., Any]


def write(folder: Path, **files: str | bytes) -> dict[str, str]:
    """Files of dataset ``x`` by their suffix, ``_`` for a point; the keys that find them."""
    (folder / "x").mkdir(parents=True)
    for suffix, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / "x" / f"x.{suffix.replace('_', '.')}").write_bytes(data)
    return {"data_path": str(folder)}


@pytest.fixture
def build(tmp_path, caplog) -> Build:
    """The dataset of some files; ``build(files, model, key=value)``."""
    caplog.set_level(logging.INFO)
    number = iter(range(99))

    def build_dataset(files: dict[str, str | bytes], model: str = "BPR", **keys: Any) -> Any:
        keys = {"load_col": None, "show_progress": False, **write(tmp_path / f"data{next(number)}", **files), **keys}
        caplog.clear()
        return create_dataset(FedKDConfig(model, "x", config_dict=keys))

    return build_dataset


def refusal(build: Build, *arguments: Any, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        build(*arguments, **keys)
    return str(caught.value)


def tokens(dataset: Any, field: str) -> list[str]:
    return dataset.field2id_token[field][dataset.inter_feat[field].to_numpy()].tolist()


@pytest.mark.parametrize("model", ["BPR", "SASRec", "DIEN", "WideDeep", "AttnFedKD", "MF"])
def test_every_dataset_class_holds_the_rows_of_the_file(build, model):
    sequential = {"train_neg_sample_args": None} if model == "SASRec" else {}
    for seed in range(6):
        content, _ = random_file(seed, "none")
        wanted = read_slowly(content, {"rating", "timestamp"}, {"user_id", "item_id"})
        dataset = build({"inter": content}, model, **sequential)
        columns = [tokens(dataset, field) for field in ("user_id", "item_id")]
        columns += [dataset.inter_feat[field].tolist() for field in ("rating", "timestamp")]
        names = [wanted.names.index(field) for field in ("user_id", "item_id", "rating", "timestamp")]
        rows = [tuple(row[place] for place in names) for row in wanted.rows]
        found = list(zip(*columns, strict=True))
        # Sequential models have their rows by user and time.
        assert sorted(found) == sorted(rows) if model in ("SASRec", "DIEN") else found == rows


def test_the_class_is_the_one_that_recbole_takes(data_path):
    for model, name in {
        "BPR": "Dataset",
        "Pop": "Dataset",
        "WideDeep": "Dataset",
        "SASRec": "SequentialDataset",
        "DIEN": "DIENDataset",
        "CKE": "KnowledgeBasedDataset",
        "GRU4RecKG": "GRU4RecKGDataset",
    }.items():
        keys = {"SASRec": {"train_neg_sample_args": None}, "GRU4RecKG": VECTORS}.get(model, {})
        config = FedKDConfig(model, "tiny", config_dict={"data_path": str(data_path), **keys})
        chosen = recbole_dataset_class(config)
        assert chosen.__name__ == name
        assert issubclass(chosen, AtomicFiles) and issubclass(chosen, getattr(recbole_datasets, name))


def test_quote_marks_in_titles_swallow_no_rows(build):
    titles = {3: '"Heroes', 16: 'Villains"', 5: "it's", 6: '"'}
    item = "item_id:token\ttitle:token_seq\n" + "".join(f"i{i}\t{titles.get(i, 'plain')}\n" for i in range(ITEMS))
    dataset = build({"inter": HEADER + ROWS, "item": item})
    assert len(dataset.inter_feat) == ROWS.count("\n") and dataset.item_num == ITEMS + 1
    assert {'"Heroes', 'Villains"', "it's", '"'} <= set(dataset.field2id_token["title"])


def test_knowledge_graphs_are_read_alike(build, caplog):
    link = "item_id:token\tentity_id:token\n" + "".join(f'i{item}\t"e{item}\n' for item in range(10))
    graph = "head_id:token\trelation_id:token\ttail_id:token\n" + "".join(f'"e{i}\tNA\t"e{i + 1}\n' for i in range(10))
    dataset = build({"inter": HEADER + ROWS, "kg": graph, "link": link}, "CKE")
    assert len(dataset.kg_feat) == 10 and dataset.entity_num >= 11
    assert "NA" in dataset.field2id_token["relation_id"]
    assert "60 of 120 interactions are dropped, 60 are left" in caplog.text
    bad = graph.replace('"e3\tNA', "\tNA")
    assert "x.kg', line 5: 'head_id' is empty" in refusal(
        build, {"inter": HEADER + ROWS, "kg": bad, "link": link}, "CKE"
    )
    sentence = refusal(
        build, {"inter": HEADER + ROWS, "kg": graph, "link": link}, "CKE", load_col={"inter": ["user_id", "item_id"]}
    )
    assert "reads a knowledge graph, but load_col names no columns of .kg" in sentence


class TestUsersAndItems:
    def test_users_without_features_keep_their_rows(self, build, caplog):
        user = "user_id:token\tage:token\n" + "".join(f"u{user}\t{user}\n" for user in range(4))
        dataset = build({"inter": HEADER + ROWS, "user": user})
        assert len(dataset.inter_feat) == ROWS.count("\n")
        assert "'x.user' has no row of 8 of 12 users" in caplog.text and "their 80 interactions stay" in caplog.text
        ages = dataset.user_feat["age"].to_numpy()
        known = [dataset.field2token_id["user_id"][f"u{user}"] for user in range(4)]
        assert (ages[known] != 0).all() and np.delete(ages, known).sum() == 0

    def test_they_are_dropped_on_request_and_counted(self, build, caplog):
        user = "user_id:token\tage:token\n" + "".join(f"u{user}\t{user}\n" for user in range(4))
        dataset = build({"inter": HEADER + ROWS, "user": user}, filter_inter_by_user_or_item=True)
        assert len(dataset.inter_feat) == 40
        assert "filter_inter_by_user_or_item=True: 80 of 120 interactions are dropped, 40 are left" in caplog.text

    def test_files_whose_ids_have_nothing_in_common_are_refused(self, build):
        sentence = refusal(build, {"inter": HEADER + ROWS, "user": "user_id:token\tage:token\n1\t30\n2\t40\n"})
        assert (
            "'x.user' has none of the 12 users of 'x.inter': the first user_id is '1' there and 'u0' here" in sentence
        )

    def test_a_repeated_user_is_told(self, build, caplog):
        user = "user_id:token\tage:token\n" + "".join(f"u{user}\t{user}\n" for user in range(USERS))
        dataset = build({"inter": HEADER + ROWS, "user": user + "u3\t99\n"})
        assert "1 row(s) repeat a 'user_id', first 'u3' in line 14; of each, the first row counts" in caplog.text
        assert "99" not in dataset.field2id_token["age"] and dataset.user_num == USERS + 1

    def test_missing_numbers_of_features_are_told(self, build, caplog):
        item = "item_id:token\tprice:float\n" + "".join(f"i{i}\t{i or ''}\n" for i in range(ITEMS))
        build({"inter": HEADER + ROWS, "item": item})
        assert "1 of 20 rows have no 'price', first line 2; the mean of the others stands in for it" in caplog.text
        empty = "item_id:token\tprice:float\n" + "".join(f"i{i}\t\n" for i in range(ITEMS))
        assert "'price' has no number at all" in refusal(build, {"inter": HEADER + ROWS, "item": empty})

    def test_one_name_in_two_files_is_refused(self, build):
        user = "user_id:token\tname:token\nu1\ta\n"
        item = "item_id:token\tname:token\ni1\ta\n"
        sentence = refusal(build, {"inter": HEADER + ROWS, "user": user, "item": item})
        assert "x.item' and the .user file both have a column 'name'" in sentence

    @pytest.mark.parametrize(("model", "keys"), [("AttnFedKD", {}), ("MF", {}), ("BPR", {"strategy": "fedavg"})])
    def test_users_who_never_interact_change_no_number(self, tmp_path, model, keys):
        results = []
        for name, more in (("without", ""), ("with", "u99\ta\nu98\tb\n")):
            folder = write_dataset(tmp_path / name)
            file = folder / "tiny" / "tiny.user"
            header, rows = file.read_text().split("\n", 1)
            file.write_text(f"{header}\n{more}{rows}")
            config = {"data_path": str(folder), **SMALL, "epochs": 1, **keys}
            results.append(run_recbole_fedkd(model, "tiny", None, config, saved=False)["test_result"])
        assert results[0] == results[1]


class TestNumbers:
    def test_ratings_and_times_that_are_declared_tokens_are_numbers(self, tmp_path):
        results = []
        for name, kind in (("float", "float"), ("token", "token")):
            folder = write_dataset(tmp_path / name)
            file = folder / "tiny" / "tiny.inter"
            text = file.read_text().replace("rating:float", f"rating:{kind}")
            file.write_text(text.replace("timestamp:float", f"timestamp:{kind}"))
            config = {"data_path": str(folder), **SMALL, "epochs": 1}
            results.append(run_recbole_fedkd("AttnStudent", "tiny", None, config, saved=False)["test_result"])
        assert results[0] == results[1]

    def test_what_is_no_number_there_is_refused(self, build):
        rows = HEADER.replace("rating:float", "rating:token") + ROWS.replace("u3\ti2\t", "u3\ti2\tgood")
        assert "'rating' is 'good2', which is no number" in refusal(build, {"inter": rows})
        rows = HEADER.replace("rating:float", "rating:float_seq") + ROWS
        assert "'rating' has the type float_seq, but every row has one of it: write rating:float" in refusal(
            build, {"inter": rows}
        )

    @pytest.mark.parametrize("label", ["label:float", "label:token"])
    def test_labels_are_numbers_too(self, build, label):
        rows = f"user_id:token\titem_id:token\t{label}\nu1\ti1\t1\nu2\ti2\t0\nu1\ti2\t1\n"
        dataset = build({"inter": rows}, "WideDeep")
        assert dataset.inter_feat["label"].tolist() == [1, 0, 1]
        assert "line 3: 'label' is '' where" in refusal(build, {"inter": rows.replace("i2\t0", "i2\t")}, "WideDeep")

    def test_ids_that_are_declared_numbers_are_texts(self, build):
        rows = HEADER.replace("user_id:token", "user_id:float") + ROWS.replace("u", "0")
        dataset = build({"inter": rows})
        assert dataset.field2id_token["user_id"][:3].tolist() == ["[PAD]", "00", "01"]

    @pytest.mark.parametrize(
        ("model", "keys"),
        [
            ("BPR", {"eval_args": {"order": "TO"}}),
            ("BPR", {"rm_dup_inter": "last"}),
            ("SASRec", {"train_neg_sample_args": None}),
            ("AttnFedKD", {}),
            ("DIN", {"label_mode": "threshold"}),
        ],
    )
    def test_a_missing_time_is_refused_where_order_counts(self, build, model, keys):
        rows = HEADER + ROWS
        sentence = refusal(build, {"inter": rows.replace("\t1062\n", "\t\n")}, model, **keys)
        assert "'timestamp' is '' where every row needs a number" in sentence
        assert f"line {1 + rows[: rows.index('1062')].count(chr(10))}:" in sentence

    def test_elsewhere_the_column_is_left_out_and_no_time_is_invented(self, build, caplog):
        dataset = build({"inter": HEADER + ROWS.replace("\t1062\n", "\t\n")})
        assert "timestamp" not in dataset.inter_feat and "timestamp" not in dataset.field2type
        assert "1 of 120 rows have no 'timestamp'; the column is not used" in caplog.text
        assert len(dataset.inter_feat) == 120

    def test_times_in_nanoseconds_are_exact(self, build):
        rows = HEADER + "".join(f"u\ti{i}\t1\t{1_600_000_000_000_000_000 + i}\n" for i in range(9))
        times = build({"inter": rows}).inter_feat["timestamp"]
        assert times.dtype == np.int64 and times.tolist() == [1_600_000_000_000_000_000 + i for i in range(9)]


class TestColumns:
    @pytest.mark.parametrize(
        ("keys", "says"),
        [
            ({"load_col": {"inter": ["user_id", "ratin"]}}, "load_col names 'ratin', but the columns of"),
            ({"load_col": {"inter": ["ratin"]}}, "user_id, item_id, rating, timestamp; did you mean 'rating'?"),
            ({"load_col": {"user": ["user_id"]}}, "x.user', which does not exist"),
            ({"unload_col": {"inter": ["ratin"]}}, "unload_col names 'ratin', but the columns of"),
            ({"unload_col": {"inter": ["user_id"]}}, "unload_col names 'user_id', which"),
            ({"unused_col": {"inter": ["ratin"]}}, "unused_col names 'ratin', but the loaded columns of 'x.inter' are"),
            ({"unused_col": {"inter": ["item_id"]}}, "unused_col names 'item_id', which is needed"),
            ({"USER_ID_FIELD": "uid"}, "has no column 'uid' (USER_ID_FIELD); the columns of"),
            ({"alias_of_user_id": ["friend"]}, "alias_of_user_id names 'friend', but the loaded columns are user_id"),
            ({"RATING_FIELD": "stars"}, "has no column 'stars' (RATING_FIELD)"),
            ({"TIME_FIELD": "time"}, "has no column 'time' (TIME_FIELD)"),
            (
                {"eval_args": {"order": "TO"}, "load_col": {"inter": ["rating"]}},
                "needs timestamps, but no column 'timestamp'",
            ),
            ({"val_interval": {"ratin": "[1,2]"}}, "val_interval names 'ratin', but the loaded columns are"),
            ({"val_interval": {"rating": [3, 4, 5]}}, "val_interval of 'rating' is [3, 4, 5]; it must be an interval"),
            (
                {"val_interval": {"user_id": "(1,2)"}},
                "val_interval of 'user_id' is '(1,2)'; it must be a list of tokens",
            ),
            ({"val_interval": {"rating": "[9,10]"}}, "none of the 120 interactions of dataset 'x' is left"),
        ],
    )
    def test_a_key_that_names_what_is_not_there_is_refused_with_what_is(self, build, keys, says):
        assert says in refusal(build, {"inter": HEADER + ROWS}, **keys)

    def test_ids_are_loaded_whatever_load_col_says(self, build):
        dataset = build({"inter": HEADER + ROWS}, load_col={"inter": ["rating"]})
        assert list(dataset.inter_feat) == ["user_id", "item_id", "rating"]

    def test_unload_col_alone_loads_the_rest(self):
        keys = write(Path("alone"), inter=HEADER + ROWS)
        config = FedKDConfig("BPR", "x", config_dict={**keys, "unload_col": {"inter": ["rating"]}})
        assert list(create_dataset(config).inter_feat) == ["user_id", "item_id", "timestamp"]

    def test_both_id_columns_of_other_names_are_told_at_once(self, build):
        rows = HEADER.replace("user_id", "userId").replace("item_id", "movieId") + ROWS
        sentence = refusal(build, {"inter": rows})
        assert "'user_id' (USER_ID_FIELD) and 'item_id' (ITEM_ID_FIELD)" in sentence and "userId, movieId" in sentence


class TestFilters:
    def test_filters_that_are_asked_for_say_what_they_drop(self, build, caplog):
        build({"inter": HEADER + ROWS}, val_interval={"rating": "[3,5]"})
        assert "val_interval={'rating': '[3,5]'}: " in caplog.text and "of 120 interactions are dropped" in caplog.text
        build({"inter": HEADER + ROWS}, val_interval={"user_id": ["u1", "u2"]})
        assert "100 of 120 interactions are dropped, 20 are left" in caplog.text
        build({"inter": HEADER + ROWS + "u1\ti0\t5\t9\n"}, rm_dup_inter="first")
        assert "rm_dup_inter=first: 1 of 121 interactions are dropped, 120 are left" in caplog.text

    def test_a_filter_of_users_takes_their_interactions(self, build):
        user = "user_id:token\tage:float\n" + "".join(f"u{user}\t{20 + user}\n" for user in range(USERS))
        dataset = build({"inter": HEADER + ROWS, "user": user}, val_interval={"age": "[20,22)"})
        assert set(tokens(dataset, "user_id")) == {"u0", "u1"}

    def test_nothing_is_dropped_without_a_word(self, build, caplog):
        assert len(build({"inter": HEADER + ROWS}).inter_feat) == 120
        assert "dropped" not in caplog.text


class TestBenchmarkFiles:
    def parts(self, **changes: str) -> dict[str, str]:
        lines = ROWS.splitlines(keepends=True)
        parts = {"train": lines[:80], "valid": lines[80:100], "test": lines[100:]}
        return {f"{name}_inter": HEADER + changes.get(name, "".join(rows)) for name, rows in parts.items()}

    def test_parts_keep_their_rows(self, build):
        dataset = build(self.parts(), benchmark_filename=["train", "valid", "test"])
        assert dataset.file_size_list == [80, 20, 20]

    def test_an_empty_id_names_its_part(self, build):
        files = self.parts(valid="u1\ti1\t3\t4\n\ti2\t3\t5\n")
        sentence = refusal(build, files, benchmark_filename=["train", "valid", "test"])
        assert "x.valid.inter', line 3: 'user_id' is empty" in sentence

    def test_parts_of_other_columns_are_refused(self, build):
        files = self.parts()
        files["test_inter"] = "user_id:token\titem_id:token\nu1\ti1\n"
        sentence = refusal(build, files, benchmark_filename=["train", "valid", "test"])
        assert "x.train.inter' has the columns user_id:token" in sentence and "parts must have the same" in sentence

    def test_histories_of_a_sequential_model_are_asked_for_by_name(self, build):
        keys = {"train_neg_sample_args": None, "benchmark_filename": ["train", "valid", "test"]}
        sentence = refusal(build, self.parts(), "SASRec", **keys)
        assert "add a column item_id_list:token_seq" in sentence


def test_the_whole_file_twice_is_refused_unless_copies_are_removed(build):
    assert "every one of its 120 different rows 2 times" in refusal(build, {"inter": HEADER + ROWS + ROWS})
    assert len(build({"inter": HEADER + ROWS + ROWS}, rm_dup_inter="first").inter_feat) == 120


def test_quote_marks_round_every_id_are_told(build, caplog):
    rows = HEADER + "".join(f'"u{user}"\t"i{item}"\t3\t4\n' for user in range(3) for item in range(user, 5))
    assert set(tokens(build({"inter": rows}), "user_id")) == {'"u0"', '"u1"', '"u2"'}
    assert "every 'user_id' is in quote marks" in caplog.text and "every 'item_id' is in quote marks" in caplog.text


def test_a_file_without_a_last_line_end_is_told(build, caplog):
    build({"inter": (HEADER + ROWS)[:-1]})
    assert "does not end with the end of a line: if it was cut off, its last row is wrong" in caplog.text


@pytest.mark.parametrize("model", ["BPR", "Pop", "SASRec", "MF"])
def test_one_item_or_one_user_end_in_a_sentence(tmp_path, model):
    keys = {"show_progress": False, "load_col": None}
    keys |= {"train_neg_sample_args": None} if model == "SASRec" else {}
    one_item = HEADER + "".join(f"u{user}\ti\t{1 + user % 5}\t{user}\n" for user in range(9))
    with pytest.raises(InputError, match="dataset 'x' has one item, so that there is nothing to sample or to rank"):
        _prepare(FedKDConfig(model, "x", config_dict={**keys, **write(tmp_path / "item", inter=one_item)}))
    if model != "SASRec":
        one_user = HEADER + "".join(f"u\ti{item}\t{1 + item % 5}\t{item}\n" for item in range(9))
        with pytest.raises(InputError, match="dataset 'x' has one user, who has interacted with all its items"):
            _prepare(FedKDConfig(model, "x", config_dict={**keys, **write(tmp_path / "user", inter=one_user)}))


def test_the_csv_file_of_the_page_on_data_runs():
    """docs/data.md: a dataset of a CSV file, and a run of it."""
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    *commands, last = page.split("```bash\n")[1].split("```")[0].splitlines()
    Path("ratings.csv").write_text("userId,movieId,rating,timestamp\n" + ROWS.replace("\t", ","))
    for command in commands:
        assert main(command.split()[1:]) == 0
    keys = {key: value for key, _, value in (word.removeprefix("--").partition("=") for word in last.split()[1:])}
    assert len(create_dataset(FedKDConfig(command_line=keys)).inter_feat) == 120


def test_no_lock_is_left_behind_and_a_dataset_that_is_there_needs_none(data_path, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "locks"))
    (tmp_path / "locks").mkdir()
    config = FedKDConfig("BPR", "tiny", config_dict={"data_path": str(data_path), "state": "ERROR"})
    create_dataset(config)
    away = FedKDConfig("BPR", "no-such", config_dict={"data_path": str(tmp_path), "state": "ERROR"})
    with pytest.raises(InputError, match="unknown"):
        create_dataset(away)
    assert not list((tmp_path / "locks").iterdir())


def test_who_comes_while_a_dataset_is_made_waits_and_finds_it_whole(tmp_path):
    folder, order = tmp_path / "there", []

    def second():
        with creation._sole_download(folder) as existed:
            order.append(("second", existed, (folder / "whole").exists()))

    with creation._sole_download(folder) as existed:
        folder.mkdir()
        other = threading.Thread(target=second)
        other.start()
        other.join(0.2)
        (folder / "whole").touch()
        order.append(("first", existed, True))
    other.join()
    assert order == [("first", False, True), ("second", True, True)]
