"""The coordinator: a server whose clients are elsewhere. It holds sums, versions and curves, and nobody's rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from logging import getLogger
from pathlib import Path
from time import perf_counter
from typing import Any

from recbole.utils import early_stopping

from recbole_fedkd.checkpoint.sealed import read_sealed, write_sealed
from recbole_fedkd.checkpoint.state import restored
from recbole_fedkd.engine import InProcess, RemoteEngine, RoundReport, Transport
from recbole_fedkd.errors import InputError
from recbole_fedkd.evaluation import JudgedRows
from recbole_fedkd.federated.envelope import Answer, new_run
from recbole_fedkd.federated.server import Release
from recbole_fedkd.federation.parties import build_server
from recbole_fedkd.files import held_alone, regular_file, remove_temporaries, writable_folder, write_json
from recbole_fedkd.machines.folders import SERVER_STATE
from recbole_fedkd.machines.judgeable import check_judgeable
from recbole_fedkd.machines.judging import (
    added,
    area_within,
    check_sums,
    floor_of,
    metrics_of,
    protocol_of,
)
from recbole_fedkd.machines.manifest import Manifest
from recbole_fedkd.record import environment
from recbole_fedkd.rounds import EpochRecord, course, epsilon, number_of, record_of, round_record

_WHERE = "; judged by each party where its rows are, sums added"

FLOOR = "Bias of each party"
"""Name of the floor in a result: what ``Bias`` reaches that every party fits to its own rows."""

SPENT, LOCK, COMMAND = "spent.json", ".lock", ".command.lock"
"""Files of the coordinator's folder, beside all that it knows: how many rounds ``privacy`` has let something out of; what a
coordinator holds that runs there; and what a command holds that has it run, which over Flower is another process."""


def sole_coordinator(folder: Path, patience: float = 1.0, lock: str = LOCK) -> AbstractContextManager[None]:
    """A folder for one coordinator alone; raises :class:`InputError` where another still runs there after so many seconds."""
    writable_folder(folder, f"folder '{folder}'")
    refused = f"another coordinator runs in '{folder}'; end it first, or name another --out"
    return held_alone(folder / lock, refused, patience)


def in_use(folder: Path) -> bool:
    """Whether a coordinator runs in a folder."""
    try:
        with held_alone(folder / LOCK, ""):
            return False
    except InputError:
        return True


Declared = Mapping[int, Mapping[str, float]]
"""What every party has said of itself when it came, by :data:`~recbole_fedkd.federated.envelope.DECLARED`."""


def engine_of(manifest: Manifest, transport: Transport, declared: Declared) -> RemoteEngine:
    """The engine of a coordinator; arguments and errors as of :class:`Coordinator`."""
    config = manifest.config
    check_judgeable(config, manifest.schema)
    server = build_server(config, manifest.schema)
    timeout, least = config["client_timeout"], config["min_clients"]
    engine = RemoteEngine(server, transport, new_run(), _sizes(declared), timeout, least)
    engine.name, engine.signers = transport.name, manifest.signers
    return engine


def _sizes(declared: Declared) -> dict[int, int]:
    return {number: int(sizes["samples"]) for number, sizes in sorted(declared.items())}


def check_manifest(manifest: Manifest) -> None:
    """Raise what a coordinator of these parties would raise before their first round."""
    declared: Declared = {number: {"samples": 1} for number in range(manifest.schema.clients)}
    engine_of(manifest, InProcess({}), declared).rounds_of_budget(manifest.config["epochs"])


class Coordinator:
    """Draws clients, folds what they say, has them judged where they are, stops early, and can be killed at any moment.

    Args:
        manifest: what is public.
        transport: how parties are reached.
        declared: what every party has said of itself; a run that goes on has it.
        folder: its own; a run that lies there goes on.

    Raises:
        InputError: parties cannot judge what the config asks for, or another federation's run lies in the folder.
    """

    def __init__(self, manifest: Manifest, transport: Transport, declared: Declared, folder: Path) -> None:
        self.manifest, self.config, self.folder = manifest, manifest.config, folder
        writable_folder(folder, f"folder '{folder}'")
        remove_temporaries(folder)
        config = self.config
        self.declared = declared
        self.engine = engine_of(manifest, transport, declared)
        self.engine.check_sums = self._check_sums
        self.rounds: list[EpochRecord] = []
        self.best_score = -float("inf") if config["valid_metric_bigger"] else float("inf")
        self.best_result: dict[str, float] | None = None
        self.best_round: int | None = None
        self.waited, self.stopped = 0, False
        self.test_sums: dict[int, dict[str, float]] = {}
        self.at_test: dict[str, dict[int, Any]] = {}
        if (folder / SERVER_STATE).is_file():
            self._read(folder / SERVER_STATE)
        self._release = self.engine.server.release
        if self._release is not None:
            _count_in(self._release, folder / SPENT)
        self.epochs = self.engine.rounds_of_budget(config["epochs"], self.round)

    @property
    def round(self) -> int:
        """The round that comes next, from 0."""
        return len(self.rounds)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to ask of parties."""
        return self._trained and bool(self.test_sums or not self.rounds)

    @property
    def _trained(self) -> bool:
        return self.stopped or self.round >= self.epochs

    def fit(self, on_round: Callable[[int, dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Train to the end, and have the best round's networks judged.

        Args:
            on_round: told the number of a round, from 1, and its record.

        Returns:
            The keys of any run's result that do not need anybody's rows, and ``parties``: each one's test metrics.

        Raises:
            ClientError: too few parties answered; the same folder goes on where that is.
        """
        while not self._trained:
            self.test_sums = {}
            self._run_round()
            if on_round is not None:
                on_round(self.round, asdict(self.rounds[-1]))
        if not self.test_sums and self.rounds:
            last = dict.fromkeys(self.engine.sizes, b"")
            self.engine.report = report = RoundReport(0.0)
            self.test_sums = _numbers(self.engine.judged(self.round - 1, last, "test"))
            self.at_test = {"unserved": report.unserved, "ignored": report.ignored}
            self._write()
        return self.result()

    def _check_sums(self, number: int, phase: str, sums: Mapping[str, float]) -> None:
        check_sums(self.config, self.manifest.schema, sums, self.declared[number], phase)

    def _run_round(self) -> None:
        index, every = self.round, self.config["eval_step"]
        judged = bool(every) and (index + 1) % every == 0
        # Without validation the latest round is the best.
        self.engine.phase = "valid" if judged else ""
        began = perf_counter()
        report = self.engine.run_round(index)
        if report.missing:
            secret = self._release is not None and self._release.samples  # who took part is what the epsilon stands on
            reasons = "" if secret else f": {report.reasons}"
            getLogger().warning(f"round {number_of(index)}: {len(report.missing)} clients left out{reasons}")
        seconds, valid, improved = perf_counter() - began, None, not every
        if judged:
            valid = self._metrics(added(_numbers(self.engine.closing)))
            improved = self._judged(valid)
        if improved:
            self.best_round = index
            self.engine.keep_best(index)  # of which the report tells, too
        record = round_record(seconds, report, self._release)
        record.valid = valid
        self.rounds.append(record)
        self._write()

    def _metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The metrics that are asked for, of sums."""
        asked = {name.lower() for name in self.config.judged_metrics}
        metrics = metrics_of(sums, self.manifest.schema.label_values)
        return {name: value for name, value in metrics.items() if name.partition("@")[0] in asked}

    def _protocol(self, name: str) -> str:
        """How a test metric came about."""
        within = f", exact to {area_within(added(self.test_sums)):.1g}" if name == "auc" else ""
        return protocol_of(name.partition("@")[0], self.config, self.manifest.schema) + within + _WHERE

    def _judged(self, metrics: dict[str, float]) -> bool:
        """Whether a round is the best so far; says when to stop."""
        name, bigger = str(self.config["valid_metric"]).lower(), self.config["valid_metric_bigger"]
        if name not in metrics:
            raise InputError(f"valid_metric is {name}, which parties do not judge; they judge {', '.join(metrics)}")
        if self.round <= self.engine.server.strategy.exchange_rounds:
            self.waited = 0  # patience is with training, which begins after the exchange
        self.best_score, self.waited, self.stopped, improved = early_stopping(
            metrics[name], self.best_score, self.waited, self.config["stopping_step"], bigger
        )
        if improved:
            self.best_result = metrics
        return bool(improved)

    def result(self) -> dict[str, Any]:
        """What a run returns, as far as the coordinator knows it."""
        digits, labels = self.config["metric_decimal_place"], list(self.manifest.schema.label_values)

        def rounded(metrics: Mapping[str, float] | None) -> dict[str, float] | None:
            return None if metrics is None else {name: round(value, digits) for name, value in metrics.items()}

        total = added(self.test_sums)
        test, floor = rounded(self._metrics(total)), rounded(self._metrics(floor_of(total)))
        judged = JudgedRows.of(total) if "predicted" in total else None
        return {
            "best_valid_score": None if self.best_result is None else self.best_score,
            "valid_score_bigger": bool(self.config["valid_metric_bigger"]),
            "best_valid_result": rounded(self.best_result),
            "test_result": test,
            **course(self.rounds, self.best_round),
            "engine": self.engine.name,
            "engine_fallback": None,
            "partition": {
                "scheme": self.config["partition"],
                "client_num": len(self.engine.sizes),
                "idle_clients": [number for number, size in self.engine.sizes.items() if not size],
                "held_out_clients": [],
                "label_values": labels,
                "clients": [],  # what parties hold of each label is theirs
            },
            "strangers": None,
            "floors": {FLOOR: floor} if floor else {},
            "cold": None if judged is None else judged.cold_summary(),
            "spread": None if judged is None else judged.spread(),
            "epsilon": epsilon(self.rounds),
            "user_metrics": None,  # of single users a party tells nothing
            "environment": environment(),
            "protocols": {name: self._protocol(name) for name in test or {}},
            "config": self.config.plain_values(),
            "run_folder": str(self.folder),
            "parties": {str(number): rounded(self._metrics(sums)) for number, sums in sorted(self.test_sums.items())},
            "at_test": self.at_test,
        }

    def _write(self) -> None:
        state = {
            "manifest": self.manifest.digest.hex(),
            "run": self.engine.run,
            "declared": {number: dict(sizes) for number, sizes in self.declared.items()},
            "engine": self.engine.state_dict(),
            "records": [asdict(record) for record in self.rounds],
            "best": [float(self.best_score), self.best_result, self.best_round, self.waited, self.stopped],
            "test_sums": self.test_sums,
            "at_test": self.at_test,
        }
        write_sealed(state, self.folder / SERVER_STATE)

    def _read(self, file: Path) -> None:
        state, _ = read_sealed(file, "state of a coordinator")
        if state.get("manifest") != self.manifest.digest.hex():
            raise InputError(f"'{file}' is the run of another manifest; name another folder")
        with restored(file):
            self.engine.run, self.declared = state["run"], state["declared"]
            self.engine.resize(_sizes(self.declared))
            self.engine.load_state_dict(state["engine"])
            self.rounds = [record_of(record) for record in state["records"]]
            self.best_score, self.best_result, self.best_round, self.waited, self.stopped = state["best"]
            self.test_sums, self.at_test = state["test_sums"], state["at_test"]


def _count_in(release: Release, file: Path) -> None:
    """Keep the count of what was let out in a file of its own, which is there before parties hear of it.

    A round that was broken off after that is run again, with other noise: parties have heard both, and both are counted.
    """
    if file.is_file():
        spent = json.loads(regular_file(file).read_text(encoding="utf-8"))
        if spent["releases"] > release.releases:
            release.load_state_dict(spent)
    release.spends = partial(write_json, file=file)


def _numbers(answers: Mapping[int, Answer]) -> dict[int, dict[str, float]]:
    return {number: dict(answer.numbers or {}) for number, answer in answers.items()}
