"""What a run imports, and that what is left out gives the same numbers."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import sklearn.metrics
import torch
from conftest import needs_numba
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_fedkd import compat

NUMBERS = st.floats(-5, 5, width=32)
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=300)


@settings(max_examples=50, deadline=None)
@given(PAIRS, st.sampled_from([np.float32, np.float64]))
def test_errors_are_those_of_sklearn_to_the_bit(pairs, precision):
    trues, predicted = np.array(pairs, dtype=precision).T
    for name in ("mean_absolute_error", "mean_squared_error"):
        assert getattr(compat, name)(trues, predicted) == getattr(sklearn.metrics, name)(trues, predicted), name


@settings(max_examples=50, deadline=None)
@given(st.lists(NUMBERS, min_size=2, max_size=50), st.randoms(), st.booleans())
def test_area_is_that_of_sklearn_to_the_bit(places, random, falling):
    x = np.array(sorted(places, reverse=falling), dtype=np.float64)
    y = np.array([random.random() for _ in places])
    assert compat.auc(x, y) == sklearn.metrics.auc(x, y)


def test_a_curve_that_turns_round_has_no_area():
    with pytest.raises(ValueError, match="neither increasing nor decreasing"):
        compat.auc(np.array([0.0, 1.0, 0.5]), np.zeros(3))


COMPILES = """
import numpy as np
from loops import add, twice
from recbole_fedkd.model.compiled import compiled, tell_of_compiling
tell_of_compiling(print)
for loop in (add, twice):
    compiled(loop)(np.zeros(3, np.float32))
"""


@needs_numba
def test_whoever_waits_for_loops_to_be_compiled_is_told_once_and_never_again(tmp_path):
    (tmp_path / "loops.py").write_text(
        "def add(out):\n    out[0] = out[1] + out[2]\n\n\ndef twice(out):\n    out[0] = 2 * out[1]\n"
    )
    kept = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    run = partial(
        subprocess.run, [sys.executable, "-c", COMPILES], check=True, capture_output=True, text=True, env=kept
    )
    first, second = (run(cwd=tmp_path).stdout.splitlines() for _ in range(2))
    assert len(first) == 1 and first[0].startswith("loops    are compiled"), first
    assert second == []


RUN = """
import sys
from recbole_fedkd import run_recbole_fedkd
model, keys = sys.argv[1], dict(key.split("=") for key in sys.argv[2:])
run_recbole_fedkd(model=model, dataset="ml-100k", config_dict={"epochs": 1, **keys}, saved=False)
names = ("sklearn", "scipy.optimize", "scipy.stats", "torch._dynamo", "torch.utils.tensorboard")
imported = [name for name in names if name in sys.modules]
assert not imported, imported
from sklearn.metrics import log_loss, mean_absolute_error
assert mean_absolute_error.__module__.startswith("sklearn")
from torch.utils.tensorboard import SummaryWriter
assert isinstance(SummaryWriter, type)
from recbole.model.general_recommender import NCEPLRec, SLIMElastic
import torch._dynamo
weight = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.SGD([weight], lr=0.1)
optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
weight.grad = torch.ones(1)
optimizer.step()
assert weight.item() < 1.0
"""


@pytest.mark.parametrize(
    "arguments",
    [["AttnFedKD", "strategy=afd"], ["AttnFedKD", "strategy=fedavg", "learner=adam"], ["BPR"], ["Pop"]],
    ids=" ".join,
)
def test_a_run_imports_no_sklearn_no_curves_and_no_compiler_and_leaves_all_to_others(arguments, tmp_path):
    command = [sys.executable, "-c", RUN, *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("learner", ["Adam", "SGD", "Adagrad", "RMSprop", "SparseAdam"])
def test_a_step_without_a_compiler_is_torchs_own(learner):
    def stepped(step):
        weight = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = getattr(torch.optim, learner)([weight], lr=0.1)
        for _ in range(3):
            loss = (
                torch.nn.functional.embedding(torch.tensor([0, 2]), weight, sparse=learner == "SparseAdam")
                .square()
                .sum()
            )
            optimizer.zero_grad()
            loss.backward()
            step(optimizer)
        return weight.detach()

    step = getattr(torch.optim, learner).step
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch._dynamo", raising=False)
        without = stepped(step)
        assert "torch._dynamo" not in sys.modules
    importlib.import_module("torch._dynamo")
    assert torch.equal(without, stepped(step))


def test_a_folder_of_models_has_those_that_recbole_has_and_no_others():
    from recbole.model import general_recommender

    assert general_recommender.BPR.__module__ == "recbole.model.general_recommender.bpr"
    with pytest.raises(AttributeError, match="no attribute 'Nobody'"):
        _ = general_recommender.Nobody
    with pytest.raises(ImportError, match="cannot import name 'Nobody'"):
        exec("from recbole.model.general_recommender import Nobody")


def test_methods_of_optimizers_are_torchs_own_once_something_compiles():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    importlib.import_module("torch._dynamo")
    optimizer.zero_grad()
    plain = torch.optim.Optimizer.zero_grad.__wrapped__
    assert not isinstance(vars(plain)["__dynamo_disable"], partial)
