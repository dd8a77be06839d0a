"""A run speaks to people, and a call of the library to nobody who did not ask."""

import logging
import logging.handlers
import re
from pathlib import Path

import numpy as np
import pytest

import recbole_fedkd
from recbole_fedkd.command_line import main
from recbole_fedkd.errors import TrainingError
from recbole_fedkd.telling import RoundLines, duration, plan

ARGUMENTS = (
    "--dataset=tiny", "--embedding_size=4", "--hidden_sizes=[4,8]", "--attention_heads=2", "--history_length=3", "--epochs=2",
    "--client_num=3",
)  # fmt: skip


@pytest.fixture
def command(data_path, capsys):
    def run(*more, code=0):
        assert main([*ARGUMENTS, f"--data_path={data_path}", *more]) == code
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


def test_the_command_at_the_end_of_a_run_that_stopped_early_trains_on(data_path, capsys):
    given = [each for each in ARGUMENTS if not each.startswith("--epochs")]
    keys = [f"--data_path={data_path}", "--model=AttnFedKD", "--epochs=40", "--stopping_step=1", "--learning_rate=0.5"]
    assert main([*given, *keys]) == 0
    out = capsys.readouterr().out
    (more,) = re.findall(r"recbole-fedkd (--resume=\S+) (--stopping_step=2)$", out, re.MULTILINE)
    assert main(list(more)) == 0
    assert out.count("\nround ") < 40 and "\nround " in capsys.readouterr().out


def test_a_run_says_what_it_does_how_it_goes_and_what_it_cost(command):
    out, err = command("--model=AttnFedKD", "--num_layers=3")
    lines = out.splitlines()
    assert lines[0].startswith("data     tiny: 30 users, 40 items, 600 interactions, labels: ratings 1, 2, 3, 4, 5")
    assert lines[1] == "split    480 training, 60 validation and 60 test rows (80/10/10 %, at random)"
    assert lines[2].startswith("method   AttnFedKD: strategy afd on engine local: 3 clients")
    assert lines[3].startswith("not read num_layers")
    rounds = [
        line for line in lines if re.match(r"round \d/2  loss \d\.\d{4}  mae \d\.\d{4} [* ]  [\d,]+ bytes  \d", line)
    ]
    assert len(rounds) == 2 and "at most" in rounds[0] and "at most" not in rounds[1]
    (folder,) = Path("saved").iterdir()
    assert f"folder   {folder}, log: log/AttnFedKD/{folder.name}.log" in out
    assert f"recbole-fedkd recommend {folder} --users=all" in out and f"--resume={folder} --epochs=4" in out
    assert re.search(r"cost     2 rounds, the best [12]; [\d,]+ bytes up, [\d,]+ down; [\d,]+ until the best; ", out)
    assert re.search(r"metric +value +Bias +protocol", out)
    # The config and the network are in the log, and on no screen.
    log = Path(f"log/AttnFedKD/{folder.name}.log").read_text()
    assert "embedding_size = 4" in log and "AttentiveNetwork" in log and "\x1b" not in log
    assert "embedding_size" not in out + err and "AttentiveNetwork" not in out + err
    assert len(lines) < 40


def test_the_floor_is_the_model_s_own_result(command, run):
    out, _ = command("--model=AttnFedKD", "--seed=5")
    bias = run("Bias", seed=5, load_col=None)["test_result"]
    found = re.search(r"mae +[\d.]+ +([\d.]+)", out)
    assert float(found[1]) == pytest.approx(bias["mae"], abs=1e-4)


def test_clicks_have_pop_for_a_floor(command, run):
    out, _ = command("--model=MF", "--label_mode=implicit", "--load_col={inter: [user_id, item_id]}")
    pop = run("Pop", label_mode="implicit", load_col={"inter": ["user_id", "item_id"]})["test_result"]
    found = re.search(r"ndcg@10 +[\d.]+ +([\d.]+)", out)
    assert float(found[1]) == pytest.approx(pop["ndcg@10"], abs=1e-4)
    assert "epoch 2/2" in out and "bytes" not in out


