"""Reading of records: what is left out, what is noted, what belongs together."""

import numpy as np
import pytest
from report_records import Page, Records, of_clients

from recbole_fedkd.errors import InputError
from recbole_fedkd.report import write_report
from recbole_fedkd.report.experiment import read_experiment


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "grid")


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
    assert len(experiment.runs) == 1 and experiment.runs[0].users.empty
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


def test_clients_that_are_no_numbers_are_noted(records):
    cell = records.run("afd", 1, {"mae": 0.5}, users={**of_clients([1.0] * 5), "client": np.full(5, 0.5)})
    experiment = records.read()
    assert f"users/{cell}.npz is left out: its clients are no whole numbers." in experiment.notes


def test_a_repeated_round_counts_once(records):
    cell = records.run("afd", 1, {"mae": 0.5}, valid=(0.9, 0.8))
    file = records.folder / "runs" / f"{cell}.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:3], lines[2].replace('"seconds": 1.0', '"seconds": 5.0'), lines[3]]))
    (run,) = records.read().runs
    assert [each.seconds for each in run.rounds] == [1.0, 5.0]


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
