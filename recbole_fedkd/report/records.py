"""The record of one run, read and checked."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_fedkd.config.fitted import FITTED
from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.record import OPTIONAL_PARTS, RECORD_VERSIONS

# Where the threshold of a label comes from; older records do not say it, and it judges nothing else.
_ORIGIN = re.compile(r", three quarters of the scale \S+")
# What may go wrong with a file that another program, or another version of this one, has written.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def parted_protocol(protocol: str) -> tuple[str, str]:
    """A protocol, and what was counted on the split of one seed, in brackets at its end or empty."""
    protocol, bracket, counts = protocol.partition(" [")
    return protocol, bracket.strip() + counts


def comparable_protocol(protocol: str) -> str:
    """What two protocols have in common that judge alike."""
    return _ORIGIN.sub("", parted_protocol(protocol)[0])


@dataclass(frozen=True)
class Round:
    """One round of a federation, or one epoch of a central run.

    Attributes:
        number: counted from 1.
        seconds: of training, without validation.
        bytes_down: to all clients.
        bytes_up: from all clients.
        valid: validation metrics by lower-case name; empty if the round was not validated.
        loss: of training; None if it was not recorded.
        missing: clients that were left out of the round, and why.
    """

    number: int
    seconds: float
    bytes_down: int
    bytes_up: int
    valid: Mapping[str, float]
    loss: float | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes_moved(self) -> int:
        """Up and down, over all clients."""
        return self.bytes_down + self.bytes_up


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        cell: its name in the grid, which is also that of its file.
        row: the row of the tables that it is one seed of.
        group: what tells its tables from others, such as dataset and partition.
        seed: pairs it with the runs of other rows.
        settings: the keys that the grid set for it.
        central: one model on all data; such a run has no network and no bytes.
        environment: versions and machine.
        partition: ``scheme``, ``label_values`` and per client ``samples`` and the histogram ``labels``; None without
            clients.
        rounds: in order.
        test: test metrics by lower-case name.
        best_round: number of the round that was judged; None if unknown.
        valid_metric: lower-case name of the metric that chose it.
        valid_bigger: whether more of it is better.
        protocols: how each test metric came about, one sentence each.
        total_bytes: over the whole run, what is sent outside the rounds included.
        training_seconds: over the whole run.
        users: one line per user id, one column per metric, nan where a user is not judged by it, and in a federation each
            user's ``client``, which older records lack; empty if users were not recorded.
        config: every key with its value.
        engine: the engine that ran; None if it was not recorded.
        engine_fallback: why it ran in place of the one that was asked for; None where that ran.
        extras: numbers that few runs have, such as ``strangers mae`` or ``epsilon``.
        parties: test metrics that each party has judged where its rows are; empty where they are judged in one place.
    """

    cell: str
    row: str
    group: Mapping[str, Any]
    seed: int
    settings: Mapping[str, Any]
    central: bool
    environment: Mapping[str, Any]
    partition: Mapping[str, Any] | None
    rounds: tuple[Round, ...]
    test: Mapping[str, float]
    best_round: int | None
    valid_metric: str
    valid_bigger: bool
    protocols: Mapping[str, str]
    total_bytes: int
    training_seconds: float
    users: pd.DataFrame = field(default_factory=pd.DataFrame)
    config: Mapping[str, Any] = field(default_factory=dict)
    engine: str | None = None
    engine_fallback: str | None = None
    extras: Mapping[str, float] = field(default_factory=dict)
    parties: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    @property
    def student_pool(self) -> tuple[Mapping[str, Any], ...]:
        """The students of several sizes that were dealt out to the clients in turn; empty without."""
        return () if self.partition is None else tuple(self.config.get("student_pool") or ())

    def protocol(self, metric: str) -> str | None:
        """How a test metric came about, alike for all that was judged alike; None where that is not known."""
        protocol = self.protocols.get(metric)
        return None if protocol is None else comparable_protocol(protocol)

    @property
    def best_valid(self) -> float | None:
        """Best validation score over the rounds; None if no round was validated."""
        scores = [score for _, score in self.valid_curve()]
        return (max if self.valid_bigger else min)(scores, default=None)

    def valid_curve(self) -> list[tuple[int, float]]:
        """Position in ``rounds`` and validation score of each validated round."""
        return [
            (position, record.valid[self.valid_metric])
            for position, record in enumerate(self.rounds)
            if self.valid_metric in record.valid
        ]


def as_text(value: Any) -> str:
    """A configuration value as a reader would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def differing_keys(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys that two configs have with different values, of those on which a run's numbers depend.

    A key that only one has does not count: it came, or went, with a version of the package. Nor does a threshold of the
    ratings that nobody has set: a run settles it when it has its data, one for each dataset. Nor do a smaller batch and a
    longer patience, to which a run fits the defaults when it knows how many rows there are.
    """
    shared = sorted(config.keys() & other.keys() - keys_with("aside") - {"seed"})
    alike = config.get("dataset") == other.get("dataset")
    return [
        key
        for key in shared
        if config[key] != other[key]
        and key not in FITTED
        and not (key in ("rating_threshold", "threshold") and not (alike and _settled(config) and _settled(other)))
    ]


def _settled(config: Mapping[str, Any]) -> bool:
    """Whether a config's threshold of the ratings is set."""
    return config.get("label_mode") is None or config.get("rating_threshold") is not None


