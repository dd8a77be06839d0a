"""The notebook of the documentation runs, and is kept as it ran."""

import copy
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra 'docs' is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra 'docs' is not installed")
NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs").glob("*.ipynb"))


def said(cell):
    """Texts that a cell prints and shows."""
    outputs = cell.get("outputs", [])
    return [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]


def form(text):
    """Lines and columns of a text, and its words but for numbers and the items that are recommended."""
    return [
        [re.sub(r"[\d.]+", "#", re.sub("comedy|drama", "item", word)) for word in line.split()]
        for line in text.splitlines()
    ]


def measured(text):
    """Numbers with decimals, in their order: errors, scores and ratings."""
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_shows_what_it_is_kept_with(file, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(file.parent.parent), os.environ.get("PYTHONPATH", "")]))
    kept = nbformat.read(file, 4)
    nbformat.validate(kept)
    ran = copy.deepcopy(kept)
    nbclient.NotebookClient(ran, timeout=300).execute()
    for before, after in zip(kept.cells, ran.cells, strict=True):
        for kept_text, text in zip(said(before), said(after), strict=True):
            assert form(kept_text) == form(text)
            assert measured(kept_text) == pytest.approx(measured(text), rel=0.1, abs=0.05), "keep it as it runs today"
        assert [output["output_type"] for output in before.get("outputs", [])] == [
            output["output_type"] for output in after.get("outputs", [])
        ], "run the notebook anew and keep it"
        assert not any(output.get("name") == "stderr" for output in after.get("outputs", []))
