"""What happens in a federation, as lines of JSON that a machine can read, and what an administrator asks of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from texttable import Texttable

from recbole_fedkd.errors import InputError, listed, printable
from recbole_fedkd.files import json_ready
from recbole_fedkd.rounds import EpochRecord

LOG = "log.jsonl"
"""File of the coordinator's folder: a line for every event."""

_LATEST = 20


class Journal:
    """Events of a coordinator, a line each, also over several lives of it.

    Every line has ``time`` (UTC) and ``event``: ``waiting``, ``begin``, ``round``, ``end`` or ``failed``.

    Args:
        folder: the coordinator's.
        tell: told every event in words.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None] = lambda _: None) -> None:
        self.file, self._tell = folder / LOG, tell
        events = read_events(self.file)
        self._rounds = sum(event["event"] == "round" for event in events)

    def write(self, event: str, **values: Any) -> None:
        """Add a line."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values}
        packed = (json.dumps(json_ready(line), allow_nan=False) + "\n").encode()
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                packed = b"\n" + packed  # after a line that a kill has cut
            os.write(descriptor, packed)
        finally:
            os.close(descriptor)
        _say(line, self._tell)

    def rounds(self, rounds: Sequence[EpochRecord], seen: Mapping[int, float], refused: int = 0) -> None:
        """Add a line for every round that has none yet.

        Args:
            rounds: of all rounds.
            seen: when each party was heard last, in seconds since 1970.
            refused: how many came who were not let in, since the coordinator was started.
        """
        for number in range(self._rounds + 1, len(rounds) + 1):
            values = {name: value for name, value in asdict(rounds[number - 1]).items() if name != "clients"}
            moments = {
                party: datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") for party, at in seen.items()
            }
            self.write("round", round=number, **values, seen=moments, refused=refused)
        self._rounds = max(self._rounds, len(rounds))


class Follower:
    """Tells in words what a log gets from now on; arguments as of :class:`Journal`."""

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self.file, self._tell = folder / LOG, tell
        self._size, self._told = -1, len(read_events(self.file))

    def look(self) -> None:
        """Tell what is new."""
        size = self.file.stat().st_size if self.file.is_file() else 0
        if size != self._size:
            events = read_events(self.file)
            for event in events[self._told :]:
                _say(event, self._tell)
            self._size, self._told = size, len(events)


def _say(event: Mapping[str, Any], tell: Callable[[str], None]) -> None:
    """Tell an event in words; why a run failed is told where its error is."""
    what = event["event"]
    if what == "begin":
        there = f"{event['there']} of {len(event['parties'])} parties are there"
        tell(f"{there}; {event['round'] - 1} of {event['epochs']} rounds are done")
    elif what == "round":
        tell(_round_in_words(event))
    elif what != "failed":
        tell(_state(event))


def _round_in_words(event: Mapping[str, Any]) -> str:
    words = {"missing": "missing", "unserved": "missing in judging", "ignored": "answers not counted of"}
    without = "".join(f", {word} {listed(list(event[part]))}" for part, word in words.items() if event.get(part))
    valid = "".join(f", {name} {_number(value, '.4f')}" for name, value in (event["valid"] or {}).items())
    moved = event["bytes_down"] + event["bytes_up"]
    loss, seconds = _number(event["loss"], ".4f"), _number(event["seconds"], ".1f")
    spent = f", epsilon {event['epsilon']:.4g}" if event.get("epsilon") is not None else ""
    return f"round {event['round']}: loss {loss}{valid}, {moved:,} B{spent}, {seconds} s{without}"


def _number(value: float | None, form: str) -> str:
    """A number of an event, which is null where it was not finite."""
    return "not finite" if value is None else f"{value:{form}}"


def read_events(file: Path) -> list[dict[str, Any]]:
    """The events of a log; what is no whole line is left out."""
    events = []
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event and "time" in event:
            events.append(event)
    return events


