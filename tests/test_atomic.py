"""Atomic files are read as they are written, or refused with file and line."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.utils import FeatureType
from slow_reader import FAULTS, Refused, random_file, read_slowly

from recbole_fedkd.data import atomic
from recbole_fedkd.data.atomic import read_atomic, read_header
from recbole_fedkd.data.layout import Layout
from recbole_fedkd.errors import InputError

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
NUMBERS, IDS = {"rating", "timestamp"}, {"user_id", "item_id"}


def written(folder: Path, content: bytes | str) -> Path:
    file = folder / "x.inter"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def read(folder: Path, content: bytes | str, **layout: str):
    return read_atomic(written(folder, content), Layout(**layout))


def refusal(folder: Path, content: bytes | str, **layout: str) -> str:
    """The sentence that refuses a file, whether its lines or its values are wrong."""
    with pytest.raises(InputError) as caught:
        values(read(folder, content, **layout))
    return str(caught.value).replace(str(folder), "")


def values(file) -> dict[str, list]:
    """All columns, as the datasets read them."""
    columns = {}
    for column in file.columns:
        name = column.name
        if name == "timestamp":
            columns[name] = file.exact_numbers(name, True).tolist()
        elif name in NUMBERS or column.kind == FeatureType.FLOAT:
            columns[name] = file.numbers(name, name in NUMBERS).tolist()
        elif column.kind == FeatureType.TOKEN:
            columns[name] = [text if isinstance(text, str) else None for text in file.tokens(name, name in IDS)]
        else:
            columns[name] = [each.tolist() for each in file.sequences(name, column.kind)]
    file.refuse_copies()
    return columns


@pytest.mark.parametrize("block", [1, 50, 1 << 23], ids=["a line at a time", "some lines", "the file"])
@pytest.mark.parametrize("fault", list(dict.fromkeys(FAULTS)))
def test_random_files_are_read_or_refused_as_by_a_slow_reader(tmp_path, monkeypatch, fault, block):
    monkeypatch.setattr(atomic, "_BLOCK", block)
    refused = 0
    for seed in range(12):
        content, _ = random_file(seed, fault)
        try:
            wanted = read_slowly(content, NUMBERS, IDS)
        except Refused as error:
            refused += 1
            sentence = refusal(tmp_path, content)
            assert "/x.inter'" in sentence
            assert error.line is None or f"line {error.line}" in sentence, (seed, sentence)
            continue
        found = values(read(tmp_path, content))
        assert list(found) == wanted.names
        rows = [list(row) for row in zip(*found.values(), strict=True)]
        np.testing.assert_equal(rows, wanted.rows)
    assert refused == (0 if fault in ("none", "empty line") else 12)


@given(
    st.lists(
        st.tuples(*[st.text(st.characters(exclude_characters="\t\r\n\0", exclude_categories=["Cs"]))] * 2), min_size=1
    )
)
def test_any_token_comes_back_as_it_was_written(tmp_path_factory, rows):
    file = written(tmp_path_factory.mktemp("any"), "a:token\tb:token\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    kept = [row for row in rows if "[PAD]" not in row]
    if kept != rows or any(row in (("a:token", "b:token"), ("a", "b")) for row in rows):
        return
    table = read_atomic(file, Layout())
    for place, name in enumerate("ab"):
        read_back = [value if isinstance(value, str) else "" for value in table.tokens(name, False)]
        assert read_back == [row[place] for row in rows]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, unique=True))
def test_timestamps_of_64_bits_keep_their_order(tmp_path_factory, times):
    file = written(tmp_path_factory.mktemp("times"), "timestamp:float\n" + "".join(f"{time}\n" for time in times))
    read_back = read_atomic(file, Layout()).exact_numbers("timestamp", True)
    assert [int(time) for time in read_back] == times


def test_lines_are_counted_as_in_an_editor(tmp_path):
    rows = "u1\ti1\t1\t1\n\n\nu2\ti2\t\t2\n"
    assert "line 5: 'rating' is ''" in refusal(tmp_path, HEADER + rows)
    assert "line 5: 'rating' is ''" in refusal(tmp_path, (HEADER + rows).replace("\n", "\r\n"))


def test_a_quote_mark_is_a_character(tmp_path):
    rows = 'u1\t"Heroes\t1\t1\nu2\ti2\t2\t2\nu3\tVillains"\t3\t3\n'
    assert values(read(tmp_path, HEADER + rows))["item_id"] == ['"Heroes', "i2", 'Villains"']


def test_an_id_that_reads_like_nothing_is_an_id(tmp_path):
    rows = "NA\tnull\t1\t1\nnan\tNone\t2\t2\n1\t001\t3\t3\n 1\t1 \t3\t4\n"
    found = values(read(tmp_path, HEADER + rows))
    assert found["user_id"] == ["NA", "nan", "1", " 1"]
    assert found["item_id"] == ["null", "None", "001", "1 "]


@pytest.mark.parametrize(
    ("rating", "says"),
    [
        ("", "'rating' is '' where every row needs a number"),
        ("nan", "'rating' is 'nan' where every row needs a number"),
        ("inf", "'rating' is 'inf'; it must be a finite number"),
        ("1e308", "'rating' is '1e308'; it must lie between -3.4e+38 and 3.4e+38"),
        ("3,5", "'rating' is '3,5', which is no number: decimals follow a point"),
        ("1_000", "'rating' is '1_000', which is no number"),
        ("good", "'rating' is 'good', which is no number"),
        ("2020-01-31", "which is no number: times are numbers, such as seconds since 1970"),
        ("x" * 9999, "'rating' is 'xxx"),
    ],
)
def test_a_rating_that_is_none_is_named_with_its_line(tmp_path, rating, says):
    assert says in (sentence := refusal(tmp_path, HEADER + f"u1\ti1\t1\t1\nu2\ti2\t{rating}\t2\n"))
    assert sentence.startswith("'/x.inter', line 3: 'rating' is") and len(sentence) < 500


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("\ti\t1\t1", "line 3: 'user_id' is empty"),
        ("u\t\t1\t1", "line 3: 'item_id' is empty"),
        (" \ti\t1\t1", "line 3: 'user_id' is empty"),
        ("u\ti\t1", "line 3: 3 fields where the header has 4 columns"),
        ("u\ti\tj\t1\t1", "line 3: 5 fields where the header has 4 columns"),
        ("u i 1 1", "line 3: 1 field where the header has 4 columns"),
        ("user_id:token\titem_id:token\trating:float\ttimestamp:float", "line 3: it is the header once more"),
        ("user_id\titem_id\trating\ttimestamp", "line 3: it is the header once more"),
        ("item_id:token\tuser_id:token\trating:float\ttimestamp:float", "line 3: it is the header once more"),
        ("\ufeffUSER_ID:TOKEN\tITEM_ID:TOKEN\tRATING:FLOAT\tTIMESTAMP:FLOAT ", "line 3: it is the header once more"),
        ("u\ti\0\t1\t1", "line 3: it holds a NUL character"),
        ("[PAD]\ti\t1\t1", "line 3: 'user_id' is '[PAD]', RecBole's own token"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, says):
    assert says in refusal(tmp_path, f"{HEADER}u1\ti1\t1\t1\n{line}\nu2\ti2\t1\t1\n")


def test_a_last_line_that_was_cut_off_is_told_as_that(tmp_path):
    assert "line 3: 2 fields" in refusal(tmp_path, HEADER + "u\ti\t1\t1\nu\ti")
    assert "it was cut off" in refusal(tmp_path, HEADER + "u\ti\t1\t1\nu\ti")
    assert not read(tmp_path, HEADER + "u\ti\t1\t1").ends
    assert read(tmp_path, HEADER + "u\ti\t1\t1\n").ends


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("", "line 1 is empty; an atomic file starts with a line of name:type"),
        ("user_id\titem_id", "the columns user_id, item_id have no types"),
        ("user_id:token,item_id:token", "',' seems to separate user_id:token, item_id:token: set field_separator=','"),
        ("userId;movieId", "';' seems to separate userId, movieId: set field_separator=';'"),
        ("user_id::movie_id", "'::' seems to separate user_id, movie_id: set field_separator='::'"),
        ("user_id:token\titem_id:tokn", "'item_id' has the type 'tokn'"),
        ("user_id:token\titem_id:tokn", "did you mean 'token'?"),
        ("user_id:token\trating:int", "'rating' has the type 'int'; the types are token, float, token_seq, float_seq"),
        ("user_id:token\titem_id", "the column 'item_id' is not name:type"),
        ("user_id:token\t:token", "the column ':token' is not name:type"),
        ("user_id:token\titem:id:token", "the column 'item:id:token' is not name:type"),
        ("user_id:token\tuser_id:float", "two columns are called 'user_id'"),
        ('"user_id:token"\t"item_id:token"', "fields of atomic files are not quoted"),
    ],
)
def test_a_header_that_is_none_is_told_with_what_would_mend_it(tmp_path, header, says):
    assert says in refusal(tmp_path, f"{header}\nu\ti\n")


def test_untyped_headers_name_the_keys_of_other_column_names(tmp_path):
    for header in ("userId,movieId,rating", "userId\tmovieId\trating"):
        sentence = refusal(tmp_path, header + "\n")
        for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "RATING_FIELD", "TIME_FIELD"):
            assert key in sentence


def test_rows_that_all_stand_twice_are_refused_and_some_that_do_are_not(tmp_path):
    rows = ["u1\ti1\t1\t1\n", "u1\ti2\t1\t2\n", "u2\ti1\t1\t3\n"]
    assert "every one of its 3 different rows 2 times" in refusal(tmp_path, HEADER + "".join(rows * 2))
    assert "every one of its 3 different rows 3 times" in refusal(tmp_path, HEADER + "".join(sorted(rows * 3)))
    assert len(values(read(tmp_path, HEADER + "".join(rows + rows[:2])))["rating"]) == 5


def test_encodings(tmp_path):
    rows = "Jürgen\ti1\t1\t1\n"
    assert values(read(tmp_path, "\ufeff" + HEADER + rows))["user_id"] == ["Jürgen"]
    assert values(read(tmp_path, (HEADER + rows).encode("latin-1"), encoding="latin-1"))["user_id"] == ["Jürgen"]
    assert values(read(tmp_path, (HEADER + rows).encode("utf-16"), encoding="utf-16"))["user_id"] == ["Jürgen"]
    sentence = refusal(tmp_path, (HEADER + rows).encode("latin-1"))
    assert "'/x.inter', line 2: the bytes fc 72 67 65 are no text in utf-8" in sentence
    with pytest.raises(InputError, match="encoding is 'utf-9', which Python does not know"):
        Layout(encoding="utf-9")


@pytest.mark.parametrize("separator", [",", "::", "|", " ", ".*"])
def test_separators_are_texts_and_no_patterns(tmp_path, separator):
    content = HEADER + "u1\ti1\t1\t5\nu2\ti2\t2\t6\n"
    found = read(tmp_path, content.replace("\t", separator), separator=separator, sequence_separator="/")
    assert values(found)["timestamp"] == [5, 6]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"separator": ""}, "field_separator is ''"),
        ({"separator": "\n"}, "field_separator is '\\n'"),
        ({"separator": 5}, "field_separator is 5"),
        ({"separator": " "}, "field_separator and seq_separator are both ' '"),
    ],
)
def test_separators_that_separate_nothing_are_refused(keys, says):
    with pytest.raises(InputError) as caught:
        Layout(**keys)
    assert says in str(caught.value)


def test_times_that_64_bits_cannot_tell_apart_are_refused(tmp_path):
    def times(*texts: str) -> list:
        return (
            read(tmp_path, "timestamp:float\n" + "".join(f"{text}\n" for text in texts))
            .exact_numbers("timestamp", True)
            .tolist()
        )

    assert times("1600000000000000001", "1600000000000000002.0") == [1600000000000000001, 1600000000000000002]
    assert times("1600000000.25", "1600000000", "1600000000.0") == [1600000000.25, 1600000000, 1600000000]
    for bad in (
        ["1600000000.123456789", "1600000000.123456788"],
        ["1600000000000000001", "0.5"],
        ["9223372036854775808", "1"],
    ):
        with pytest.raises(InputError, match=r"x.inter', line \d: 'timestamp' is"):
            times(*bad)


def test_missing_values_of_features_are_nan_and_no_text(tmp_path):
    file = read(tmp_path, "a:token\tb:float\tc:token_seq\td:float_seq\n\t\t\t\nNA\tNA\tx  y\t1 2.5\n")
    assert file.tokens("a", False).tolist()[1] == "NA" and math.isnan(file.tokens("a", False)[0])
    assert np.isnan(file.numbers("b", False)).tolist() == [True, True]
    assert [each.tolist() for each in file.sequences("c", FeatureType.TOKEN_SEQ)] == [[], ["x", "y"]]
    assert [each.tolist() for each in file.sequences("d", FeatureType.FLOAT_SEQ)] == [[], [1.0, 2.5]]


def test_a_token_that_would_fill_the_memory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.psutil, "virtual_memory", lambda: SimpleNamespace(total=2000))
    rows = "".join(f"u{user}\ti\t1\t{user}\n" for user in range(20))
    assert "line 4: 'user_id' has a token of 50 characters" in refusal(tmp_path, HEADER + rows.replace("u2", "u" * 50))
    assert len(values(read(tmp_path, HEADER + rows))["user_id"]) == 20


def test_only_wanted_columns_are_kept_and_all_are_checked(tmp_path):
    path = written(tmp_path, HEADER + "u\ti\t1\t2\n")
    assert list(read_atomic(path, Layout(), ["rating", "user_id"]).texts) == ["user_id", "rating"]
    assert [column.name for column in read_header(path, Layout())] == ["user_id", "item_id", "rating", "timestamp"]


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "x.inter").mkdir()
    with pytest.raises(InputError, match=r"x\.inter' cannot be read: Is a directory"):
        read_atomic(tmp_path / "x.inter", Layout())
