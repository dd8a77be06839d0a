"""What clients keep lies in files that nobody sees: the numbers are those of memory, and nothing is left behind."""

import errno
import gc
import os
from pathlib import Path

import pytest
import torch

from recbole_fedkd.checkpoint.reading import read_checkpoint
from recbole_fedkd.engine.base import Engine
from recbole_fedkd.engine.fleet import mapped
from recbole_fedkd.engine.fleet.mapped import MappedTensors, lies_in_file
from recbole_fedkd.engine.fleet.store import SMALL, RowStore
from recbole_fedkd.errors import TrainingError

pytestmark = pytest.mark.skipif(not mapped.MAPS, reason="files are mapped on Linux alone")

FLEET = {"engine": "fleet", "partition": "user"}
KINDS = [
    ("AttnFedKD", {"strategy": "local", "learner": "adam"}),
    ("AttnFedKD", {"strategy": "fedavg", "learner": "adam", "serve_after": "training", "clients_per_round": 9}),
    ("AttnFedKD", {"strategy": "afd", "knowledge": "item", "learner": "adam"}),
    ("PFedRec", {"preset": "pfedrec", "serve_after": "training"}),
    ("BPR", {"strategy": "fedavg", "label_mode": "implicit", "learner": "adam"}),
]


@pytest.fixture
def _any_size(monkeypatch):
    """Data of tests are small."""
    monkeypatch.setattr(mapped, "LEAST", 1)


def mapped_under(folder):
    """Files of a folder that this process maps."""
    gc.collect()
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder.resolve()}/" in line]


@pytest.mark.usefixtures("_any_size")
@pytest.mark.parametrize(("model", "keys"), KINDS, ids=str)
def test_clients_in_files_train_as_those_in_memory(prepared, model, keys):
    states = []
    for memory in (1e6, 0.0):
        _, trainer, _, _ = prepared(model, **FLEET, **keys, fleet_kept_memory=memory)
        losses = [trainer.engine.run_round(index).loss for index in range(3)]
        (group,), own = trainer.model.groups, trainer.engine.memories
        kept = [group.numbers, *(part for piece in group.rows.pieces.values() for part in piece)]
        kept += [tensor for memory in own for tensor in memory.buffers() if tensor.numel()]
        assert all(lies_in_file(tensor) == (memory == 0.0) for tensor in kept)
        assert memory or not (trainer.model.mapped.held + trainer.model.mapped.of_rows.held)
        states.append({"losses": torch.tensor(losses), **trainer.model.state_dict()})
    in_memory, in_files = states
    assert in_memory.keys() == in_files.keys()
    assert all(torch.equal(values, in_files[name]) for name, values in in_memory.items())


@pytest.mark.usefixtures("_any_size")
@pytest.mark.parametrize("keys", [keys for model, keys in KINDS if model == "AttnFedKD"], ids=str)
def test_clients_in_files_go_on_as_if_they_had_never_stopped(run, keys):
    keys = {**FLEET, **keys, "fleet_kept_memory": 0.0}
    whole, part = run(**keys, epochs=3), run(**keys, epochs=1)
    resumed = run(**keys, epochs=3, resume=part["run_folder"])
    assert resumed["test_result"] == whole["test_result"]
    first, second = (
        read_checkpoint(Path(ended["run_folder"]) / "last.pth")["state_dict"] for ended in (whole, resumed)
    )
    assert all(torch.equal(values, second[name]) for name, values in first.items())


@pytest.mark.usefixtures("_any_size")
def test_files_have_no_name_and_go_with_the_run(prepared, tmp_path):
    _, trainer, _, _ = prepared(**FLEET, strategy="local", fleet_kept_memory=0.0, checkpoint_dir=str(tmp_path / "kept"))
    trainer.engine.run_round(0)
    assert mapped_under(tmp_path / "kept") and not list((tmp_path / "kept").iterdir())
    del trainer
    assert not mapped_under(tmp_path / "kept")


