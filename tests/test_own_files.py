"""Parties with files of their own, which know each other by a public catalogue alone."""

import re

import numpy as np
import pandas as pd
import pytest

from recbole_fedkd.command_line import main
from recbole_fedkd.data.schema import ClientRows
from recbole_fedkd.engine import InProcess
from recbole_fedkd.federated.envelope import Answer
from recbole_fedkd.machines.coordinator import Coordinator
from recbole_fedkd.machines.manifest import Manifest
from recbole_fedkd.machines.party import Party

ITEMS, KNOWN_ITEMS = 30, 24
KEYS = ["--model=AttnFedKD", "--strategy=fedavg", "--client_num=2", "--label_values=[1,2,3,4,5]", "--metrics=[MAE,RMSE]",
        "--valid_metric=MAE", "--epochs=2", "--embedding_size=4", "--hidden_sizes=[4,8]", "--attention_heads=2",
        "--users=9"]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """A catalogue without the last six items, and two parties' rows, as tables."""
    dice = np.random.default_rng(3)
    prices = [f"{place * 1.5:g}" for place in range(KNOWN_ITEMS)]
    kinds = ["x|y" if place % 2 else "z" for place in range(KNOWN_ITEMS)]
    pd.DataFrame({"sku": [f"s{place}" for place in range(KNOWN_ITEMS)], "kind": kinds, "price": prices}).to_csv(
        tmp_path / "shop.csv", index=False
    )
    tables = []
    for party in range(2):
        rows = [
            (f"who{party}-{user}", f"s{item}", str(dice.integers(1, 6)), str(1000 + item))
            for user in range(5 + party)
            for item in dice.choice(ITEMS, 12, replace=False)
        ]
        tables.append(pd.DataFrame(rows, columns=["user", "sku", "stars", "time"]))
        tables[-1].to_csv(tmp_path / f"{party}.csv", index=False)
    return tables


def made(*more):
    others = [key for key in KEYS if key.partition("=")[0] not in {each.partition("=")[0] for each in more}]
    return main(["manifest", "shop.csv", "--out=m", *others, *more])


def brought(party, file=None, *more, number=None):
    told = [f"--manifest=m --number={party if number is None else number} --out=p{party}".split()]
    return main(["bring", file or f"{party}.csv", *told[0], *more])


def rows_of(folder, manifest):
    """A party's rows of all splits, with the catalogue's tokens, and its users' numbers."""
    parts = [ClientRows.load(folder / f"{name}.npz").interactions for name in ("rows", "valid", "test")]
    tokens = np.array(manifest.schema.columns["item_id"].tokens)
    return [
        (int(user), tokens[int(item)], float(stars), float(time))
        for part in parts
        for user, item, stars, time in zip(*(part[name] for name in ("user_id", "item_id", "rating", "timestamp")), strict=True)
    ]  # fmt: skip


def test_every_row_of_the_catalogue_is_in_one_split_and_the_others_are_named(files, tmp_path, capsys):
    assert made() == 0
    manifest = Manifest.load("m")
    assert sorted(manifest.schema.columns["item_id"].tokens) == sorted(
        ["[PAD]", *(f"s{place}" for place in range(KNOWN_ITEMS))]
    )
    for party, table in enumerate(files):
        assert brought(party) == 0
        outside = table[~table["sku"].isin([f"s{place}" for place in range(KNOWN_ITEMS)])]
        told = re.search(r"left out (\d+) rows of (\d+) items outside the catalogue: (.*)", capsys.readouterr().out)
        assert (int(told[1]), int(told[2])) == (len(outside), outside["sku"].nunique())
        assert set(told[3].split(", ")) == set(outside["sku"])
        found, kept = rows_of(tmp_path / f"p{party}", manifest), table.drop(outside.index)
        names = {name: place for place, name in enumerate(dict.fromkeys(kept["user"]), start=1 + 9 * party)}
        expected = [
            (names[user], item, float(stars), float(time)) for user, item, stars, time in kept.itertuples(index=False)
        ]
        assert sorted(found) == sorted(expected)
        files_of_all = [*(tmp_path / "m").iterdir(), *(tmp_path / f"p{party}").iterdir()]
        assert not any(b"who" in file.read_bytes() for file in files_of_all)


TOGETHER = {
    "rating": [],
    "threshold": ["--label_mode=threshold", "--metrics=[MAE,RMSE]"],
    "clicks": ["--label_mode=implicit", "--metrics=[NDCG]", "--topk=[5,10]", "--valid_metric=NDCG@10"],
}


@pytest.mark.parametrize("labels", TOGETHER)
def test_they_train_together(files, tmp_path, labels):
    more = TOGETHER[labels]
    assert made(*more) == 0 and brought(0) == 0 and brought(1) == 0
    manifest = Manifest.load("m")
    parties = {number: Party(tmp_path / f"p{number}", manifest) for number in range(2)}
    transport = InProcess({number: party.answer for number, party in parties.items()})
    declared = {number: Answer.from_bytes(party.hello()).numbers for number, party in parties.items()}
    result = Coordinator(manifest, transport, declared, tmp_path / "server").fit()
    assert (
        len(result["rounds"]) == 2
        and set(result["test_result"]) == ({"ndcg@5", "ndcg@10"} if labels == "clicks" else {"mae", "rmse"})
        and set(result["parties"]) == {"0", "1"}
    )


