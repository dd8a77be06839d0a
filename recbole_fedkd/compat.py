"""Everything that makes RecBole 1.2.1 run on today's stack; each shim says why it is here and when it can go.

What can be mended by subclassing is not here: ``config.FedKDConfig`` replaces ``compatibility_settings`` and the reading
of ``sys.argv``, ``evaluation.Collector`` moves only tensors, the trainers of ``trainer`` load checkpoints safely.
``recbole.quick_start`` is never imported: it needs ray 2.6, which needs numpy 1 and setuptools < 82.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy.sparse import dok_matrix

# RecBole 1.2.1 writes np.float, np.long, ... in its layers, metrics and interactions; numpy 1.24 removed the aliases and
# Config sets them from names that numpy 2 removed. Only missing ones are added. Ends when RecBole uses builtin types.
_NUMPY_ALIASES: dict[str, Any] = {
    "bool": np.bool_,
    "int": np.int_,
    "float": np.float64,
    "complex": np.complex128,
    "object": np.object_,
    "str": np.str_,
    "long": np.int_,
    "unicode": np.str_,
}


def add_numpy_aliases() -> None:
    """Give numpy the aliases that RecBole uses, where they are missing."""
    for alias, value in _NUMPY_ALIASES.items():
        if alias not in np.__dict__:
            setattr(np, alias, value)


def _dok_update(matrix: Any, entries: dict[tuple[int, int], float]) -> None:
    """Set many entries of a ``dok_matrix`` at once.

    It must fill ``_dict``, where scipy keeps the entries: ``dict.update(matrix, entries)`` runs and leaves the graph empty.
    """
    matrix._dict.update(entries)


def add_dok_update() -> None:
    """LightGCN, NGCF, NCL, GCMC, SpectralCF, KGIN, MCCLK call ``dok_matrix._update``, which scipy 1.13 removed."""
    if not hasattr(dok_matrix, "_update"):
        setattr(dok_matrix, "_update", _dok_update)  # noqa: B010


def mean_absolute_error(trues: Any, predicted: Any) -> float:
    """As sklearn's of this name, of two columns ``[n]``."""
    return float(np.average(np.abs(predicted - trues).reshape(-1, 1), axis=0)[0])


def mean_squared_error(trues: Any, predicted: Any) -> float:
    """As sklearn's of this name, of two columns ``[n]``."""
    return float(np.average(((trues - predicted) ** 2).reshape(-1, 1), axis=0)[0])


def auc(x: Any, y: Any) -> float:
    """As sklearn's of this name: the area under a curve ``[n]`` by the trapezoidal rule, whichever way it runs."""
    steps = np.diff(x)
    if (steps < 0).any() and (steps > 0).any():
        raise ValueError(f"x is neither increasing nor decreasing: {x}")
    direction = -1 if (steps < 0).any() else 1
    return float(direction * (steps * (y[1:] + y[:-1]) / 2.0).sum())


@contextmanager
def _standing_in(name: str, **attributes: Any) -> Iterator[None]:
    """Inside, who imports a module that nobody has imported yet gets these attributes alone."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(attributes)
    try:
        yield
    finally:
        del sys.modules[name]


def _board(*args: Any, **kwargs: Any) -> Any:
    """TensorBoard's writer, imported by whoever makes one."""
    return importlib.import_module("torch.utils.tensorboard").SummaryWriter(*args, **kwargs)


def read_recbole() -> None:
    """Import RecBole's evaluator and what makes curves without sklearn and TensorBoard, which take half a second each.

    Of the first RecBole takes three functions, which are those above meanwhile, with sklearn's numbers; of the second a writer.
    Whoever else imports them gets them. Ends when RecBole imports what it uses where it uses it.
    """
    of_sklearn = {"auc": auc, "mean_absolute_error": mean_absolute_error, "mean_squared_error": mean_squared_error}
    with _standing_in("torch.utils.tensorboard", SummaryWriter=_board), _standing_in("sklearn.metrics", **of_sklearn):
        importlib.import_module("recbole.evaluator")


class _Models(ModuleType):
    """A folder of RecBole's models, each of which is imported when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        file = f"{self.__name__}.{name.lower()}"
        if name.startswith("_") or importlib.util.find_spec(file) is None:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        return getattr(importlib.import_module(file), name)


def read_models_when_asked() -> None:
    """RecBole imports all models of a kind for one, and with them sklearn: a second and more.

    Ends when RecBole imports the one that is named.
    """
    for kind in ("general", "context_aware", "sequential", "knowledge_aware"):
        name = f"recbole.model.{kind}_recommender"
        spec = importlib.util.find_spec(name)
        if name not in sys.modules and spec is not None:
            sys.modules[name] = module = _Models(name)
            module.__spec__, module.__file__ = spec, spec.origin
            module.__path__ = list(spec.submodule_search_locations or ())
            setattr(sys.modules["recbole.model"], f"{kind}_recommender", module)


def _unless_compiled(method: str, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method of an optimiser; as torch has it, once something has imported what compiles."""
    if "torch._dynamo" in sys.modules:
        vars(plain).pop("__dynamo_disable", None)
        return getattr(torch.optim.Optimizer, method)(*args, **kwargs)
    return plain(*args, **kwargs)


