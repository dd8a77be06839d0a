"""The run's log: RecBole's logger with a file of the run's own, and the folders that RecBole writes into."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from recbole.utils import init_logger

from recbole_fedkd.errors import InputError
from recbole_fedkd.files import writable_folder

_run_handlers: list[logging.Handler] = []


class _RunLog(logging.FileHandler):
    """A log file that says once that it cannot be written (a full disk), where Python prints a traceback for every line."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Replaces Python's."""
        if not self.told:
            self.told = True
            print(f"log file '{self.baseFilename}' cannot be written: {sys.exc_info()[1]}", file=sys.stderr)

    def close(self) -> None:
        """As Python's; what the disk has no room for is lost."""
        with suppress(OSError):
            super().close()


def check_folders(config: Any) -> None:
    """Know, before anything runs, that the folders can be written that every run writes into.

    Raises:
        InputError: one of them cannot; the sentence says which.
    """
    try:
        here = Path.cwd()
    except OSError as error:
        raise InputError(
            f"the working folder cannot be used: {error.strerror}; start the run in one that is there"
        ) from error
    for name in (f"log/{config['model']}", "log_tensorboard"):
        writable_folder(
            here / name, f"working folder '{here}', in which RecBole keeps log/ and log_tensorboard/ of every run,"
        )
    folder = config["checkpoint_dir"]
    writable_folder(Path(folder), f"checkpoint_dir '{folder}'")


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


def start_logging(config: Any) -> None:
    """RecBole's logger, with a file of this run's own.

    RecBole names the file by the second, and sets up nothing where the root logger has a handler already, be it that of
    an earlier run or of the program around. Here an earlier run's handlers go and everybody else's stay.
    """
    root = logging.getLogger()
    for handler in _run_handlers:
        root.removeHandler(handler)
        handler.close()
    _run_handlers.clear()
    others = list(root.handlers)
    root.handlers = []
    try:
        init_logger(config)
        for handler in root.handlers:
            _run_handlers.append(_in_own_file(handler, config["run_name"]))
    finally:
        # First, because RecBole names the TensorBoard folder after the first file that it finds here.
        root.handlers = [*_run_handlers, *others]


def _in_own_file(handler: logging.Handler, run_name: str) -> logging.Handler:
    """The handler itself, or for RecBole's log file one that writes into a file of this run's name."""
    if not isinstance(handler, logging.FileHandler):
        return handler
    handler.close()
    shared = Path(handler.baseFilename)
    with suppress(FileNotFoundError):  # a run that started in the same second has removed it
        if shared.stat().st_size == 0:
            shared.unlink()
    own = _RunLog(shared.with_name(f"{run_name}.log"))
    own.setLevel(handler.level)
    own.setFormatter(handler.formatter)
    for each in handler.filters:
        own.addFilter(each)
    return own
