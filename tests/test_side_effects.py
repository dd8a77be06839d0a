"""What a run leaves as it was, random streams and allocator; and what a round makes once, or does not keep."""

import gc
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL

from recbole_fedkd.federated.message import SERVER, Message

WATCHED = """
import ctypes, sys
asked = []
class Watched(ctypes.CDLL):
    def __getattr__(self, name):
        asked.extend([name] if name == "mallopt" else [])
        return super().__getattr__(name)
ctypes.CDLL = Watched
import recbole_fedkd.experiment.cell, recbole_fedkd.machines.coordinator
from recbole_fedkd.command_line import main
from recbole_fedkd.quick_start import run_recbole_fedkd
keys = eval(sys.argv[1])
for engine in ("local", "fleet"):
    run_recbole_fedkd("AttnFedKD", "tiny", config_dict={**keys, "engine": engine}, saved=False)
print("by a library", len(asked))
print("exit", main(["--model=AttnFedKD", "--dataset=tiny", "--quiet", *(f"--{name}={value}" for name, value in keys.items())]))
print("by a command", len(asked))
"""


def test_our_own_command_alone_tells_the_allocator_what_to_keep(data_path, tmp_path):
    keys = {**SMALL, "data_path": str(data_path), "epochs": 1, "show_progress": False}
    command = [sys.executable, "-c", WATCHED, repr(keys)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    counted = dict(line.rsplit(" ", 1) for line in printed.splitlines() if line.startswith(("by a ", "exit ")))
    assert counted == {"by a library": "0", "exit": "0", "by a command": "1"}


def streams():
    """The states of torch's, numpy's and Python's random streams."""
    kind, numbers, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), (kind, numbers.tolist(), *rest), random.getstate()


@pytest.mark.parametrize("engine", ["local", "fleet"])
@pytest.mark.parametrize("model", ["AttnFedKD", "BPR"])
def test_rounds_and_judging_leave_the_random_streams_of_the_process_as_they_were(prepared, engine, model):
    keys = {} if model == "AttnFedKD" else {"strategy": "fedavg", "load_col": {"inter": ["user_id", "item_id"]}}
    _, trainer, loaders, _ = prepared(model, engine=engine, **keys)
    assert trainer.engine.name == engine
    np.random.seed(5)
    random.seed(5)
    before = streams()
    for index in range(2):
        trainer.engine.run_round(index)
        assert streams() == before
    trainer.evaluate(loaders[2], load_best_model=False)
    assert streams() == before


SAID_TO_ALL = [
    {"strategy": "fedavg"},
    {"strategy": "fedavg", "codecs": ["int8"]},
    {"strategy": "afd"},
    {"strategy": "afd", "knowledge": "item", "codecs": ["fp16"]},
]


@pytest.mark.parametrize("engine", ["local", "fleet"])
@pytest.mark.parametrize("keys", SAID_TO_ALL, ids=str)
def test_what_the_server_says_to_all_is_made_into_bytes_once_a_round(prepared, monkeypatch, engine, keys):
    _, trainer, *_ = prepared(engine=engine, partition="user", **keys)
    assert trainer.engine.name == engine and len(trainer.engine.samples) > 20
    written, to_bytes = Counter(), Message.to_bytes

    def counted(message):
        written[message.round] += message.sender == SERVER
        return to_bytes(message)

    monkeypatch.setattr(Message, "to_bytes", counted)
    for index in range(3):
        trainer.engine.run_round(index)
    assert set(written.values()) <= {0, 1} and sum(written.values()) >= 2


def held():
    """Bytes of numpy's arrays since tracing began, and of all tensors."""
    gc.collect()
    tensors = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in gc.get_objects()
        if issubclass(type(value), torch.Tensor)  # not isinstance, which asks what a dead proxy stands for
    }
    return tracemalloc.get_traced_memory()[0] + sum(tensors.values())


ADDED_UP = [
    {"strategy": "fedavg"},
    {"strategy": "fedavg", "row_mean": "changed"},
    {"strategy": "afd"},
    {"strategy": "afd", "knowledge": "item"},
    {"strategy": "afd", "knowledge": "factors", "factor_size": 3, "sketch_width": 4},
]


@pytest.mark.parametrize("keys", ADDED_UP, ids=str)
def test_a_fold_of_what_is_added_up_holds_no_upload(prepared, keys):
    _, trainer, *_ = prepared(engine="local", **keys)
    engine = trainer.engine
    client = engine.clients[0]
    client.receive(engine.server.send(0, 0))
    client.train(0)
    payload, strategy = client.send(0), engine.server.strategy
    upload = Message.from_bytes(payload)
    upload.arrays.pop("histogram" if keys.get("knowledge") == "item" else "", None)  # which every client tells but once
    fold = strategy.empty(engine.server.state, dict.fromkeys(range(1600), upload.training.samples))
    tracemalloc.start()
    try:
        held_after = []
        for number in range(1600):
            arrays = {name: array.copy() for name, array in upload.arrays.items()}
            fold.add(replace(upload, sender=number % SMALL["client_num"], arrays=arrays))
            del arrays
            if number + 1 in (100, 1600):
                held_after.append(held())
    finally:
        tracemalloc.stop()
    of_uploads = 1500 * sum(array.nbytes for array in upload.arrays.values())
    assert held_after[1] - held_after[0] < of_uploads / 10
