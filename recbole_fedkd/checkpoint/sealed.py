"""Sealed files: what ``torch.save`` writes, with a digest over all of it that is checked before anything is used.

The digest stands in the comment that a zip file may end with, so that the file is still torch's own. It tells damage, of a
single bit too; it is no signature: who writes a file of his own can seal it as well.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from recbole_fedkd.errors import InputError
from recbole_fedkd.files import SEAL, SEAL_LENGTH, check_seal, read_bytes, write_bytes

_END_RECORD = b"PK\x05\x06"
_END_LENGTH = 22


def sealed(state: dict[str, Any]) -> bytes:
    """What is written for a state: torch's bytes and their seal."""
    stream = io.BytesIO()
    torch.save(state, stream)
    # The last two bytes of a zip file without a comment are the comment's length. Of a large state there is one copy.
    with stream.getbuffer() as content:
        end = bytes(content[-_END_LENGTH:])
        if end[:4] != _END_RECORD or end[-2:] != b"\0\0":
            raise RuntimeError("torch.save writes another kind of file than a zip without a comment")
        content[-2:] = SEAL_LENGTH.to_bytes(2, "little")
        seal = _seal(content)
    stream.seek(0, io.SEEK_END)
    stream.write(seal)
    return stream.getvalue()


def _seal(content: bytes | memoryview) -> bytes:
    return SEAL + hashlib.sha256(content).hexdigest().encode()


def digest(content: bytes) -> str:
    """The digest that sealed bytes end with."""
    return content[-SEAL_LENGTH + len(SEAL) :].decode("ascii")


def write_sealed(state: dict[str, Any], file: Path) -> None:
    """Write a state whole or not at all; raises what :func:`recbole_fedkd.files.written_whole` does."""
    write_bytes(sealed(state), file)


def read_sealed(file: Path, kind: str = "checkpoint") -> tuple[dict[str, Any], bytes]:
    """Read a sealed file without running any code from it.

    Args:
        file: the file.
        kind: what the sentences call it.

    Returns:
        The state, and all of the file.

    Raises:
        InputError: it cannot be read, its seal is missing or broken, or it holds no state.
    """
    content = read_bytes(file, kind)
    seal = content[-SEAL_LENGTH:]
    check_seal(seal, file, kind)
    if seal != _seal(memoryview(content)[:-SEAL_LENGTH]):
        raise InputError(
            f"{kind} '{file}' is damaged: its content is not what its checksum says; take another copy of it"
        )
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes that it did not write, torch.load raises whatever comes
        raise InputError(f"{kind} '{file}' cannot be read: it holds more than plain values and tensors") from error
    if not isinstance(state, dict):
        raise InputError(f"'{file}' is not a checkpoint of recbole_fedkd")
    return state, content
