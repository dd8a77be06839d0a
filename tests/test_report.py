import csv
import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.evaluator import smaller_metrics
from scipy import stats

from recbole_fedkd.errors import InputError
from recbole_fedkd.evaluation import metrics as _metrics  # noqa: F401  (registers the metrics)
from recbole_fedkd.report import write_report
from recbole_fedkd.report.plots import mean_curve
from recbole_fedkd.report.records import Group, Published, Run, Scale, read_experiment
from recbole_fedkd.report.statistics import (
    LOWER_IS_BETTER,
    client_means,
    client_quality,
    compare,
    cost,
    effort_to_reach,
    front_rows,
    holm,
    paired_t,
    pareto_front,
    share_closed,
    share_of_bytes,
    sizes_of,
    summary,
    user_differences,
    wilcoxon,
)
from recbole_fedkd.report.tables import (
    NONE,
    best_rows,
    client_tables,
    clients_csv,
    cost_tables,
    markdown,
    metrics_of,
    percent,
    protocol_sentences,
    published_table,
    quality_markdown,
    quality_table,
    scale_csv,
    scale_sentence,
    scale_table,
    significance_sentences,
    size_sentences,
)

GROUP = {"dataset": "ml-100k", "partition": "random"}
PARTITION = {
    "scheme": "random",
    "client_num": 3,
    "label_values": [1.0, 2.0],
    "clients": [
        {"users": 2, "samples": 30, "labels": [10, 20]},
        {"users": 2, "samples": 12, "labels": [6, 6]},
        {"users": 1, "samples": 0, "labels": []},
    ],
}


class Records:
    """Writes the records of an experiment, as a grid would."""

    def __init__(self, folder, **plan):
        self.folder = folder
        self.cells = []
        self.plan = {"name": "grid", "experiment": {}, "reference": None, **plan}
        for name in ("runs", "users", "failures"):
            (folder / name).mkdir(parents=True)

    def run(self, row, seed, test, valid=(0.9, 0.8), seconds=1.0, moved=100, group=GROUP, finished=True, **more):
        cell = f"{len(self.cells):02d}-{seed}"
        self.cells.append({"cell": cell, "row": row, "group": group, "seed": seed})
        strategy = more.pop("strategy", "afd")
        head = {
            "kind": "run",
            "version": more.pop("version", 2),
            "cell": cell,
            "row": row,
            "group": group,
            "seed": seed,
            "keys": {"strategy": strategy},
            "config": {"strategy": strategy, "student_pool": more.pop("student_pool", None), **more.pop("config", {})},
            "environment": {"python": "3.11", "torch": "2"},
            "partition": None if strategy == "central" else more.pop("partition", PARTITION),
        }
        lines = [head]
        first = 0 if head["version"] == 1 else 1
        for number, score in enumerate(valid, start=first):
            lines.append(
                {
                    "kind": "round",
                    "round": number,
                    "seconds": seconds,
                    "loss": 1.0,
                    "bytes_down": moved // 2,
                    "bytes_up": moved - moved // 2,
                    "valid": None if score is None else {"mae": score},
                }
            )
        result = {
            "kind": "result",
            "test": test,
            "best_valid": {"mae": min(score for score in valid if score is not None)},
            "best_round": more.pop("best_round", len(valid) - 1 + first),
            "valid_metric": "MAE",
            "valid_score_bigger": False,
            "protocols": more.pop("protocols", dict.fromkeys(test, "held-out test rows")),
            "communication": {"total_bytes": moved * len(valid)},
            "timing": {"rounds": len(valid), "training_seconds": seconds * len(valid)},
        }
        if finished:
            lines.append(result)
        users = more.pop("users", None)
        assert not more
        (self.folder / "runs" / f"{cell}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if users is not None:
            np.savez(self.folder / "users" / f"{cell}.npz", **users)
        return cell

    def failure(self, row, seed, error, group=GROUP):
        cell = f"{len(self.cells):02d}-{seed}"
        self.cells.append({"cell": cell, "row": row, "group": group, "seed": seed})
        record = {**self.cells[-1], "error": error}
        (self.folder / "failures" / f"{cell}.json").write_text(json.dumps(record))

    def done(self):
        content = {**self.plan, "cells": self.cells}
        (self.folder / "experiment.json").write_text(json.dumps(content))
        return self.folder

    def read(self):
        return read_experiment(self.done())


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "grid")


