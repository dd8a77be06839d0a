"""What every client cost in every round: a file that grows by one line a round, beside the checkpoints that speak of it.

A checkpoint holds how long the file was and the digest of it, so that writing one takes the same time in every round. Lines
behind that length are those of a round that was not finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recbole_fedkd.errors import InputError, TrainingError

CLIENTS = "clients.jsonl"


class GrowingFile:
    """Lines of JSON, written one by one, or other bytes; :meth:`state` is what a checkpoint keeps of them.

    Args:
        begun: what is there already.

    Attributes:
        length: bytes so far.
    """

    def __init__(self, begun: bytes = b"") -> None:
        self.begun = begun
        self.length, self._digest = len(begun), hashlib.sha256(begun)

    def append(self, line: Mapping[str, Any], file: Path) -> None:
        """Add a line; see :meth:`extend`."""
        self.extend([(json.dumps(line) + "\n").encode()], file)

    def extend(self, parts: Iterable[bytes | memoryview], file: Path) -> None:
        """Add bytes, on the disk before this returns; raises :class:`TrainingError` if they cannot be written."""
        length, digest = self.length, self._digest.copy()
        try:
            with file.open("r+b" if file.exists() else "wb") as stream:
                stream.truncate(length)
                stream.seek(length)
                for part in parts:
                    stream.write(part)
                    digest.update(part)
                    length += len(part)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise TrainingError(f"'{file}' cannot be written: {error.strerror or error}") from error
        self.length, self._digest = length, digest

    def state(self) -> dict[str, Any]:
        """Its length in bytes, and the digest of them."""
        return {"bytes": self.length, "digest": self._digest.hexdigest()}


_REMEDY = "take another copy of it, or remove it to go on without what single clients cost so far"


def read_growing(file: Path, state: Mapping[str, Any], remedy: str = _REMEDY) -> bytes | None:
    """What a checkpoint speaks of; None where the file is not there, as beside a checkpoint that was copied alone.

    Args:
        file: of a :class:`GrowingFile`.
        state: what :meth:`GrowingFile.state` was.
        remedy: what may be done about a file that is another one, the end of a sentence.

    Raises:
        InputError: the file is not the one that the checkpoint speaks of.
    """
    if not state["bytes"]:
        return b""
    try:
        with file.open("rb") as stream:
            content = stream.read(state["bytes"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"'{file}' cannot be read: {error.strerror or error}") from error
    if len(content) != state["bytes"] or hashlib.sha256(content).hexdigest() != state["digest"]:
        raise InputError(
            f"'{file}' is damaged, or that of another run: its first {state['bytes']} bytes are not what the checkpoint says; "
            + remedy
        )
    return content
