"""Rounds as they are told: counted from 1, on the screen, in logs, curves and results.

Inside, epochs are indices from 0, as in RecBole: seeds and checkpoints depend on them. RecBole writes the index into its
lines and curves in many places, of which several lie in the middle of long methods; here they are met where they come out.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

_TOLD = re.compile(r"(?<=epoch )\d+(?=(?: training| evaluating)?\b)")
_STEPS = ("epoch", "train_step", "valid_step")


def number_of(index: int) -> int:
    """The number of a round, from 1, of its index, from 0."""
    return index + 1


class Epoch(int):
    """An index that formats as its number: RecBole's progress bars print it, and its trainers compute with it."""

    def __format__(self, form: str) -> str:
        return format(number_of(int(self)), form)


class NumberedLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose lines such as ``epoch 0 training`` count from 1; for what RecBole's trainers say."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, {})

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """The line as it is told."""
        return _TOLD.sub(lambda number: str(number_of(int(number[0]))), msg) if isinstance(msg, str) else msg, kwargs


class _InFront:
    """In front of something that counts steps; what is not counted anew here is behind."""

    def __init__(self, behind: Any) -> None:
        self._behind = behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)


class NumberedCurves(_InFront):
    """TensorBoard's writer with steps from 1."""

    def add_scalar(self, tag: str, value: Any, step: int, *args: Any, **keys: Any) -> None:
        """Add one number of a curve, at the step of index ``step``."""
        self._behind.add_scalar(tag, value, number_of(step), *args, **keys)


class NumberedBoard(_InFront):
    """RecBole's logger for Weights & Biases with steps from 1."""

    def log_metrics(self, metrics: Mapping[str, Any], *args: Any, **keys: Any) -> None:
        """Log the metrics of one epoch."""
        numbered = {name: number_of(value) if name in _STEPS else value for name, value in metrics.items()}
        self._behind.log_metrics(numbered, *args, **keys)


@dataclass
class EpochRecord:
    """What one epoch (one round) cost.

    Attributes:
        seconds: wall time of training, without evaluation.
        loss: training loss as RecBole reports it: a sum over batches centrally, a mean over samples in a federation.
        bytes_down: bytes from the server to all clients.
        bytes_up: bytes from all clients to the server.
        clients: client number to ``[bytes down, bytes up]``.
        valid: metrics of the validation after it; None where there was none.
        codec_error: what encoding took from the uploads, as a share of their L2 norm.
        missing: client number to why it was left out of the round.
        unserved: of clients elsewhere, to why one did not take in, judge or keep what serves its users after the round.
        ignored: of clients elsewhere, to how many of its answers were not taken, by kind: late, doubled or,
            of a step under masks, ``mask``.
        epsilon: of ``privacy``, spent by this round and those before; None without.
        clip: of ``privacy``, where it moves: the norm that updates of this round were shortened to; else None.
    """

    seconds: float
    loss: float
    bytes_down: int = 0
    bytes_up: int = 0
    clients: dict[int, list[int]] = field(default_factory=dict)
    valid: dict[str, float] | None = None
    codec_error: float = 0.0
    missing: dict[int, str] = field(default_factory=dict)
    unserved: dict[int, str] = field(default_factory=dict)
    ignored: dict[int, dict[str, int]] = field(default_factory=dict)
    epsilon: float | None = None
    clip: float | None = None


def record_of(values: Mapping[str, Any]) -> EpochRecord:
    """The record that a checkpoint holds as a dictionary; raises TypeError or ValueError for any other."""
    record = EpochRecord(**values)
    optional = (record.epsilon or 0, record.clip or 0)
    numbers = (record.seconds, record.loss, record.codec_error, *optional, *(record.valid or {}).values())
    counts = (record.bytes_down, record.bytes_up, *(count for pair in record.clients.values() for count in pair))
    if not all(isinstance(number, int | float) for number in numbers) or not all(
        isinstance(count, int) for count in counts
    ):
        raise TypeError("a record of an epoch holds something else than numbers")
    if any(len(pair) != 2 for pair in record.clients.values()):
        raise ValueError("a record of an epoch has other than two byte counts for a client")
    return record