class Page(HTMLParser):
    """The tags of a page, in order, and the text of its cells."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.texts = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def cells(table):
    return [[f"[{cell.text}]" if cell.strong else cell.text for cell in row] for row in table.rows]


def test_mean_and_sample_deviation():
    found = summary([1.0, 2.0, 6.0])
    assert (found.mean, found.deviation, found.count) == (3.0, pytest.approx(math.sqrt(7)), 3)
    assert math.isnan(summary([1.0]).deviation)
    assert summary([]).count == 0 and math.isnan(summary([]).mean)


def test_holm_by_hand():
    # Sorted 0.005 0.01 0.03 0.04, times 4 3 2 1: 0.02 0.03 0.06 0.04, and the last may not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_does_not_count_tests_that_were_not_made():
    corrected = holm([math.nan, 0.01, 0.02])
    assert math.isnan(corrected[0])
    assert corrected[1:] == pytest.approx([0.02, 0.02])


def test_paired_tests_are_scipys():
    one, other = np.array([0.71, 0.64, 0.80, 0.69, 0.77]), np.array([0.70, 0.66, 0.75, 0.61, 0.74])
    assert paired_t(one - other) == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert wilcoxon(one - other) == pytest.approx(stats.wilcoxon(one, other).pvalue)
    # Five pairs that all differ in one direction: 2 of the 2^5 assignments of signs are as extreme.
    assert wilcoxon(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == 0.0625


def test_paired_tests_without_spread_or_pairs():
    assert paired_t(np.zeros(4)) == wilcoxon(np.zeros(4)) == 1.0
    assert math.isnan(paired_t(np.array([0.3]))) and math.isnan(wilcoxon(np.array([0.3])))
    assert math.isnan(paired_t(np.full(3, 0.1)))


def test_pareto_front_by_hand():
    points = [(10.0, 0.7), (0.0, 0.8), (5.0, 0.8), (20.0, 0.7), (30.0, 0.6), (0.0, 0.9)]
    assert pareto_front(points, bigger=False) == [1, 0, 4]
    assert pareto_front(points, bigger=True) == [5]


def test_mean_curve_covers_what_all_curves_cover():
    curves = [(np.array([0.0, 2.0, 4.0]), np.array([4.0, 2.0, 0.0])), (np.array([1.0, 2.0]), np.array([5.0, 4.0]))]
    x, mean, deviation = mean_curve(curves)
    assert x.tolist() == [1.0, 2.0]
    assert mean.tolist() == [4.0, 3.0]
    assert deviation.tolist() == pytest.approx([math.sqrt(2), math.sqrt(2)])


def test_quality_table_by_hand(records):
    for seed, mae, auc in ((1, 0.70, 0.80), (2, 0.72, 0.82)):
        records.run("local", seed, {"mae": mae, "auc": auc, "ndcg@10": 0.5, "ndcg@5": 0.4})
    for seed, mae in ((1, 0.69), (2, 0.71)):
        records.run("afd", seed, {"mae": mae, "auc": 0.8})
    (group,) = records.read().groups
    table = quality_table(group)
    assert table.header == ("row", "MAE ↓", "AUC ↑", "NDCG@5 ↑", "NDCG@10 ↑", "seeds")
    deviation = f"{math.sqrt(2) * 0.01:.4f}"
    # A metric that a single row has is not its best.
    assert cells(table) == [
        ["local", f"0.7100 ± {deviation}", f"[0.8100 ± {deviation}]", "0.4000 ± 0.0000", "0.5000 ± 0.0000", "2"],
        ["afd", f"[0.7000 ± {deviation}]", "0.8000 ± 0.0000", NONE, NONE, "2"],
    ]
    assert f"| afd | **0.7000 ± {deviation}** | 0.8000 ± 0.0000 | {NONE} | {NONE} | 2 |" in markdown(table).splitlines()


def test_a_metric_that_a_seed_lacks_is_counted(records):
    records.run("afd", 1, {"mae": 0.5, "auc": 0.6})
    records.run("afd", 2, {"mae": 0.5, "auc": None})
    (group,) = records.read().groups
    assert cells(quality_table(group)) == [["afd", "0.5000 ± 0.0000", "0.6000 (n = 1)", "2"]]


def test_rows_stand_in_the_order_of_the_experiment(records):
    for row in ("zeta", "alpha", "mid"):
        records.run(row, 1, {"mae": 0.5})
    experiment = records.read()
    assert experiment.groups[0].rows == ("zeta", "alpha", "mid")
    assert experiment.groups[0].reference == "zeta"


def test_groups_have_tables_of_their_own(records):
    for dataset in ("b", "a"):
        records.run("afd", 1, {"mae": 0.5}, group={"dataset": dataset})
    assert [group.title for group in records.read().groups] == ["dataset: b", "dataset: a"]


def test_protocols_that_differ_are_told_and_nobody_is_best(records):
    records.run("afd", 1, {"mae": 0.5, "auc": 0.8}, protocols={"mae": "in stars", "auc": "in stars"})
    records.run("central", 1, {"mae": 0.4, "auc": 0.7}, protocols={"mae": "normalised", "auc": "in stars"})
    (group,) = records.read().groups
    assert best_rows(group) == {"mae": set(), "auc": {"afd"}}
    assert protocol_sentences(group) == [
        "AUC: in stars.",
        "MAE: the protocol differs between rows, so that they do not compare: in stars (afd); normalised (central).",
    ]
    assert {each.metric for each in compare(group, metrics_of(group))} == {"auc"}


def test_unfinished_and_unreadable_runs_are_noted(records):
    records.run("afd", 1, {"mae": 0.5})
    unfinished = records.run("afd", 2, {"mae": 0.1}, finished=False)
    broken = records.run("afd", 3, {"mae": 0.1})
    (records.folder / "runs" / f"{broken}.jsonl").write_bytes(b"\xff\xfe{")
    odd = records.run("afd", 4, {"mae": 0.1})
    (records.folder / "runs" / f"{odd}.jsonl").write_text('{"kind": "run", "seed": 4}\n[]\n')
    experiment = records.read()
    assert [run.seed for run in experiment.runs] == [1]
    for cell in (unfinished, broken, odd):
        assert any(note.startswith(f"runs/{cell}.jsonl is left out: ") for note in experiment.notes), cell
    page = Page(write_report(records.folder).read_text())
    assert f"runs/{unfinished}.jsonl is left out: it has no result, so the run is not finished." in page.texts
    assert "3 of 4 runs of this experiment have no result yet." in page.texts


def test_half_a_line_at_the_end_is_no_result(records):
    cell = records.run("afd", 1, {"mae": 0.5})
    records.run("afd", 2, {"mae": 0.5})
    file = records.folder / "runs" / f"{cell}.jsonl"
    file.write_text(file.read_text()[:-20])
    assert [run.seed for run in records.read().runs] == [2]


def test_an_unreadable_users_file_costs_only_the_tests_over_users(records):
    cell = records.run("afd", 1, {"mae": 0.5})
    (records.folder / "users" / f"{cell}.npz").write_bytes(b"no archive")
    experiment = records.read()
    assert len(experiment.runs) == 1 and not experiment.runs[0].users
    assert any(f"users/{cell}.npz" in note for note in experiment.notes)


def test_without_a_plan_the_files_order_counts(records):
    for row in ("b", "a"):
        records.run(row, 1, {"mae": 0.5})
    experiment = read_experiment(records.folder)
    assert experiment.groups[0].rows == ("b", "a")
    assert any("no experiment.json" in note for note in experiment.notes)
    (records.folder / "experiment.json").write_text("{")
    assert read_experiment(records.folder).groups[0].rows == ("b", "a")


def test_runs_of_an_earlier_plan_are_left_out(records):
    records.run("afd", 1, {"mae": 0.5})
    renamed = records.run("fd", 1, {"mae": 0.9})
    removed = records.run("afd", 1, {"mae": 0.9})
    records.cells.pop()
    records.cells[-1]["row"] = "fedavg"
    experiment = records.read()
    assert [run.test["mae"] for run in experiment.runs] == [0.5]
    assert any(f"left out: {renamed}, {removed}." in note for note in experiment.notes)


def test_records_of_another_version_are_left_out(records):
    cell = records.run("afd", 1, {"mae": 0.5})
    records.run("afd", 2, {"mae": 0.5})
    file = records.folder / "runs" / f"{cell}.jsonl"
    file.write_text(file.read_text().replace('"version": 2', '"version": 3'))
    experiment = records.read()
    assert [run.seed for run in experiment.runs] == [2]
    assert f"runs/{cell}.jsonl is left out: its version is 3, and only 1 and 2 are known." in experiment.notes


def test_a_second_run_of_the_same_place_is_left_out(records):
    records.run("afd", 1, {"mae": 0.5})
    second = records.run("afd", 1, {"mae": 0.9})
    experiment = records.read()
    assert [run.test["mae"] for run in experiment.runs] == [0.5]
    assert any(note.startswith(f"{second} is left out") for note in experiment.notes)


def test_a_row_whose_runs_are_of_two_methods_is_noted(records):
    first = records.run("central", 1, {"mae": 0.5}, config={"learner": "adam_to_sgd", "seed": 1, "device": "cpu"})
    other = records.run("central", 2, {"mae": 0.5}, config={"learner": "adam", "seed": 2, "device": "cuda", "new": 1})
    records.run("afd", 1, {"mae": 0.5}, config={"learner": "adam", "seed": 1})
    records.run("afd", 2, {"mae": 0.5}, config={"learner": "adam", "seed": 2})
    (note,) = [note for note in records.read().notes if "method" in note]
    assert (
        f"the runs of 'central' are not of one method: {first} and {other} have learner adam_to_sgd and adam." in note
    )


def test_the_metrics_of_which_less_is_better_are_recboles():
    assert frozenset(smaller_metrics) == LOWER_IS_BETTER


def test_nothing_to_report_is_one_sentence(tmp_path, records):
    with pytest.raises(InputError, match="is no folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no finished run"):
        write_report(records.folder)
    records.run("afd", 1, {"mae": 0.5}, finished=False)
    with pytest.raises(InputError, match="the run is not finished"):
        write_report(records.folder)
    assert not (records.folder / "report").exists()


def test_failures_alone_are_a_report_and_a_mended_one_is_none(records):
    records.failure("afd", 1, "Traceback\n  somewhere\nTrainingError: the loss is <nan>")
    assert "TrainingError: the loss is <nan>" in Page(write_report(records.done()).read_text()).texts
    records.failure("afd", 2, "too late")
    failed = records.cells.pop()
    records.run("afd", 2, {"mae": 0.5})
    (records.folder / "runs" / f"{records.cells[-1]['cell']}.jsonl").rename(
        records.folder / "runs" / f"{failed['cell']}.jsonl"
    )
    experiment = records.read()
    assert [failure.seed for failure in experiment.failures] == [1]


def users_of(values, seed=0):
    """Per-user records; users in an order of the seed's own."""
    order = np.random.default_rng(seed).permutation(len(values))
    return {"user": np.arange(len(values))[order], "mae": np.array(values, dtype=np.float32)[order]}


