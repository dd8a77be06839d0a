"""Large tensors beside a checkpoint: a file that grows by those of their pieces that a round of few clients has changed.

A tensor is cut into pieces: a client's rows, or 4 KB. Those whose digest is another than at the checkpoint before are appended,
and the checkpoint holds a word in the tensor's place, and how long the file was, so that what a killed process left behind that
length is not read. A file that has come to hold more old pieces than new ones is followed by another one.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.checkpoint.growing import GrowingFile, read_growing
from recbole_fedkd.checkpoint.state import restored
from recbole_fedkd.errors import InputError

FIELD = "large_tensors"
LARGE, PIECE = 2**20, 4096
"""Bytes of a tensor that is kept apart, and of a piece of one that has no rows of clients."""

LARGE_FILES = "tensors-*.bin"
_NAME = re.compile(r"tensors-\d+\.bin")
_HEADER = struct.Struct("<Q")


class LargeTensors:
    """Writes them.

    Args:
        apart: whether tensors are kept apart at all; else states stay as they are.

    Attributes:
        file: name of the file that grows; None: none does.
        of_best: name of the file that the best checkpoint speaks of.
    """

    def __init__(self, apart: bool) -> None:
        self.apart = apart
        self.file: str | None = None
        self.of_best: str | None = None
        self._grown = GrowingFile()
        self._known: dict[str, dict[int, bytes]] = {}

    def taken_out(self, state: dict[str, Any], folder: Path, number: int) -> dict[str, Any]:
        """A state without its large tensors; what changed of them is on the disk before this returns.

        Args:
            state: of a checkpoint.
            folder: that the checkpoint is written to.
            number: that no other file of the folder has been begun at, or that no checkpoint speaks of.

        Raises:
            TrainingError: it cannot be written.
        """
        large: dict[str, tuple[Tensor, NDArray[np.int64]]] = {}
        small = _without(state, "", large) if self.apart else state
        if not large:
            return state
        if self.file is None or self._grown.length > 2 * sum(tensor.nbytes for tensor, _ in large.values()):
            self.file, self._grown, self._known = f"tensors-{number}.bin", GrowingFile(), {}
        name = self.file
        self.file = None  # what is written by half is begun anew
        parts = (part for path, (tensor, bounds) in large.items() for part in self._changed(path, tensor, bounds))
        self._grown.extend(parts, folder / name)
        self.file = name
        return {**small, FIELD: {"file": name, **self._grown.state()}}

    def _changed(self, path: str, tensor: Tensor, bounds: NDArray[np.int64]) -> Iterator[bytes | memoryview]:
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        known, ends = self._known.setdefault(path, {}), bounds.tolist()
        filled = np.flatnonzero(np.diff(bounds)).tolist()
        changed = sorted(known.keys() - set(filled))
        for piece in changed:
            del known[piece]
        runs: list[list[int]] = []
        for piece in filled:
            begin, end = ends[piece], ends[piece + 1]
            digest = hashlib.blake2b(content[begin:end], digest_size=16).digest()
            if known.get(piece) == digest:
                continue
            known[piece] = digest
            changed.append(piece)
            if runs and runs[-1][1] == begin:
                runs[-1][1] = end
            else:
                runs.append([begin, end])
        if not changed:
            return
        places = np.asarray(changed, dtype=np.int64)
        sizes = np.where(places < len(bounds) - 1, np.diff(bounds)[places.clip(max=len(bounds) - 2)], 0)
        header = msgpack.packb({"tensor": path, "places": places.tobytes(), "sizes": sizes.tobytes()})
        yield _HEADER.pack(len(header)) + header
        for begin, end in runs:
            yield content[begin:end]

    def tidy(self, folder: Path, improved: bool) -> None:
        """A checkpoint has been written, the best one too where it ``improved``: files that neither speaks of are removed."""
        if self.file is None:
            return
        self.of_best = self.file if improved else self.of_best
        for file in folder.iterdir():
            if _NAME.fullmatch(file.name) and file.name not in (self.file, self.of_best):
                file.unlink(missing_ok=True)

    def go_on(self, folder: Path, last: Path | None, best: Path | None) -> None:
        """Copy what the checkpoints of another folder speak of, before they are; what comes next is a file of its own."""
        for file in (last, best):
            if file is not None and file.parent.resolve() != folder.resolve():
                shutil.copyfile(file, folder / file.name)
        self.of_best = best.name if best is not None else None


def _without(value: Any, path: str, large: dict[str, tuple[Tensor, NDArray[np.int64]]]) -> Any:
    """Dictionaries and lists with a word in place of their large tensors, put into ``large`` with where their pieces begin."""
    if isinstance(value, list):
        return [_without(element, f"{path}/{position}", large) for position, element in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    small = {}
    for name, inner in value.items():
        here = f"{path}/{name}"
        if not isinstance(inner, Tensor):
            small[name] = _without(inner, here, large)
        elif inner.layout != torch.strided or inner.nbytes < LARGE:
            small[name] = inner
        else:
            counts = value.get(f"{str(name).rpartition('.')[0]}.count")
            large[here] = inner, _bounds(inner, counts if str(name).endswith((".item", ".data")) else None)
            small[name] = {FIELD: here, "shape": list(inner.shape), "dtype": str(inner.dtype).removeprefix("torch.")}
    return small


def _bounds(tensor: Tensor, counts: Tensor | None) -> NDArray[np.int64]:
    """Where the pieces of a tensor begin, and its end, in bytes: rows of clients where it has so many."""
    if counts is not None and int(counts.sum()) == len(tensor):
        ends = counts.cumsum(0).cpu().numpy() * (tensor.nbytes // len(tensor))
    else:
        ends = np.append(np.arange(PIECE, tensor.nbytes, PIECE), tensor.nbytes)
    return np.concatenate([[0], ends]).astype(np.int64)


def put_back(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """A state with its large tensors, from the file beside its checkpoint.

    Raises:
        InputError: the file is not there, or not the one that the checkpoint speaks of.
    """
    file = large_file(state, checkpoint)
    if file is None:
        return state
    with restored(checkpoint):
        content = read_growing(file, state[FIELD], "take another copy of the run's folder")
        if content is None:
            raise InputError(
                f"beside '{checkpoint}' lies no '{file.name}', which holds its large tensors; take the whole folder of the run"
            )
        tensors = _joined(memoryview(content))
        filled = _filled({name: value for name, value in state.items() if name != FIELD}, tensors)
    assert isinstance(filled, dict)
    return filled


def large_file(state: Mapping[str, Any], checkpoint: Path) -> Path | None:
    """The file beside a checkpoint that it speaks of; None: it holds all by itself."""
    kept = state.get(FIELD)
    if kept is None:
        return None
    if not isinstance(kept, dict) or not isinstance(kept.get("file"), str) or not _NAME.fullmatch(kept["file"]):
        raise InputError(f"checkpoint '{checkpoint}' cannot be used: its field '{FIELD}' names no file of a run")
    return checkpoint.with_name(kept["file"])


def _joined(content: memoryview) -> dict[str, bytearray]:
    """The bytes of every tensor: of each piece what was appended last."""
    pieces: dict[str, dict[int, memoryview]] = {}
    position = 0
    while position < len(content):
        begin = position + _HEADER.size
        position = begin + _HEADER.unpack(content[position:begin])[0]
        header = msgpack.unpackb(content[begin:position])
        of_tensor = pieces.setdefault(header["tensor"], {})
        places, sizes = (np.frombuffer(header[name], dtype=np.int64).tolist() for name in ("places", "sizes"))
        for piece, size in zip(places, sizes, strict=True):
            if not 0 <= size <= len(content) - position:
                raise ValueError("a piece of a tensor is longer than the file")
            of_tensor[piece] = content[position : position + size]
            position += size
    return {
        path: bytearray().join(of_tensor[piece] for piece in sorted(of_tensor)) for path, of_tensor in pieces.items()
    }


def _filled(value: Any, tensors: Mapping[str, bytearray]) -> Any:
    """The way back from :func:`_without`."""
    if isinstance(value, list):
        return [_filled(element, tensors) for element in value]
    if not isinstance(value, dict):
        return value
    if FIELD not in value:
        return {name: _filled(inner, tensors) for name, inner in value.items()}
    dtype = getattr(torch, value["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"'{value['dtype']}' is no type of numbers")
    return torch.frombuffer(tensors[value[FIELD]], dtype=torch.uint8).view(dtype).view(value["shape"])
