"""Tables of anybody's become datasets: what is guessed, what is dropped and told, and what is refused in one sentence."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import recbole_fedkd
from recbole_fedkd.command_line import main
from recbole_fedkd.data.importing import import_table, read_table
from recbole_fedkd.errors import InputError

ROWS = "userId,movieId,rating,timestamp\n1,10,4.5,964982703\n1,11,3,964982704\n2,10,5,964982705\n"


def atomic(name="a", folder="dataset") -> list[list[str]]:
    return [line.split("\t") for line in (Path(folder) / name / f"{name}.inter").read_text().splitlines()]


def imported(content, *arguments, file="a.csv", encoding="utf-8"):
    Path(file).write_bytes(content.encode(encoding) if isinstance(content, str) else content)
    assert main(["import", file, *arguments]) == 0
    return atomic()


EXPECTED = [
    ["user_id:token", "item_id:token", "rating:float", "timestamp:float"],
    ["1", "10", "4.5", "964982703"],
    ["1", "11", "3", "964982704"],
    ["2", "10", "5", "964982705"],
]


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (ROWS, {}),
        (ROWS.replace(",", ";"), {}),
        (ROWS.replace(",", "\t"), {"file": "a.tsv"}),
        (ROWS.replace(",", "\t"), {"file": "a.txt"}),
        (ROWS.replace(",", "|"), {}),
        (ROWS.replace("\n", "\r\n"), {}),
        (ROWS.replace("\n", "\r"), {}),
        ("\ufeff" + ROWS, {}),
        (ROWS, {"encoding": "utf-16"}),
        ("\n" + ROWS.replace("\n2", "\n\n2"), {}),
        (ROWS.rstrip("\n"), {}),
        ('"User ID","Movie-ID","Rating","time"\n"1","10","4.5","964982703"\n1,11,3,964982704\n2,10,"5",964982705\n', {}),
        ("user_id:token,item_id:token,rating:float,timestamp:float\n" + ROWS.split("\n", 1)[1], {}),
        (ROWS.replace("4.5", "4,5").replace("userId,movieId,rating,timestamp", "userId;movieId;rating;timestamp")
         .replace("1,10,4,5,9", "1;10;4,5;9").replace("1,11,3,", "1;11;3;").replace("2,10,5,", "2;10;5;"), {}),
        (ROWS + "1,11,3,964982704\n", {}),  # a row again
        (ROWS + ",11,3,1\n3,,3,1\n3,11,,1\n3,11,great,1\n3,11,3,\n3,11,inf,1\n3,11,3,soon\n", {}),
    ],
)  # fmt: skip
def test_files_of_every_kind_give_the_same_dataset(content, options):
    assert imported(content, **options) == EXPECTED


def test_a_look_says_what_was_guessed_and_what_was_dropped_and_why(capsys):
    noted = ROWS.replace("timestamp", "timestamp,note").replace("03\n", "03,x\n").replace("04\n", "04,y\n")
    imported(noted.replace("05\n", "05,z\n") + "3,,3,1,a\n3,11,great,1,b\n1,10,4.5,964982703,x\n")
    told = capsys.readouterr().out
    assert (
        "user: userId (guessed)  item: movieId (guessed)  rating: rating (guessed)  time: timestamp (guessed)" in told
    )
    assert "3 interactions of 2 users with 2 items" in told and "ratings from 3 to 5, 3 different ones" in told
    assert "not used: note" in told
    assert "dropped 1 rows: no item in column 'movieId'" in told
    assert "dropped 1 rows: no number in column 'rating', such as 'great'" in told
    assert "dropped 1 rows: the same row again" in told
    assert "next: recbole-fedkd --preset=factors --client_num=16 --dataset=a" in told


def test_columns_are_named_and_left_out(capsys):
    content = "who,what,how,when,rating\na,x,1,5,9\nb,y,2,6,9\n"
    rows = imported(content, "--user=who", "--item=what", "--rating=how", "--time=")
    assert rows == [["user_id:token", "item_id:token", "rating:float"], ["a", "x", "1"], ["b", "y", "2"]]
    rows = imported(content, "--user=who", "--item=what", "--rating=", "--overwrite")
    assert rows[0] == ["user_id:token", "item_id:token", "timestamp:float"]
    told = capsys.readouterr().out
    assert "--label_mode=implicit" in told and "next: recbole-fedkd --preset=fedmf --dataset=a" in told


@pytest.mark.parametrize(
    ("dates", "seconds"),
    [
        (["2024-01-02", "2024-01-03"], [1704153600, 1704240000]),
        (["2024-01-02 03:04:05", "2024-01-02T03:04:06"], [1704164645, 1704164646]),
        (["2024-01-02T03:04:05Z", "2024-01-02T03:04:05+01:00"], [1704164645, 1704161045]),
        (["2024-01-02T03:04:05.25Z", "2024-01-02T03:04:05.5Z"], [1704164645.25, 1704164645.5]),
        (["13/01/2024", "02/01/2024"], [1705104000, 1704153600]),
        (["01/13/2024", "01/02/2024"], [1705104000, 1704153600]),
        (["02.01.2024", "03.01.2024"], [1704153600, 1704240000]),
        (["02.01.2024 03:04", "03.01.2024 00:00"], [1704164640, 1704240000]),
        (["20240102", "20240103"], [1704153600, 1704240000]),
        (["1704164645123", "1704164645124"], [1704164645123, 1704164645124]),
        (["1.5e9", "1500000001.25"], [1.5e9, 1500000001.25]),
        (["Jan 2, 2024", "Jan 3, 2024"], [1704153600, 1704240000]),
    ],
)
def test_times_are_numbers_or_dates(dates, seconds):
    frame = pd.DataFrame({"user": ["a", "b"], "item": ["x", "y"], "date": dates})
    found = import_table(frame, {})
    assert found.table["timestamp"].astype(float).tolist() == seconds and not found.dropped


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        ("", [], "is empty"),
        ("  \n \n", [], "is empty"),
        ("userId,movieId,rating\n", [], "has a header and no rows"),
        ("just a text\nand more\n", [], "has one column, 'just a text'"),
        (ROWS, ["--user=usrId"], "has no column 'usrId' for user; it has userId, movieId, rating, timestamp; did you"),
        (ROWS, ["--user=movieId", "--item=movieId"], "is named for both user and item"),
        ("a,b,c\n1,2,3\n", [], "the user or the item: it has a, b, c; say --user=<column> --item=<column>, and"),
        ("user,b,c\n1,2,3\n", [], "has no column that looks like the item"),
        ("userId,userId,item\n1,2,3\n", [], "has two columns \'userId\'; rename one"),
        ("user,item,rating\n1,2,good\n1,3,bad\n", [], "holds no number to rate by, but 'good'; name another by --rating"),
        ("user,item,time\n1,2,soon\n", [], "holds neither times nor dates, but 'soon'"),
        ("user,item,time\n1,2,\n", [], "holds neither times nor dates, but ''; name another by --time, or leave times out"),
        ("user,item\n,2\n1,\n", [], "has no row that can be used (1 rows: no user in column 'user'; 1 rows: no item"),
        ("user,item\n1,2,3,4\n5,6\n", [], "rows have more fields than the header"),
        ("user,item\n1,2\n1,2,3\n", [], "cannot be read as a table with the separator ','"),
        ('user,item\n"1,2\n3,4\n', [], "cannot be read as a table"),
        (b"user,item\n\xff\xfe\xfa,2\n", [], "is not encoded in utf-8"),
        ("üser,item\n1,2\n".encode("latin-1"), [], "say what it is by --encoding, such as latin-1"),
        ("user,item\n1,2\n", ["--encoding=klingon"], "unknown encoding"),
        (b"user,item\n1\0,2\n", [], "holds NUL characters"),
        (ROWS, ["--separator=::"], "separator is '::'; it must be one character, or tab"),
        (ROWS, ["--usr=x"], "import does not know --usr; did you mean 'user'?"),
        (ROWS, ["--name=../x"], "name is '../x'; it must be the name of a folder"),
        (ROWS, ["--name="], "name is ''"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence_and_writes_nothing(content, arguments, says, capsys):
    Path("a.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    code = main(["import", "a.csv", *arguments])
    printed = capsys.readouterr().err
    assert code == 2 and says in printed and printed.count("\n") == 1 and len(printed) < 600
    assert not Path("dataset").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "import needs a file"),
        (["nowhere.csv"], "'nowhere.csv' cannot be read: No such file"),
        (["."], "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_told(arguments, says, capsys):
    assert main(["import", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_other_kinds_of_files_are_named(capsys):
    Path("a.xlsx").write_text("x")
    assert main(["import", "a.xlsx"]) == 2
    assert "is no CSV, TSV or parquet file" in capsys.readouterr().err


def test_a_dataset_is_not_overwritten_unasked(capsys):
    imported(ROWS)
    before = atomic()
    Path("a.csv").write_text(ROWS.replace("4.5", "1"))
    assert main(["import", "a.csv"]) == 2
    assert "is there already" in capsys.readouterr().err and atomic() == before
    assert main(["import", "a.csv", "--overwrite"]) == 0
    assert atomic() != before


TOKENS = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)


@given(
    st.lists(st.tuples(TOKENS, TOKENS, st.one_of(st.floats(), st.none(), st.text(max_size=3))), min_size=1, max_size=8)
)
def test_whatever_a_frame_holds_rows_are_whole_or_dropped(rows):
    frame = pd.DataFrame(rows, columns=["user", "item", "rating"])
    try:
        found = import_table(frame, {})
    except InputError:
        return
    table = found.table
    assert len(table) + sum(count for count, _ in found.dropped.values()) == len(rows)
    assert not table.duplicated().any() and not (table == "").any().any()
    assert not table["user_id"].str.contains("[\t\n\r]").any()
    assert np.isfinite(table["rating"].astype(float)).all()


def test_ids_stay_as_they_are_written():
    frame = pd.DataFrame({"user": ["01", "1", "1.0", "NA", "null"], "item": [1.0, 2.0, 3.0, None, 5.0]})
    table = import_table(frame, {}).table
    assert table["user_id"].tolist() == ["01", "1", "1.0", "null"] and table["item_id"].tolist() == ["1", "2", "3", "5"]


def test_a_frame_is_not_changed():
    frame = pd.DataFrame({1: ["a"], "user": ["a"], "item": ["b"]})
    before = frame.copy()
    read = frame.copy()
    import_table(read.copy(), {})
    pd.testing.assert_frame_equal(frame, before)


@pytest.fixture
def frame():
    generator = np.random.default_rng(1)
    pairs = pd.DataFrame({"person": np.repeat(np.arange(12), 15), "movie": np.tile(np.arange(15), 12)})
    pairs["stars"] = generator.integers(1, 6, len(pairs))
    pairs["date"] = pd.to_datetime("2024-01-01") + pd.to_timedelta(generator.permutation(len(pairs)), "h")
    return pairs.sample(frac=0.6, random_state=1).rename(columns={"person": "user id"})


QUIET = {"state": "WARNING", "show_progress": False, "epochs": 1}


@pytest.mark.parametrize(("model", "keys"), [("AttnFedKD", {"client_num": 2}), ("Bias", {}), ("BPR", {})])
def test_a_data_frame_is_a_dataset(frame, model, keys):
    before = frame.copy()
    result = recbole_fedkd.run_recbole_fedkd(model, frame, config_dict={**QUIET, **keys})
    pd.testing.assert_frame_equal(frame, before)
    assert result["test_result"]
    table = recbole_fedkd.load(result["run_folder"]).recommend(["3"], 2)
    assert table["user_id"].tolist() == ["3", "3"]


def test_a_frame_without_a_saved_run_leaves_no_dataset(frame):
    recbole_fedkd.run_recbole_fedkd("Bias", frame, config_dict=QUIET, saved=False)
    assert not Path("dataset").exists()


def test_columns_of_a_frame_keep_the_names_that_config_keys_give_them(frame):
    keys = {"USER_ID_FIELD": "user id", "ITEM_ID_FIELD": "movie", "RATING_FIELD": "stars"}
    result = recbole_fedkd.run_recbole_fedkd("Bias", frame, config_dict={**QUIET, **keys})
    assert result["config"]["USER_ID_FIELD"] == "user id" and result["test_result"]


def test_a_wrong_frame_is_refused():
    with pytest.raises(InputError, match="the data frame has no column that looks like the user"):
        recbole_fedkd.run_recbole_fedkd("Bias", pd.DataFrame({"a": [1]}), config_dict=QUIET)


def test_what_is_packed_is_read_or_said_to_be(tmp_path):
    text = b"user,item,rating\nu,i,3\nv,j,4\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text))
    assert read_table(tmp_path / "t.csv.gz")["item"].tolist() == ["i", "j"]
    for content, says in (
        (gzip.compress(text)[:-9], "cannot be unpacked"),
        (b"PK\x03\x04", "is an archive"),
        (b"\x1f\x8b" + text, "cannot be read"),
    ):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(InputError, match=says):
            read_table(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (
            pd.DataFrame({"a": ["x"], "b": ["y"]}),
            "say USER_ID_FIELD=<column> ITEM_ID_FIELD=<column>, and RATING_FIELD and",
        ),
        (pd.DataFrame({"user": ["x"], "item": ["y"], "rating": ["z"]}), "but 'z'; name another by RATING_FIELD$"),
        (pd.Series(["x"]), "dataset is a Series; it must be the name of a folder in data_path, or a data frame"),
    ],
)
def test_who_gives_a_frame_is_answered_with_keys(frame, says):
    with pytest.raises(InputError, match=says):
        recbole_fedkd.run_recbole_fedkd("Bias", frame, saved=False)


def test_a_list_is_no_user():
    frame = pd.DataFrame({"user": [["a"], ["b"]], "item": ["x", "y"], "rating": [3, 4]})
    with pytest.raises(InputError, match="column 'user' holds \\['a'\\]; it must have one value a row"):
        import_table(frame, {})


def test_parquet_is_read_with_its_types(tmp_path):
    pd.DataFrame({"user": [1, 2], "item": [3, 4], "rating": [1.0, 2.5]}).to_parquet(tmp_path / "a.parquet")
    assert import_table(read_table(tmp_path / "a.parquet"), {}).table["rating"].tolist() == ["1.0", "2.5"]
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_table(tmp_path / "a.parquet")