def test_differences_per_user_are_means_over_the_seeds_that_judged_him(records):
    nan = math.nan
    records.run("local", 1, {"mae": 0.5}, users=users_of([0.5, 0.5, 0.5, nan, 0.5]))
    records.run("local", 2, {"mae": 0.5}, users=users_of([0.5, 0.5, nan, nan, 0.5], 1))
    records.run("afd", 1, {"mae": 0.5}, users=users_of([1.0, 0.5, 0.75, 1.0, nan], 2))
    records.run("afd", 2, {"mae": 0.5}, users=users_of([0.5, 0.0, 0.75, 1.0, nan], 3))
    records.run("afd", 3, {"mae": 0.5}, users=users_of([9.0, 9.0, 9.0, 9.0, 9.0], 4))
    (group,) = records.read().groups
    pairs = list(zip(group.runs["afd"], group.runs["local"], strict=False))
    assert user_differences(pairs, "mae").tolist() == [0.25, -0.25, 0.25]
    assert user_differences(pairs, "auc").size == 0
    over_users = {each.test: each for each in compare(group, ["mae"]) if each.unit == "users"}
    assert over_users["Wilcoxon"].count == 3
    assert over_users["Wilcoxon"].p == pytest.approx(stats.wilcoxon([0.25, -0.25, 0.25]).pvalue)
    assert over_users["paired t"].p == pytest.approx(stats.ttest_1samp([0.25, -0.25, 0.25], 0).pvalue)
    assert over_users["paired t"].difference == pytest.approx(1 / 12)


NAN = math.nan
# Of users 0, 1, ... in the tests of clients.
CLIENTS = [0, 0, 1, 1, 2]


def of_clients(values, clients=CLIENTS, seed=0, metric="mae"):
    """Per-user records with the users' clients; users in an order of the seed's own."""
    order = np.random.default_rng(seed).permutation(len(values))
    return {
        "user": np.arange(len(values))[order],
        "client": np.array(clients)[order],
        metric: np.array(values, dtype=np.float32)[order],
    }


def test_a_client_is_the_mean_of_its_judged_users():
    numbers, means = client_means(np.array([4, 1, 4, -1, 1, 2]), np.array([1.0, 5.0, 2.0, 9.0, NAN, NAN]))
    assert (numbers.tolist(), means.tolist()) == ([1, 4], [5.0, 1.5])
    numbers, means = client_means(np.array([-1]), np.array([1.0]))
    assert len(numbers) == len(means) == 0


def clients_by_hand(records):
    """Two rows and two seeds; no client of local is judged by all its users."""
    # Clients of local: 2, 2 (one of two users judged), 4; of afd: 1, 6, 4, where user 3 is judged in afd alone.
    records.run("local", 1, {"mae": 3.0}, users=of_clients([1, 3, 2, NAN, 4]))
    records.run("afd", 1, {"mae": 3.0}, users=of_clients([1, 1, 3, 9, 4], seed=5))
    records.run("local", 2, {"mae": 2.0}, users=of_clients([2, 2, 2, 2, 2], seed=3))
    records.run("afd", 2, {"mae": 1.0}, users=of_clients([1, 1, 1, 1, 1], seed=4))


