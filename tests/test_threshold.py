"""The rating from which a row is positive: what it is where nobody says, and what is said where all rows are alike."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_dataset

from recbole_fedkd.data.threshold import one_sided, positive_sentence, three_quarters
from recbole_fedkd.errors import InputError


def rated(folder, change):
    """The small dataset with other ratings: ``change`` takes 1..5 and the number of the row."""
    file = write_dataset(folder) / "tiny" / "tiny.inter"
    header, *rows = file.read_text().splitlines()
    columns = [row.split("\t") for row in rows]
    for number, row in enumerate(columns):
        row[2] = f"{change(int(row[2]), number):g}"
    file.write_text("\n".join([header, *("\t".join(row) for row in columns)]) + "\n")
    return str(folder)


@pytest.mark.parametrize(
    ("scale", "threshold"),
    [
        ((1, 5), 4.0),
        ((0, 10), 7.5),
        ((20, 100), 80.0),
        ((0.5, 5), 3.875),
        ((-10, 10), 5.0),
        ((0.1, 0.9), 0.7),
        ((0, 1), 0.75),
    ],
)
def test_three_quarters_of_the_way_up(scale, threshold):
    assert three_quarters(scale) == threshold
    assert positive_sentence("rating", threshold, scale).endswith(
        f"three quarters of the scale {scale[0]:g}..{scale[1]:g}"
    )
    assert positive_sentence("rating", threshold - 1, scale) == f"rating >= {threshold - 1:g}"


SCALES = [
    (lambda stars, row: stars, 4.0),
    (lambda stars, row: 20 * stars, 80.0),
    (lambda stars, row: (stars - 1) * 2.5, 7.5),
    (lambda stars, row: stars / 2, 2.0),
    (lambda stars, row: 0.2 * stars - 0.1, 0.7),  # a rating equal to the threshold is positive
    (lambda stars, row: stars - 6, -2.0),
]


@pytest.mark.parametrize(("change", "threshold"), SCALES)
@pytest.mark.parametrize("mode", ["threshold", "rating"])
def test_an_unset_threshold_makes_the_same_rows_positive_on_any_scale(tmp_path, prepared, mode, change, threshold):
    path = rated(tmp_path / "data", change)
    config, trainer, loaders, evaluations = prepared("AttnStudent", data_path=path, label_mode=mode)
    assert config["rating_threshold"] == threshold
    assert float(f"{change(4, 0):g}") == threshold
    rows = loaders[2]._dataset.inter_feat
    _, _, plain, _ = prepared("AttnStudent", label_mode="rating")
    expected = plain[2]._dataset.inter_feat["rating"] >= 4
    assert torch.equal(rows["user_id"], plain[2]._dataset.inter_feat["user_id"])
    if mode == "threshold":
        assert torch.equal(rows["label"].bool(), expected)
    (ranking,) = [each for each in evaluations[1] if "full sort" in each.name]
    assert len(ranking.loader._dataset.inter_feat) == int(expected.sum())
    assert f"rating >= {threshold:g}, three quarters of the scale" in ranking.name
    result = trainer.evaluate(evaluations[1], load_best_model=False)
    if mode == "rating":
        with torch.no_grad():
            distribution = trainer.model.eval().predict_distribution(rows)
        from sklearn.metrics import roc_auc_score

        assert result["auc"] == pytest.approx(roc_auc_score(expected, distribution[:, 3:].sum(1)), abs=1e-4)


def test_declared_labels_are_the_scale(prepared):
    config, *_ = prepared("AttnStudent", label_mode="rating", label_values=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert config["rating_threshold"] == 3.75


def test_four_is_what_it_was_to_the_bit(run):
    for mode in ("threshold", "rating"):
        unset, four = (
            run("AttnStudent", label_mode=mode, epochs=1, **keys) for keys in ({}, {"rating_threshold": 4.0})
        )
        assert unset["test_result"] == four["test_result"]
        assert unset["config"]["rating_threshold"] == 4.0
        assert unset["protocols"] == four["protocols"]


def test_a_resumed_run_keeps_the_threshold_that_was_found(run):
    first = run("WideDeep", label_mode="threshold", epochs=1)
    again = run("WideDeep", resume=first["run_folder"], epochs=2)
    whole = run("WideDeep", label_mode="threshold", epochs=2)
    assert again["test_result"] == whole["test_result"]
    assert again["config"]["threshold"] == {"rating": 4.0}


ALL_ALIKE = [
    ({"label_mode": "threshold", "rating_threshold": 4}, 20, "rating_threshold is 4, but all of the 600 ratings"),
    ({"label_mode": "threshold", "rating_threshold": 400}, 20, "rating_threshold is 400, but none of the 600 ratings"),
    ({"label_mode": "rating", "rating_threshold": 4}, 20, "rating_threshold is 4, but all of the 600 ratings"),
    ({"label_mode": "threshold"}, 0, "all 600 ratings of dataset 'tiny' are 0"),
    ({"label_mode": "rating"}, 0, "all 600 ratings of dataset 'tiny' are 0"),
    ({"label_mode": "rating", "label_values": [0, 1, 2]}, 0, "all 600 ratings of dataset 'tiny' are 0"),
    ({"label_mode": "rating", "label_values": [5]}, 1, "at least two distinct labels are needed"),
]


@pytest.mark.parametrize(("keys", "factor", "told"), ALL_ALIKE)
def test_one_label_only_is_refused_with_the_scale(tmp_path, run, keys, factor, told):
    path = rated(tmp_path / "data", lambda stars, row: factor * stars)
    with pytest.raises(InputError, match=told):
        run("AttnStudent", data_path=path, **keys)


def test_recboles_own_threshold_is_checked_alike(tmp_path, run, caplog):
    path = rated(tmp_path / "data", lambda stars, row: 20 * stars)
    keys = {"metrics": ["AUC", "LogLoss"], "valid_metric": "AUC", "train_neg_sample_args": None, "data_path": path}
    keys["eval_args"] = {"mode": "labeled", "group_by": None, "split": {"RS": [0.8, 0.1, 0.1]}}
    with pytest.raises(InputError, match=r"threshold is {'rating': 4}, but all of the 600 ratings .* are 20 to 100"):
        run("WideDeep", threshold={"rating": 4}, **keys)
    run("WideDeep", threshold={"rating": 80}, epochs=1, **keys)
    assert not [record for record in caplog.records if "%" in record.getMessage()]


def test_nearly_one_label_is_told_once_with_its_share(tmp_path, run, caplog):
    path = rated(tmp_path / "data", lambda stars, row: 1 if row % 50 == 0 else 5)
    run("AttnStudent", data_path=path, label_mode="threshold", epochs=1, metrics=["Accuracy"], valid_metric="Accuracy")
    told = [record.getMessage() for record in caplog.records if "rating_threshold is 4" in record.getMessage()]
    reason = "as rating_threshold is 4 and the ratings are 1 to 5; is it meant so?"
    assert told == [f"dataset 'tiny': 588 of 600 rows (98 %) are positive, {reason}"]


def test_a_metric_that_test_rows_cannot_define_is_said_and_is_null(tmp_path, run, caplog):
    # The last row of every user, which leave-one-out tests, is positive; the one before has both kinds.
    path = rated(tmp_path / "data", lambda stars, row: 5 if row % 20 == 19 else 1 + 4 * (row % 2 ^ (row // 20) % 2))
    keys = {"data_path": path, "label_mode": "threshold", "epochs": 1, "result_file": "result.json"}
    keys["eval_args"] = {"split": {"LS": "valid_and_test"}, "order": "TO"}
    result = run("AttnStudent", **keys)
    assert np.isnan(result["test_result"]["auc"])
    said = [record.getMessage() for record in caplog.records]
    assert sum("held-out test rows: 30 of 30 rows (100 %) are positive" in each for each in said) == 1
    assert '"auc": null' in Path("result.json").read_text()


def test_a_validation_metric_that_is_not_defined_is_refused_before_training(tmp_path, run):
    path = rated(tmp_path / "data", lambda stars, row: 5 if row % 20 == 18 else 1 + 4 * (row % 2 ^ (row // 20) % 2))
    with pytest.raises(InputError, match="valid_metric AUC is not defined"):
        run(
            "AttnStudent",
            data_path=path,
            label_mode="threshold",
            eval_args={"split": {"LS": "valid_and_test"}, "order": "TO"},
        )


@pytest.mark.parametrize(
    ("keys", "mend"),
    [
        (
            {"label_mode": "rating"},
            r"their highest rating is 1: lower rating_threshold \(4\), or hold out more rows \(eval_args",
        ),
        ({"label_mode": "threshold"}, r"lower rating_threshold \(4\), or hold out more rows \(eval_args.split\)"),
        ({"threshold": {"rating": 4}}, r"lower threshold \(\{'rating': 4\}\), or hold out more rows"),
    ],
)
def test_held_out_rows_of_which_none_is_positive_name_the_keys_that_mend_it(tmp_path, run, keys, mend):
    path = rated(tmp_path / "data", lambda stars, row: 1 if row % 20 > 17 else 1 + 4 * (row % 2))
    chosen = {"data_path": path, "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO"}}
    chosen |= {"metrics": ["NDCG", "MAE"], "valid_metric": "NDCG@10"}
    with pytest.raises(InputError, match=f"no held-out row has a positive label.* have nothing to rank; {mend}"):
        run("AttnStudent" if "label_mode" in keys else "WideDeep", **chosen, **keys)


def test_a_split_that_leaves_nothing_to_judge_by_is_refused(tmp_path, run, caplog):
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    rows = [f"u{row}\ti{row}\t{1 + 4 * (row % 2)}\t{row}" for row in range(20)]
    (folder / "tiny.inter").write_text(
        "\n".join(["user_id:token\titem_id:token\trating:float\ttimestamp:float", *rows])
    )
    keys = {"data_path": str(folder.parent), "epochs": 1, "load_col": {"inter": ["rating", "timestamp"]}}
    with pytest.raises(
        InputError, match=r"holds out no test row of the 20 interactions .* set eval_args.group_by=None"
    ):
        run("BPR", **keys)
    assert [each for each in caplog.messages if "holds out no valid row" in each]
    caplog.clear()
    for shares in ([0.8, 0.1, 0.1], [0.8, 0.0, 0.2]):
        assert run("BPR", eval_args={"split": {"RS": shares}, "group_by": None}, **keys)["test_result"]
    assert not [each for each in caplog.messages if "holds out no" in each]


def test_clicks_are_not_judged_on_stars(run):
    keys = {"LABEL_FIELD": "rating", "train_neg_sample_args": None, "epochs": 1, "eval_args": {"mode": "labeled"}}
    for metric in ("AUC", "LogLoss"):
        with pytest.raises(InputError, match=rf"metric {metric} needs labels 0 and 1, but 'rating' .* holds 1 to 5"):
            run("WideDeep", metrics=[metric], valid_metric=metric, **keys)


def test_shares():
    assert one_sided(np.array([True] * 95 + [False] * 5)) is None
    assert one_sided(np.array([True] * 96 + [False] * 4)) == "96 of 100 rows (96 %) are positive"
    assert one_sided(np.array([False] * 10)) == "10 of 10 rows (100 %) are negative"
    assert one_sided(np.array([], dtype=bool)) is None


def test_a_finished_run_is_not_repeated_because_its_data_settled_the_threshold():
    from recbole_fedkd.report.records import differing_keys

    planned = {
        "dataset": "a",
        "label_mode": "threshold",
        "rating_threshold": None,
        "threshold": {"rating": None},
        "seed": 1,
    }
    settled = {**planned, "rating_threshold": 4.0, "threshold": {"rating": 4.0}}
    assert differing_keys(settled, planned) == []
    assert differing_keys(settled, {**settled, "rating_threshold": 3.0}) == ["rating_threshold"]
    assert differing_keys(settled, {**settled, "dataset": "b", "rating_threshold": 7.5}) == ["dataset"]
    assert differing_keys(
        {"threshold": {"rating": 4}, "dataset": "a"}, {"threshold": {"rating": 3}, "dataset": "a"}
    ) == ["threshold"]
