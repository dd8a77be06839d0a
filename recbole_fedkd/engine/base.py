"""The round, written once: engines differ in how they run the clients, and in nothing else."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from recbole_fedkd.errors import InputError, TrainingError, reason_of
from recbole_fedkd.federated.message import LARGEST, MessageError
from recbole_fedkd.federated.server import Intake, Server
from recbole_fedkd.finite import NotFiniteError

FAILURES = (Exception, SystemExit, GeneratorExit)
"""What a client may fail by: one that ends itself ends nobody else."""

_NAMED, _LONGEST = 5, 300
"""Clients that a sentence names before it counts the others, and letters of a reason."""


@dataclass
class RoundReport:
    """What one communication round cost.

    Attributes:
        loss: mean training loss over all samples of the last local epoch.
        bytes_down: client to bytes received from the server.
        bytes_up: client to bytes sent to the server.
        codec_error: what encoding took from the uploads, as a share of their L2 norm; 0 without codecs.
        missing: client to why it was left out: what kind of fault, and what exactly.
        unserved: client elsewhere to why it did not take in what serves its users, did not judge or keep that; likewise.
        ignored: client elsewhere to how many of its answers were not taken, by kind: late, doubled or,
            of a step under masks, ``mask``.
    """

    loss: float
    bytes_down: dict[int, int] = field(default_factory=dict)
    bytes_up: dict[int, int] = field(default_factory=dict)
    codec_error: float = 0.0
    missing: dict[int, str] = field(default_factory=dict)
    unserved: dict[int, str] = field(default_factory=dict)
    ignored: dict[int, dict[str, int]] = field(default_factory=dict)

    @property
    def reasons(self) -> str:
        """Half a sentence with who is missing, and why."""
        named = "; ".join(f"client {number}, {reason}" for number, reason in list(self.missing.items())[:_NAMED])
        return named + (f"; and {len(self.missing) - _NAMED} more" if len(self.missing) > _NAMED else "")

    @property
    def total_bytes(self) -> int:
        """Bytes of the round in both directions."""
        return sum(self.bytes_down.values()) + sum(self.bytes_up.values())


class ClientError(TrainingError):
    """An error inside a client, with the client, the round and the stage it happened in."""

    @classmethod
    def of(cls, who: str, round_index: int, stage: str, cause: BaseException) -> ClientError:
        """Of what happened in a client, or in several."""
        error = cause if isinstance(cause, cls) else cls(f"{who}, round {round_index + 1}, {stage}: {reason_of(cause)}")
        error.__cause__ = cause if error is not cause else cause.__cause__
        return error

    @property
    def reason(self) -> str:
        """Why a client is missing: what kind of fault, and what exactly."""
        cause = self.__cause__
        kind = (
            ""
            if isinstance(cause, MessageError)
            else "not finite: "
            if isinstance(cause, NotFiniteError)
            else "failed: "
        )
        return " ".join(f"{kind}{self if cause is None else reason_of(cause)}".split())[:_LONGEST]


@contextmanager
def serving(who: str, round_index: int) -> Iterator[None]:
    """What clients do to serve their users; the server says the same to all, so that without one there is none.

    Raises:
        ClientError: they cannot.
    """
    try:
        yield
    except FAILURES as error:
        raise ClientError.of(who, round_index, "serving its users", error) from error


@dataclass
class Round:
    """A round while it runs.

    Attributes:
        index: from 0.
        chosen: the clients that take part.
        intake: takes in what they answer.
        on_step: told the number of samples after each training step.
        on_bytes: told the number of bytes after each message.
        report: what is known of it so far; its loss is the sum over all samples.
        seen: samples behind the loss.
        lost: squared L2 norm of what encoding took from the uploads, and of the uploads.
    """

    index: int
    chosen: Sequence[int]
    intake: Intake
    on_step: Callable[[int], None] | None
    on_bytes: Callable[[int], None] | None
    report: RoundReport
    seen: int = 0
    lost: tuple[float, float] = (0.0, 0.0)

    def count(self, loss: float, seen: int, lost: tuple[float, float] = (0.0, 0.0)) -> None:
        """Add what clients that answered have trained on."""
        self.report.loss += loss
        self.seen += seen
        self.lost = (self.lost[0] + lost[0], self.lost[1] + lost[1])


class Engine(ABC):
    """Runs the rounds of a federation.

    Args:
        server: the server.
        min_clients: clients that must answer in a round for it to count; the others are left out and named. None: all that
            take part, so that the first that fails ends the run.

    Attributes:
        name: value of the config key ``engine``.
        held_out: clients that take part in no round.
    """

    name: str

    def __init__(self, server: Server, min_clients: int | None = None) -> None:
        self.server, self.min_clients = server, min_clients
        self.held_out: frozenset[int] = frozenset()

    @property
    @abstractmethod
    def sizes(self) -> Mapping[int, int]:
        """Samples of an epoch of every client, by its number."""

    @property
    def samples(self) -> Mapping[int, int]:
        """Samples of an epoch of every client that trains, by its number: it has any, and is not held out."""
        return {number: size for number, size in self.sizes.items() if size and number not in self.held_out}

    @property
    def trained(self) -> Sequence[int]:
        """Numbers of the clients that train, in ascending order."""
        return list(self.samples)

    def rounds_of_budget(self, rounds: int, begun: int | None = None) -> int:
        """How many of so many rounds may run: under ``privacy`` a run ends with its budget.

        Args:
            rounds: that are to run.
            begun: how many have, where others were broken off after something was let out; None: none was.

        Raises:
            InputError: too few clients to hide one among, noise that masks would round to none, or a budget that not one
                round fits in.
        """
        server, count = self.server, len(self.samples)
        if server.hides is not None and count < 3:
            raise InputError(
                "secure_aggregation=True needs three clients, of two each knows the other's part of the sum; there are "
                f"{count} that train"
            )
        if server.release is None:
            return rounds
        tells = min(rounds, server.strategy.exchange_rounds or rounds)
        broken_off = 0 if begun is None else server.release.releases - min(begun, tells)
        lasts = server.release.start(count, tells + broken_off) - broken_off
        if server.hides is not None:
            server.intake(0, self.samples)  # it refuses noise that whole numbers round to none
        logging.getLogger().log(
            logging.INFO if lasts >= tells else logging.WARNING,
            f"privacy: {server.release}; the budget lasts for {lasts} of {tells} rounds in which something is let out",
        )
        return lasts if lasts < tells else rounds

    def run_round(
        self,
        round_index: int,
        on_step: Callable[[int], None] | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> RoundReport:
        """One communication round.

        1. The server chooses the clients of the round.
        2. Each is told the server's message, trains on its own samples and answers. What it answers is checked and folded;
           a client that fails, or whose answer is not taken, is left out and named, and is as it was before the round.
        3. If enough have answered, the server makes its next state of what they came to.
        4. Where users are served by what the server holds, every client takes it in. Its bytes are not counted: a
           client that takes part in the next round gets the same message then. Where a moving average of a client's
           networks serves, it takes in the latest.

        Args:
            round_index: from 0.
            on_step: told the number of samples after each training step.
            on_bytes: told the number of bytes after each message.

        Raises:
            ClientError: an error inside a client, naming client, round and stage; or fewer than ``min_clients`` answered.
            NotFiniteError: what the server makes of the round is not finite.
        """
        samples = self.samples
        chosen = self.server.choose(self.trained, round_index)
        intake = self.server.intake(round_index, {number: samples[number] for number in chosen})
        current = Round(round_index, chosen, intake, on_step, on_bytes, RoundReport(0.0))
        statistics = self._run_clients(current)
        self._check_enough(current)
        intake.finish(statistics)
        for number, (down, up) in (intake.hidden.traffic if intake.hidden is not None else {}).items():
            current.report.bytes_down[number] += down
            current.report.bytes_up[number] = up  # in place of the message that nobody has seen
        self._serve(round_index)
        report, (lost, whole) = current.report, current.lost
        report.loss = report.loss / max(current.seen, 1)  # a secret draw may choose nobody
        report.codec_error = min(lost / whole, LARGEST**2) ** 0.5 if whole else 0.0  # also by a whole next to 0
        return report

    @abstractmethod
    def _run_clients(self, current: Round) -> Mapping[str, Any] | None:
        """Step 2 of a round; what the uploads come to, where that does not follow from those taken in one by one."""

    @abstractmethod
    def _serve(self, round_index: int) -> None:
        """Step 4 of a round."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs and the model does not hold, plain values and tensors only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def close(self) -> None:  # noqa: B027
        """No more rounds: let go of what is held outside of this process."""

    def _leave_out(self, current: Round, client: int, error: ClientError) -> None:
        """A client is missing in the round; where everybody has to answer, that ends the run."""
        if self.min_clients is None:
            raise error
        current.report.missing[client] = error.reason

    def _check_enough(self, current: Round) -> None:
        answered = len(current.chosen) - len(current.report.missing)
        if answered < min(self.min_clients or 0, len(current.chosen)):
            raise ClientError(
                f"round {current.index + 1}: {answered} of {len(current.chosen)} clients answered, min_clients asks for "
                f"{self.min_clients} ({current.report.reasons})"
            )
