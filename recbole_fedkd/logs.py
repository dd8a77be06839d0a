"""The run's log: RecBole's logger with a file of the run's own, and the folders that RecBole writes into."""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recbole_fedkd import compat as _compat  # noqa: F401  (before RecBole's modules, of which it readies what they import)

# isort: split
import colorlog
import recbole.trainer.trainer as recbole_trainer


class _RunLog(logging.FileHandler):
    """A log file that says once that it cannot be written (a full disk), where Python prints a traceback for every line."""

    has_complained = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Replaces Python's."""
        if not self.has_complained:
            self.has_complained = True
            print(f"log file '{self.baseFilename}' cannot be written: {sys.exc_info()[1]}", file=sys.stderr)

    def close(self) -> None:
        """As Python's; what the disk has no room for is lost."""
        with suppress(OSError):
            super().close()


@contextmanager
def board_errors_raised() -> Iterator[None]:
    """TensorBoard writes in a thread of its own, which prints a traceback where the disk is full.

    Inside this context it does not; the run's own thread gets the error with the next number that it writes there.
    """
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not (isinstance(arguments.exc_value, OSError) and "AsyncWriter" in type(arguments.thread).__name__):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def run_log(config: Any) -> Iterator[None]:
    """The run's own log file, for as long as it runs, with what RecBole and this package log to the root logger.

    Whoever else listens there hears what they would without it: levels are as before afterwards, and until then nothing
    reaches a handler that would not have reached it before. A run that keeps no logs has none.
    """
    if not config.keeps_logs:
        yield
        return
    root = logging.getLogger()
    handlers, level, heard = list(root.handlers), root.level, root.getEffectiveLevel()
    own = _RunLog(log_file(config), encoding="utf-8")
    own.setLevel(str(config["state"] or "INFO").upper())
    own.setFormatter(logging.Formatter("%(asctime)-15s %(levelname)s  %(message)s", "%a %d %b %Y %H:%M:%S"))
    own.addFilter(_plain)

    def as_before(record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None and logger is not root and not logger.level:
            logger = logger.parent
        return logger is not root or record.levelno >= heard

    for handler in handlers:
        handler.addFilter(as_before)
    root.handlers.insert(0, own)
    root.setLevel(min(heard, own.level))
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(own)
        own.close()
        for handler in handlers:
            handler.removeFilter(as_before)


def log_file(config: Any) -> Path:
    """Where a run logs."""
    return Path("log", str(config["model"]), f"{config['run_name']}.log")


_COLOURS = re.compile(r"\x1B(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])")


def _plain(record: logging.LogRecord) -> bool:
    """Take RecBole's colours out of a message."""
    record.msg, record.args = _COLOURS.sub("", record.getMessage()), None
    return True


class _NoBoard:
    """TensorBoard's writer of a run that keeps no logs."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **keys: None


@contextmanager
def own_folders(config: Any) -> Iterator[None]:
    """Inside, RecBole's trainers make no folder but that of their curves, which has the run's name, if logs are kept at all."""
    before = recbole_trainer.get_tensorboard, recbole_trainer.ensure_dir

    def board(logger: Any) -> Any:
        if not config.keeps_logs:
            return _NoBoard()
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(Path("log_tensorboard") / config["run_name"]))

    recbole_trainer.get_tensorboard, recbole_trainer.ensure_dir = board, lambda folder: None
    try:
        yield
    finally:
        recbole_trainer.get_tensorboard, recbole_trainer.ensure_dir = before


@contextmanager
def screen(level: int) -> Iterator[None]:
    """Inside, what is logged from a level on is on the screen as RecBole shows it: for ``--verbose``, and else warnings.

    What RecBole's models say of themselves, such as that a key has its default, or how long histories are, is a hint for
    those who look for the reason of something.
    """
    root, handler = logging.getLogger(), logging.StreamHandler()
    handler.setLevel(level)
    models = str(Path(recbole_trainer.__file__).parents[1] / "model")

    def asked_for(record: logging.LogRecord) -> bool:
        hint = record.pathname.startswith(models) or str(record.msg).startswith("Max value of user's history")
        return level < logging.WARNING or not hint

    handler.addFilter(asked_for)
    colours = "%(log_color)s%(asctime)-15s %(levelname)s  %(message)s"
    formatter: logging.Formatter = colorlog.ColoredFormatter(colours, "%d %b %H:%M", log_colors=_OF_LEVELS)
    handler.setFormatter(formatter if level < logging.WARNING else logging.Formatter("%(levelname)s: %(message)s"))
    before = root.level
    root.addHandler(handler)
    root.setLevel(min(level, root.getEffectiveLevel()))
    try:
        yield
    finally:
        root.setLevel(before)
        root.removeHandler(handler)


_OF_LEVELS = {"DEBUG": "cyan", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}
