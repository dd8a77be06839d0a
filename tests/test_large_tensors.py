"""Large tensors beside a checkpoint: what changed is appended, whatever else comes back as it was, and damage is a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recbole_fedkd import load_data_and_model
from recbole_fedkd.checkpoint import large
from recbole_fedkd.checkpoint.growing import GrowingFile
from recbole_fedkd.checkpoint.reading import read_checkpoint
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.experiment.grid import Cell
from recbole_fedkd.experiment.records import checkpoint_folder, keep_checkpoint


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch):
    monkeypatch.setattr(large, "LARGE", 64)
    monkeypatch.setattr(large, "PIECE", 32)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def rows(counts, numbers) -> dict[str, torch.Tensor]:
    count, total = torch.tensor(counts), sum(counts)
    data = torch.tensor(numbers[:total] + [0.0] * (total - len(numbers))).repeat_interleave(20).view(total, 20)
    return {"rows.count": count, "rows.item": torch.arange(total), "rows.data": data}


counts = st.lists(st.integers(0, 4), min_size=3, max_size=3)
numbers = st.lists(st.sampled_from([0.0, 1.0, 2.0]), max_size=12)


@example([([0, 0, 0], [], 0)] * 4 + [([0, 1, 0], [], 0), ([0, 0, 3], [], 0)])
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(counts, numbers, st.integers(0, 40)), min_size=1, max_size=6))
def test_every_state_comes_back_as_it_was_whatever_grew_shrank_or_vanished(tmp_path_factory, states):
    folder = tmp_path_factory.mktemp("run")
    writer, kept = large.LargeTensors(True), []
    for number, (count, values, length) in enumerate(states, 1):
        whole = {
            "epoch": number,
            "table": torch.arange(length, dtype=torch.float64).view(length, 1) + number % 2,
            "list": [{1: rows(count, values)}, None, 2.5],
            "half": torch.full((40,), number, dtype=torch.bfloat16),
        }
        kept.append((whole, writer.taken_out(whole, folder, number)))
        writer.tidy(folder, improved=number % 2 == 1)
    assert same(large.put_back(kept[-1][1], folder / "last.pth"), kept[-1][0])
    of_best = kept[(len(kept) - 1) // 2 * 2]
    assert same(large.put_back(of_best[1], folder / "best.pth"), of_best[0])
    assert len(list(folder.iterdir())) <= 2


def test_what_is_written_is_what_changed(tmp_path):
    writer, table, held = large.LargeTensors(True), torch.zeros(1000, 8), [3] * 50
    state = {"table": table, "store": rows(held, [])}
    writer.taken_out(state, tmp_path, 1)
    (file,) = tmp_path.iterdir()
    whole = file.stat().st_size
    table[500] = 1
    held[20] = 5  # all rows of clients behind it lie elsewhere
    writer.taken_out({"table": table, "store": rows(held, [])}, tmp_path, 2)
    assert 0 < file.stat().st_size - whole < 32 + 5 * 88 + 30 * 3 * 8 + 2 * 400
    grown = file.stat().st_size
    writer.taken_out({"table": table, "store": rows(held, [])}, tmp_path, 3)
    assert file.stat().st_size == grown


def test_a_file_of_mostly_old_pieces_is_followed_by_another(tmp_path):
    writer = large.LargeTensors(True)
    for number in range(1, 9):
        small = writer.taken_out({"table": torch.full((100,), float(number))}, tmp_path, number)
        writer.tidy(tmp_path, improved=number == 1)
        assert {file.name for file in tmp_path.iterdir()} == {writer.file, writer.of_best}
        assert (tmp_path / writer.file).stat().st_size < 4 * 400 + 1000
    assert writer.file != writer.of_best == "tensors-1.bin"
    assert large.put_back(small, tmp_path / "last.pth")["table"].eq(8).all()


def test_a_full_disk_takes_nothing_from_the_checkpoint_before_nor_from_the_next(tmp_path, monkeypatch):
    writer, table = large.LargeTensors(True), torch.zeros(100)
    before = writer.taken_out({"table": table}, tmp_path, 1)

    def full(self, parts, file):
        next(iter(parts))
        raise TrainingError("'tensors-1.bin' cannot be written: No space left on device")

    with monkeypatch.context() as patch, pytest.raises(TrainingError):
        patch.setattr(GrowingFile, "extend", full)
        writer.taken_out({"table": table + 1}, tmp_path, 2)
    assert large.put_back(before, tmp_path / "last.pth")["table"].eq(0).all()
    after = writer.taken_out({"table": table + 1}, tmp_path, 3)
    assert large.put_back(after, tmp_path / "last.pth")["table"].eq(1).all()


KEYS = {"model": "MF", "engine": "fleet", "partition": "user", "clients_per_round": 5, "strategy": "fedavg"}
KEYS |= {"serve_after": "training", "label_mode": "implicit"}


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_run_killed_anywhere_around_a_checkpoint_goes_on_to_the_same_end(run, monkeypatch):
    taken_out, extend, tidy = large.LargeTensors.taken_out, GrowingFile.extend, large.LargeTensors.tidy
    whole = run(**KEYS, epochs=3)
    expected = read_checkpoint(whole["run_folder"])["state_dict"]
    for place in ("before its file grows", "while it grows", "before the checkpoint", "behind it"):
        before, count = set(Path("saved").iterdir()), 0

        def at(here, place=place):
            nonlocal count
            count += here == place
            if here == place and count == 2:
                raise Killed

        def grows(self, state, folder, number, at=at):
            at("before its file grows")
            made = taken_out(self, state, folder, number)
            at("before the checkpoint")
            return made

        def half(self, parts, file, at=at):
            parts = list(parts)
            extend(self, parts[: len(parts) // 2], file)
            if file.suffix == ".bin":
                at("while it grows")
            extend(self, parts[len(parts) // 2 :], file)

        def last(self, folder, improved, at=at):
            at("behind it")
            tidy(self, folder, improved)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(large.LargeTensors, "taken_out", grows)
            patch.setattr(GrowingFile, "extend", half)
            patch.setattr(large.LargeTensors, "tidy", last)
            run(**KEYS, epochs=3)
        (folder,) = set(Path("saved").iterdir()) - before
        assert read_checkpoint(folder)["epoch"] == (1 if place == "behind it" else 0)
        again = run(**KEYS, epochs=3, resume=str(folder))
        assert again["test_result"] == whole["test_result"]
        assert same(read_checkpoint(again["run_folder"])["state_dict"], expected)
        assert 1 <= len(list(Path(again["run_folder"]).glob("tensors-*.bin"))) <= 2


def test_a_kept_checkpoint_loads_and_a_missing_or_damaged_file_is_one_sentence(run, tmp_path):
    folder = Path(run(**KEYS, epochs=1)["run_folder"])
    cell = Cell("name", "row", {}, 1, {})
    keep_checkpoint(tmp_path, cell, folder)
    load_data_and_model(checkpoint_folder(tmp_path, cell))
    (file,) = folder.glob("tensors-*.bin")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="is damaged, or that of another run"):
        load_data_and_model(folder)
    file.unlink()
    for use in (lambda: load_data_and_model(folder / "best.pth"), lambda: run(**KEYS, epochs=2, resume=str(folder))):
        with pytest.raises(InputError, match="take the whole folder"):
            use()


@pytest.mark.parametrize("named", ["../tensors-1.bin", "/etc/passwd", 3, None])
def test_a_checkpoint_names_no_other_file(tmp_path, named):
    with pytest.raises(InputError, match="names no file of a run"):
        large.put_back({large.FIELD: {"file": named, "bytes": 1, "digest": ""}}, tmp_path / "last.pth")
