"""Machine code made by numba, where it is installed: what torch does in a dozen passes through memory is done in one.

Whoever calls it has another way where :func:`has_compiler` says no, and for tensors of a GPU. Loops of attention, of
convolutions and of full rankings are in modules of their own, ``*_loops.py``, which only a compiled call imports, since they
need numba; those of the fleet are in ``engine/fleet/compiled.py``. What is compiled is kept beside the file of its loop, and
numba looks at that file alone: after an edit of another file that the loop calls, touch it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float32]
Ids = NDArray[np.int64]

ROUNDING = {"reassoc", "contract", "arcp", "nsz"}
"""What the compiler may do to sums and products; what is not a number stays what it is."""

LANES, ROWS = 16, 4
"""Numbers of a row of ``vectors.py``, and rows at a time: what sizes are filled up to a multiple of with zeros."""

HIDDEN = np.float32(-1e30)
"""Score of a key that an item does not see."""


COMPILING = "loops    are compiled to machine code first, once for this installation: some 28 s of the processor"

_to_be_told: list[Callable[[str], None]] = []


def tell_of_compiling(tell: Callable[[str], None]) -> None:
    """Have somebody told, once, where loops are not on the disk yet: compiling them takes longer than many a round."""
    _to_be_told[:] = [tell]


@cache
def _listen() -> None:
    from numba.core.event import Listener, register

    class Compiling(Listener):
        def on_start(self, event: Any) -> None:
            while _to_be_told:
                _to_be_told.pop()(COMPILING)

        def on_end(self, event: Any) -> None:
            pass

    register("numba:compile", Compiling())


@cache
def has_compiler() -> bool:
    """Whether numba is installed, and not told to compile nothing by its own ``NUMBA_DISABLE_JIT``."""
    disabled = os.environ.get("NUMBA_DISABLE_JIT", "")
    return disabled.strip() in ("", "0") and importlib.util.find_spec("numba") is not None


@cache
def compiled(function: Callable[..., Any], errors: str = "python") -> Callable[..., Any]:
    """A function of arrays and numbers in machine code, which leaves Python's lock.

    Args:
        function: is compiled, and kept where there is a folder for it.
        errors: whose rules hold where something is divided by zero, Python's or numpy's.
    """
    from numba import njit

    _listen()
    options: Any = {"nogil": True, "fastmath": ROUNDING, "error_model": errors}
    made: Any
    try:
        made = njit(function, cache=True, **options)
    except RuntimeError:  # there is no folder to keep it in
        made = njit(function, **options)
    return made  # type: ignore[no-any-return]
