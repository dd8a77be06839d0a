"""Rounds are counted from 1 wherever they are told, and inside nothing depends on how."""

import json
import logging
import re

import pytest

from recbole_fedkd import run_recbole_fedkd
from recbole_fedkd.report.experiment import read_experiment
from recbole_fedkd.rounds import Epoch, NumberedCurves, NumberedLogger


@pytest.fixture
def told(run, capfd):
    """Everything that a run shows, its TensorBoard steps, and its result: ``told(model, key=value, ...)``."""

    def of(model, **keys):
        numbers = []
        shown = run(
            model, epochs=3, show_progress=True, state="INFO", on_round=lambda *told: numbers.append(told), **keys
        )
        captured = capfd.readouterr()
        return captured.out + captured.err, numbers, shown

    return of


@pytest.fixture
def run(data_path, tmp_path):
    from conftest import SMALL

    def run_model(model, on_round=None, **keys):
        config = {"data_path": str(data_path), **SMALL, "topk": [5], **keys}
        return run_recbole_fedkd(model, "tiny", config_dict=config, on_round=on_round)

    return run_model


def numbers_in(text, pattern):
    return sorted({int(number) for number in re.findall(pattern, text)})


@pytest.mark.parametrize("model", ["AttnFedKD", "AttnStudent", "BPR"])
def test_screen_log_result_and_callback_count_from_one(told, tmp_path, model):
    shown, called, result = told(model, stopping_step=0 if model == "BPR" else 10)
    shown += "".join(file.read_text() for file in tmp_path.rglob("*.log"))
    count = len(result["rounds"])
    assert numbers_in(shown, r"epoch (\d+) training") == list(range(1, count + 1))
    assert numbers_in(shown, r"epoch (\d+) evaluating") == list(range(1, count + 1))
    bars = r"Round +(\d+)" if model == "AttnFedKD" else r"Train +(\d+)"
    assert numbers_in(shown, bars) == list(range(1, count + 1))
    assert [number for number, _, _ in called] == list(range(1, count + 1))
    assert [each["round"] for each in result["rounds"]] == list(range(1, count + 1))
    metric = str(result["config"]["valid_metric"]).lower()
    valid = [each["valid"][metric] for each in result["rounds"]]
    assert valid[result["best_round"] - 1] == (max if result["valid_score_bigger"] else min)(valid)
    if "best eval result in epoch" in shown:
        assert numbers_in(shown, r"best eval result in epoch (\d+)") == [result["best_round"]]


def test_tensorboard_counts_from_one(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("BPR", epochs=2)
    steps = {"Loss/Train": [], "Vaild_score": []}
    for folder in {file.parent for file in tmp_path.rglob("events.out.*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        for curve in steps.keys() & set(events.Tags()["scalars"]):
            steps[curve] += [each.step for each in events.Scalars(curve)]
    assert steps == {"Loss/Train": [1, 2], "Vaild_score": [1, 2]}


def test_an_index_computes_as_itself_and_prints_as_a_number():
    assert f"{Epoch(0):>5}" == "    1" and Epoch(0) % 2 == 0 and Epoch(3) == 3 and hash(Epoch(3)) == hash(3)


def test_a_logger_changes_no_other_line(caplog):
    logger = NumberedLogger(logging.getLogger("numbered"))
    with caplog.at_level(logging.INFO):
        for line in (
            "epoch 0 training [time",
            "\x1b[1;32mepoch 9 evaluating\x1b[0m",
            "epochs 3",
            "3 local epochs",
            5,
        ):
            logger.info(line)
    assert [record.getMessage() for record in caplog.records] == [
        "epoch 1 training [time", "\x1b[1;32mepoch 10 evaluating\x1b[0m", "epochs 3", "3 local epochs", "5"
    ]  # fmt: skip


def test_curves_hand_everything_else_on():
    class Writer:
        closed = False

        def close(self):
            self.closed = True

    writer = Writer()
    NumberedCurves(writer).close()
    assert writer.closed


def test_records_of_version_one_counted_from_zero_and_are_read_as_if_not(tmp_path):
    (tmp_path / "runs").mkdir()
    for version, first in ((1, 0), (2, 1)):
        head = {"kind": "run", "version": version, "row": f"v{version}", "seed": 1}
        rounds = [
            {"kind": "round", "round": first + n, "bytes_up": 10, "valid": {"mae": 1.0 - n / 10}} for n in range(3)
        ]
        tail = {"kind": "result", "test": {"mae": 0.5}, "best_round": first + 1, "valid_metric": "MAE"}
        lines = [head, *rounds, {**tail, "valid_score_bigger": False}]
        (tmp_path / "runs" / f"{version}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "experiment.json").write_text(json.dumps({"name": "x"}))
    old, new = read_experiment(tmp_path).runs
    assert old.best_round == new.best_round == 2
    assert old.rounds == new.rounds and [each.number for each in old.rounds] == [1, 2, 3]


def test_a_client_that_fails_is_told_with_its_round_from_one(prepared):
    from recbole_fedkd.engine.local import ClientError

    _, trainer, loaders, _ = prepared("AttnFedKD")

    def broken(*_, **__):
        raise ValueError("broken")

    trainer.engine.clients[0].train = broken
    with pytest.raises(ClientError, match=r"round 1\b"):
        trainer.fit(loaders[0], saved=False)
