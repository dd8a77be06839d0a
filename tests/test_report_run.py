"""The page of a single run, and configs that reports and searches hand on: each is read by a run again."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import SMALL
from report_records import Page, Records

from recbole_fedkd.command_line import main
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.quick_start import run_recbole_fedkd
from recbole_fedkd.record import RUN_RECORD, RUN_USERS
from recbole_fedkd.report import write_report


@pytest.fixture(scope="module")
def keys(data_path):
    return {"model": "AttnFedKD", "dataset": "tiny", "data_path": str(data_path), "client_num": 3, "epochs": 2, **SMALL}


@pytest.fixture
def run(keys):
    return run_recbole_fedkd(config_dict={**keys, "show_progress": False})


def test_a_run_is_reported_from_its_folder(run, capsys):
    folder = Path(run["run_folder"])
    assert run["user_metrics"] is None, "nobody asked for them"
    assert main(["report", str(folder)]) == 0
    assert f"report: {folder}/report/index.html" in capsys.readouterr().out
    page = Page((folder / "report" / "index.html").read_text())
    text = " ".join(page.texts)
    assert f"MAE {run['test_result']['mae']:.4f}" in text and "The worst of 3 clients in" in text
    assert f"recbole-fedkd --resume={folder} --epochs=N" in text
    told = {each["aria-label"].split(".")[0] for each in page.all("div") if each.get("class") == "picture"}
    assert {"Validation MAE against rounds", "Training loss", "Bytes of every round", "Data of the clients"} <= told
    total = sum(each["bytes_down"] + each["bytes_up"] for each in run["rounds"])
    assert total == run["communication"]["total_bytes"] > 0


def test_a_run_that_has_no_result_yet_is_reported_from_its_checkpoint(run, capsys):
    folder = Path(run["run_folder"])
    for name in (RUN_RECORD, RUN_USERS):
        (folder / name).unlink()
    text = " ".join(Page(write_report(folder).read_text()).texts)
    assert "in validation; it is not finished" in text and "until now: the run has no result yet" in text
    assert f"recbole-fedkd --resume={folder}" in text and "--epochs=N" not in text
    (folder / "last.pth").write_bytes(b"damaged")
    assert main(["report", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_page_says_why_another_engine_ran_than_the_one_asked_for(keys):
    asked = {**keys, "engine": "fleet", "weight_decay": 0.1, "learner": "sgd", "show_progress": False}
    found = run_recbole_fedkd(config_dict=asked)
    assert found["engine"] == "local" and found["engine_fallback"]
    text = " ".join(Page(write_report(Path(found["run_folder"])).read_text()).texts)
    assert f"Engine fleet cannot run this, engine local does: {found['engine_fallback']}." in text


@pytest.mark.parametrize("content", ["", "{}", '{"kind": "run"}\n[]', "\x00"])
def test_a_record_that_cannot_be_read_is_one_sentence(content, tmp_path, capsys):
    (tmp_path / RUN_RECORD).write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: record '{tmp_path / RUN_RECORD}' cannot be used: ") and said.count("\n") == 1


def test_a_central_run_has_a_page_without_clients(keys):
    found = run_recbole_fedkd(config_dict={**keys, "model": "AttnStudent", "strategy": "central"})
    text = " ".join(Page(write_report(Path(found["run_folder"])).read_text()).texts)
    assert "One model on all data, without a network; 2 epochs in" in text and "Clients" not in text


def test_nothing_is_kept_of_a_run_that_saves_nothing(keys):
    run_recbole_fedkd(config_dict={**keys, "show_progress": False}, saved=False)
    assert not list(Path().rglob(RUN_RECORD))


def test_the_winner_is_chosen_by_validation_and_its_config_runs(keys, tmp_path):
    records = Records(tmp_path / "grid")
    given = {name: value for name, value in keys.items() if name != "data_path"}
    for row, valid, test in (("lucky", 0.8, 0.1), ("chosen", 0.7, 0.2)):
        for seed in (3, 4):
            more = {"keys": {**given, "gamma": 0.3, "seed": seed}} if row == "chosen" else {}
            records.run(row, seed, {"mae": test}, valid=(0.9, valid), **more)
    page = write_report(records.done())
    config = page.parent / "best.yaml"
    assert yaml.safe_load(config.read_text()) == {**given, "gamma": 0.3, "seed": 3}
    assert "the row 'chosen' is best in validation MAE, 0.7000 ± 0.0000 over 2 seed(s)" in config.read_text()
    assert main([f"--config_files={config}", f"--data_path={keys['data_path']}", "--result_file=r.json"]) == 0
    assert json.loads(Path("r.json").read_text())["config"]["gamma"] == 0.3
    assert FedKDConfig(config_file_list=[str(config)])["seed"] == 3
