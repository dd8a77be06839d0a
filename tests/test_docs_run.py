"""The code of the documentation runs: every block of a page, in its order, on a small data set under the names of the text.

What is shortened: one round in place of the preset's, a small network, one seed in place of three, and cells of ``compare`` run
in this process (tests/test_experiment.py has them in their own). A block that cannot run here says why in a comment above it,
``<!-- not run: reason -->``, and a whole page ``<!-- page not run: reason -->``.
"""

import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import write_dataset

from recbole_fedkd import quick_start
from recbole_fedkd.command_line import _COMMANDS, main
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.experiment import runner
from recbole_fedkd.experiment.cell import run_cell

pytestmark = pytest.mark.usefixtures("forgotten")

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^(?:<!-- (?:not run: )?(.+?) -->\n)?```(bash|python|yaml)\n(.*?)^```$", re.M | re.S)
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SHORT = {
    "epochs": "1",
    "embedding_size": "4",
    "hidden_sizes": "[4, 8]",
    "attention_heads": "2",
    "history_length": "3",
    "show_progress": "False",
}


def short():
    """Keys of every run; without ``data_path`` RecBole would take its own ml-100k."""
    return {**SHORT, "data_path": str(Path("dataset").resolve())}


def blocks(page):
    """Language and text of a page's blocks that are to run."""
    text = page.read_text(encoding="utf-8")
    if "<!-- page not run: " in text:
        return []
    return [(kind, code) for reason, kind, code in BLOCK.findall(text) if not reason]


RUN = [page for page in PAGES if any(kind != "yaml" for kind, _ in blocks(page))]


def known_id(kind, number):
    """Ids of MovieLens, the first of them those that the text speaks of."""
    spoken = {"u": ("196", "186"), "i": ("50", "181", "242", "302")}[kind]
    return spoken[int(number)] if int(number) < len(spoken) else f"{300 + int(number)}"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with what the text speaks of: small data sets under the known names, a CSV, the repository's files."""
    for name in ("ml-100k", "ml-1m"):
        write_dataset(tmp_path / "dataset", name)
        for file in (tmp_path / "dataset" / name).iterdir():
            file.write_text(re.sub(r"\b([ui])(\d+)", lambda found: known_id(*found.groups()), file.read_text()))
    for name in ("experiments", "docs", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    frame = pd.read_csv(tmp_path / "dataset/ml-100k/ml-100k.inter", sep="\t")
    frame.columns = [name.partition(":")[0] for name in frame.columns]
    frame["user_id"] = frame["user_id"].astype(str)
    frame.to_csv("ratings.csv", index=False)

    whole = quick_start.run_recbole_fedkd

    def shortened(*given, command_line=None, **keys):
        return whole(*given, command_line={**short(), **(command_line or {})}, **keys)

    def run_here(cell, folder, children, progress, keep):
        run_cell(cell, folder, lambda line: None, keep)

    defaults = FedKDConfig._set_default_parameters

    def small(config):
        """RecBole takes its own ml-100k, whatever ``data_path`` says."""
        defaults(config)
        if config.dataset == "ml-100k":
            config.final_config_dict["data_path"] = str(tmp_path / "dataset" / "ml-100k")

    monkeypatch.setattr(FedKDConfig, "_set_default_parameters", small)
    monkeypatch.setattr(quick_start, "run_recbole_fedkd", shortened)
    monkeypatch.setattr(runner, "_run_cell", run_here)
    return {"frame": frame, "__name__": "page"}


def latest_run():
    """The folder of the latest run."""
    return max(Path("saved").iterdir(), key=lambda folder: folder.stat().st_mtime)


def shell(text):
    """Run the lines of a block by the command line of this package, whatever they are called by."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("<run>", latest_run().name if "<run>" in line else ""), comments=True)
        if not words:
            continue
        assert words[0] == "recbole-fedkd" or words[:2] == ["python", "run_recbole_fedkd.py"], f"who runs {line}?"
        words = words[1:] if words[0] == "recbole-fedkd" else words[2:]
        if words[0] not in _COMMANDS and not words[0].startswith("--help"):
            given = [word.partition("=")[0] for word in words]
            words += [f"--{key}={value}" for key, value in short().items() if f"--{key}" not in given]
        if words[0] == "compare":
            words += ["--epochs=1", f"--data_path={Path('dataset').resolve()}", "--workers=1"]
        if words[0] == "audit":
            words += ["--rounds=1"]
        said = StringIO()
        with redirect_stdout(said):
            code = main(words)
        assert code == 0, f"{line}\n{said.getvalue()}"


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_in_its_order(desk, page):
    files = iter(re.findall(r"`(\w+\.yaml)`:$", page.read_text(encoding="utf-8"), re.M))
    made = [Path(path) for path in re.findall(r"saved/(?=<run>)", page.read_text(encoding="utf-8"))]
    if made and page.name in ("recommend.md", "runs.md"):
        shell("recbole-fedkd --preset=factors --dataset=ml-100k --client_num=3 --epochs=9")
    for kind, text in blocks(page):
        if kind == "bash":
            shell(text)
        elif kind == "python":
            code = text.replace("saved/<run>", str(latest_run()) if Path("saved").is_dir() else "")
            exec(compile(code, str(page), "exec"), desk)
        elif named := next(files, None):
            Path(named).write_text(text.replace("[2020, 2021, 2022]", "[2020]"))
        else:
            assert yaml.safe_load(text), "a block of yaml that says nothing"


def test_a_block_that_is_not_run_says_why():
    reasons = [reason for page in PAGES for reason, _, _ in BLOCK.findall(page.read_text(encoding="utf-8")) if reason]
    assert all(len(reason.split()) >= 2 for reason in reasons)
