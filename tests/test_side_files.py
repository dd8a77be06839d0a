"""Files of users and items beside the interactions: columns become features of the right kind, or a sentence says why not."""

from pathlib import Path

import pytest

from recbole_fedkd import load_data_and_model, run_recbole_fedkd
from recbole_fedkd.command_line import main

RATINGS = "user,item,rating\n" + "".join(
    f"u{u},i{(u * 7 + k * 3) % 20},{1 + (u + k) % 5}\n" for u in range(20) for k in range(8)
)
USERS = "Age,name,user,zip\n" + "".join(f"{20 + u},N {u % 2},u{u},0{u}\n" for u in range(19)) + "50,again,u1,03\n,,,\n"
ITEMS = "id,genres,year (of release)\n" + "".join(
    f"i{i},{'Action|Sci Fi' if i % 2 else 'Drama'},{1990 + i}\n" for i in range(20)
)


@pytest.fixture
def files():
    for name, text in (("ratings", RATINGS), ("users", USERS), ("items", ITEMS)):
        Path(f"{name}.csv").write_text(text)
    return ["import", "ratings.csv", "--users=users.csv", "--items=items.csv", "--name=mine"]


def test_columns_become_numbers_texts_and_lists_and_a_run_reads_them(files, capsys):
    assert main(files) == 0
    said = capsys.readouterr().out
    users, items = (Path(f"dataset/mine/mine.{role}").read_text().splitlines() for role in ("user", "item"))
    assert users[:2] == ["user_id:token\tAge:float\tname:token\tzip:token", "u0\t20\tN 0\t00"]
    assert len(users) == 20  # neither the second u1 nor the row without a user
    assert items[:3] == [
        "item_id:token\tgenres:token_seq\tyear_of_release:float",
        "i0\tDrama\t1990",
        "i1\tAction Sci_Fi\t1991",
    ]
    assert "users: 19, with Age (number), name (text), zip (text)" in said
    assert "1 users of the interactions are not in 'users.csv'" in said and "dropped 2 rows of 'users.csv'" in said
    config = {"epochs": 1, "show_progress": False, "embedding_size": 4, "history_length": 3}
    dataset = load_data_and_model(run_recbole_fedkd("AttnStudent", "mine", config_dict=config)["run_folder"])[2]
    assert {"Age", "name", "zip"} <= set(dataset.user_feat.columns)
    assert {"genres", "year_of_release"} <= set(dataset.item_feat.columns)


def test_of_a_dataset_that_is_replaced_nothing_stays(files):
    assert main(files) == 0
    assert main(["import", "ratings.csv", "--name=mine", "--overwrite"]) == 0
    assert [file.name for file in Path("dataset/mine").iterdir()] == ["mine.inter"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("user\nu1\n", "has one column"),
        ("who,age\nu1,3\n", "has no column that looks like the user"),
        ("user,age\nx1,3\n", "has no user of the interactions in column 'user'"),
        ("user,a b,a_b\nu1,3,4\n", "which would be called 'a_b' as another is"),
        ("user,rating\nu1,3\n", "which would be called 'rating' as another is"),
        ("", "is empty"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_writes_nothing(files, text, says, capsys):
    Path("users.csv").write_text(text)
    assert main(files) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not Path("dataset").exists()
