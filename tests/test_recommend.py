"""Recommendations: the scores of the model in the dataset's tokens, and somebody new who is scored as a device would."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.utils.case_study import full_sort_scores

import recbole_fedkd
from recbole_fedkd.command_line import main
from recbole_fedkd.command_line.tables import listed_tokens, rated_tokens
from recbole_fedkd.errors import InputError
from recbole_fedkd.quick_start import load_data_and_model
from recbole_fedkd.recommend import Recommender
from recbole_fedkd.recommend.folding import learn
from recbole_fedkd.recommend.scoring import appended

IMPLICIT = {"label_mode": "implicit", "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]}}
STOCK = {"load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]}}
FACTORS = {"preset": "factors", "factor_size": 2, "sketch_width": 3}
SEQUENTIAL = {
    "train_neg_sample_args": None,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
}
# Name to model and keys: central, federated on both engines, floors, RecBole's of every kind.
KINDS = {
    "afd": ("AttnFedKD", {}),
    "fedavg": ("AttnFedKD", {"preset": "fedavg"}),
    "fedavg, fleet": ("AttnFedKD", {"preset": "fedavg", "engine": "fleet"}),
    "fedkd": ("AttnFedKD", {"preset": "fedkd", "teacher": {"history_length": 3}}),
    "factors": ("AttnFedKD", FACTORS),
    "central": ("AttnStudent", {}),
    "known": ("AttnStudent", {"known_features": True, "factor_size": 2}),
    "known alone": (
        "AttnStudent",
        {"known_features": True, "use_user_id": False, "history_length": 0, "factor_size": 2},
    ),
    "central, implicit": ("AttnStudent", {"label_mode": "implicit", "backbone": "mlp", "hidden_sizes": [8]}),
    "MF": ("MF", IMPLICIT),
    "fedmf": ("MF", {**IMPLICIT, "preset": "fedmf", "clients_per_round": 4}),
    "pfedrec": ("PFedRec", {**IMPLICIT, "preset": "pfedrec"}),
    "Bias": ("Bias", {}),
    "FoldIn": ("FoldIn", {"factor_size": 2, "sketch_width": 3}),
    "MFEM": ("MFEM", {"factor_size": 2}),
    "Pop": ("Pop", STOCK),
    "BPR": ("BPR", STOCK),
    "BPR, fedavg": ("BPR", {**STOCK, "strategy": "fedavg"}),
    "LightGCN": ("LightGCN", STOCK),
    "NeuMF": ("NeuMF", {**STOCK, "label_mode": "threshold"}),
    "EASE": ("EASE", STOCK),
    "ItemKNN": ("ItemKNN", STOCK),
    "MultiVAE": ("MultiVAE", {**STOCK, "train_neg_sample_args": None}),
    "WideDeep": ("WideDeep", {"label_mode": "threshold"}),
    "WideDeep, fedavg": ("WideDeep", {"label_mode": "threshold", "strategy": "fedavg"}),
    "WideDeep, stock": ("WideDeep", {"threshold": {"rating": 4}}),
    "DIN": ("DIN", {"label_mode": "threshold"}),
    "DIN, stock": ("DIN", {**STOCK, "MAX_ITEM_LIST_LENGTH": 4}),
    "DIEN": ("DIEN", {**STOCK, "MAX_ITEM_LIST_LENGTH": 4}),
    "CORE": ("CORE", {**STOCK, **SEQUENTIAL, "MAX_ITEM_LIST_LENGTH": 8}),
    "GRU4RecCPR": ("GRU4RecCPR", {**STOCK, **SEQUENTIAL, "MAX_ITEM_LIST_LENGTH": 8, "reranker_CAN_NUM": 10}),
    "GRU4Rec": ("GRU4Rec", {**STOCK, **SEQUENTIAL, "MAX_ITEM_LIST_LENGTH": 8}),
    "SASRec": ("SASRec", {**STOCK, **SEQUENTIAL, "MAX_ITEM_LIST_LENGTH": 8, "n_heads": 2, "hidden_size": 8}),
}


@pytest.fixture(scope="module")
def loaded(data_path, tmp_path_factory):
    """A trained recommender of each kind, once."""
    from conftest import SMALL

    known: dict[str, Recommender] = {}

    def get(kind: str) -> Recommender:
        if kind not in known:
            model, keys = KINDS[kind]
            config = {**SMALL, "data_path": str(data_path), "learning_rate": 0.03, "epochs": 2, **keys}
            config["checkpoint_dir"] = str(tmp_path_factory.mktemp("saved"))
            folder = recbole_fedkd.run_recbole_fedkd(model, "tiny", config_dict=config)["run_folder"]
            known[kind] = recbole_fedkd.load(folder)
        return known[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_recommends(loaded, kind):
    found = loaded(kind)
    table = found.recommend(["u3", "u7"], 5)
    assert list(table.columns) == ["user_id", "item_id", "score", "rank"]
    assert table["user_id"].tolist() == ["u3"] * 5 + ["u7"] * 5 and table["rank"].tolist() == [1, 2, 3, 4, 5] * 2
    assert set(table["item_id"]) <= set(found.items)
    assert all(part["score"].is_monotonic_decreasing for _, part in table.groupby("user_id"))
    # In company or alone, and whichever way it is asked: the same.
    alone = found.recommend("u7", 5)
    pd.testing.assert_frame_equal(alone, table[5:].reset_index(drop=True), rtol=1e-4)
    scores = found.score(alone[["user_id", "item_id"]])["score"]
    np.testing.assert_allclose(scores, alone["score"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["afd", "factors", "fedmf", "Bias", "BPR", "LightGCN", "EASE"])
def test_scores_are_those_that_the_run_was_judged_by(loaded, kind):
    found = loaded(kind)
    _, model, dataset, _, _, test = load_data_and_model(found.config["resume"])
    users = dataset.token2id("user_id", np.array(["u3", "u7"]))
    expected = full_sort_scores(users, model, test, device="cpu")  # seen items are -inf there
    table = found.score([(user, item) for user in ("u3", "u7") for item in found.items])["score"].to_numpy()
    expected = expected[:, 1:].numpy().flatten()
    np.testing.assert_allclose(table[np.isfinite(expected)], expected[np.isfinite(expected)], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["afd", "BPR", "GRU4Rec", "WideDeep"])
def test_what_a_user_has_seen_can_be_left_out(loaded, data_path, kind):
    rows = pd.read_csv(data_path / "tiny" / "tiny.inter", sep="\t")
    seen = set(rows[rows["user_id:token"] == "u3"]["item_id:token"])
    found = loaded(kind)
    everything = found.recommend("u3", 1000)
    assert len(everything) == len(found.items) and seen & set(everything["item_id"]) == seen & set(found.items)
    left = found.recommend("u3", 1000, exclude_seen=True)
    assert set(left["item_id"]) == set(found.items) - seen


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Pop"])
def test_similar_items_are_those_that_the_same_users_prefer(loaded, kind):
    found = loaded(kind)
    if kind == "Bias":
        return  # scored alike for everybody
    table = found.similar_items("i5", 4)
    assert list(table.columns) == ["item_id", "similarity", "rank"] and "i5" not in set(table["item_id"])
    assert table["similarity"].is_monotonic_decreasing and table["similarity"].between(-1.001, 1.001).all()


def test_similarity_equals_a_correlation_of_scores(loaded):
    found = loaded("MFEM")
    scores = np.stack([found.score([(user, item) for item in found.items])["score"] for user in found.users])
    left = scores - scores.mean(1, keepdims=True)
    expected = pd.DataFrame(left, columns=found.items).corr()["i5"].drop("i5").sort_values(ascending=False)
    table = found.similar_items("i5", 3)
    np.testing.assert_allclose(table["similarity"], expected[:3], rtol=1e-3)


@pytest.mark.parametrize("kind", ["Bias", "Pop"])
def test_a_model_that_knows_no_tastes_says_that_nothing_is_similar(loaded, kind):
    with pytest.raises(InputError, match="alike for every user"):
        loaded(kind).similar_items("i5")


HISTORY = [("i1", 5.0), ("i2", 1), ("i3", 4), ("i4", 2)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "afd"])
def test_somebody_new_is_answered_or_refused_by_name(loaded, kind):
    found = loaded(kind)
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    user = found.recommend("u3", 5)
    table = found.recommend_for(HISTORY, 5)
    assert list(table.columns) == ["item_id", "score", "rank"] and len(table) == 5
    assert not set(table["item_id"]) & {"i1", "i2", "i3", "i4"}
    assert len(found.recommend_for(HISTORY, 1000, exclude_seen=False)) == len(found.items)
    # Nobody else is touched, and asked again it is the same.
    pd.testing.assert_frame_equal(found.recommend_for(HISTORY, 5), table)
    pd.testing.assert_frame_equal(found.recommend("u3", 5), user)
    assert all(torch.equal(value, before[name]) for name, value in found.model.state_dict().items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("afd", "Pop", "Bias")])
def test_the_history_matters(loaded, kind):
    found = loaded(kind)
    some, other = [("i1", 5.0), ("i2", 1)], [("i30", 5.0), ("i31", 1)]
    first, second = (
        found.recommend_for(each, 1000, exclude_seen=False).set_index("item_id")["score"] for each in (some, other)
    )
    assert not np.allclose(first, second.reindex(first.index), rtol=1e-6)


def training_history(found, user):
    rows = found._scorer.training
    own = rows.inter_feat["user_id"] == rows.token2id("user_id", user)
    items = rows.id2token("item_id", rows.inter_feat["item_id"][own].numpy())
    return list(zip(items, rows.inter_feat["rating"][own].tolist(), strict=True))


@pytest.mark.parametrize("kind", ["Bias", "FoldIn", "MFEM", "EASE", "ItemKNN", "factors"])
def test_a_user_s_own_history_folded_in_gives_the_user_s_scores(loaded, kind):
    found = loaded(kind)
    client = None
    if kind == "factors":
        client = int(found.model.client_of_user[found._user_ids["u3"]])
    folded = found.recommend_for(training_history(found, "u3"), 1000, exclude_seen=False, client=client)
    known = found.recommend("u3", 1000).set_index("item_id")["score"]
    np.testing.assert_allclose(folded["score"], known[folded["item_id"]], rtol=2e-3, atol=2e-3)


def test_what_is_known_of_somebody_new_is_what_is_known_of_a_user_with_the_same_history(loaded):
    found = loaded("known alone")
    history = training_history(found, "u3")
    folded = found.recommend_for(history, 1000)
    known = found.recommend("u3", 1000).set_index("item_id")["score"]
    assert len(folded) > 10
    np.testing.assert_allclose(folded["score"], known[folded["item_id"]], rtol=1e-4)
    assert found.recommend("u3", 1000).set_index("item_id")["score"].equals(known)  # nobody stays behind


def test_what_somebody_likes_is_ranked_above_what_somebody_dislikes(loaded):
    for kind in ("central", "known", "known alone", "fedavg", "fedavg, fleet", "WideDeep"):
        found = loaded(kind)
        good, bad = [(f"i{n}", 5) for n in range(8)], [(f"i{n}", 1) for n in range(8)]
        of_good, of_bad = (found.recommend_for(each, 1000)["score"].mean() for each in (good, bad))
        assert of_good > of_bad, kind


def test_both_engines_give_somebody_new_the_same(loaded):
    local, fleet = (loaded(kind).recommend_for(HISTORY, 1000) for kind in ("fedavg", "fedavg, fleet"))
    left, right = local.set_index("item_id")["score"], fleet.set_index("item_id")["score"]
    np.testing.assert_allclose(left, right[left.index], rtol=1e-2)


def test_where_no_network_is_everybody_s_the_clients_answer_together(loaded):
    found = loaded("afd")
    each = [found.recommend_for(HISTORY, 1000, client=number).set_index("item_id")["score"] for number in range(3)]
    together = found.recommend_for(HISTORY, 1000).set_index("item_id")["score"]
    expected = sum(scores[together.index] for scores in each) / 3
    np.testing.assert_allclose(together, expected, rtol=1e-6)
    assert len(found.recommend_for(HISTORY, 3, client=1)) == 3
    with pytest.raises(InputError, match=r"client is 3; it must be an integer in \[0, 2\]"):
        found.recommend_for(HISTORY, client=3)


def test_data_frames_go_in(loaded):
    found = loaded("MFEM")
    frame = pd.DataFrame(HISTORY, columns=["item_id", "rating"])
    pd.testing.assert_frame_equal(found.recommend_for(frame, 3), found.recommend_for(HISTORY, 3))
    pd.testing.assert_frame_equal(found.recommend_for(dict(HISTORY), 3), found.recommend_for(HISTORY, 3))
    assert len(found.score(pd.DataFrame({"user_id": ["u1"], "item_id": ["i1"]}))) == 1
    assert len(found.recommend(pd.Series(["u1", "u2"]), 2)) == 4
    assert found.recommend([], 3).empty and len(found.recommend(None, 1)) == len(found.users)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda found: found.recommend("u99"), "user 'u99' is not among the 30 users of dataset 'tiny'"),
        (lambda found: found.recommend(float("nan")), "user 'nan' is not among"),
        (lambda found: found.recommend("u1", 0), "k is 0; it must be an integer >= 1"),
        (lambda found: found.recommend("u1", True), "k is True"),
        (lambda found: found.recommend("u1", 2.5), "k is 2.5"),
        (lambda found: found.score([("u1", "x")]), "item 'x' is not among the 40 items"),
        (lambda found: found.score(["u1"]), "'u1' is no pair"),
        (lambda found: found.score(pd.DataFrame({"user": ["u1"]})), "it must have user_id"),
        (lambda found: found.similar_items("x"), "item 'x' is not among"),
        (lambda found: found.recommend_for([]), "history is empty"),
        (lambda found: found.recommend_for(["i1"]), "item 'i1' of the history has no rating"),
        (lambda found: found.recommend_for([("i1", 3.7)]), "the label 3.7 is not among the labels"),
        (lambda found: found.recommend_for([("i1", float("nan"))]), "the rating of item 'i1' is nan"),
        (lambda found: found.recommend_for([("i1", "5")]), "the rating of item 'i1' is '5'"),
        (lambda found: found.recommend_for([("i1", 5, 2)]), "is no \\(item, rating\\)"),
    ],
)
def test_bad_questions_are_told_in_one_sentence(loaded, ask, says):
    with pytest.raises(InputError, match=says):
        ask(loaded("central"))


def test_a_sequence_gets_its_latest_entry_and_a_full_one_loses_its_first():
    past = torch.tensor([[1, 2, 0], [1, 2, 3]])
    assert appended(past, torch.tensor([2, 3]), torch.tensor([9, 8])).tolist() == [[1, 2, 9], [2, 3, 8]]


@pytest.mark.parametrize(("kind", "says"), [("BPR", "trained without clients"), ("fedavg", "must be an integer in")])
def test_a_client_that_is_not_there_serves_nobody(kind, says, loaded):
    with pytest.raises(InputError, match=f"client is 99; .*{says}"):
        loaded(kind).recommend_for([("i1", 5)], client=99)


@pytest.mark.parametrize("kind", ["central", "factors", "MF", "BPR", "Pop"])
def test_no_pairs_have_no_scores_and_who_knows_all_items_is_told_none(kind, loaded):
    found = loaded(kind)
    assert not len(found.score([]))
    assert not len(found.recommend_for([(item, 3) for item in found.items]))


def test_learning_finds_the_minimum_of_a_loss_with_its_prior():
    # (x - 3)^2 + x^2 / 2 is smallest at x = 2.
    found = learn({"x": torch.zeros(1)}, lambda named: (named["x"] - 3).square().sum())
    assert found["x"].item() == pytest.approx(2.0, abs=1e-4)


@pytest.fixture(scope="module")
def folder(data_path, tmp_path_factory):
    keys = {"data_path": str(data_path), "checkpoint_dir": str(tmp_path_factory.mktemp("saved")), "state": "WARNING"}
    return recbole_fedkd.run_recbole_fedkd("MFEM", "tiny", config_dict=keys)["run_folder"]


def test_the_command_prints_and_writes_what_python_gives(folder, capsys, tmp_path):
    expected = recbole_fedkd.load(folder).recommend(["u3", "u7"], 4, exclude_seen=True)
    assert main(["recommend", folder, "--users=u3,u7", "-k", "4", "--exclude-seen"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[1:]] == expected[["user_id", "item_id"]].to_numpy().tolist()
    (tmp_path / "users.txt").write_text("u3\nu7\n")
    for name, read in {
        "a.csv": pd.read_csv,
        "a.tsv": lambda file: pd.read_csv(file, sep="\t"),
        "a.json": pd.read_json,
    }.items():
        assert main(["recommend", folder, "--users=@users.txt", "-k=4", "--exclude-seen", f"--out={name}"]) == 0
        pd.testing.assert_frame_equal(read(tmp_path / name), expected, check_dtype=False, rtol=1e-5)
    assert f"8 rows: {name}" in capsys.readouterr().out
    assert main(["recommend", folder, "--users=all", "-k=1", "--out=all.csv"]) == 0
    assert len(pd.read_csv("all.csv")) == 30


def test_the_command_answers_somebody_new_and_tells_similar_items(folder, capsys):
    found = recbole_fedkd.load(folder)
    assert main(["recommend", folder, "--history=i1:5,i2:1", "-k=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == found.recommend_for([("i1", 5), ("i2", 1)], 3)["item_id"].tolist()
    assert main(["recommend", folder, "--similar=i5", "-k=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == found.similar_items("i5", 3)["item_id"].tolist()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "recommend needs a run; write recommend <run folder>"),
        (["nowhere", "--users=u1"], "nowhere"),
        (["{folder}"], "recommend needs one of --users, --history, --similar"),
        (["{folder}", "--users=u1", "--similar=i1"], "recommend needs one of --users, --history, --similar"),
        (
            ["{folder}", "--users=u99"],
            "user 'u99' is not among the 30 users of dataset 'tiny', named as in its files, such as u",
        ),
        (["{folder}", "--users=Doe, John"], """in double quotes: --users='"a, b"'"""),
        (["{folder}", "--history=Film, 3:5"], """in double quotes: --history='"a, b":5'"""),
        (["{parent}", "--users=u1"], "is none of one run, but holds {folder}"),
        (["{folder}", "--users="], "users is empty"),
        (["{folder}", "--users=@nowhere.txt"], "nowhere.txt"),
        (["{folder}", "--users=u1", "-k", "0"], "k is '0'; it must be an integer >= 1"),
        (["{folder}", "--users=u1", "--out=a.xlsx"], "out is 'a.xlsx'; it must end in .csv, .tsv, .json or .parquet"),
        (["{folder}", "--users=u1", "--out=no/a.csv"], "out"),
        (["{folder}", "--history=i1"], "item 'i1' of the history has no rating"),
        (["{folder}", "--history=i1:x"], "the rating of item 'i1' is 'x'"),
        (["{folder}", "--users=u1", "--usres=u2"], "key 'usres' is unknown"),
    ],
)
def test_a_wrong_question_on_the_command_line_is_one_sentence(folder, arguments, says, capsys):
    assert main(["recommend", *(each.format(folder=folder, parent=Path(folder).parent) for each in arguments)]) == 2
    printed = capsys.readouterr().err
    assert says.format(folder=folder) in printed and printed.count("\n") == 1


@pytest.mark.parametrize("run", [None, 3, ["a"], "", b"x"])
def test_what_is_no_folder_is_told_in_one_sentence(run):
    with pytest.raises(InputError, match=r"run is .*; it must be the folder of a run, or a checkpoint file"):
        recbole_fedkd.load(run)


@pytest.mark.parametrize("command", ["report", "cost", "audit"])
def test_a_folder_of_runs_is_answered_with_the_runs_in_it(folder, command, capsys):
    assert main([command, str(Path(folder).parent)]) == 2
    assert f"is none of one run, but holds {folder}; name one" in capsys.readouterr().err


def test_tokens_with_commas_are_quoted():
    assert listed_tokens('"Thin Man, The", b,,c') == ["Thin Man, The", "b", "c"] and listed_tokens("all") is None
    assert rated_tokens('"Thin Man, The:5","x, y":2,a:b:2.5,a:b:,c') == [
        ("Thin Man, The", 5.0), ("x, y", 2.0), ("a:b", 2.5), ("a:b", None), ("c", None),
    ]  # fmt: skip
