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
import recbole_fedkd.trainer
import torch
network = torch.nn.Linear(3, 2)
from recbole_fedkd.optim import AdamToSGD
optimizer = AdamToSGD(network.parameters(), 0.1)
network(torch.ones(1, 3)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
told = [name for name in ("sklearn", "scipy.optimize", "scipy.stats", "torch._dynamo") if name in sys.modules]
assert not told, told
from sklearn.metrics import log_loss, mean_absolute_error
assert mean_absolute_error.__module__.startswith("sklearn")
import torch._dynamo
torch.optim.SGD(network.parameters(), lr=0.1).add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
"""


def test_a_run_imports_no_sklearn_no_optimisers_of_scipy_and_no_compiler_and_leaves_all_to_others():
    ended = subprocess.run([sys.executable, "-c", RUN], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_methods_of_optimizers_are_torchs_own_once_something_compiles():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    importlib.import_module("torch._dynamo")
    optimizer.zero_grad()
    plain = torch.optim.Optimizer.zero_grad.__wrapped__
    assert not isinstance(vars(plain)["__dynamo_disable"], partial)
