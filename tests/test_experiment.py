"""Experiments: the grid, its cells, and a runner that may be killed at any time."""

import fcntl
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
import yaml
from conftest import SMALL

from recbole_fedkd import command_line
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.errors import InputError
from recbole_fedkd.experiment.grid import expand, read_experiment
from recbole_fedkd.experiment.records import is_finished, log_file, run_file, users_file
from recbole_fedkd.experiment.runner import Outcome, Pace, Progress, run_experiment
from recbole_fedkd.quick_start import load_data_and_model

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
GRID = {"dataset": ["ml-100k"], "label_mode": ["threshold", "rating"], "seed": [2020, 2021]}


def rows_and_groups(experiment):
    return [(cell.row, cell.group.get("label_mode"), cell.seed) for cell in experiment.cells]


# The grid


def test_the_cells_are_the_product_of_grid_and_rows():
    rows = {"AFD": {"preset": "afd"}, "FD": {"preset": "fd", "gamma": 0.5}}
    experiment = expand({"keys": {"epochs": 3, "gamma": 0.1}, "grid": GRID, "rows": rows, "reference": "FD"})
    assert rows_and_groups(experiment) == [
        (row, mode, seed) for mode in ("threshold", "rating") for seed in (2020, 2021) for row in ("AFD", "FD")
    ]
    assert experiment.rows == ("AFD", "FD")
    assert experiment.reference == "FD"
    assert len({cell.id for cell in experiment.cells}) == 8
    first, second = experiment.cells[:2]
    assert list(first.group) == ["dataset", "label_mode"]
    assert first.keys == {
        "preset": "afd",
        "epochs": 3,
        "gamma": 0.1,
        "dataset": "ml-100k",
        "label_mode": "threshold",
        "seed": 2020,
        "data_path": str(Path("dataset").resolve()),
    }
    assert second.keys["gamma"] == 0.5
    assert first.title == "AFD ml-100k threshold seed 2020"
    assert first.id.startswith("AFD-ml-100k-threshold-seed2020-")


def test_a_row_that_sets_a_key_of_the_grid_has_one_value_on_the_axis():
    rows = {"WideDeep": {"model": "WideDeep", "label_mode": "threshold"}, "AFD": None}
    experiment = expand({"grid": GRID, "rows": rows})
    mine = [each for each in rows_and_groups(experiment) if each[0] == "WideDeep"]
    assert mine == [("WideDeep", "threshold", 2020), ("WideDeep", "threshold", 2021)]
    assert len(experiment.cells) == 2 + 4
    seeded = expand({"grid": GRID, "rows": {"once": {"seed": 7}}})
    assert rows_and_groups(seeded) == [("once", "threshold", 7), ("once", "rating", 7)]


def test_by_sets_keys_for_single_values_of_the_grid():
    rows = {"AFD": {"gamma": 0.1, "by": {"label_mode": {"threshold": {"gamma": 0.3}}, "seed": {2021: {"alpha": 0.5}}}}}
    cells = expand({"grid": GRID, "rows": rows}).cells
    found = {(cell.keys["label_mode"], cell.seed): (cell.keys["gamma"], cell.keys.get("alpha")) for cell in cells}
    assert found == {
        ("threshold", 2020): (0.3, None),
        ("threshold", 2021): (0.3, 0.5),
        ("rating", 2020): (0.1, None),
        ("rating", 2021): (0.1, 0.5),
    }
    assert all("by" not in cell.keys for cell in cells)
    fixed = expand(
        {"grid": GRID, "rows": {"a": {"label_mode": "rating", "by": {"label_mode": {"rating": {"gamma": 1}}}}}}
    )
    assert {cell.keys["gamma"] for cell in fixed.cells} == {1}
    by = {"label_mode": {"threshold": {"gamma": 0.3}}}
    overridden = expand(
        {"grid": GRID, "rows": {"a": {"label_mode": "threshold", "gamma": 0.1, "by": by}}}, {"label_mode": "rating"}
    )
    assert {(cell.keys["label_mode"], cell.keys["gamma"]) for cell in overridden.cells} == {("rating", 0.1)}