def test_clients_own_averages_by_hand(records):
    clients_by_hand(records)
    (group,) = records.read().groups
    local, afd = client_quality(group, ["mae", "auc"])
    assert (local.row, local.mean.mean, local.worst.mean) == ("local", pytest.approx((8 / 3 + 2) / 2), 3.0)
    assert (local.better, local.compared, local.clients) == (0, 0, 6) and math.isnan(local.difference)
    assert (afd.mean.mean, afd.worst.mean) == (pytest.approx((11 / 3 + 1) / 2), 3.5)
    assert afd.worst.deviation == pytest.approx(5 / math.sqrt(2))
    # Seed 1: -1, +1 over the user whom both judged, 0, which is no gain; seed 2: -1 each.
    assert (afd.difference, afd.better, afd.compared) == (-0.5, 4, 6)
    (found,) = client_tables(group)
    assert found.table.header == ("row", "MAE ↓", "MAE, worst client", "MAE, against local")
    assert cells(found.table) == [
        ["local", "[2.3333 ± 0.4714]", "[3.0000 ± 1.4142]", NONE],
        ["afd", "[2.3333 ± 1.8856]", "3.5000 ± 3.5355", "-0.5000 (4 of 6)"],
    ]


def run_of(row, users):
    return Run(
        cell=row,
        row=row,
        group={},
        seed=1,
        settings={},
        central=False,
        environment={},
        partition=None,
        rounds=(),
        test={"mae": 1.0},
        best_round=None,
        valid_metric="mae",
        valid_bigger=False,
        protocols={},
        total_bytes=0,
        training_seconds=0.0,
        users=users,
    )


judged_users = st.dictionaries(st.integers(0, 15), st.sampled_from([NAN, 0.0, 0.25, 0.5, 1.0]), min_size=1)


@given(judged_users, judged_users, st.lists(st.integers(0, 3), min_size=16, max_size=16))
def test_clients_averages_equal_loops_over_their_users(mine, others, client_of_user):
    def recorded(values):
        users = np.array(list(values), dtype=np.int64)
        of_users = np.array(client_of_user)[users]
        return {"user": users, "client": of_users, "mae": np.array(list(values.values()), dtype=np.float32)}

    runs = {"local": (run_of("local", recorded(others)),), "afd": (run_of("afd", recorded(mine)),)}
    found = [each for each in client_quality(Group({}, ("local", "afd"), runs, "local"), ["mae"]) if each.row == "afd"]
    values, differences = {}, {}
    for user, value in mine.items():
        if not math.isnan(value):
            values.setdefault(client_of_user[user], []).append(value)
            if not math.isnan(others.get(user, NAN)):
                differences.setdefault(client_of_user[user], []).append(value - others[user])
    means = [sum(each) / len(each) for each in values.values()]
    gains = [sum(each) / len(each) for each in differences.values()]
    assert len(found) == bool(means)
    for each in found:
        assert each.mean.mean == pytest.approx(sum(means) / len(means))
        assert each.worst.mean == pytest.approx(max(means))
        assert (each.clients, each.better, each.compared) == (len(means), sum(gain < 0 for gain in gains), len(gains))
        if gains:
            assert each.difference == pytest.approx(sum(gains) / len(gains))


def test_a_metric_that_grows_has_its_worst_client_below(records):
    for row, values in (("local", [0.2, 0.4, 0.5, 0.5, 0.9]), ("afd", [0.3, 0.4, 0.5, 0.4, 0.9])):
        records.run(row, 1, {"accuracy": 0.5}, users=of_clients(values, metric="accuracy"))
    (group,) = records.read().groups
    local, afd = client_quality(group, ["accuracy"])
    assert (local.worst.mean, afd.worst.mean) == (pytest.approx(0.3), pytest.approx(0.35))
    assert (afd.better, afd.compared) == (1, 3)


def test_where_a_threshold_comes_from_makes_no_other_protocol(records):
    told = "held-out test rows, rating >= 4"
    records.run("afd", 1, {"mae": 0.5}, protocols={"mae": told})
    records.run("local", 1, {"mae": 0.6}, protocols={"mae": f"{told}, three quarters of the scale 1..5"})
    (group,) = records.read().groups
    assert protocol_sentences(group) == [f"MAE: {told}, three quarters of the scale 1..5."]
    assert best_rows(group)["mae"] == {"afd"}


def test_counts_of_single_seeds_make_no_other_protocol(records):
    told = "held-out test rows [{} of 60 rows repeat a pair]"
    for seed, repeated in ((1, 3), (2, 5)):
        for row, mae in (("afd", 0.4), ("local", 0.5)):
            records.run(row, seed, {"mae": mae}, protocols={"mae": told.format(repeated)})
    records.run("local", 3, {"mae": 0.5}, protocols={"mae": "held-out test rows"})
    (group,) = records.read().groups
    assert protocol_sentences(group) == ["MAE: held-out test rows [3 to 5 of 60 rows repeat a pair]."]
    assert best_rows(group)["mae"] == {"afd"}


def test_rows_of_different_protocols_are_not_compared_client_by_client(records):
    records.run("local", 1, {"mae": 1.0}, users=of_clients([1] * 5), protocols={"mae": "in stars"})
    records.run("afd", 1, {"mae": 0.5}, users=of_clients([0.5] * 5), protocols={"mae": "normalised"})
    (group,) = records.read().groups
    assert [each.compared for each in client_quality(group, ["mae"])] == [0, 0]
    assert cells(client_tables(group)[0].table)[1] == ["afd", "0.5000", "0.5000", NONE]


