"""Runs the cells of an experiment: several processes at a time, finished runs never again, failures told and not fatal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

from tqdm import tqdm

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.errors import InputError
from recbole_fedkd.experiment.grid import Cell, Experiment, canonical, none_starts
from recbole_fedkd.experiment.records import (
    adopt_run,
    failure_file,
    is_finished,
    log_file,
    prepare_folder,
    run_file,
    work_folder,
    write_failure,
)
from recbole_fedkd.files import held_alone, write_json
from recbole_fedkd.quick_start import check_dataset

_PACKAGE_PARENT = Path(__file__).resolve().parent.parent.parent
_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_TO_END = 5.0


@dataclass(frozen=True)
class Outcome:
    """How an experiment went: numbers of runs.

    Attributes:
        earlier: finished before this start.
        finished: finished now.
        failed: failed now.
    """

    earlier: int
    finished: int
    failed: int

    def __str__(self) -> str:
        before = f" ({self.earlier} of them before)" if self.earlier else ""
        after = " (see failures/)" if self.failed else ""
        return f"{self.earlier + self.finished} done{before}, {self.failed} failed{after}"


def run_experiment(
    experiment: Experiment, folder: Path, workers: int, stream: TextIO | None = None, keep: bool = False
) -> Outcome:
    """Run every cell that has no complete record yet. A cell without a config or a dataset fails without being started.

    Args:
        experiment: what to run.
        folder: where records go; made if it is not there.
        workers: number of processes at a time.
        stream: where progress goes; not set: standard error.
        keep: whether the best checkpoint of every run that runs now is kept in ``checkpoints/<cell>``.

    Raises:
        InputError: no cell's keys make a config, another runner is at work in the folder, or it cannot be written.
        KeyboardInterrupt: passed on after the processes have been ended.
    """
    folder = folder.resolve()
    configs, refused = _configs(experiment.cells)
    if not configs:
        first = experiment.cells[0]
        raise none_starts(first, refused[first.id])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out '{folder}' cannot be made: {error.strerror}") from error
    with held_alone(
        folder / ".lock", f"folder '{folder}' is in use by another runner; wait for it, or give another --out"
    ):
        prepare_folder(folder, experiment)
        open_cells = [
            cell
            for cell in experiment.cells
            if not is_finished(folder, cell, configs.get(cell.id))
            and not (cell.id in configs and adopt_run(folder, cell, configs[cell.id]))
        ]
        refused |= _without_data(open_cells, configs)
        progress = Progress(stream or sys.stderr)
        children = _Children()
        failed = 0
        try:
            for cell in open_cells:
                if cell.id in refused:
                    progress.start(cell)
                    write_failure(folder, cell, refused[cell.id])
                    progress.end(cell, f"failed: {refused[cell.id]}")
                    failed += 1
            with ThreadPoolExecutor(workers) as pool:
                futures = [
                    pool.submit(_run_cell, cell, folder, children, progress, keep)
                    for cell in open_cells
                    if cell.id not in refused
                ]
                try:
                    for future in as_completed(futures):
                        failed += future.result() is not None
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    children.end()
                    raise
        finally:
            progress.close()
        return Outcome(len(experiment.cells) - len(open_cells), len(open_cells) - failed, failed)


def _configs(cells: Sequence[Cell]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Plain values of every cell's config, by the cell's id, and for cells whose keys make none the sentence that says why.

    Cells that differ in their seed alone share a config.
    """
    built: dict[str, dict[str, Any] | InputError] = {}
    configs, refused = {}, {}
    for cell in cells:
        computed = {
            name: value for name, value in cell.keys.items() if name != "seed" and name not in keys_with("aside")
        }
        text = canonical(computed)
        if text not in built:
            try:
                built[text] = FedKDConfig(config_dict=cell.keys).plain_values()
            except InputError as error:
                built[text] = error
        values = built[text]
        if isinstance(values, InputError):
            refused[cell.id] = str(values)
        else:
            configs[cell.id] = values
    return configs, refused