@pytest.mark.parametrize(
    ("by", "sentence"),
    [
        ({"colour": {"red": {}}}, "by names 'colour', which is not in the grid"),
        ({"label_mode": {"stars": {"gamma": 1}}}, 'by.label_mode holds "stars", which the grid does not'),
        ({"label_mode": {"rating": {"seed": 3}}}, "by.label_mode sets 'seed', a key of the grid"),
        ({"label_mode": ["rating"]}, "it must map values of the grid to config keys"),
        (["label_mode"], "it must map keys of the grid to values and their config keys"),
    ],
)
def test_a_wrong_by_is_told(by, sentence):
    with pytest.raises(InputError, match=sentence):
        expand({"grid": GRID, "rows": {"AFD": {"by": by}}})


def test_published_numbers_are_about_keys_of_the_grid():
    with pytest.raises(InputError, match="published_for names 'mode', which is not in the grid"):
        expand({"grid": GRID, "rows": {"a": {}}, "published_for": {"mode": "rating"}})
    with pytest.raises(InputError, match="published_for is 'rating'; it must map"):
        expand({"grid": GRID, "rows": {"a": {}}, "published_for": "rating"})


def test_a_scale_may_name_any_of_its_rows_and_changes_no_cell():
    content = {"grid": GRID, "rows": {"local": {"preset": "local"}, "AFD": {"preset": "afd"}}}
    plain = expand(content)
    for scale in (None, {}, {"floor": "local"}, {"floor": "local", "ceiling": "AFD", "bytes": "AFD"}):
        assert expand({**content, "scale": scale}).cells == plain.cells


def test_only_confines_a_row():
    rows = {"AFD": {}, "WideDeep": {"model": "WideDeep", "only": {"label_mode": ["threshold"], "seed": [2021]}}}
    experiment = expand({"grid": GRID, "rows": rows})
    assert [each for each in rows_and_groups(experiment) if each[0] == "WideDeep"] == [("WideDeep", "threshold", 2021)]
    assert len(experiment.cells) == 5
    assert all("only" not in cell.keys for cell in experiment.cells)


def test_without_rows_model_and_strategy_name_them():
    grid = {"dataset": ["a", "b"], "model": ["WideDeep", "DeepFM"], "strategy": ["fedavg", "local"]}
    experiment = expand({"grid": grid})
    assert experiment.rows == ("WideDeep fedavg", "WideDeep local", "DeepFM fedavg", "DeepFM local")
    assert {tuple(cell.group) for cell in experiment.cells} == {("dataset",)}
    assert {cell.seed for cell in experiment.cells} == {2020}
    assert expand({"keys": {"dataset": "a", "seed": 4}}).cells[0].title == "AttnFedKD seed 4"


def test_overrides_win_in_every_cell():
    rows = {"AFD": {"epochs": 9}, "WideDeep": {"model": "WideDeep", "only": {"label_mode": ["threshold"]}}}
    content = {"keys": {"epochs": 3}, "grid": GRID, "rows": rows, "reference": "WideDeep"}
    experiment = expand(content, {"epochs": "1", "label_mode": "rating", "seed": "5", "data_path": "there"})
    assert rows_and_groups(experiment) == [("AFD", "rating", 5)]
    assert experiment.cells[0].keys["epochs"] == 1
    assert experiment.cells[0].keys["data_path"] == str(Path("there").resolve())
    assert experiment.reference is None


def test_config_files_count_by_what_they_hold(tmp_path):
    (tmp_path / "one.yaml").write_text("epochs: 5\ngamma: 0.3\n")
    (tmp_path / "two.yaml").write_text("gamma: 0.3\nepochs: 5\n")
    cells = [
        expand({"keys": {"config_files": str(tmp_path / name), "dataset": "a", "gamma": 0.7}}).cells[0]
        for name in ("one.yaml", "two.yaml")
    ]
    assert cells[0].keys["epochs"] == 5
    assert cells[0].keys["gamma"] == 0.7
    assert cells[0].id == cells[1].id
    assert "config_files" not in cells[0].keys


