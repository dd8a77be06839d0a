"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Temporary path beside ``file`` that takes its place once it is written, and vanishes if that fails."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def json_ready(value: Any) -> Any:
    """JSON has no word for nan and infinity: null."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(content: Mapping[str, Any], file: Path) -> None:
    """Write a JSON file whole or not at all."""
    with written_whole(file) as temporary:
        temporary.write_text(json.dumps(json_ready(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
