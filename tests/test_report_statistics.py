"""Statistics of a report by hand: summaries, tests and their correction, clients, costs, fronts and shares."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.evaluator import register
from report_records import NAN, PARTITION, SCALE, Records, cells, csv_lines, of_clients, scaled, tables, users_of, words
from scipy import stats

from recbole_fedkd.evaluation import metrics as _metrics  # noqa: F401  (registers the metrics)
from recbole_fedkd.report import write_report
from recbole_fedkd.report.contents import NONE
from recbole_fedkd.report.experiment import Group, Scale
from recbole_fedkd.report.measures import (
    client_means,
    client_quality,
    cost,
    effort_to_reach,
    front_rows,
    mean_curve,
    share_closed,
    share_of_bytes,
)
from recbole_fedkd.report.quality import significance_sentences
from recbole_fedkd.report.records import Run
from recbole_fedkd.report.statistics import (
    LOWER_IS_BETTER,
    compare,
    holm,
    paired_t,
    summary,
    user_differences,
    wilcoxon,
)
from recbole_fedkd.report.tables import client_blocks, cost_blocks, scale_blocks


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "grid")


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
    places = dict(zip("abcdef", points, strict=True))
    assert front_rows(places, bigger=False) == ["b", "a", "e"]
    assert front_rows(places, bigger=True) == ["f"]


def test_mean_curve_covers_what_all_curves_cover():
    curves = [(np.array([0.0, 2.0, 4.0]), np.array([4.0, 2.0, 0.0])), (np.array([1.0, 2.0]), np.array([5.0, 4.0]))]
    x, mean, deviation = mean_curve(curves)
    assert x.tolist() == [1.0, 2.0]
    assert mean.tolist() == [4.0, 3.0]
    assert deviation.tolist() == pytest.approx([math.sqrt(2), math.sqrt(2)])


def test_the_metrics_of_which_less_is_better_are_recboles(without_plugins):
    assert frozenset(register.smaller_metrics) == LOWER_IS_BETTER


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


def test_a_client_is_the_mean_of_its_judged_users():
    means = client_means(pd.Series([4, 1, 4, NAN, 1, 2]), pd.Series([1.0, 5.0, 2.0, 9.0, NAN, NAN]))
    assert means.to_dict() == {1: 5.0, 4: 1.5}
    assert client_means(pd.Series([NAN]), pd.Series([1.0])).empty


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
    (table,) = tables(client_blocks(group))
    assert table.header == ("row", "MAE ↓", "MAE, worst client", "MAE, against local")
    assert cells(table) == [
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
        return pd.DataFrame({"client": of_users, "mae": np.array(list(values.values()))}, index=users)

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


def test_rows_of_different_protocols_are_not_compared_client_by_client(records):
    records.run("local", 1, {"mae": 1.0}, users=of_clients([1] * 5), protocols={"mae": "in stars"})
    records.run("afd", 1, {"mae": 0.5}, users=of_clients([0.5] * 5), protocols={"mae": "normalised"})
    (group,) = records.read().groups
    assert [each.compared for each in client_quality(group, ["mae"])] == [0, 0]
    assert cells(tables(client_blocks(group))[0])[1] == ["afd", "0.5000", "0.5000", NONE]


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
    told = words(client_blocks(group))
    assert "Users of central, old, which recorded no clients, count to those that they have" in told
    assert "left out: old, elsewhere, unjudged." in told


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
    table, told = scale_blocks(group, experiment.scale)
    assert table.header == ("row", "MAE ↓", "MAE, closed", "bytes until the best round", "share of the bytes of fedavg")
    assert cells(table) == [
        ["local", "[0.8500]", "0.0 %", "0", "0.0 %"],
        ["central", "0.5500", "100.0 %", NONE, NONE],
        ["afd", "[0.7000]", "62.5 %", "40", "20.0 %"],
        ["fedavg", "[0.6500]", "37.5 %", "200", "100.0 %"],
        ["wasteful", "0.9000", "-50.0 %", "800", "400.0 %"],
    ]
    assert "Closed is (row - local) / (central - local)" in told.text and "within each seed" in told.text


def test_shares_that_fewer_seeds_have_say_so(tmp_path):
    records = scaled(tmp_path / "grid", **SCALE)
    records.run("afd", 3, {"mae": 0.7}, moved=10)
    experiment = records.read()
    (afd,) = [row for row in cells(scale_blocks(experiment.groups[0], experiment.scale)[0]) if row[0] == "afd"]
    assert afd[2:] == ["62.5 % (n = 2)", "33", "20.0 % (n = 2)"]


def test_a_distance_between_different_protocols_is_none(tmp_path):
    records = Records(tmp_path / "grid")
    for row, mae, protocol in (("local", 0.9, "in stars"), ("central", 0.2, "normalised"), ("afd", 0.8, "in stars")):
        records.run(row, 1, {"mae": mae}, protocols={"mae": protocol})
    (group,) = records.read().groups
    assert share_closed(group, "afd", "mae", "local", "central").count == 0
    assert not any(cell.strong for row in scale_blocks(group, Scale())[0].rows for cell in row)


def test_a_scale_names_what_it_measures_by_and_nothing_else(tmp_path):
    experiment = scaled(tmp_path / "grid", bytes="afd").read()
    table, told = scale_blocks(experiment.groups[0], experiment.scale)
    assert table.header == ("row", "MAE ↓", "bytes until the best round", "share of the bytes of afd")
    assert "Closed" not in told.text
    assert scale_blocks(experiment.groups[0], Scale())[0].header == ("row", "MAE ↓", "bytes until the best round")


def test_a_scale_whose_row_has_no_run_is_noted(tmp_path):
    experiment = scaled(tmp_path / "grid", **{**SCALE, "ceiling": "gone"}).read()
    assert any("The scale's ceiling is the row 'gone', which has no run in" in note for note in experiment.notes)
    closed = [row[2] for row in cells(scale_blocks(experiment.groups[0], experiment.scale)[0])]
    assert closed == [NONE] * 5


def test_rows_without_a_network_are_on_no_front_and_equal_rows_share_a_place():
    places = {"central": (None, 0.1), "b": (5.0, 0.4), "a": (0.0, 0.5), "twin": (0.0, 0.5), "worse": (5.0, 0.5)}
    assert front_rows(places, bigger=False) == ["a", "twin", "b"]
    assert front_rows({"central": (None, 0.1)}, bigger=True) == []


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
    lines = csv_lines((write_report(records.folder).parent / "significance.csv").read_text())
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
    spent, way = tables(cost_blocks(group, experiment.named_reference))
    assert [row[:5] for row in cells(way)] == [
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
    assert len(tables(cost_blocks(group, False))) == 1