def test_a_cell_has_the_same_name_until_a_key_changes_what_it_computes():
    def name(**keys):
        return expand({"keys": {"dataset": "a", **keys}}).cells[0].id

    # Written down: records of an earlier version must be found again.
    assert name() == "AttnFedKD-a-seed2020-9cfd6fd1"
    assert name(epochs=3, gamma=0.1) == name(gamma=0.1, epochs=3)
    assert name(gamma=0.1) != name(gamma=0.2) != name()
    assert name() == name(data_path="x", torch_threads=2, show_progress=True, state="DEBUG", checkpoint_dir="y")
    assert "/" not in name(model="a/../b c")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "experiment holds a list; it must hold keys, grid, rows"),
        ({"gird": {}}, "'gird' is unknown; allowed are keys, grid, rows, reference"),
        ({"gird": {}}, "did you mean 'grid'"),
        ({"grid": []}, "grid is a list; it must map config keys to lists"),
        ({"grid": {"dataset": "a"}}, "grid key 'dataset' is 'a'; it must be a list of at least one value"),
        ({"grid": {"dataset": []}}, "grid key 'dataset' is []; it must be a list"),
        ({"grid": {"dataset": ["a", "a"]}}, "grid key 'dataset' holds \"a\" twice"),
        ({"grid": {"dataset": ["a"], "seed": ["x"]}}, "seed is 'x'; it must be an integer >= 0"),
        ({"grid": {"dataset": ["a"], "config_files": ["b"]}}, "config_files cannot be in grid"),
        ({"keys": {"dataset": "a"}, "grid": {"dataset": ["a"]}}, "key 'dataset' is in keys and in grid"),
        ({"keys": 3}, "keys is 3; it must map config keys to values"),
        ({"keys": {1: 3}}, "1 is no name of a config key"),
        ({"keys": {"result_file": "a"}}, "key 'result_file' is that of a single run"),
        ({"keys": {"dataset": "a", "gamma": float("nan")}}, "key 'gamma' is nan, which JSON cannot hold"),
        ({"keys": {"epochs": 3}}, "no dataset is named"),
        ({"grid": GRID, "rows": []}, "rows is []; it must map names to config keys"),
        ({"grid": GRID, "rows": {"A": 3}}, "row 'A' is 3; it must map config keys to values"),
        ({"grid": GRID, "rows": {3: {}}}, "row '3': its name must be a text"),
        ({"grid": GRID, "rows": {"A": {}, "B": {}}}, "rows 'A' and 'B' are the same run, B ml-100k threshold seed 2020"),
        ({"grid": GRID, "rows": {"A": {"only": {"label_mod": [1]}}}}, "only names 'label_mod', which is not in the grid"),
        ({"grid": GRID, "rows": {"A": {"only": {"label_mode": "rating"}}}}, "only.label_mode is 'rating'; it must be a list"),
        ({"grid": GRID, "rows": {"A": {"only": {"label_mode": ["stars"]}}}}, 'only.label_mode holds "stars", which the grid'),
        ({"grid": GRID, "rows": {"A": {}}, "reference": "a"}, "reference 'a' is no row; did you mean 'A'"),
        ({"grid": GRID, "rows": {"AFD": {}}, "scale": "AFD"}, "scale is 'AFD'; it must map floor, ceiling, bytes to rows"),
        ({"grid": GRID, "rows": {"AFD": {}}, "scale": {"flor": "AFD"}}, "scale names 'flor'; allowed are floor"),
        ({"grid": GRID, "rows": {"AFD": {}}, "scale": {"flor": "AFD"}}, "did you mean 'floor'"),
        ({"grid": GRID, "rows": {"AFD": {}}, "scale": {"bytes": "AF"}}, "scale.bytes 'AF' is no row; did you mean 'AFD'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told_in_one_sentence(content, says):
    with pytest.raises(InputError) as caught:
        expand(content)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rows: {A: {}, A: {}}", "'A' stands there twice"),
        ("rows: [", "is not valid yaml"),
        ("", "holds a NoneType"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, says):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=f"experiment '{file}'") as caught:
        read_experiment(file)
    assert says in str(caught.value)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_experiment(tmp_path / "missing.yaml")