def status(folder: Path) -> str:
    """How a federation is: round, parties, when each was heard last, bytes, and the validation curve.

    Args:
        folder: the coordinator's.

    Raises:
        InputError: no coordinator has written there.
    """
    events = read_events(folder / LOG)
    if not events:
        raise InputError(
            f"'{folder}' holds no {LOG} that a coordinator has written; name the folder that coordinate has as --out"
        )
    needed = {"round", "bytes_down", "bytes_up"}
    rounds = {event["round"]: event for event in events if event["event"] == "round" and needed <= event.keys()}
    latest = {event["event"]: event for event in events}
    begin = latest.get("begin", {})
    age = _ago((datetime.now(UTC) - datetime.fromisoformat(events[-1]["time"])).total_seconds())
    down, up = (sum(event[f"bytes_{way}"] for event in rounds.values()) for way in ("down", "up"))
    lines = [
        f"{_state(events[-1])}; {len(rounds)} of {begin.get('epochs', '?')} rounds; the last word is {age} old",
        f"{down + up:,} bytes: {down:,} down, {up:,} up",
    ]
    if refused := _refused(events):
        lines.append(f"{refused} came who were not let in; the coordinator's own output says why")
    if parties := begin.get("parties"):
        lines += ["", _parties(parties, [*rounds.values(), *([latest["end"]] if "end" in latest else [])])]
    if rounds:
        lines += ["", _curve(rounds)]
    return "\n".join(lines)


def _refused(events: Iterable[Mapping[str, Any]]) -> int:
    """How many came who were not let in, over all lives of a coordinator, of which each begins with ``waiting``."""
    lives = [0]
    for event in events:
        lives += [0] if event["event"] == "waiting" else []
        lives[-1] = max(lives[-1], event.get("refused", 0))
    return sum(lives)


def _state(last: Mapping[str, Any]) -> str:
    return {
        "waiting": f"waiting for {last.get('parties')} parties at {last.get('address')}",
        "begin": "training",
        "round": "training",
        "end": f"finished: best round {last.get('best_round')}, test {last.get('test')}",
        "failed": f"stopped: {printable(str(last.get('why')))}",
    }.get(str(last["event"]), str(last["event"]))


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _parties(parties: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> str:
    """Who was heard when, and how often it was missing, of rounds and the end in their order."""
    seen: dict[str, str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    why: dict[str, str] = {}
    for event in events:
        seen |= event.get("seen", {})
        for part in ("missing", "unserved"):
            for number, reason in event.get(part, {}).items():
                counts[number, part] += 1
                why[number] = reason
        for number, kinds in event.get("ignored", {}).items():
            counts[number, "ignored"] += sum(kinds.values())
    rows = [
        [number, f"{samples:,}", seen.get(number, "")]
        + [counts[number, part] for part in ("missing", "unserved", "ignored")]
        + [printable(why.get(number, ""))[:60]]
        for number, samples in parties.items()
    ]
    head = ["party", "samples", "last seen (UTC)", "rounds without it", "judged without it", "answers not counted"]
    return _table([[*head, "why at last"], *rows])


def _curve(rounds: Mapping[int, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for event in rounds.values() for name in event["valid"] or {}))
    rows = [
        [number, _number(event["seconds"], ".1f"), _number(event["loss"], ".5g")]
        + [_number(event["valid"][name], ".4f") if name in (event["valid"] or {}) else "" for name in names]
        for number, event in sorted(rounds.items())[-_LATEST:]
    ]
    return _table([["round", "seconds", "loss", *names], *rows])


def _table(rows: Sequence[Sequence[Any]]) -> str:
    table = Texttable(max_width=0)
    table.set_deco(Texttable.HEADER)
    table.set_cols_dtype(["t"] * len(rows[0]))
    table.add_rows([[str(cell) for cell in row] for row in rows])
    drawn: str = table.draw()
    return drawn
