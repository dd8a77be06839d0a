"""Checkpoint files under damage, kills and full disks: whole or refused, and a run's folder always holds one state."""

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from recbole_fedkd import load_data_and_model
from recbole_fedkd.checkpoint.reading import read_checkpoint
from recbole_fedkd.checkpoint.sealed import read_sealed, write_sealed
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.files import write_bytes, write_json

QUICK = {"model": "BPR", "learning_rate": 0.05, "eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}}}


@pytest.fixture
def folder(run) -> Path:
    return Path(run(**QUICK, epochs=2)["run_folder"])


class TestSeal:
    STATE = {"epoch": 1, "weights": torch.arange(60.0).view(6, 10), "nested": {"list": [1, 2.5, None, "text"]}}

    def test_a_sealed_file_is_torchs_own(self, tmp_path):
        write_sealed(self.STATE, tmp_path / "a.pth")
        loaded = torch.load(tmp_path / "a.pth", weights_only=True)
        assert loaded["nested"] == self.STATE["nested"]
        assert torch.equal(loaded["weights"], self.STATE["weights"])

    def test_no_bit_can_flip_unnoticed(self, tmp_path):
        write_sealed(self.STATE, tmp_path / "a.pth")
        whole = (tmp_path / "a.pth").read_bytes()
        damaged = tmp_path / "b.pth"
        ends = {*range(60), *range(len(whole) - 200, len(whole))}
        for place in sorted(ends | set(range(0, len(whole), 7))):
            content = bytearray(whole)
            content[place] ^= 1 << (place % 8)
            damaged.write_bytes(content)
            with pytest.raises(InputError):
                read_sealed(damaged)

    @pytest.mark.parametrize("added", [b"\0", b"text", b"\0" * 200])
    def test_bytes_behind_the_end_are_noticed(self, tmp_path, added):
        write_sealed(self.STATE, tmp_path / "a.pth")
        (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes() + added)
        with pytest.raises(InputError):
            read_sealed(tmp_path / "b.pth")

    def test_a_flipped_bit_of_a_run_is_one_sentence_for_resume_and_load(self, run, folder):
        content = bytearray((folder / "last.pth").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "last.pth").write_bytes(content)
        for use in (lambda: run(**QUICK, epochs=3, resume=str(folder)), lambda: load_data_and_model(folder)):
            with pytest.raises(InputError, match="checksum"):
                use()


class Killed(BaseException):
    """Stands for the end of the process: nothing is cleaned up behind it."""


def kill_at(monkeypatch, number: int) -> None:
    """Let the process end at a file operation, in the middle of what a write writes."""
    count = 0
    write, replace, unlink = Path.write_bytes, Path.replace, Path.unlink

    def counted() -> bool:
        nonlocal count
        count += 1
        return count == number

    def killed_write(self, content):
        if counted():
            write(self, content[: len(content) // 2])
            raise Killed
        return write(self, content)

    def killed_replace(self, target):
        if counted():
            raise Killed
        return replace(self, target)

    def never_cleaned(self, missing_ok=False):
        if count < number:
            unlink(self, missing_ok)

    monkeypatch.setattr(Path, "write_bytes", killed_write)
    monkeypatch.setattr(Path, "replace", killed_replace)
    monkeypatch.setattr(Path, "unlink", never_cleaned)


def test_a_run_killed_at_any_file_operation_resumes_to_the_same_end(run, monkeypatch):
    epochs = 2
    whole = run(**QUICK, epochs=epochs)
    expected = read_checkpoint(whole["run_folder"])["state_dict"]
    resumed = refused = 0
    for number in range(1, 100):
        before = set(Path("saved").iterdir())
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                run(**QUICK, epochs=epochs)
                break
            except Killed:
                pass
        (folder,) = set(Path("saved").iterdir()) - before
        if not (folder / "last.pth").exists():
            refused += 1
            with pytest.raises(InputError, match="no epoch"):
                run(**QUICK, epochs=epochs, resume=str(folder))
            continue
        load_data_and_model(folder)
        again = run(**QUICK, epochs=epochs, resume=str(folder))
        resumed += 1
        assert again["test_result"] == whole["test_result"]
        assert all(
            torch.equal(expected[name], each)
            for name, each in read_checkpoint(again["run_folder"])["state_dict"].items()
        )
        assert not [each.name for each in folder.iterdir() if each.name.startswith(".")]
    assert resumed >= 4 and refused >= 2


def test_a_resumed_run_killed_while_it_starts_holds_a_whole_state_or_none(run, folder, monkeypatch):
    for number in range(1, 20):
        before = set(Path("saved").iterdir())
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                run(**QUICK, epochs=2, resume=str(folder))
                break
            except Killed:
                pass
        (new,) = set(Path("saved").iterdir()) - before
        if (new / "last.pth").exists():
            run(**QUICK, epochs=2, resume=str(new))
    assert number > 3


def test_the_best_checkpoint_of_another_run_is_refused(run):
    keys = {**QUICK, "learning_rate": 0.5}
    one, other = (Path(run(**keys, epochs=8, seed=seed)["run_folder"]) for seed in (1, 2))
    state = read_checkpoint(one)
    assert state["best_epoch"] < state["epoch"]
    shutil.copy(other / "best.pth", one / "best.pth")
    with pytest.raises(InputError, match="is not the best checkpoint"):
        run(**keys, epochs=9, seed=1, resume=str(one))


def test_a_run_without_validation_resumes_from_its_folder(run):
    keys = {"model": "BPR", "eval_args": {"split": {"RS": [0.8, 0.0, 0.2]}}}
    whole = run(**keys, epochs=3)
    part = run(**keys, epochs=2)
    assert run(**keys, epochs=3, resume=part["run_folder"])["test_result"] == whole["test_result"]


def test_a_folder_without_a_checkpoint_is_told_as_that(run):
    Path("saved/empty").mkdir(parents=True)
    with pytest.raises(InputError, match=r"'saved/empty' holds no checkpoint: no epoch .* start the run again"):
        run(**QUICK, resume="saved/empty")


class TestFilesThatCannotBeWritten:
    @pytest.fixture
    def full_disk(self, monkeypatch):
        write = Path.write_bytes
        written = 0

        def fill_after(number: int) -> None:
            def full(self, content):
                nonlocal written
                written += 1
                if written > number:
                    write(self, content[:10])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(self, content)

            monkeypatch.setattr(Path, "write_bytes", full)

        return fill_after

    def test_what_was_written_before_the_disk_was_full_goes_on(self, run, full_disk, monkeypatch, tmp_path):
        whole = run(**QUICK, epochs=4)
        before = set(Path("saved").iterdir())
        full_disk(4)
        with pytest.raises(TrainingError, match=r"cannot be written: No space left on device"):
            run(**QUICK, epochs=4)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        (folder,) = set(Path("saved").iterdir()) - before
        assert not [each.name for each in folder.iterdir() if each.name.startswith(".")]
        assert run(**QUICK, epochs=4, resume=str(folder))["test_result"] == whole["test_result"]

    def test_a_run_folder_that_is_removed_in_mid_run_is_one_sentence(self, run, monkeypatch):
        from recbole_fedkd.trainer import CheckpointTrainer

        train = CheckpointTrainer._train_once

        def removed(self, train_data, epoch_idx, loss_func, show_progress):
            if epoch_idx == 1:
                shutil.rmtree(self.run_folder)
            return train(self, train_data, epoch_idx, loss_func, show_progress)

        monkeypatch.setattr(CheckpointTrainer, "_train_once", removed)
        with pytest.raises(TrainingError, match=r"last.pth' cannot be written: its folder is no longer there"):
            run(**QUICK, epochs=3)

    def test_a_working_folder_that_is_gone_is_one_sentence(self, run, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(InputError, match="the working folder cannot be used"):
            run(**QUICK, epochs=1, checkpoint_dir=str(tmp_path / "saved"))

    def test_a_symbolic_link_is_written_through(self, tmp_path):
        target, link = tmp_path / "real.json", tmp_path / "link.json"
        target.write_text("old")
        link.symlink_to(target)
        write_json({"a": 1}, link)
        assert link.is_symlink() and target.read_text() == '{\n  "a": 1\n}\n'

    @pytest.mark.parametrize("device", ["/dev/full", "/dev/null"])
    def test_a_device_is_never_replaced(self, device):
        with pytest.raises(InputError, match="is a device"):
            write_bytes(b"x", Path(device))
        assert not Path(device).is_file()


def test_flipping_random_bits_never_loads(run, folder):
    generator = random.Random(3)
    whole = (folder / "best.pth").read_bytes()
    for _ in range(200):
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        Path("flipped.pth").write_bytes(content)
        with pytest.raises(InputError):
            load_data_and_model("flipped.pth")
