"""The notebook of the documentation runs, and is kept as it ran."""

import copy
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra 'docs' is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra 'docs' is not installed")
NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs").glob("*.ipynb"))


def tables(cell):
    """Columns of the tables that a cell shows."""
    shown = [
        output["data"]["text/plain"] for output in cell.get("outputs", []) if "text/plain" in output.get("data", {})
    ]
    return [text.splitlines()[0].split() for text in shown]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_shows_what_it_is_kept_with(file, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(file.parent.parent), os.environ.get("PYTHONPATH", "")]))
    kept = nbformat.read(file, 4)
    nbformat.validate(kept)
    ran = copy.deepcopy(kept)
    nbclient.NotebookClient(ran, timeout=300).execute()
    for before, after in zip(kept.cells, ran.cells, strict=True):
        assert tables(before) == tables(after)
        assert [output["output_type"] for output in before.get("outputs", [])] == [
            output["output_type"] for output in after.get("outputs", [])
        ], "run the notebook anew and keep it"
        assert not any(output.get("name") == "stderr" for output in after.get("outputs", []))