def test_rows_may_share_keys_by_a_merge_key(tmp_path):
    file = tmp_path / "merged.yaml"
    file.write_text(
        "grid: {dataset: [a]}\nrows:\n  one: &one {preset: fd, gamma: 0.1}\n  two: {<<: *one, gamma: 0.5}\n"
    )
    assert [(cell.keys["preset"], cell.keys["gamma"]) for cell in read_experiment(file).cells] == [
        ("fd", 0.1),
        ("fd", 0.5),
    ]


# Progress


def test_the_pace_of_a_run_counts_evaluation_in():
    pace = Pace()
    event = {"rounds": 16, "seconds": 2.0, "metric": "mae", "value": 0.71234}
    assert pace.sentence({**event, "round": 1}, 100.0) == "round 1/16, 2.0 s a round, mae 0.7123, <= 30 s left"
    assert pace.sentence({**event, "round": 5}, 112.4) == "round 5/16, 3.1 s a round, mae 0.7123, <= 34 s left"
    unjudged = {**event, "round": 6, "value": None, "rounds": 66}
    assert pace.sentence(unjudged, 115.5) == "round 6/66, 3.1 s a round, <= 3 min 6 s left"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("live", [True, False])
def test_a_run_has_a_line_on_a_terminal_and_few_lines_elsewhere(live, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    first, second = expand({"grid": {"dataset": ["a"], "seed": [1, 2]}}).cells
    stream = Terminal() if live else io.StringIO()
    progress = Progress(stream)
    for cell in (first, second):
        progress.start(cell)
    for number in range(9):
        progress.go_on(first, f"round {number}/9")
    progress.go_on(second, "x" * 99)
    progress.end(first, "done in 3 s")
    progress.start(first)
    progress.end(second, "failed: " + "y" * 99)
    progress.close()
    said = stream.getvalue()
    assert "AttnFedKD a seed 1: done in 3 s\n" in said
    assert "y" * 99 in said
    assert ("round 8/9" in said) is live
    if live:
        lines = said.replace("\r", "\n").replace("\x1b[A", "").splitlines()
        assert max(len(line) for line in lines if "x" in line) == 59
    else:
        assert said.splitlines()[:2] == ["AttnFedKD a seed 1: starts", "AttnFedKD a seed 2: starts"]
        now = monotonic() + 31
        monkeypatch.setattr("recbole_fedkd.experiment.runner.monotonic", lambda: now)
        progress.go_on(second, "round 3/9")
        progress.go_on(second, "round 4/9")
        assert stream.getvalue().removeprefix(said) == "AttnFedKD a seed 2: round 3/9\n"


def test_the_outcome_is_one_line():
    assert str(Outcome(0, 3, 0)) == "3 done, 0 failed"
    assert str(Outcome(2, 1, 1)) == "3 done (2 of them before), 1 failed (see failures/)"


# Runs


def write_experiment(file: Path, data_path: Path, rows: dict, seeds: list[int], **keys) -> Path:
    settings = {"data_path": str(data_path), **SMALL, "epochs": 12, "stopping_step": 12, **keys}
    content = {"keys": settings, "grid": {"dataset": ["tiny"], "seed": seeds}, "rows": rows}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def lines_of(folder: Path, cell) -> list[dict]:
    return [json.loads(line) for line in run_file(folder, cell).read_text().splitlines()]


def numbers_of(folder: Path, cell) -> tuple:
    """What must not depend on when and how often a run was started."""
    _, *rounds, result = lines_of(folder, cell)
    learned = [(each["round"], each["loss"], each["valid"], each["bytes_up"]) for each in rounds]
    return learned, result["test"], result["best_valid"], result["best_round"], result["communication"]


ROWS = {"local": {"preset": "local"}, "AFD": {"preset": "afd"}}


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory, data_path):
    """An experiment of two cells, run in one go by the command line's function."""
    folder = tmp_path_factory.mktemp("experiment")
    file = write_experiment(folder / "tiny.yaml", data_path, ROWS, [2020])
    experiment, said = read_experiment(file), io.StringIO()
    outcome = run_experiment(experiment, folder / "out", 1, said)
    assert outcome == Outcome(0, 2, 0), said.getvalue()
    return experiment, folder / "out", said.getvalue()