def test_atomic_files_are_as_good_as_tables(files, tmp_path):
    assert made() == 0 and brought(0) == 0
    whole = rows_of(tmp_path / "p0", Manifest.load("m"))
    for file in (tmp_path / "p0").iterdir():
        file.unlink()
    catalogue = pd.read_csv("shop.csv", dtype=str)
    lines = [f"{sku}\t{kind.replace('|', ' ')}\t{price}" for sku, kind, price in catalogue.itertuples(index=False)]
    (tmp_path / "shop.item").write_text("\n".join(["item_id:token\tkind:token_seq\tprice:float", *lines]) + "\n")
    lines = ["\t".join(row) for row in files[0].itertuples(index=False)]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (tmp_path / "0.inter").write_text("\n".join([header, *lines]) + "\n")
    assert main(["manifest", "shop.item", "--out=a", *KEYS]) == 0
    assert (tmp_path / "a" / "schema.json").read_bytes() == (tmp_path / "m" / "schema.json").read_bytes()
    assert brought(0, "0.inter") == 0
    assert rows_of(tmp_path / "p0", Manifest.load("m")) == whole


def test_a_party_may_have_met_one_label_only(files, tmp_path):
    assert made() == 0
    files[0].assign(stars="5").to_csv("fives.csv", index=False)
    assert brought(0, "fives.csv") == 0


def test_an_id_beside_a_title_is_the_id_and_both_columns_are_named_where_nothing_fits(files, tmp_path, capsys):
    table = pd.read_csv("shop.csv", dtype=str)
    table.rename(columns={"sku": "id", "kind": "title"}).to_csv("shop.csv", index=False, sep=";", encoding="utf-8-sig")
    assert main(["manifest", "shop.csv", "--out=a b/m", *KEYS]) == 0
    told = capsys.readouterr().out
    assert "items such as 's0'" in told and "bring <file> '--manifest=a b/m'" in told
    assert main(["bring", "0.csv", "--manifest=a b/m", "--number=0", "--out=a b/p"]) == 0
    assert "recbole-fedkd party 'a b/p' '--manifest=a b/m'" in capsys.readouterr().out
    files[0].assign(sku="none").to_csv("strange.csv", index=False)
    assert main(["bring", "strange.csv", "--manifest=a b/m", "--number=0", "--out=p"]) == 2
    assert "column 'sku' holds items such as 'none', the catalogue such as 's0'" in capsys.readouterr().err


def test_an_item_that_stands_twice_in_the_catalogue_is_named(files, tmp_path, caplog):
    table = pd.read_csv("shop.csv")
    pd.concat([table, table.iloc[[3, 5, 3]], table.iloc[[0]].assign(sku="")]).to_csv("shop.csv", index=False)
    assert made() == 0
    assert "dropped 4 rows of 'shop.csv': no item, or one that was there before (s3, s5)" in caplog.text


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (lambda: made("--label_values=~"), "a catalogue does not say which labels there are"),
        (lambda: made("--label_values=[5,1,1]"), "label_values is [5, 1, 1]; each label must stand there once"),
        (lambda: made("--label_values=[1]"), "label_values is [1]; at least two distinct labels are needed"),
        (lambda: made() or main(["bring", "0.csv", "--manifest=m", "--number=0", "--out=m/p"]), "out 'm/p' lies in a manifest"),
        (lambda: made("--users=1000001"), "users is 1000001 for each of 2 parties; together they may have 2,000,000 at most"),
        (lambda: made("--load_col={user: [user_id, age]}"), "which are their parties' own"),
        (lambda: made("--strategy=central"), "trains one network on all data"),
        (lambda: main(["manifest", "none.csv", *KEYS]), "'none.csv' cannot be read"),
        (lambda: main(["manifest", "0.csv", *KEYS, "--out=0.csv"]), "is there already and not empty"),
        (lambda: made() or brought(0, number=2), "the manifest's parties are 0 to 1"),
        (lambda: made() or brought(0, number="x"), "must be a party's number"),
        (lambda: made() or brought(0, "shop.csv"), "no column that looks like the user"),
        (lambda: made() or brought(0, "none.csv"), "'none.csv' cannot be read"),
        (lambda: made() or brought(0, "strange.csv"), "no item of 'strange.csv' is in the catalogue"),
        (lambda: made() or brought(0, "sixes.csv"), "label 6, which is not among label_values"),
        (lambda: made() or brought(0, "many.csv"), "has 10 users; a party of this manifest has 9 at most"),
        (lambda: made() or brought(0, "0.csv", "--time="), "no column for timestamp"),
        (lambda: made("--label_mode=threshold") or brought(0, "0.csv", "--rating="), "no column for rating"),
        (lambda: made("--secure_aggregation=True"), "needs three clients"),
        (lambda: made("--secure_aggregation=True", "--client_num=3") or brought(0), "is not the private key of a party"),
        (lambda: made("--label_mode=implicit", "--metrics=[LogLoss]", "--valid_metric=LogLoss"), "judge rows of both kinds"),
        (lambda: made("--model=BPR", "--metrics=[NDCG]", "--valid_metric=NDCG@10"), "model 'BPR' is not judged"),
        (lambda: made() or brought(0, "0.csv", "--colour=red"), "colour"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said_in_a_sentence_and_leaves_nothing(files, tmp_path, capsys, step, sentence):
    files[0].assign(sku="none").to_csv("strange.csv", index=False)
    files[0].assign(stars="6").to_csv("sixes.csv", index=False)
    users = [f"u{place % 10}" for place in range(len(files[0]))]
    files[0].assign(user=users).drop_duplicates(["user", "sku"]).to_csv("many.csv", index=False)
    assert step() == 2
    told = capsys.readouterr().err
    assert sentence in told and told.startswith("error: ") and told.count("\n") == 1
    assert not (tmp_path / "p0").exists()