def test_runs_without_clients_take_those_of_the_same_seed_and_partition(records):
    other = {**PARTITION, "clients": PARTITION["clients"][:2]}
    records.run("central", 1, {"mae": 1.0}, users=users_of([1, 1, 1, 1, 0]), strategy="central")
    records.run("central", 2, {"mae": 1.0}, users=users_of([1, 1, 1, 1, 0]), strategy="central")
    records.run("old", 1, {"mae": 1.0}, users=users_of([0, 0, 0, 0, 3]))
    records.run("old, elsewhere", 1, {"mae": 1.0}, users=users_of([0, 0, 0, 0, 3]), partition=other)
    records.run("unjudged", 1, {"mae": 1.0})
    records.run("afd", 1, {"mae": 1.0}, users=of_clients([2, 2, 2, 2, 2]))
    (group,) = records.read().groups
    found = {each.row: each for each in client_quality(group, ["mae"])}
    assert list(found) == ["central", "old", "afd"]
    # Seed 2 has no run with clients.
    assert (found["central"].mean.mean, found["central"].mean.count) == (pytest.approx(2 / 3), 1)
    assert (found["old"].worst.mean, found["old"].better, found["old"].compared) == (3.0, 2, 3)
    (table,) = client_tables(group)
    assert "Users of central, old, which recorded no clients, count to those that they have" in table.sentence
    assert "left out: old, elsewhere, unjudged." in table.sentence


def test_without_any_clients_nothing_is_said_of_them(records):
    records.run("local", 1, {"mae": 0.5}, users=users_of([0.5, 0.5]))
    experiment = records.read()
    assert client_tables(experiment.groups[0]) == []
    assert clients_csv(experiment) is None
    assert "Clients" not in Page(write_report(records.folder).read_text()).texts


def test_clients_that_are_no_numbers_are_noted(records):
    cell = records.run("afd", 1, {"mae": 0.5}, users={**of_clients([1.0] * 5), "client": np.full(5, 0.5)})
    experiment = records.read()
    assert f"users/{cell}.npz is left out: its clients are no whole numbers." in experiment.notes


POOL = [{"embedding_size": 8}, {}]


def students(records, reference=POOL):
    """Clients 0 and 2 have the small student, client 1 the row's own."""
    records.run("local", 1, {"mae": 1.0}, users=of_clients([2, 2, 2, 2, 2]), student_pool=reference)
    records.run("afd", 1, {"mae": 1.0}, users=of_clients([1, 1, 3, 3, 1.5]), student_pool=POOL)
    records.run("fedavg", 1, {"mae": 1.0}, users=of_clients([1, 1, 1, 1, 3]))
    records.run("other pool", 1, {"mae": 1.0}, users=of_clients([0] * 5), student_pool=[{}, {}, POOL[0]])
    other = {**PARTITION, "clients": PARTITION["clients"][:2]}
    records.run("other clients", 1, {"mae": 1.0}, users=of_clients([0] * 5), partition=other)
    records.run("central", 1, {"mae": 1.0}, users=users_of([4, 4, 1, 1, 4]), strategy="central", student_pool=POOL)
    return records.read()


@pytest.mark.parametrize("reference", [POOL, None, [{}, {"embedding_size": 2}, {}]])
def test_every_size_of_student_beside_the_references_clients_of_the_same_numbers(records, reference):
    (group,) = students(records, reference).groups
    small, own = [size for size in sizes_of(group) if list(size.pool) == POOL]
    assert small.rows == own.rows == ("local", "afd", "fedavg", "central")
    assert [
        (each.row, each.mean.mean, each.worst.mean, each.better, each.compared)
        for each in client_quality(group, ["mae"], small)
    ] == [("local", 2, 2, 0, 0), ("afd", 1.25, 1.5, 2, 2), ("fedavg", 2, 3, 1, 2), ("central", 4, 4, 0, 2)]
    assert [(each.row, each.mean.mean, each.difference) for each in client_quality(group, ["mae"], own)][1:] == [
        ("afd", 3, 1),
        ("fedavg", 1, -1),
        ("central", 1, -1),
    ]
    told = {each.title: each.sentence for each in client_tables(group)}
    assert {"All clients", "Students 2 of 2 (the keys of the row)"} < told.keys()
    beside = "fedavg, central" if reference == POOL else "local, fedavg, central"
    assert told["Students 1 of 2 (embedding_size: 8)"] == (
        f"Clients 0, 2, which have this student. In {beside} the clients of the same numbers have the row's own model."
    )


def test_sizes_are_dealt_out_in_turn(records):
    sizes = sizes_of(students(records).groups[0])
    assert [(len(size.pool), size.place) for size in sizes] == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    assert sizes[-1].has(np.array([0, 1, 2, 3, 5, -1])).tolist() == [False, False, True, False, True, False]


def test_whether_every_size_gains_is_said(records):
    (group,) = students(records).groups
    sentences = size_sentences(group)
    assert sentences[0] == "afd against local, means over clients and seeds: in MAE only students of size 1 gain."
    # A row without sizes gains with no student of a size, so nothing is said of it.
    assert [sentence.split(" against")[0] for sentence in sentences] == ["afd", "other pool"]
    assert "in MAE students of every size gain" in sentences[1]


def test_the_csv_of_clients_has_a_line_per_size_row_and_metric(records):
    experiment = students(records)
    lines = list(csv.DictReader(clients_csv(experiment).splitlines()))
    small = next(line for line in lines if (line["size"], line["row"]) == ("1", "afd"))
    assert (small["student"], small["better"], small["reference"]) == ('{"embedding_size": 8}', "lower", "local")
    assert (float(small["mean"]), float(small["worst"]), float(small["difference"])) == (1.25, 1.5, -0.75)
    assert (small["clients"], small["better_off"], small["compared"], small["seeds"]) == ("2", "2", "2", "1")
    assert [line["row"] for line in lines if not line["size"]][:2] == ["local", "afd"]


def scaled(folder, **scale):
    """Two seeds; bytes until the best round are moved times two, but that of fedavg is its first of two."""
    records = Records(folder, experiment={"scale": scale}, reference="local")
    for seed, low, high in ((1, 0.9, 0.5), (2, 0.8, 0.6)):
        records.run("local", seed, {"mae": low, "auc": 0.5}, moved=0)
        records.run("central", seed, {"mae": high, "auc": 0.5}, moved=0, strategy="central")
    for seed, mae, moved in ((1, 0.8, 10), (2, 0.6, 30)):
        records.run("afd", seed, {"mae": mae, "auc": 0.5}, moved=moved)
    for seed, mae in ((1, 0.4), (2, 0.9)):
        records.run("fedavg", seed, {"mae": mae, "auc": 0.5}, moved=200, best_round=1)
    records.run("wasteful", 2, {"mae": 0.9, "auc": 0.5}, moved=400)
    return records