def test_a_run_leaves_its_whole_record(never_killed):
    experiment, out, said = never_killed
    cell = experiment.cells[1]
    run, *rounds, result = lines_of(out, cell)
    assert (run["kind"], run["version"], run["cell"], run["row"]) == ("run", 2, cell.id, "AFD")
    assert (run["group"], run["seed"]) == ({"dataset": "tiny"}, 2020)
    assert run["keys"] == {key: value for key, value in cell.keys.items() if key not in keys_with("aside")}
    assert run["config"]["strategy"] == "afd"
    # A record may be published: it says what was computed, not where it lay.
    assert str(out.parent) not in json.dumps(run)
    assert run["environment"]
    assert len(run["partition"]["clients"]) == 3
    assert [each["round"] for each in rounds] == list(range(1, 13))
    assert {each["kind"] for each in rounds} == {"round"}
    assert result["kind"] == "result"
    assert result["valid_metric"] in result["best_valid"]
    assert result["communication"]["total_bytes"] > sum(each["bytes_up"] for each in rounds) > 0
    assert result["timing"].keys() == {"rounds", "training_seconds", "seconds_per_round"}
    with np.load(users_file(out, cell)) as users:
        assert users["user"].dtype == np.int64
        assert len(users["user"]) > 0
        for name in users.files:
            assert len(users[name]) == len(users["user"])
            assert users[name].dtype == (np.int64 if name in ("user", "client") else np.float32)
        assert set(users["client"].tolist()) == set(range(len(run["partition"]["clients"])))
    assert list((out / "work").iterdir()) == []
    assert list((out / "failures").iterdir()) == []
    assert log_file(out, cell).is_file()
    described = json.loads((out / "experiment.json").read_text())
    assert [each["cell"] for each in described["cells"]] == [each.id for each in experiment.cells]
    assert described["experiment"]["rows"] == ROWS
    # On a slow machine, lines on its rounds stand between.
    assert f"{cell.title}: starts\n" in said and f"\n{cell.title}: done in " in said


@pytest.mark.parametrize("keys", [{"strategy": "afd"}, {"model": "BPR", "strategy": "fedavg"}])
def test_every_judged_user_of_a_federation_stands_beside_its_own_client(prepared, keys):
    _, trainer, loaders, evaluations = prepared(**keys, partition="attribute:group", user_metrics=True)
    trainer.evaluate(evaluations[1], load_best_model=False)
    tokens = loaders[0]._dataset.field2id_token["user_id"]
    found = trainer.user_metrics
    # The small dataset's users u0, u2, ... are of group a, the others of group b.
    groups = {
        int(str(tokens[user])[1:]) % 2: client for user, client in zip(found["user"], found["client"], strict=True)
    }
    assert sorted(groups.values()) == [0, 1]
    for user, client in zip(found["user"], found["client"], strict=True):
        assert client == groups[int(str(tokens[user])[1:]) % 2]


def test_a_central_run_has_no_clients(prepared):
    _, trainer, _, evaluations = prepared("AttnStudent", user_metrics=True)
    trainer.evaluate(evaluations[1], load_best_model=False)
    assert trainer.user_metrics["user"]
    assert "client" not in trainer.user_metrics


def test_a_finished_run_is_never_repeated(never_killed):
    experiment, out, _ = never_killed
    before = {file: file.stat().st_mtime_ns for file in (out / "runs").iterdir()}
    said = io.StringIO()
    assert run_experiment(experiment, out, 2, said) == Outcome(2, 0, 0)
    assert {file: file.stat().st_mtime_ns for file in (out / "runs").iterdir()} == before
    assert said.getvalue() == ""


