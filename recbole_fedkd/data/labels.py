"""Label encoding: values of the label field to the indices of the declared label set, and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd.errors import InputError


def declared_labels(values: NDArray[np.floating], declared: Sequence[float] | None, field: str) -> list[float]:
    """The ordered label set: what the config declares, or the distinct values found.

    Args:
        values: all values of the label field.
        declared: ``label_values`` of the config.
        field: name of the label field, for the message.

    Raises:
        InputError: fewer than two labels, one that is declared twice, or a value outside the declared set.
    """
    present = sorted({float(value) for value in np.unique(values)})
    if declared is None:
        if len(present) < 2:
            raise InputError(f"field '{field}' holds only the value {present}; at least two distinct labels are needed")
        if len(present) > 100:
            raise InputError(
                f"field '{field}' holds {len(present)} distinct values; label_values must declare the labels, "
                "or label_mode=threshold makes two of them"
            )
        return present
    labels = sorted({float(value) for value in declared})
    if len(labels) < max(2, len(declared)):
        needed = "at least two distinct labels are needed" if len(labels) < 2 else "each label must stand there once"
        raise InputError(f"label_values is {list(declared)}; {needed}")
    outside = [value for value in present if value not in labels]
    if outside:
        raise InputError(f"field '{field}' holds the label {outside[0]:g}, which is not among label_values {labels}")
    return labels


def encode_labels(values: NDArray[np.floating], labels: Sequence[float]) -> NDArray[np.int64]:
    """Indices ``[n]`` of values ``[n]`` in the ordered label set.

    The labels are compared in the precision of the values: 0.2 read as float32 is not 0.2 as float64.

    Raises:
        InputError: a value that is no label.
    """
    known = np.asarray(labels, dtype=values.dtype)
    indices = np.minimum(np.searchsorted(known, values), len(known) - 1)
    strange = known[indices] != values
    if strange.any():
        raise InputError(f"the label {values[strange][0]:g} is not among the labels {list(labels)}")
    return indices.astype(np.int64)
