"""Arrays no longer than a bound: what stage ``clip`` makes of a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.federated.message import Schema
from recbole_fedkd.registry import setting

Arrays = dict[str, NDArray[np.generic]]

ROUNDING = 1e-9
"""By so much a sum of squares that is 1 may miss it."""


@dataclass(frozen=True)
class ClipSettings:
    """The key of :class:`Clip`.

    Attributes:
        clip_norm: of all arrays that no pattern of ``norms`` matches.
        norms: pattern of array names to their own norm. What is bounded by 1 is the norm of all arrays together, each in units
            of its own.
    """

    clip_norm: float = setting(
        1.0,
        "> 0",
        "Stage clip: largest L2 norm of all numbers of a client's message, of a network of what changed of it; a longer "
        "message is shortened to it.",
    )
    norms: Mapping[str, float] = field(default_factory=dict)

    def norm_of(self, name: str) -> float:
        """The bound of one array: that of the first pattern that its name matches, else ``clip_norm``."""
        return next((norm for pattern, norm in self.norms.items() if fnmatchcase(name, pattern)), self.clip_norm)

    def empties(self, schema: Schema) -> str | None:
        """Why messages of this schema come to nothing: the bound does not hold the counts of one sample; None: it does."""
        arrays = schema.arrays.items()
        counts = [name for name, spec in arrays if spec.counts and np.issubdtype(spec.dtype, np.integer)]
        one = sum(self.norm_of(name) ** -2 for name in counts) ** 0.5
        if one <= 1 + ROUNDING:
            return None
        return (
            f"Clients send zeros: the counts of one sample ({', '.join(counts)}) are {one:.3g} times as long as their bound "
            "lets a message be; raise privacy.clip, or clip_norm of stage clip"
        )


def clipped(arrays: Mapping[str, NDArray[np.generic]], settings: ClipSettings, seeds: Sequence[int] = (0,)) -> Arrays:
    """Arrays whose joint L2 norm, each in units of its bound, is within 1.

    Whole numbers come first, since a count times a factor is none: where they fit they stay, and the others are shortened to
    what is left. Where they do not fit, there are fewer of them (:func:`_fewer`).

    Args:
        arrays: of a message.
        settings: bounds.
        seeds: of which counts are kept that do not fit all.
    """
    units = {name: settings.norm_of(name) for name, array in arrays.items() if array.dtype.kind in "fiu"}
    exact = {name: arrays[name].astype(np.float64) for name in units}
    whole = {name: unit for name, unit in units.items() if arrays[name].dtype.kind != "f"}
    changed = set[str]()
    if _norm(exact, whole) > 1 + ROUNDING:
        norm = _norm(exact, units)  # of numbers that are none, which others refuse, counts are not to become any
        norm = norm if np.isfinite(norm) else _norm(exact, whole)
        exact = _fewer(exact, whole, norm, np.random.default_rng(seeds))
        changed = set(units)
    others = {name: unit for name, unit in units.items() if name not in whole}
    room, norm = float(np.sqrt(max(1.0 - _norm(exact, whole) ** 2, 0.0))), _norm(exact, others)
    if norm > room:
        exact |= {name: exact[name] * (room / norm) for name in others}
        changed |= set(others)
    return {name: exact[name].astype(array.dtype) if name in changed else array for name, array in arrays.items()}


def _fewer(
    exact: Mapping[str, NDArray[np.float64]], whole: Mapping[str, float], norm: float, generator: np.random.Generator
) -> dict[str, NDArray[np.float64]]:
    """Counts that fit, and with them what belongs to them.

    All would be divided by the norm, if counts could be: each is divided and rounded down, and then drawn rows (an item's or a
    label's place along the first axis, the same of all arrays) are rounded up, as many as have room in the counts' part of the
    bound; one at least, if the whole bound holds one. Other arrays of as many rows keep of each row the share that its counts
    keep, so that a sum over a count stays what it was.

    Args:
        exact: arrays of a message.
        whole: units of those of counts, which do not fit.
        norm: of all arrays, in units, above 1.
        generator: draws the rows.
    """
    counts = {name: np.atleast_1d(exact[name]) for name in whole if exact[name].size}
    rows = max(map(len, counts.values()))
    tables = [array.reshape(len(array), -1) for array in counts.values()]
    widths = [table.shape[1] for table in tables]
    stacked = np.hstack([np.pad(table, ((0, rows - len(table)), (0, 0))) for table in tables])
    units = np.repeat([whole[name] for name in counts], widths)

    down, up = np.trunc(stacked / norm), np.copysign(np.ceil(np.abs(stacked) / norm), stacked)
    costs = ((up**2 - down**2) / units**2).sum(1)
    room = _norm(exact, whole) ** 2 / norm**2 - ((down / units) ** 2).sum() + ROUNDING
    drawn = generator.permutation(np.flatnonzero(costs))
    fits = drawn[costs[drawn] <= room]
    raised = fits[np.cumsum(costs[fits]) <= room]
    if not down.any() and not len(raised):
        raised = drawn[np.argsort(costs[drawn], kind="stable")][:1]
        raised = raised[costs[raised] <= 1 + ROUNDING]
    kept = down.copy()
    kept[raised] = up[raised]

    arrays = dict(exact)
    for name, part in zip(counts, np.split(kept, np.cumsum(widths)[:-1], axis=1), strict=True):
        arrays[name] = part[: len(counts[name])].reshape(exact[name].shape)
    squares = (stacked**2).sum(1)
    shares = np.divide((kept * stacked).sum(1), squares, out=np.ones(rows), where=squares > 0)
    for name in exact.keys() - whole.keys():
        if rows > 1 and exact[name].shape[:1] == (rows,):
            arrays[name] = (exact[name].T * shares).T
    return arrays


def _norm(exact: Mapping[str, NDArray[Any]], units: Mapping[str, float]) -> float:
    """Joint L2 norm of the arrays that have a unit, in these."""
    return float(np.sqrt(sum((exact[name] ** 2).sum() / unit**2 for name, unit in units.items())))


def length(arrays: Mapping[str, NDArray[np.generic]], settings: ClipSettings) -> float:
    """Joint L2 norm of arrays, each in units of its bound; :func:`clipped` leaves what is within 1 as it is."""
    exact = {name: array.astype(np.float64) for name, array in arrays.items() if array.dtype.kind in "fiu"}
    return _norm(exact, {name: settings.norm_of(name) for name in exact})