SCALE = {"floor": "local", "ceiling": "central", "bytes": "fedavg"}


def test_shares_of_distance_and_bytes_are_paired_by_seed_and_then_averaged(tmp_path):
    experiment = scaled(tmp_path / "grid", **SCALE).read()
    (group,) = experiment.groups
    assert experiment.scale == Scale("local", "central", "fedavg")
    # (0.9 - 0.8) / 0.4 = 25 % and (0.8 - 0.6) / 0.2 = 100 %; of the means it would be 0.15 / 0.3 = 50 %.
    assert share_closed(group, "afd", "mae", "local", "central").mean == pytest.approx(0.625)
    # 125 % and -50 %.
    assert share_closed(group, "fedavg", "mae", "local", "central").mean == pytest.approx(0.375)
    assert share_closed(group, "afd", "auc", "local", "central").count == 0
    assert share_closed(group, "afd", "mae", None, "central").count == 0
    assert share_of_bytes(group, "afd", "fedavg").mean == pytest.approx(0.2)
    assert share_of_bytes(group, "local", "fedavg").mean == 0
    assert share_of_bytes(group, "central", "fedavg").count == 0
    assert share_of_bytes(group, "afd", "local").count == 0
    table = scale_table(group, experiment.scale)
    assert table.header == ("row", "MAE ↓", "MAE, closed", "bytes until the best round", "share of the bytes of fedavg")
    assert cells(table) == [
        ["local", "[0.8500]", "0.0 %", "0", "0.0 %"],
        ["central", "0.5500", "100.0 %", NONE, NONE],
        ["afd", "[0.7000]", "62.5 %", "40", "20.0 %"],
        ["fedavg", "[0.6500]", "37.5 %", "200", "100.0 %"],
        ["wasteful", "0.9000", "-50.0 %", "800", "400.0 %"],
    ]
    told = scale_sentence(experiment.scale)
    assert "Closed is (row - local) / (central - local)" in told and "within each seed" in told


def test_shares_that_fewer_seeds_have_say_so(tmp_path):
    records = scaled(tmp_path / "grid", **SCALE)
    records.run("afd", 3, {"mae": 0.7}, moved=10)
    experiment = records.read()
    (afd,) = [row for row in cells(scale_table(experiment.groups[0], experiment.scale)) if row[0] == "afd"]
    assert afd[2:] == ["62.5 % (n = 2)", "33", "20.0 % (n = 2)"]


def test_a_distance_between_different_protocols_is_none(tmp_path):
    records = Records(tmp_path / "grid")
    for row, mae, protocol in (("local", 0.9, "in stars"), ("central", 0.2, "normalised"), ("afd", 0.8, "in stars")):
        records.run(row, 1, {"mae": mae}, protocols={"mae": protocol})
    (group,) = records.read().groups
    assert share_closed(group, "afd", "mae", "local", "central").count == 0
    assert not any(cell.strong for row in scale_table(group, Scale()).rows for cell in row)


def test_a_scale_names_what_it_measures_by_and_nothing_else(tmp_path):
    experiment = scaled(tmp_path / "grid", bytes="afd").read()
    table = scale_table(experiment.groups[0], experiment.scale)
    assert table.header == ("row", "MAE ↓", "bytes until the best round", "share of the bytes of afd")
    assert "Closed" not in scale_sentence(experiment.scale)
    assert scale_table(experiment.groups[0], Scale()).header == ("row", "MAE ↓", "bytes until the best round")


def test_a_scale_whose_row_has_no_run_is_noted(tmp_path):
    experiment = scaled(tmp_path / "grid", **{**SCALE, "ceiling": "gone"}).read()
    assert any("The scale's ceiling is the row 'gone', which has no run in" in note for note in experiment.notes)
    closed = [row[2] for row in cells(scale_table(experiment.groups[0], experiment.scale))]
    assert closed == [NONE] * 5


def test_the_csv_of_bytes_and_quality_by_hand(tmp_path):
    lines = list(csv.DictReader(scale_csv(scaled(tmp_path / "grid", **SCALE).read()).splitlines()))
    afd = next(line for line in lines if line["row"] == "afd")
    assert (float(afd["closed"]), afd["closed_seeds"], float(afd["bytes"])) == (pytest.approx(0.625), "2", 40.0)
    assert (float(afd["share_of_bytes"]), afd["front"], afd["metric"]) == (pytest.approx(0.2), "1", "mae")
    central = next(line for line in lines if line["row"] == "central")
    assert (central["bytes"], central["share_of_bytes"], central["front"]) == ("", "", "0")


def test_rows_without_a_network_are_on_no_front_and_equal_rows_share_a_place():
    places = {"central": (None, 0.1), "b": (5.0, 0.4), "a": (0.0, 0.5), "twin": (0.0, 0.5), "worse": (5.0, 0.5)}
    assert front_rows(places, bigger=False) == ["a", "twin", "b"]
    assert front_rows({"central": (None, 0.1)}, bigger=True) == []


def test_small_shares_keep_two_digits():
    assert [percent(share) for share in (0.5, 1.234, -0.5, -0.0, 0.0001234, -0.00999, 0.01)] == [
        "50.0 %",
        "123.4 %",
        "-50.0 %",
        "0.0 %",
        "0.012 %",
        "-1.00 %",
        "1.0 %",
    ]


def test_files_on_clients_and_scale_come_and_go_with_their_records(tmp_path):
    records = scaled(tmp_path / "grid", **SCALE)
    records.run("local", 5, {"mae": 3.0}, users=of_clients([1, 3, 2, NAN, 4]))
    cell = records.cells[-1]["cell"]
    report = write_report(records.done()).parent
    names = ("clients.md", "clients.csv", "scale.md", "scale.csv")
    page = Page((report / "index.html").read_text())
    assert set(names) <= {anchor["href"] for anchor in page.all("a")}
    assert {"Clients", "Bytes and quality", "All clients"} <= set(page.texts)
    assert "| afd | **0.7000** | 62.5 % | 40 | 20.0 % |" in (report / "scale.md").read_text().splitlines()
    assert "#### All clients" in (report / "clients.md").read_text().splitlines()
    (records.folder / "users" / f"{cell}.npz").unlink()
    records.plan["experiment"] = {}
    write_report(records.done())
    page = Page((report / "index.html").read_text())
    assert not set(names) & {anchor["href"] for anchor in page.all("a")}
    assert not any((report / name).exists() for name in names)