def test_a_renamed_row_keeps_its_finished_run(never_killed, tmp_path, data_path):
    _, whole_out, _ = never_killed
    out = shutil.copytree(whole_out, tmp_path / "out")
    rows = {"no exchange": ROWS["local"], "AFD": ROWS["AFD"]}
    experiment = read_experiment(write_experiment(tmp_path / "tiny.yaml", data_path, rows, [2020]))
    before = [lines_of(whole_out, cell) for cell in never_killed[0].cells]
    assert run_experiment(experiment, out, 1, io.StringIO()) == Outcome(2, 0, 0)
    for cell, (_, *others) in zip(experiment.cells, before, strict=True):
        head, *rest = lines_of(out, cell)
        assert (head["cell"], head["row"], rest) == (cell.id, cell.row, others)
        assert users_file(out, cell).is_file()
    for folder in ("runs", "users"):
        assert {file.stem for file in (out / folder).iterdir()} == {cell.id for cell in experiment.cells}


def test_a_run_made_with_another_default_is_repeated(never_killed, tmp_path):
    experiment, whole_out, _ = never_killed
    out = shutil.copytree(whole_out, tmp_path / "out")
    changed, same = experiment.cells
    head, *rest = lines_of(out, changed)
    rate = head["config"]["learning_rate"]
    # Written by a version whose preset had another rate; the seed and the machine's keys are no reason.
    head["config"] |= {"learning_rate": rate / 2, "device": "cuda", "torch_threads": 9}
    run_file(out, changed).write_text("".join(json.dumps(line) + "\n" for line in (head, *rest)))
    marker = run_file(out, same).stat().st_mtime_ns
    assert is_finished(out, changed)
    assert run_experiment(experiment, out, 1, io.StringIO()) == Outcome(1, 1, 0)
    assert lines_of(out, changed)[0]["config"]["learning_rate"] == rate
    assert run_file(out, same).stat().st_mtime_ns == marker


def test_half_a_record_is_none(never_killed, tmp_path):
    experiment, out, _ = never_killed
    cell = experiment.cells[0]
    text = run_file(out, cell).read_text()
    copy = run_file(tmp_path, cell)
    copy.parent.mkdir()
    for part, finished in ((text, True), (text[:-20], False), (text[: text.rindex("{")], False), ("", False)):
        copy.write_text(part)
        assert is_finished(tmp_path, cell) is finished


