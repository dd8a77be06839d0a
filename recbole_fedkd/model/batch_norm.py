"""Batch normalisation of a batch of one row, which torch refuses to train on.

One row has no variance. The last batch of an epoch may be one row, and so may all that a client has. Such a batch is
normalised by the running mean and variance, as in evaluation, and leaves them as they are: the row is learned from, nothing
else of the run changes, and a model without batch normalisation is not touched.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_MARK = "_normalised_by_running_statistics"


def normalise_single_rows(model: nn.Module) -> None:
    """Let every batch normalisation of a model take its running statistics for a batch of one row.

    Args:
        model: any network, changed in place; its parameters, buffers and random numbers stay as they are.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(_before)
            module.register_forward_hook(_after, always_call=True)


def _before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    rows = inputs[0]
    if module.training and rows.dim() > 1 and rows.numel() == rows.shape[1]:
        module.training = False
        setattr(module, _MARK, True)


def _after(module: nn.Module, inputs: Any, output: Any) -> None:
    if getattr(module, _MARK, False):
        module.training = True
        setattr(module, _MARK, False)