def _without_data(cells: Sequence[Cell], configs: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Of cells whose dataset is neither there nor to be had, by the cell's id, the sentence that says so."""
    missing = {}
    for cell in cells:
        if cell.id in configs:
            try:
                check_dataset(configs[cell.id]["dataset"], Path(configs[cell.id]["data_path"]))
            except InputError as error:
                missing[cell.id] = str(error)
    return missing


class Progress:
    """One line per run: live on a terminal; else printed at its start, at its end, and between at most every 30 seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._lock = threading.Lock()
        self._bars: dict[str, tqdm[Any]] = {}
        self._printed: dict[str, float] = {}

    def start(self, cell: Cell) -> None:
        """A run begins."""
        with self._lock:
            if self._live:
                taken = {-bar.pos for bar in self._bars.values()}
                slot = next(number for number in range(len(taken) + 1) if number not in taken)
                bar: tqdm[Any] = tqdm(bar_format="{desc}", position=slot, leave=False, file=self._stream)
                self._bars[cell.id] = bar
                bar.set_description_str(_fitting(f"{cell.title}: starts"))
            else:
                self._print(cell, "starts")

    def go_on(self, cell: Cell, sentence: str) -> None:
        """A run has come further."""
        with self._lock:
            if self._live:
                self._bars[cell.id].set_description_str(_fitting(f"{cell.title}: {sentence}"))
            elif monotonic() - self._printed[cell.id] >= _SECONDS_BETWEEN_LINES:
                self._print(cell, sentence)

    def end(self, cell: Cell, sentence: str) -> None:
        """A run is over."""
        with self._lock:
            if self._live:
                self._bars.pop(cell.id).close()
                tqdm.write(f"{cell.title}: {sentence}", file=self._stream)
            else:
                self._print(cell, sentence)

    def close(self) -> None:
        """Leave the terminal clean."""
        with self._lock:
            for bar in self._bars.values():
                bar.close()
            self._bars.clear()

    def _print(self, cell: Cell, sentence: str) -> None:
        print(f"{cell.title}: {sentence}", file=self._stream, flush=True)
        self._printed[cell.id] = monotonic()


def _fitting(line: str) -> str:
    """As much as one line of the terminal holds; a line that wraps could not be overwritten."""
    return line[: shutil.get_terminal_size().columns - 1]


class _Children:
    """The processes under way; after :meth:`end` none is started any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self.ended = False

    @contextmanager
    def start(self, command: list[str], **options: Any) -> Iterator[subprocess.Popen[str] | None]:
        """A process, or None after the end."""
        with self._lock:
            process = None if self.ended else subprocess.Popen(command, text=True, **options)
            if process is not None:
                self._running.add(process)
        try:
            yield process
        finally:
            if process is not None:
                with self._lock:
                    self._running.discard(process)

    def end(self) -> None:
        """Terminate all, and kill those that do not mind."""
        with self._lock:
            self.ended = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()


def _run_cell(cell: Cell, folder: Path, children: _Children, progress: Progress, keep: bool) -> str | None:
    """Run one cell in its process; returns what made it fail, None if nothing did."""
    work, log = work_folder(folder, cell), log_file(folder, cell)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    failure_file(folder, cell).unlink(missing_ok=True)
    description = work / "cell.json"
    write_json({"folder": str(folder), "cell": asdict(cell), "keep": keep}, description)
    command = [sys.executable, "-m", "recbole_fedkd.experiment.cell", str(description)]
    # In a process group of its own: Ctrl-C is the runner's to handle.
    with (
        log.open("w", encoding="utf-8") as errors,
        children.start(
            command,
            cwd=work,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            process_group=0,
        ) as process,
    ):
        if process is None:
            return None
        began = monotonic()
        progress.start(cell)
        assert process.stdout is not None
        pace = Pace()
        with process.stdout:
            for line in process.stdout:
                event = json.loads(line)
                if "round" in event:
                    progress.go_on(cell, pace.sentence(event, monotonic()))
        code = process.wait()
    if children.ended:
        return None
    error = _failure(code, log, run_file(folder, cell).name if not is_finished(folder, cell) else None)
    if error is None:
        shutil.rmtree(work, ignore_errors=True)
        progress.end(cell, f"done in {_duration(monotonic() - began)}")
    else:
        write_failure(folder, cell, error)
        progress.end(cell, f"failed: {error}")
    return error


class Pace:
    """How fast a run goes, evaluation included, from the times at which its rounds ended."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def sentence(self, event: dict[str, Any], now: float) -> str:
        """A round has ended: such as ``round 5/16, 3.1 s a round, mae 0.71, <= 35 s left``.

        Args:
            event: ``round`` (from 1), ``rounds``, ``seconds`` (of training), ``metric`` and ``value`` (or None).
            now: time in seconds.
        """
        number, rounds = event["round"], event["rounds"]
        if self._first is None:
            self._first = (number, now)
        first, then = self._first
        seconds = (now - then) / (number - first) if number > first else event["seconds"]
        parts = [f"round {number}/{rounds}", f"{seconds:.1f} s a round"]
        if event["value"] is not None:
            parts.append(f"{event['metric']} {event['value']:.4g}")
        # At most, because a run may stop early.
        return ", ".join([*parts, f"<= {_duration(seconds * (rounds - number))} left"])


def _environment() -> dict[str, str]:
    """Environment of a cell's process: one thread, and modules, plugins among them, where this process finds them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    paths = [] if _PACKAGE_PARENT.name in ("site-packages", "dist-packages") else [_PACKAGE_PARENT]
    paths += [Path(path).resolve() for path in sys.path]
    outside = [str(path) for path in paths if path.is_dir() and not path.is_relative_to(sys.base_prefix)]
    outside = [path for path in outside if not Path(path).is_relative_to(sys.prefix)]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(outside))
    return environment


def _failure(code: int, log: Path, missing: str | None) -> str | None:
    """Why a process failed; None if it did not."""
    if code == 0:
        return None if missing is None else f"the process ended without writing {missing}"
    if code < 0:
        return f"the process was ended by signal {signal.Signals(-code).name}, perhaps for want of memory"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"the process ended with exit code {code} and said nothing"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
