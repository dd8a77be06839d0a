"""Machine code made by numba, where it is installed: what torch does in a dozen passes through memory is done in one.

Whoever calls it has another way where :func:`has_compiler` says no, and for tensors of a GPU. Loops of a full ranking are in
``ranking.py``, products in ``tiles.py``, those of the fleet in ``engine/fleet/compiled.py``. What is compiled is kept beside
the file of its loop, and numba looks at that file alone: after an edit of another file that the loop calls, touch it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float32]
Ids = NDArray[np.int64]

ROUNDING = {"reassoc", "contract", "arcp", "nsz"}
"""What the compiler may do to sums and products; what is not a number stays what it is."""

HIDDEN = np.float32(-1e30)
"""Score of a key that an item does not see."""


COMPILING = "loops    are compiled to machine code first, once for this installation: half a minute at most"

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
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


@cache
def compiled(
    function: Callable[..., None], errors: str = "python", *helpers: Callable[..., Any]
) -> Callable[..., None]:
    """A function of arrays and numbers in machine code, which leaves Python's lock.

    Args:
        function: is compiled, and kept where there is a folder for it.
        errors: whose rules hold where something is divided by zero, Python's or numpy's.
        helpers: functions that it calls.
    """
    from numba import njit

    _listen()
    for helper in helpers:
        _compiled_inside(helper)
    options: Any = {"nogil": True, "fastmath": ROUNDING, "error_model": errors}
    made: Any
    try:
        made = njit(function, cache=True, **options)
    except RuntimeError:  # there is no folder to keep it in
        made = njit(function, **options)
    return made  # type: ignore[no-any-return]


@cache
def _compiled_inside(helper: Callable[..., Any]) -> None:
    from numba.extending import register_jitable

    register_jitable(fastmath=ROUNDING, error_model="numpy")(helper)


def exponential(x: np.float32) -> np.float32:
    """``e^x`` of ``x <= 0``, as a part of loops, in which it is compiled; of less than -87, that of -87."""
    # e^x = 2^n e^r, with r within half of log 2: a polynomial, and n in the place of a number's exponent.
    x = max(x, np.float32(-87.0))
    n = np.rint(x * np.float32(1.44269504))
    r = x - n * np.float32(0.69314718)
    p = np.float32(1.9875691e-4) * r + np.float32(1.3981999e-3)
    p = (p * r + np.float32(8.3334519e-3)) * r + np.float32(4.1665796e-2)
    p = (p * r + np.float32(1.6666665e-1)) * r + np.float32(0.5)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + np.float32(1.0)) * power  # type: ignore[no-any-return]