def test_a_killed_experiment_goes_on_to_the_same_numbers(never_killed, tmp_path, data_path):
    whole, whole_out, _ = never_killed
    file, out = write_experiment(tmp_path / "tiny.yaml", data_path, ROWS, [2020]), tmp_path / "out"
    started = (
        "import sys; from pathlib import Path; from recbole_fedkd.experiment.grid import read_experiment;"
        "from recbole_fedkd.experiment.runner import run_experiment;"
        "run_experiment(read_experiment(sys.argv[1]), Path(sys.argv[2]), 1)"
    )
    first, second = read_experiment(file).cells
    assert [first.id, second.id] == [cell.id for cell in whole.cells]
    runner = subprocess.Popen([sys.executable, "-c", started, str(file), str(out)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        work = out / "work" / second.id
        # The second run has begun to train: its checkpoints are there.
        while not list(work.glob("saved/*/last.pth")):
            assert runner.poll() is None, "the runner ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(InputError, match="in use by another runner"):
            run_experiment(whole, out, 1, io.StringIO())
    finally:
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    assert is_finished(out, first)
    assert not is_finished(out, second)
    marker = run_file(out, first).stat().st_mtime_ns
    (out / "runs" / f".{second.id}.jsonl.0123abcd").write_text("half")

    assert run_experiment(read_experiment(file), out, 1, io.StringIO()) == Outcome(1, 1, 0)
    assert run_file(out, first).stat().st_mtime_ns == marker
    for cell in (first, second):
        assert numbers_of(out, cell) == numbers_of(whole_out, cell)
    assert {each.name for each in (out / "runs").iterdir()} == {f"{first.id}.jsonl", f"{second.id}.jsonl"}


def test_a_failing_run_is_told_and_the_others_survive(tmp_path, data_path, capsys):
    rows = {"bad": {"preset": "local", "gamma": -1}, "good": {"preset": "local", "epochs": 1}}
    file = write_experiment(tmp_path / "mixed.yaml", data_path, rows, [2020])
    bad, good = read_experiment(file).cells
    assert command_line.main([f"--experiment={file}", "--keep_checkpoints=yes"]) == 2
    assert "keep_checkpoints is 'yes'; it must be True or False" in capsys.readouterr().err
    assert command_line.main([f"--experiment={file}", "--out=out", "--workers=1", "--keep_checkpoints=True"]) == 1
    printed = capsys.readouterr()
    assert "1 done, 1 failed (see failures/)" in printed.out
    assert "bad tiny seed 2020: failed: gamma is -1; it must be a number >= 0" in printed.err
    assert is_finished(Path("out"), good)
    failure = json.loads(Path(f"out/failures/{bad.id}.json").read_text())
    assert failure == {
        "cell": bad.id,
        "row": "bad",
        "group": {"dataset": "tiny"},
        "seed": 2020,
        "error": "gamma is -1; it must be a number >= 0",
    }
    (reported,) = [line for line in printed.out.splitlines() if line.startswith("report: ")]
    page = Path(reported.removeprefix("report: "))
    written = page.read_text()
    assert "gamma is -1" in written
    # What was asked for is kept of the run that was good, and its config runs by itself.
    assert [each.name for each in Path("out/checkpoints").iterdir()] == [good.id]
    assert load_data_and_model(f"out/checkpoints/{good.id}")[0]["epochs"] == 1
    assert FedKDConfig(config_file_list=[str(page.parent / "best.yaml")])["strategy"] == "local"
    page.unlink()
    assert command_line.main(["report", "out"]) == 0
    assert page.read_text()


def test_a_key_that_no_run_can_read_leaves_the_folder_as_it_was(never_killed, tmp_path, data_path, capsys):
    out = shutil.copytree(never_killed[1], tmp_path / "out")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    file = write_experiment(tmp_path / "tiny.yaml", data_path, ROWS, [2020])
    assert command_line.main(["compare", str(file), f"--out={out}", "--epohcs=2"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "local tiny seed 2020: key 'epohcs' is unknown; did you mean 'epochs'" in said
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_run_whose_process_is_killed_is_a_failure(tmp_path, data_path, monkeypatch):
    file = write_experiment(tmp_path / "one.yaml", data_path, {"local": {"preset": "local"}}, [2020])
    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\nkill -9 $$\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    experiment, out = read_experiment(file), tmp_path / "out"
    assert run_experiment(experiment, out, 1, io.StringIO()) == Outcome(0, 0, 1)
    failure = json.loads((out / "failures" / f"{experiment.cells[0].id}.json").read_text())
    assert failure["error"] == "the process was ended by signal SIGKILL, perhaps for want of memory"
    # The next try takes the note away.
    stand_in.write_text("#!/bin/sh\necho first >&2\necho last words >&2\nexit 3\n")
    assert run_experiment(experiment, out, 1, io.StringIO()) == Outcome(0, 0, 1)
    failure = json.loads((out / "failures" / f"{experiment.cells[0].id}.json").read_text())
    assert failure["error"] == "last words"


def test_an_orphan_ends_at_its_next_round(tmp_path, data_path):
    experiment = read_experiment(
        write_experiment(tmp_path / "one.yaml", data_path, {"local": {"preset": "local"}}, [2020], epochs=1000)
    )
    cell = experiment.cells[0]
    description = tmp_path / "cell.json"
    content = {"id": cell.id, "row": cell.row, "group": cell.group, "seed": cell.seed, "keys": cell.keys}
    description.write_text(json.dumps({"folder": str(tmp_path), "cell": content, "keep": False}))
    command = [sys.executable, "-m", "recbole_fedkd.experiment.cell", str(description)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    event = json.loads(child.stdout.readline())
    assert (event["round"], event["rounds"], event["metric"]) == (1, 1000, "mae")
    assert event["value"] > 0
    child.stdout.close()
    try:
        assert child.wait(timeout=30) != 0
    finally:
        child.kill()
        child.wait()


def test_ctrl_c_ends_the_processes_and_says_how_to_go_on(tmp_path, data_path):
    file = write_experiment(tmp_path / "long.yaml", data_path, {"local": {"preset": "local"}}, [2020], epochs=1000)
    script = [sys.executable, str(ROOT / "run_recbole_fedkd.py"), f"--experiment={file}", "--out=out", "--workers=1"]
    # Where the tests run in the background of a shell, Ctrl-C is ignored and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    runner = subprocess.Popen(script, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        (cell,) = read_experiment(file).cells
        while not list(Path("out/work", cell.id).glob("saved/*/last.pth")):
            assert runner.poll() is None
            time.sleep(0.05)
        runner.send_signal(signal.SIGINT)
        _, said = runner.communicate(timeout=30)
    finally:
        runner.kill()
        runner.wait()
    assert runner.returncode == 130
    assert "stopped; the same command goes on where it stopped; what is done is kept in 'out'" in said
    assert "failed" not in said
    assert list(Path("out/failures").iterdir()) == []
    checkpoint = next(Path("out/work", cell.id).glob("saved/*/last.pth"))
    before = checkpoint.stat().st_mtime_ns
    time.sleep(1)
    assert checkpoint.stat().st_mtime_ns == before, "the run's process goes on"


def test_a_cell_without_its_dataset_fails_before_any_run_is_started(tmp_path, monkeypatch, data_path):
    started = []
    monkeypatch.setattr(
        "recbole_fedkd.experiment.runner._run_cell", lambda cell, *_: started.append(cell.keys["dataset"])
    )
    said, grid = io.StringIO(), {"dataset": ["tiny", "tinny"]}
    experiment = expand({"keys": {"data_path": str(data_path)}, "grid": grid})
    assert run_experiment(experiment, tmp_path / "out", 1, said) == Outcome(0, 1, 1)
    assert started == ["tiny"]
    assert "failed: dataset 'tinny' is unknown" in said.getvalue() and "did you mean 'tiny'?" in said.getvalue()


def test_a_folder_has_one_runner(tmp_path):
    experiment, out = expand({"keys": {"dataset": "a"}}), tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="in use by another runner; wait for it, or give another --out"):
            run_experiment(experiment, out, 1)
    assert list(out.iterdir()) == [out / ".lock"]


# The command line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compare"], "compare needs an experiment"),
        (["compare", "--out=x"], "compare needs an experiment"),
        (["compare", "missing.yaml"], "experiment 'missing.yaml' cannot be read"),
        (["--experiment=missing.yaml"], "experiment 'missing.yaml' cannot be read"),
        (["compare", "missing.yaml", "--workers=0"], "workers is '0'; it must be an integer in [1, 1024]"),
        (["compare", "missing.yaml", "more.yaml"], "argument 'more.yaml' is not of the form --key=value"),
        (["report"], "report needs the folder of one experiment"),
        (["report", "nowhere"], "folder 'nowhere' does not exist"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(arguments, says, capsys):
    assert command_line.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert says in printed
    assert printed.count("\n") == 1


def test_help_tells_the_commands(capsys):
    assert command_line.main(["compare", "--help"]) == 0
    told = capsys.readouterr().out
    # The yaml that the help shows is one that can be used.
    shown = yaml.safe_load(told[told.index("  keys: {") : told.index("Without rows")])
    assert {cell.row for cell in expand(shown).cells} == {"local", "central", "AFD+CNN", "FD+CNN", "WideDeep"}
    assert len(expand(shown).cells) == 2 * 2 * 3 * 4 + 2 * 3
    for command in ("report", "search"):
        assert command_line.main([command, "--help"]) == 0
        assert f"usage: recbole-fedkd {command}" in capsys.readouterr().out
    assert command_line.main(["--help"]) == 0
    assert "compare EXPERIMENT.yaml" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_repositorys_experiments_name_rows_that_can_be_built(file):
    experiment = read_experiment(file)
    first = min(cell.seed for cell in experiment.cells)
    for cell in experiment.cells:
        if cell.seed == first:
            config = FedKDConfig(config_dict=cell.keys)
            # Clients, and what executes them, mean nothing to a run on all data.
            assert set(config.unread_keys) <= {"client_num", "partition", "engine", "student_pool"}, cell.title
    published = experiment.content.get("published", {})
    assert set(published) <= set(experiment.rows)
