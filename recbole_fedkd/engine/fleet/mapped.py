"""What clients keep between rounds, in files that are mapped: the system takes such memory back where it is short.

A mapped file has no name in its folder from the start, so that nothing is left of it however the process ends, and its room on
the disk is taken before anything is written: a full disk is an error here, not a signal later.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from recbole_fedkd.errors import TrainingError

LEAST = 2**16
"""Bytes of a tensor below which it stays in memory: a process may map some ten thousand files."""

MAPS = sys.platform == "linux"
"""Whether the system has files without a name that can be mapped, and takes room for them beforehand."""


class MappedTensors:
    """Tensors in memory as long as these are few, and in mapped files from there on; what they hold is the same.

    Those that stay in their place cost no time in a file; rows that are put into another one round after round do.

    Args:
        folder: that the files take their room in.
        memory: bytes of tensors that stay in memory.
        memory_of_rows: the same of rows that come and go; None: they count with the others.

    Attributes:
        held: bytes of those that :meth:`kept` left in memory.
        of_rows: of rows that come and go.
    """

    def __init__(self, folder: Path = Path(), memory: float = math.inf, memory_of_rows: float | None = None) -> None:
        self.folder, self.memory, self.held = folder, memory, 0
        self._spare: dict[int, list[Tensor]] = {}
        self._used = self._unused = 0
        self.of_rows = self if memory_of_rows is None else MappedTensors(folder, memory_of_rows)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
        """Zeros, in a file where :meth:`kept` would put them there."""
        size = math.prod(shape) * dtype.itemsize
        if (device is None or device.type == "cpu") and self._is_too_much(size):
            return self._mapped(size, dtype).view(shape)
        return torch.zeros(shape, dtype=dtype, device=device)

    def repeated(self, row: Tensor, times: int) -> Tensor:
        """A tensor so many times ``[times, ...]``, kept."""
        return self.kept(self.zeros(times, *row.shape, dtype=row.dtype, device=row.device).copy_(row))

    def kept(self, tensor: Tensor) -> Tensor:
        """The tensor itself, or one in a file with the same content; it is kept until :meth:`let_go`."""
        if lies_in_file(tensor):
            return tensor
        if tensor.device.type == "cpu" and self._is_too_much(tensor.nbytes):
            file = self._file(tensor.nbytes)
            return file[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self.held += tensor.nbytes
        return tensor

    def let_go(self, tensor: Tensor) -> None:
        """It is kept no more, and nobody reads it: its file, if it has one, is that of another tensor soon."""
        if not lies_in_file(tensor):
            self.held -= tensor.nbytes
            return
        file = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self._used -= len(file)
        if self._unused < self._used:  # else there are more than a round needs
            self._unused += len(file)
            self._spare.setdefault(len(file), []).append(file)

    def _file(self, size: int) -> Tensor:
        """A file's bytes ``[n]``, as many as asked for or an eighth more; one that was used before costs half the time."""
        step = 2 ** max(size.bit_length() - 4, 0)
        length = -(-size // step) * step
        self._used += length
        if self._spare.get(length):
            self._unused -= length
            return self._spare[length].pop()
        return self._mapped(length, torch.uint8)

    def _is_too_much(self, size: int) -> bool:
        return MAPS and size >= LEAST and self.held + size > self.memory

    def _mapped(self, size: int, dtype: torch.dtype) -> Tensor:
        """Zeros ``[n]`` in a file; raises :class:`TrainingError` where there is no room for it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                name = f"/proc/self/fd/{file.fileno()}"
                return torch.from_file(name, shared=True, size=size // dtype.itemsize, dtype=dtype)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
            raise TrainingError(
                f"checkpoint_dir '{self.folder}' cannot take {math.ceil(size / 1e6)} MB more of what clients keep: {reason}; "
                "make room there, name another folder, or let fleet_kept_memory keep more in memory"
            ) from error


def lies_in_file(tensor: Tensor) -> bool:
    """Whether what a tensor holds lies in a mapped file."""
    return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None