def test_what_a_model_of_recbole_says_of_itself_is_in_the_log(command):
    out, err = command("--model=FISM", "--load_col={inter: [user_id, item_id]}")
    assert err == "" and "up to 2 epochs, " in out and "Attetion" not in out
    log = next(Path("log/FISM").iterdir()).read_text()
    assert "Pay Attetion" in log and "history interaction records" in log


def test_quiet_is_the_table_alone(command):
    out, err = command("--model=AttnFedKD", "--quiet")
    assert out.split()[0] == "metric" and "round" not in out and "cost" not in out and err == ""


def test_verbose_is_what_recbole_says(command):
    out, err = command("--model=AttnFedKD", "--verbose", "--show_progress=False")
    assert "embedding_size" in err and "AttentiveNetwork" in err and "round" not in out


def test_quiet_and_verbose_exclude_each_other(command):
    _, err = command("--model=AttnFedKD", "--quiet", "--verbose", code=2)
    assert "one run cannot be both" in err


QUICK = {"epochs": 1, "client_num": 2, "embedding_size": 4, "hidden_sizes": [4, 8]}


def library(data_path, model="AttnFedKD", **more):
    return recbole_fedkd.run_recbole_fedkd(model, "tiny", config_dict={**QUICK, "data_path": str(data_path)}, **more)


def test_a_call_of_the_library_takes_over_no_logging(data_path, capfd):
    root, handler = logging.getLogger(), logging.handlers.BufferingHandler(10_000)
    root.addHandler(handler)
    before = list(root.handlers), root.level, list(handler.filters)
    try:
        library(data_path)
        assert (list(root.handlers), root.level, list(handler.filters)) == before
        assert [record for record in handler.buffer if record.levelno < logging.WARNING] == []
    finally:
        root.removeHandler(handler)
    assert capfd.readouterr() == ("", ""), "somebody's screen is written upon"


def test_who_asked_for_more_hears_it(data_path):
    root, handler = logging.getLogger(), logging.handlers.BufferingHandler(10_000)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    library(data_path, saved=False)
    assert any("embedding_size" in record.getMessage() for record in handler.buffer)
    assert root.level == logging.INFO


@pytest.mark.parametrize("model", ["AttnFedKD", "BPR", "Bias"])
def test_a_run_that_is_not_saved_leaves_nothing(data_path, model):
    assert library(data_path, model, saved=False)["run_folder"] is None
    assert list(Path.cwd().iterdir()) == []


def test_bars_are_drawn_for_whoever_asks(data_path, capfd):
    keys = {**QUICK, "data_path": str(data_path), "show_progress": True}
    recbole_fedkd.run_recbole_fedkd("BPR", "tiny", config_dict=keys, saved=False)
    assert "Train" in capfd.readouterr().err
    recbole_fedkd.run_recbole_fedkd("BPR", "tiny", config_dict={**keys, "show_progress": False}, saved=False)
    library(data_path, "BPR", saved=False)
    assert capfd.readouterr().err == ""