def test_seeds_are_paired_and_each_kind_of_test_is_a_family(records):
    local, afd, fd = [0.70, 0.71, 0.73], [0.69, 0.705, 0.71], [0.71, 0.70, 0.75]
    for row, values in (("local", local), ("afd", afd), ("fd", fd)):
        for seed, value in reversed(list(enumerate(values))):
            records.run(row, seed, {"mae": value})
    records.run("afd", 9, {"mae": 0.1})
    (group,) = records.read().groups
    found = [each for each in compare(group, ["mae"]) if (each.unit, each.test) == ("seeds", "paired t")]
    p = [stats.ttest_rel(values, local).pvalue for values in (afd, fd)]
    assert [each.row for each in found] == ["afd", "fd"]
    assert [each.count for each in found] == [3, 3]
    assert found[0].difference == pytest.approx(-0.035 / 3)
    assert [each.p for each in found] == pytest.approx(p)
    assert [each.corrected for each in found] == pytest.approx([2 * p[0], max(2 * p[0], p[1])])
    told = " ".join(significance_sentences(group, compare(group, ["mae"]), False))
    assert "With 3 seeds the smallest two-sided Wilcoxon p over seeds is 0.25" in told
    assert "the experiment names no reference" in told


def test_rows_without_a_common_seed_are_not_tested(records):
    records.run("local", 1, {"mae": 0.5})
    records.run("afd", 2, {"mae": 0.5})
    records.run("fd", 1, {"mae": 0.4})
    (group,) = records.read().groups
    found = compare(group, ["mae"])
    assert {each.row for each in found} == {"fd"}
    assert all(math.isnan(each.p) and math.isnan(each.corrected) for each in found)
    with (write_report(records.folder).parent / "significance.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["n"], line["p"]) for line in lines if line["pairs"] == "seeds"] == [("fd", "1", "")] * 2
    assert float(lines[0]["difference"]) == pytest.approx(-0.1)


def test_effort_to_reach_the_reference_by_hand(tmp_path):
    records = Records(tmp_path / "grid", reference="local")
    records.run("local", 1, {"mae": 0.5}, valid=(0.9, 0.8, 0.7, 0.75), moved=0, seconds=1.0)
    records.run("local", 2, {"mae": 0.5}, valid=(0.9, 0.6), moved=0, seconds=1.0)
    records.run("afd", 1, {"mae": 0.5}, valid=(0.8, None, 0.7, 0.6), moved=100, seconds=2.0, best_round=3)
    records.run("afd", 2, {"mae": 0.5}, valid=(0.8, 0.61), moved=100, seconds=2.0)
    records.run("central", 1, {"mae": 0.5}, valid=(0.5,), moved=0, seconds=9.0, strategy="central")
    experiment = records.read()
    (group,) = experiment.groups
    first = effort_to_reach(group.runs["afd"][0], 0.7)
    assert (first.rounds, first.seconds, first.bytes_moved) == (3, 6.0, 300)
    assert effort_to_reach(group.runs["afd"][1], 0.6) is None
    assert effort_to_reach(group.runs["central"][0], 0.7).bytes_moved is None
    assert cost(group.runs["afd"][0], group.runs["local"][0]).best_bytes == 300
    (_, spent), (_, way) = cost_tables(group, experiment.named_reference)
    assert cells(way) == [
        ["local", "2 of 2", "2.5", "2.50 ± 0.71", "0"],
        ["afd", "1 of 2", "3.0", "6.00", "300"],
        ["central", "1 of 1", "1.0", "9.00", NONE],
    ]
    assert [row[:5] for row in cells(spent)] == [
        ["local", "3", "3.0", "0", "0"],
        ["afd", "3", "2.5", "300", "250"],
        ["central", "1", "1.0", NONE, NONE],
    ]


def test_a_score_that_grows_is_reached_from_below(records):
    cell = records.run("afd", 1, {"mae": 0.5}, valid=(0.2, 0.4, 0.3))
    file = records.folder / "runs" / f"{cell}.jsonl"
    file.write_text(file.read_text().replace('"valid_score_bigger": false', '"valid_score_bigger": true'))
    (run,) = records.read().runs
    assert run.best_valid == 0.4
    assert effort_to_reach(run, 0.3).rounds == 2


def test_without_a_named_reference_nobody_has_a_score_to_reach(records):
    records.run("afd", 1, {"mae": 0.5})
    (group,) = records.read().groups
    assert len(cost_tables(group, False)) == 1


def test_a_repeated_round_counts_once(records):
    cell = records.run("afd", 1, {"mae": 0.5}, valid=(0.9, 0.8))
    file = records.folder / "runs" / f"{cell}.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:3], lines[2].replace('"seconds": 1.0', '"seconds": 5.0'), lines[3]]))
    (run,) = records.read().runs
    assert [each.seconds for each in run.rounds] == [1.0, 5.0]


def published(tmp_path):
    content = {
        "published": {"afd": {"auc": 0.9, "minutes": "12-15", "ndcg": 0.95}, "absent": {"auc": 1}},
        "published_as": {"ndcg": "LabelledNDCG@10"},
        "published_source": "Journal <2021>",
    }
    records = Records(tmp_path / "grid", experiment=content)
    records.run("local", 1, {"auc": 0.7, "labelledndcg@10": 0.8})
    records.run("afd", 1, {"auc": 0.75, "labelledndcg@10": 0.85})
    return records


def test_published_beside_measured(tmp_path):
    records = published(tmp_path)
    experiment = records.read()
    table = published_table(experiment.groups[0], experiment.published)
    assert table.header == (
        "row",
        "auc, published",
        "AUC, measured",
        "minutes, published",
        "ndcg, published",
        "labelled NDCG@10, measured",
    )
    assert cells(table) == [["afd", "0.9", "0.7500", "12-15", "0.95", "0.8500"]]
    assert "Published, but not measured here: absent." in experiment.notes
    assert "Published (Journal &lt;2021>) and measured:" in quality_markdown(experiment)
    assert "Published: Journal <2021>" in "".join(Page(write_report(records.folder).read_text()).texts)


def test_published_numbers_stand_only_beside_what_they_are_about(tmp_path):
    group = published(tmp_path).read().groups[0]
    settings = dict(group.settings)
    numbers = Published({"afd": {"auc": 0.9}}, {}, "", settings)
    assert published_table(group, numbers) is not None
    assert published_table(group, replace(numbers, settings={**settings, "label_mode": "another"})) is None


def full_experiment(folder, slower=1.0):
    """Rows of every kind, with names that HTML, Markdown and matplotlib would all read as something else."""
    records = Records(folder, reference="local | <b>none</b>")
    generator = np.random.default_rng(7)
    kinds = [
        ("central", "central", 0),
        ("local | <b>none</b>", "local", 0),
        ("afd *T=3* $x_1", "afd", 2000),
        ("_fd_ & \"more\" <script>alert('x')</script>", "fd", 400),
    ]
    crowd = {
        **PARTITION,
        "clients": [{"users": 1, "samples": 5 + i, "labels": [i % 4, 5 + i - i % 4]} for i in range(50)],
    }
    for group, partition in ((GROUP, PARTITION), ({**GROUP, "partition": "user"}, crowd)):
        for name, strategy, moved in kinds:
            for seed in (1, 2, 3):
                noise = generator.normal(0, 0.01, 6)
                valid = [0.7 + 0.3 / (number + 1) + noise[number] for number in range(4)]
                users = {"user": np.arange(40), "mae": generator.normal(0.7, 0.1, 40).astype(np.float32)}
                more = {} if strategy == "central" else {"partition": partition}
                test = {"mae": 0.7 + noise[4], "ndcg@10": 0.1 + noise[5]}
                records.run(
                    name,
                    seed,
                    test,
                    valid,
                    slower * seed,
                    moved,
                    group,
                    strategy=strategy,
                    users=users,
                    **more,
                )
    records.failure("afd *T=3* $x_1", 4, "InputError: a | b <c>")
    return records.done()


def test_tables_depend_on_neither_times_nor_repetition(tmp_path):
    quick, slow = (full_experiment(tmp_path / name, slower) for name, slower in (("a", 1.0), ("b", 60.0)))
    report = write_report(quick).parent
    names = ("table.md", "table.csv", "significance.csv", "cost.md", "cost.csv", "index.html")
    first = {name: (report / name).read_bytes() for name in names}
    (report / "plots" / "9-stale.png").write_bytes(b"")
    assert write_report(quick) == report / "index.html"
    assert {name: (report / name).read_bytes() for name in names} == first
    other = write_report(slow).parent
    for name in ("table.md", "table.csv", "significance.csv"):
        assert (other / name).read_bytes() == first[name]
    assert (other / "cost.md").read_bytes() != first["cost.md"]
    pictures = {file.name for file in (report / "plots").iterdir()}
    kinds = ("mae-against-rounds", "mae-against-seconds", "mae-against-bytes", "clients")
    fronts = ("bytes-and-test-mae", "bytes-and-test-ndcg-10")
    assert pictures == {f"{number}-{kind}.png" for number in (1, 2) for kind in (*kinds, *fronts)}


def test_the_page_stands_alone_and_escapes_names(tmp_path):
    folder = full_experiment(tmp_path / "grid")
    text = write_report(folder).read_text()
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "b")]
    assert "@import" not in text and "url(" not in text
    assert all(
        image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 40 for image in page.all("img")
    )
    assert len(page.all("img")) == 12
    for anchor in page.all("a"):
        target = anchor["href"]
        if target.startswith("#"):
            assert any(attributes.get("id") == target[1:] for _, attributes in page.tags), target
        else:
            assert (folder / "report" / target).is_file(), target
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert len(page.all("table")) == sum(attributes.get("class") == "scroll" for attributes in page.all("div"))
    assert len(page.all("h1")) == 1
    for name in ("local | <b>none</b>", "_fd_ & \"more\" <script>alert('x')</script>", "InputError: a | b <c>"):
        assert name in page.texts, name


