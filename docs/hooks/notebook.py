"""Notebooks as pages: text, code and what the code said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def pages(docs: Path) -> dict[str, str]:
    """Every notebook of a folder: ``<name>.md`` to its text."""
    return {f"{file.stem}.md": page(json.loads(file.read_text(encoding="utf-8"))) for file in docs.glob("*.ipynb")}


def page(notebook: dict[str, Any]) -> str:
    """The cells one below the other."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += filter(None, map(output, cell["outputs"]))
    return "\n\n".join(parts) + "\n"


def output(said: dict[str, Any]) -> str:
    """What a cell printed, showed or returned."""
    data = said.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
    if "text/html" in data:
        html = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.S)
        return re.sub(r' (?:border|class|style)="[^"]*"', "", re.sub(r"\n\s*", "", html))
    text = "".join(said.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""
