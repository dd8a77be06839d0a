"""How a run ends that somebody, or the disk, ends: a sentence that says what goes on, and whole files."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import sleep

import pytest

from recbole_fedkd.checkpoint.reading import read_checkpoint
from recbole_fedkd.command_line import main
from recbole_fedkd.errors import InputError
from recbole_fedkd.trainer import CheckpointTrainer

KEYS = {"embedding_size": "4", "epochs": "4", "show_progress": "False", "state": "WARNING", "load_col": "None"}


@pytest.fixture
def arguments(data_path) -> list[str]:
    return ["--model=BPR", "--dataset=tiny", f"--data_path={data_path}", *(f"--{k}={v}" for k, v in KEYS.items())]


def at_epoch(monkeypatch, number: int, action) -> None:
    train = CheckpointTrainer._train_once

    def interrupted(self, train_data, epoch_idx, loss_func, show_progress):
        if epoch_idx == number:
            action()
        return train(self, train_data, epoch_idx, loss_func, show_progress)

    monkeypatch.setattr(CheckpointTrainer, "_train_once", interrupted)


SIGNALS = [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_ends_with_the_folder_and_the_code_of_the_signal(arguments, capsys, monkeypatch, number, code):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    with monkeypatch.context() as patch:
        at_epoch(patch, 2, lambda: os.kill(os.getpid(), number))
        assert main(arguments) == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == before
    told = capsys.readouterr().err.strip().splitlines()[-1]
    (folder,) = Path("saved").iterdir()
    assert told == f"stopped; --resume={folder} goes on after epoch 2"
    assert read_checkpoint(folder)["epoch"] == 1
    assert main([f"--resume={folder}"]) == 0


def test_a_signal_in_the_first_epoch_says_that_nothing_goes_on(arguments, capsys, monkeypatch):
    at_epoch(monkeypatch, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(arguments) == 143
    told = capsys.readouterr().err
    (log,) = Path("log").glob("*/*.log")
    assert f"no epoch was saved, so there is nothing to go on from; start it again; log: {log}" in told
    assert not list(Path("saved").iterdir())


def test_ctrl_c_while_the_command_loads_ends_it_without_a_traceback():
    code = """
import importlib.abc, os, signal, sys
class Stops(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "recbole_fedkd.command_line":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stops())
from recbole_fedkd.__main__ import main
main()
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_a_signal_that_the_process_ignores_stays_ignored(arguments, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_epoch(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert main(arguments) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_call_of_the_library_takes_no_signal_over(run, monkeypatch):
    seen = []
    at_epoch(monkeypatch, 0, lambda: seen.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP))))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    run("BPR", epochs=1, train_neg_sample_args={"distribution": "uniform", "sample_num": 1})
    assert seen == [before]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_of_its_own_that_is_stopped_in_mid_run_resumes(arguments, number):
    code = "import sys; from recbole_fedkd.command_line import console; console()"
    command = [sys.executable, "-c", code, *(each for each in arguments if "epochs" not in each), "--epochs=100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while process.poll() is None and not list(Path().glob("saved/*/last.pth")):
            sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate()
    (folder,) = Path("saved").iterdir()
    finished = read_checkpoint(folder)["epoch"] + 1
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert errors.strip().splitlines()[-1] == f"stopped; --resume={folder} goes on after epoch {finished}"
        assert "Traceback" not in errors
    assert main([f"--resume={folder}", f"--epochs={finished + 1}"]) == 0


class TestFolders:
    @pytest.mark.parametrize("name", ["log", "log_tensorboard", "saved"])
    def test_a_file_in_the_way_is_told_before_anything_runs(self, arguments, capsys, name):
        Path(name).write_text("in the way")
        assert main(arguments) == 2
        told = capsys.readouterr().err.strip()
        assert "\n" not in told and f"{name}' is a file" in told

    @pytest.mark.parametrize("folder", ["/proc/no_such/place", "/dev/null/x", "saved\0x"])
    def test_a_checkpoint_dir_that_cannot_be_made(self, run, folder):
        with pytest.raises(InputError, match=r"checkpoint_dir '.*' cannot be used"):
            run("BPR", checkpoint_dir=folder)

    def test_a_working_folder_that_cannot_be_written(self, arguments, capsys, monkeypatch):
        def refused(self, *arguments, **keys):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

        monkeypatch.setattr(Path, "mkdir", refused)
        assert main(arguments) == 2
        told = capsys.readouterr().err.strip()
        assert "\n" not in told and "working folder" in told and "Read-only file system" in told


class TestResultFile:
    @pytest.mark.parametrize(
        "file", ["/dev/full", "/dev/null", "saved", "no/such/folder/result.json", "/dev/null/x", "a\0b"]
    )
    def test_what_is_no_file_is_refused_before_anything_runs(self, run, file):
        Path("saved").mkdir()
        with pytest.raises(InputError, match="result_file") as caught:
            run("BPR", epochs=1, result_file=file)
        assert "\n" not in str(caught.value)
        assert not list(Path("saved").iterdir())
        assert not Path("/dev/full").is_file() and not Path("/dev/null").is_file()

    def test_a_link_is_written_through_and_a_resumed_run_writes_none(self, run):
        Path("real.json").write_text("old")
        Path("link.json").symlink_to("real.json")
        folder = run("BPR", epochs=1, load_col=None, result_file="link.json")["run_folder"]
        assert Path("link.json").is_symlink()
        written = Path("real.json").read_text()
        assert "test_result" in written
        run("BPR", epochs=2, load_col=None, resume=folder)
        assert Path("real.json").read_text() == written

    def test_a_disk_that_is_full_when_the_result_is_written_loses_nothing(self, arguments, capsys, monkeypatch):
        write = Path.write_bytes

        def full(self, content):
            if "result" in self.name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, content)

        monkeypatch.setattr(Path, "write_bytes", full)
        assert main([*arguments, "--result_file=result.json"]) == 1
        told = capsys.readouterr().err.strip().splitlines()[-1]
        (folder,) = Path("saved").iterdir()
        assert told == (
            f"error: 'result.json' cannot be written: No space left on device; --resume={folder} goes on after epoch 4"
        )
        assert not Path("result.json").exists()


def test_a_disk_that_is_full_for_tensorboard_prints_no_traceback(arguments, capfd, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_epoch(monkeypatch, 1, lambda: monkeypatch.setattr(RecordWriter, "write", full))
    assert main(arguments) in (0, 1)
    told = capfd.readouterr().err
    assert "Traceback" not in told


@pytest.mark.parametrize("key", ["worker", "torch_threads", "fleet_threads"])
def test_processes_and_threads_are_bounded(run, key):
    with pytest.raises(InputError, match=rf"{key} is 100000000000, .* it must be .* in \["):
        run("BPR", **{key: 100000000000})


@pytest.mark.parametrize("text", ["100000000000", "0", "-1", "x", "²"])
def test_processes_of_an_experiment_are_bounded(capsys, text):
    Path("grid.yaml").write_text("grid: {seed: [1]}\n")
    assert main(["compare", "grid.yaml", f"--workers={text}"]) == 2
    assert "it must be an integer in [1, 1024]" in capsys.readouterr().err