def test_loading_leaves_nothing(data_path, tmp_path, monkeypatch, capfd):
    folder = Path(library(data_path)["run_folder"]).resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config, model, *_ = recbole_fedkd.load_data_and_model(folder)
    recbole_fedkd.quick_start.build_trainer(config, model)
    assert set(recbole_fedkd.load(folder).recommend(k=1)["rank"]) == {1}
    assert list(Path.cwd().iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_lines_go_to_whoever_asks_and_change_no_number(data_path):
    lines = []
    told = library(data_path, saved=False, tell=lines.append)
    silent = library(data_path, saved=False)
    assert lines[0].startswith("data ") and "cost" in lines[-1]
    assert told["test_result"] == silent["test_result"] and told["floors"]["Bias"] and silent["floors"] == {}


def test_a_failure_before_the_first_round_was_saved_names_the_log_and_leaves_no_folder(data_path, monkeypatch, capsys):
    from recbole_fedkd.trainer import FedKDTrainer

    def fail(*_arguments):
        raise TrainingError("it failed")

    monkeypatch.setattr(FedKDTrainer, "_train_once", fail)
    assert main([*ARGUMENTS, "--model=AttnFedKD", f"--data_path={data_path}"]) == 1
    (log,) = Path("log").glob("*/*.log")
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: it failed; no round was saved") and told.endswith(f"log: {log}")
    assert "TrainingError: it failed" in log.read_text()
    assert not list(Path("saved").iterdir())


def test_a_failure_names_the_folder_and_how_to_go_on(data_path, monkeypatch, capsys):
    from recbole_fedkd.trainer import FedKDTrainer

    train = FedKDTrainer._train_once

    def fail(self, data, epoch, *arguments):
        if epoch == 1:
            raise TrainingError("it failed")
        return train(self, data, epoch, *arguments)

    monkeypatch.setattr(FedKDTrainer, "_train_once", fail)
    assert main([*ARGUMENTS, "--model=AttnFedKD", f"--data_path={data_path}"]) == 1
    (folder,) = Path("saved").iterdir()
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: it failed; ") and told.endswith(f"--resume={folder} goes on after round 1")


def test_what_is_spent_of_privacy_is_told_by_round_at_the_end_and_in_the_log(command):
    keys = ["--strategy=fedavg", "--partition=user", "--client_weights=uniform", "--privacy={clip: 0.5, epsilon: 8.0}"]
    out, _ = command("--model=AttnFedKD", *keys)
    spent = [float(each) for each in re.findall(r"^round .*  epsilon (\S+)  ", out, re.MULTILINE)]
    assert len(spent) == 2 and 0 < spent[0] < spent[1] <= 8.0
    assert f"privacy  epsilon {spent[1]:.4g} at delta 1e-05; its budget is spent, no further round" in out
    assert "--resume=" not in out  # it would train nothing
    (log,) = Path("log").glob("*/*.log")
    assert re.findall(r"round \d: privacy has spent epsilon (\S+)", log.read_text()) == [
        f"{each:.4g}" for each in spent
    ]
    (folder,) = Path("saved").iterdir()
    assert main([f"--resume={folder}", "--epochs=5"]) == 0
    assert "the budget lasts for 2 of 5 rounds" in Path(max(Path("log").glob("*/*.log"))).read_text()


def test_sums_that_have_nothing_more_to_train_are_offered_no_more_rounds(command):
    for keys in (["--model=Bias"], ["--model=Bias", "--strategy=sums"]):
        out, _ = command(*keys)
        assert "recbole-fedkd recommend" in out and "--resume=" not in out


def test_a_line_of_a_round_marks_the_best_so_far():
    lines = []
    tell = RoundLines("round", "mae", False, lines.append)
    for number, value in enumerate((0.8, 0.9, np.nan, 0.7), start=1):
        tell(number, 12, {"loss": 1.0, "valid": {"mae": value}, "bytes_down": 1000, "bytes_up": 234})
    tell(5, 12, {"loss": 1.0, "valid": None, "bytes_down": 0, "bytes_up": 0})
    assert [bool(re.search(r"\d \* ", line)) for line in lines] == [True, False, False, True, False]
    assert lines[0].startswith("round  1/12  loss 1.0000  mae 0.8000 *  1,234 bytes") and "bytes" not in lines[4]


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0 s"), (59, "59 s"), (90, "2 min"), (7200, "2.0 h")])
def test_durations(seconds, told):
    assert duration(seconds) == told


@pytest.mark.parametrize("epochs, cut", [(3, True), (5, True), (6, False)])
def test_rounds_that_end_before_the_exchange_does_are_told_before_they_begin(prepared, epochs, cut):
    keys = {"knowledge": "factors", "sketch_passes": 1, "em_steps": 2, "epochs": epochs}
    config, trainer, _, _ = prepared(**keys)
    assert ("the exchange takes 5 rounds and training begins after it" in plan(config, trainer)) == cut