def _stepping(step: Callable[..., Any]) -> Callable[..., Any]:
    """An optimiser's step that imports no compiler: one that is not there is not told where its graph breaks."""
    plain: Callable[..., Any] = step.__wrapped__  # type: ignore[attr-defined]

    @wraps(step)
    def stepped(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return step(optimizer, *args, **kwargs)
        with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
            return plain(optimizer, *args, **kwargs)

    return stepped


def leave_compiler_out() -> None:
    """Torch keeps its compiler out of optimisers' steps and of four other methods, and imports it for that: a second and more
    for every process.

    Until something imports it nothing can be compiled. Ends when torch looks before it imports.
    """
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        plain = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if plain is not None and "__dynamo_disable" not in vars(plain):
            vars(plain)["__dynamo_disable"] = partial(_unless_compiled, name, plain)
    for optimizer in vars(torch.optim).values():
        step = vars(optimizer).get("step") if isinstance(optimizer, type) else None
        if step is not None and getattr(step, "__code__", step).co_name == "_use_grad":
            optimizer.step = _stepping(step)


@contextmanager
def single_process_barrier() -> Iterator[None]:
    """RecBole's dataset download ends in ``torch.distributed.barrier()`` even with one process, which raises.

    Inside this context the barrier is a no-op unless a process group exists. Ends with RecBole issue 1989.
    """
    original = torch.distributed.barrier
    if not torch.distributed.is_initialized():
        torch.distributed.barrier = lambda *args, **kwargs: None
    try:
        yield
    finally:
        torch.distributed.barrier = original


def _placed(record: logging.LogRecord) -> bool:
    """Give every argument of a message without placeholders a place; lets every record pass."""
    if record.args and isinstance(record.msg, str) and "%" not in record.msg:
        record.msg += " %s" * len(record.args)
    return True


@contextmanager
def log_arguments_placed() -> Iterator[None]:
    """RaCT logs the path of its pretrained model in an argument that its message has no place for.

    The logging module then prints a traceback, which looks like the end of the run. Ends when RaCT no longer does it.
    """
    logger = logging.getLogger()
    logger.addFilter(_placed)
    try:
        yield
    finally:
        logger.removeFilter(_placed)


def anomaly_detection_kept() -> AbstractContextManager[None]:
    """Importing any of RecBole's sequential models imports SINE, whose module switches autograd's anomaly detection on.

    That slows every model of the process down. Inside this context it stays as it was. Ends when SINE no longer does it.
    """
    return torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled())


# What torch says of how RecBole makes sparse matrices (DGCF, GCMC) and tensors of many arrays (DMF).
_TOLD_BY_TORCH = r"torch\.sparse\.SparseTensor|Creating a tensor from a list of numpy\.ndarrays"


@contextmanager
def recbole_warnings_silenced() -> Iterator[None]:
    """RecBole calls pandas, numpy and torch in ways that announce to end; its user can do nothing about a dozen such lines.

    Only warnings about RecBole's own lines are silenced. Ends with the pandas, numpy and torch that RecBole 1.2.1 no longer
    runs on, which ``setup.py`` excludes.
    """
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=r"recbole\.")
        warnings.filterwarnings("ignore", _TOLD_BY_TORCH, UserWarning, module=r"recbole\.")
        # RecBole hands tensors to numpy's functions, which tell it in numpy's own name.
        warnings.filterwarnings("ignore", "__array_wrap__ must accept context", DeprecationWarning)
        yield


@contextmanager
def pickles_refused() -> Iterator[None]:
    """Models of RecBole load arrays and pretrained models from files, LDiffRec with ``allow_pickle``, and a pickle runs code.

    Inside this context numpy and torch read plain arrays and tensors only. Ends when RecBole no longer asks for more.
    """
    numpy_load, torch_load = np.load, torch.load

    def plain_arrays(*args: Any, **kwargs: Any) -> Any:
        return numpy_load(*args[:2], **{**kwargs, "allow_pickle": False})

    def plain_tensors(*args: Any, **kwargs: Any) -> Any:
        return torch_load(*args, **{**kwargs, "weights_only": True})

    np.load, torch.load = plain_arrays, plain_tensors
    try:
        yield
    finally:
        np.load, torch.load = numpy_load, torch_load


def apply() -> None:
    """Apply the shims that must be in place before RecBole's modules run."""
    add_numpy_aliases()
    add_dok_update()


read_recbole()
read_models_when_asked()
leave_compiler_out()


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""Options of glibc's ``mallopt`` (malloc.h)."""


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is allocated next, in one arena for all threads; nothing elsewhere.

    By default large blocks go back to the system at once and are faulted in anew, page by page, under one lock: a tenth of
    a round with one thread, more with two. It holds for the whole process, so that only a command that has one to itself asks
    for it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in ((_M_MMAP_THRESHOLD, 2**30), (_M_TRIM_THRESHOLD, 2**30), (_M_ARENA_MAX, 1)):
        mallopt(option, value)