def read_run(file: Path, users: pd.DataFrame | None = None) -> Run:
    """The run of a record, with the metrics of its users where there are any.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: the record cannot be used.
    """
    head: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    rounds: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            # A run that was stopped while it wrote leaves half a line, and with it no result.
            continue
        if record["kind"] == "run":
            head, result, rounds = record, None, {}
        elif record["kind"] == "round":
            # A round that was repeated after a resume replaces its first attempt.
            rounds[int(record["round"])] = record
        elif record["kind"] == "result":
            result = record
    if head is None:
        raise ValueError("it has no line of kind 'run'")
    if result is None:
        raise ValueError("it has no result, so the run is not finished")
    version = head.get("version", RECORD_VERSIONS[0])
    if version not in RECORD_VERSIONS:
        known = " and ".join(map(str, RECORD_VERSIONS))
        raise ValueError(f"its version is {version}, and only {known} are known")
    return run_of({"cell": file.stem, **head}, rounds, result, users, 1 if version == 1 else 0)


def run_of(
    head: Mapping[str, Any],
    rounds: Mapping[int, Mapping[str, Any]],
    result: Mapping[str, Any],
    users: pd.DataFrame | None = None,
    first: int = 0,
) -> Run:
    """A run from the lines of its record, the rounds by their number; ``first`` is added to these."""
    config, partition = head.get("config") or {}, _partition(head.get("partition"))
    communication, timing = result.get("communication") or {}, result.get("timing") or {}
    strategy, best_round = config.get("strategy"), result.get("best_round")
    ordered = tuple(_round(rounds[number], first) for number in sorted(rounds))
    return Run(
        cell=str(head["cell"]),
        row=str(head["row"]),
        group=dict(head.get("group") or {}),
        seed=int(head["seed"]),
        settings=dict(head.get("keys") or {}),
        central=strategy == "central" or (strategy is None and partition is None),
        environment=dict(head.get("environment") or {}),
        partition=partition,
        rounds=ordered,
        test=scores(result["test"] or {}),
        best_round=None if best_round is None else int(best_round) + first,
        valid_metric=str(result["valid_metric"]).lower(),
        valid_bigger=bool(result["valid_score_bigger"]),
        protocols={str(name).lower(): str(text) for name, text in (result.get("protocols") or {}).items()},
        total_bytes=int(communication.get("total_bytes") or sum(record.bytes_moved for record in ordered)),
        training_seconds=float(timing.get("training_seconds") or sum(record.seconds for record in ordered)),
        users=pd.DataFrame() if users is None else users,
        config=config,
        parties={int(number): scores(values or {}) for number, values in (result.get("parties") or {}).items()},
        engine=_text(result.get("engine")),
        engine_fallback=_text(result.get("engine_fallback")),
        extras={
            name: value
            for part in OPTIONAL_PARTS
            if part not in ("engine", "engine_fallback", "parties")
            for name, value in _numbers(part, result.get(part))
        },
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _numbers(name: str, value: Any) -> list[tuple[str, float]]:
    """The finite numbers of an optional part, each by the names that lead to it."""
    if isinstance(value, Mapping):
        return [number for key, inner in value.items() for number in _numbers(f"{name} {key}".lower(), inner)]
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return [(name, float(value))] if usable else []


def _partition(partition: Any) -> Mapping[str, Any] | None:
    if partition is None:
        return None
    clients = [
        {"samples": int(client.get("samples") or 0), "labels": [int(count) for count in client.get("labels") or []]}
        for client in partition.get("clients") or []
    ]
    return {
        "scheme": str(partition.get("scheme") or "not named"),
        "client_num": int(partition.get("client_num") or len(clients)),
        "label_values": list(partition.get("label_values") or []),
        "clients": clients,
    }


def _round(record: Mapping[str, Any], first: int) -> Round:
    return Round(
        number=int(record["round"]) + first,
        seconds=float(record.get("seconds") or 0.0),
        bytes_down=int(record.get("bytes_down") or 0),
        bytes_up=int(record.get("bytes_up") or 0),
        valid=scores(record.get("valid") or {}),
        loss=scores({"loss": record.get("loss")}).get("loss"),
        missing={
            str(client): f"{word}{why}"
            for part, word in (("missing", ""), ("unserved", "when it was to judge: "))
            for client, why in (record.get(part) or {}).items()
        },
    )


def scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by lower-case name; one that could not be computed, null in JSON, counts as missing."""
    return {
        str(name).lower(): float(value)
        for name, value in metrics.items()
        if value is not None and math.isfinite(float(value))
    }


def read_users(file: Path, notes: list[str]) -> pd.DataFrame:
    """Metrics of single users, by user id; empty, and noted, where the file cannot be used."""
    if not file.is_file():
        return pd.DataFrame()
    try:
        with np.load(file, allow_pickle=False) as stored:
            users = pd.DataFrame({str(name).lower(): stored[name] for name in stored.files}).set_index("user")
        if not users.index.is_unique:
            raise ValueError("a user occurs twice")
        if "client" in users and users["client"].dtype.kind not in "iu":
            raise ValueError("its clients are no whole numbers")
        metrics = users.columns.difference(["client"])
        users[metrics] = users[metrics].astype(np.float64).where(np.isfinite, np.nan)
    except (*UNREADABLE, EOFError, zipfile.BadZipFile) as error:
        notes.append(f"users/{file.name} is left out: {one_line(error)}.")
        return pd.DataFrame()
    return users


def one_line(error: Exception) -> str:
    """The message of an error in one line, without the stop at its end."""
    text = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__