def test_markdown_escapes_names(tmp_path):
    folder = full_experiment(tmp_path / "grid")
    lines = (write_report(folder).parent / "table.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    # Two groups of a header, a ruler and four rows; a pipe in a name opens no new cell.
    assert len(rows) == 12
    assert {line.replace(r"\|", "").count("|") for line in rows} == {5}
    assert any(line.startswith(r"| local \| &lt;b>none&lt;/b> |") for line in rows)
    assert any(line.startswith(r"| afd \*T=3\* $x_1 |") for line in rows)


def test_csv_holds_full_precision(records):
    records.run("afd", 1, {"mae": 1 / 3})
    records.run("afd", 2, {"mae": 1 / 7})
    with (write_report(records.done()).parent / "table.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert float(line["mean"]) == summary([1 / 3, 1 / 7]).mean
    assert float(line["deviation"]) == summary([1 / 3, 1 / 7]).deviation
    assert (line["dataset"], line["row"], line["metric"], line["better"]) == ("ml-100k", "afd", "mae", "lower")
    assert (line["seeds"], line["best"], line["protocol"]) == ("2", "0", "held-out test rows")


def test_sparse_records_make_a_report(records):
    # One seed, nothing validated, no bytes, no partition, a single round: plots are left out, tables are not.
    cell = records.run("afd", 1, {"mae": 0.5}, valid=(0.9,), moved=0, partition=None)
    file = records.folder / "runs" / f"{cell}.jsonl"
    file.write_text(file.read_text().replace('"valid": {"mae": 0.9}', '"valid": null'))
    page = write_report(records.done())
    assert not list((page.parent / "plots").iterdir())
    assert "| afd | 0.5000 | 1 |" in (page.parent / "table.md").read_text().splitlines()
    assert len((page.parent / "significance.csv").read_text().splitlines()) == 1


def test_a_broken_partition_is_noted(records):
    records.run("afd", 1, {"mae": 0.5})
    broken = records.run("afd", 2, {"mae": 0.5}, partition={"clients": [3]})
    experiment = records.read()
    assert [run.seed for run in experiment.runs] == [1]
    assert any(note.startswith(f"runs/{broken}.jsonl is left out") for note in experiment.notes)