@pytest.mark.usefixtures("_any_size")
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_breaks_off_leaves_no_file(prepared, tmp_path, monkeypatch, stop):
    _, trainer, _, _ = prepared(**FLEET, strategy="local", fleet_kept_memory=0.0, checkpoint_dir=str(tmp_path / "kept"))
    kept = MappedTensors.kept

    def breaks(self, tensor):
        raise stop

    monkeypatch.setattr(MappedTensors, "kept", breaks)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        trainer.engine.run_round(0)
    monkeypatch.setattr(MappedTensors, "kept", kept)
    assert not list((tmp_path / "kept").iterdir())
    del trainer
    assert not mapped_under(tmp_path / "kept")


def test_a_full_disk_is_told_in_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    told = r"checkpoint_dir '.*' cannot take 2 MB more of what clients keep: No space left on device; make room there"
    with pytest.raises(TrainingError, match=told):
        MappedTensors(tmp_path, 0.0).zeros(2**18)
    assert not list(tmp_path.iterdir())


def test_memory_is_used_first_and_again_when_it_is_free(tmp_path):
    room = MappedTensors(tmp_path, 2**20)
    first, second = room.kept(torch.ones(2**17)), room.kept(torch.ones(2**18))
    assert (lies_in_file(first), lies_in_file(second)) == (False, True) and torch.equal(second, torch.ones(2**18))
    assert not lies_in_file(room.kept(torch.ones(9)))  # as many maps as a process has it would not be worth
    room.let_go(first)
    room.let_go(second)
    assert room.held == 36 and not lies_in_file(room.kept(torch.ones(2**17)))


def test_rows_of_before_give_their_memory_back(tmp_path):
    room, clients = MappedTensors(tmp_path), torch.arange(3)
    store = RowStore(3, 2, 9, room)
    for size in (4, 2, 8):
        store.put(clients, torch.tensor([size] * 3), torch.arange(size).repeat(3), torch.rand(3 * size, 2))
        store.tidy()
        kept = [*store.buffers(), *(part for piece in store.pieces.values() for part in piece)]
        assert room.held == sum(tensor.nbytes for tensor in kept)


def test_pieces_are_joined_until_they_are_large_enough_for_a_file():
    store, size = RowStore(40, 31, 2000), 2000
    for client in range(40):
        store.put(
            torch.tensor([client]), torch.tensor([size]), torch.arange(size), torch.full((size, 31), float(client))
        )
        store.tidy()
    assert len(store.pieces) <= 1 + 40 * size * (8 + 4 * 31) / SMALL
    assert store.joined()["data"].view(40, -1).unique(dim=1).flatten().tolist() == list(range(40))


def test_sizes_of_many_are_those_of_a_dictionary(prepared):
    _, trainer, _, _ = prepared(**FLEET)
    engine = trainer.engine
    for held_out in (frozenset(), frozenset({0, 5})):
        engine.held_out = held_out
        plain = Engine.samples.fget(engine)
        assert engine.samples == plain and len(engine.samples) == len(plain)
        assert list(engine.trained) == list(plain) and all(type(number) is int for number in engine.trained)
    assert 5 not in engine.samples and -1 not in engine.samples and len(engine.sizes) not in engine.samples


def test_a_file_is_used_again_when_nobody_reads_it(tmp_path):
    room, parts = MappedTensors(tmp_path, 0.0), [torch.rand(2**16) for _ in range(4)]
    first, other = (room.kept(part) for part in parts[:2])
    room.let_go(first)
    again, new = (room.kept(part) for part in parts[2:])
    assert again.data_ptr() == first.data_ptr() != new.data_ptr()
    for own, part in zip((other, again, new), parts[1:], strict=True):
        assert torch.equal(own, part)
    assert len(mapped_under(tmp_path)) == 3


def test_files_that_no_round_needs_any_more_are_given_back(tmp_path):
    room = MappedTensors(tmp_path, 0.0)
    many = [room.kept(torch.rand(2**16)) for _ in range(8)]
    while many:
        room.let_go(many.pop())
    assert len(mapped_under(tmp_path)) <= 4