OF_CLIENTS = ("clients", "missing", "unserved", "ignored")
"""Parts of a record that say something of every client, and are kept apart from checkpoints."""


def round_record(seconds: float, report: Any, release: Any) -> EpochRecord:
    """What a round of a federation cost.

    Args:
        seconds: that it took.
        report: of its engine.
        release: what its server lets out under ``privacy``; None: all that the uploads come to.
    """
    down, up = report.bytes_down, report.bytes_up
    record = EpochRecord(seconds, report.loss, sum(down.values()), sum(up.values()), codec_error=report.codec_error)
    if release is not None:
        record.epsilon, record.clip = release.epsilon, release.shortened_to
    if release is None or not release.samples:  # else who took part is the secret on which the epsilon stands
        record.clients = {number: [down[number], up[number]] for number in down}
        record.missing, record.unserved = dict(report.missing), dict(report.unserved)
        record.ignored = {number: dict(counts) for number, counts in report.ignored.items()}
    return record


def without_clients(record: EpochRecord) -> dict[str, Any]:
    """What a checkpoint holds of a record."""
    return {name: value for name, value in asdict(record).items() if name not in OF_CLIENTS}


def client_line(number: int, record: EpochRecord) -> dict[str, Any] | None:
    """What a round cost every client, as a line of JSON; None if there is nothing to say."""
    parts = {name: getattr(record, name) for name in OF_CLIENTS if getattr(record, name)}
    return {"round": number, **parts} if parts else None


def add_clients(rounds: Sequence[EpochRecord], lines: bytes) -> list[EpochRecord]:
    """Records with what :func:`client_line` has said of their rounds; raises TypeError or ValueError for other lines."""
    with_clients = list(rounds)
    for line in lines.splitlines():
        of_round = json.loads(line)
        index = of_round["round"] - 1
        if index < 0:
            raise ValueError("a line speaks of a round before the first")
        parts = {name: {int(number): value for number, value in of_round.get(name, {}).items()} for name in OF_CLIENTS}
        with_clients[index] = record_of({**without_clients(with_clients[index]), **parts})
    return with_clients


def course(rounds: Sequence[EpochRecord], best: int | None) -> dict[str, Any]:
    """What a result says of a run's rounds.

    Args:
        rounds: all of them.
        best: index of the best one, None where there is none.

    Returns:
        ``communication``, bytes of the serialised messages: totals, and per round and client ``[down, up]``; ``timing``, wall
        time of training, without evaluation; ``rounds``, what each cost and its validation metrics; and ``best_round``.
    """
    down, up = [record.bytes_down for record in rounds], [record.bytes_up for record in rounds]
    seconds = [record.seconds for record in rounds]
    return {
        "communication": {
            "total_bytes": sum(down) + sum(up),
            "bytes_down": sum(down),
            "bytes_up": sum(up),
            "bytes_down_per_round": down,
            "bytes_up_per_round": up,
            "clients_per_round": [record.clients for record in rounds],
        },
        "timing": {
            "rounds": len(seconds),
            "seconds_per_round": sum(seconds) / len(seconds) if seconds else 0.0,
            "training_seconds": sum(seconds),
            "seconds": seconds,
        },
        "rounds": [{"round": number, **_told(record)} for number, record in enumerate(rounds, start=1)],
        "best_round": None if best is None else number_of(best),
    }


def _told(record: EpochRecord) -> dict[str, Any]:
    """A record, but for bytes of single clients; some parts only where they apply."""
    parts = {name: value for name, value in vars(record).items() if name != "clients"}
    return {name: value for name, value in parts.items() if name not in _WHERE_IT_APPLIES or value not in (None, {})}


_WHERE_IT_APPLIES = ("unserved", "ignored", "epsilon", "clip")


def epsilon(rounds: Sequence[EpochRecord]) -> float | None:
    """What all rounds have spent under ``privacy``; None without."""
    return rounds[-1].epsilon if rounds else None
