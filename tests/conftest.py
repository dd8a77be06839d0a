"""Fixtures: one thread, a folder of its own for every test, a small generated dataset."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import logging
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from recbole.evaluator import register

from recbole_fedkd.model.compiled import has_compiler

torch.set_num_threads(1)
torch.set_warn_always(True)  # or one test alone of a process would see what torch warns of
# How long an example takes is the machine's business; no test times anything.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

LONGEST = "test_flower.py"
"""Minutes of waiting for real servers, in one process: begun last it would keep one of two waiting for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != LONGEST)


USERS, ITEMS = 30, 40
needs_numba = pytest.mark.skipif(not has_compiler(), reason="compiles no loops: no numba, or NUMBA_DISABLE_JIT")
PLUGINS = Path(__file__).resolve().parent.parent / "docs" / "plugins"


def write_dataset(
    folder: Path, name: str = "tiny", ratings: bool = True, users: int = USERS, items: int = ITEMS, rows: int = 20
) -> Path:
    """Atomic files of a small dataset whose ratings depend on user and item, with a timestamp order."""
    target = folder / name
    target.mkdir(parents=True)
    generator = np.random.default_rng(7)
    user_taste, item_quality = generator.normal(size=users), generator.normal(size=items)
    lines = ["user_id:token\titem_id:token" + ("\trating:float" if ratings else "") + "\ttimestamp:float"]
    time = 1_000_000_000
    for user in range(users):
        for item in generator.choice(items, size=rows, replace=False):
            stars = int(np.clip(np.round(3 + user_taste[user] + item_quality[item] + generator.normal() * 0.3), 1, 5))
            time += 1
            lines.append(f"u{user}\ti{item}" + (f"\t{stars}" if ratings else "") + f"\t{time}")
    (target / f"{name}.inter").write_text("\n".join(lines) + "\n")
    lines = ["user_id:token\tgroup:token", *(f"u{user}\t{'ab'[user % 2]}" for user in range(users))]
    (target / f"{name}.user").write_text("\n".join(lines) + "\n")
    lines = ["item_id:token\tgenre:token_seq", *(f"i{item}\tx{item % 3} y{item % 2}" for item in range(items))]
    (target / f"{name}.item").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session", autouse=True)
def _folder_of_fixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What fixtures of many tests train leaves its logs here, and not in the repository."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("fixtures"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """RecBole writes logs into the current folder, and leaves its handlers and its level on the root logger.

    A test that starts in the background would ignore Ctrl-C, which some tests send. A coordinator rounds denormal numbers to 0
    in its whole process, which is not to reach the next test.
    """
    torch.set_flush_denormal(False)
    monkeypatch.chdir(tmp_path)
    before, level = list(logging.getLogger().handlers), logging.getLogger().level
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, interrupt)
    logging.getLogger().setLevel(level)
    for handler in list(logging.getLogger().handlers):
        if handler not in before:
            logging.getLogger().removeHandler(handler)
            handler.close()


SMALL: dict[str, Any] = {
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "attention_heads": 2,
    "history_length": 5,
    "known_features": False,  # the network by itself; tests/test_known.py has what is known before it
    "train_batch_size": 32,
    "learning_rate": 0.01,
    "show_progress": False,
    "state": "WARNING",
    "client_num": 3,
    "load_col": {
        "inter": ["user_id", "item_id", "rating", "timestamp"],
        "user": ["user_id", "group"],
        "item": ["item_id", "genre"],
    },
}


@pytest.fixture
def run(data_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a model on the small dataset: ``run(model, key=value, ...)``."""
    from recbole_fedkd import run_recbole_fedkd

    def run_model(
        model: str = "AttnFedKD", config_file_list: list[str] | None = None, saved: bool = True, **keys: Any
    ) -> dict[str, Any]:
        config = {"data_path": str(data_path), **SMALL, **keys}
        return run_recbole_fedkd(model, "tiny", config_file_list, config, saved)

    return run_model


@pytest.fixture
def prepared(data_path: Path) -> Callable[..., Any]:
    """Config, trainer, loaders and protocols of a model on the small dataset, untrained."""
    from recbole_fedkd.config import FedKDConfig
    from recbole_fedkd.quick_start import _prepare

    def prepare(model: str = "AttnFedKD", **keys: Any) -> Any:
        config = FedKDConfig(model, "tiny", config_dict={"data_path": str(data_path), **SMALL, **keys})
        trainer, loaders, evaluations = _prepare(config)
        return config, trainer, loaders, evaluations

    return prepare


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What plugins register in a test is gone after it, so that they are known where they are named alone."""
    from recbole_fedkd.registry import all_or_nothing

    modules = set(sys.modules)
    with suppress(EOFError), all_or_nothing():
        yield
        raise EOFError
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "").resolve().parent == PLUGINS:
            del sys.modules[name]


@pytest.fixture
def without_plugins(monkeypatch):
    """RecBole's registry of metrics without those of plugins that other tests of the process have loaded."""
    ours = [name for name, metric in register.metrics_dict.items() if metric.__module__.startswith("recbole")]
    for name in register.metrics_dict.keys() - set(ours):
        monkeypatch.delitem(register.metric_types, name)
    monkeypatch.setattr(register, "smaller_metrics", [name for name in register.smaller_metrics if name in ours])


@pytest.fixture(scope="module")
def browser():
    """A headless browser: Chromium of the system, or playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra 'browser' is not installed")
    with playwright.sync_playwright() as started:
        system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            opened = started.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        yield opened
        opened.close()
