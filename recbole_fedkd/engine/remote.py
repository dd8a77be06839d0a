"""The ``processes`` engine: every client is a party of its own, somewhere else; only bytes go there and come back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from logging import getLogger
from typing import Any, Protocol

import msgpack

from recbole_fedkd.engine.base import ClientError, Engine, Round, RoundReport
from recbole_fedkd.errors import TrainingError, listed
from recbole_fedkd.federated.envelope import (
    BEST,
    JUDGE,
    MASK,
    MOST,
    NEVER,
    TRAIN,
    Answer,
    Request,
    check_numbers,
    digest,
    masked_as,
    shortened,
)
from recbole_fedkd.federated.message import LARGEST, MessageError
from recbole_fedkd.federated.server import Hidden, Server
from recbole_fedkd.finite import NotFiniteError

MASKED_AGAIN = 2
"""How often a round's sum under masks is tried again, with new keys, where too few are left of it."""


_SQUARE = (0.0, LARGEST**2)
_OF_TRAINING = {"loss": (-LARGEST, LARGEST), "dropped": _SQUARE, "whole": _SQUARE}
"""Between what the numbers of a training lie, so that their sums over parties are finite."""


def _none_due(_number: int, _phase: str, numbers: Mapping[str, float]) -> None:
    """Nothing was to be judged."""
    check_numbers(numbers, {}, {})


class Transport(Protocol):
    """Carries bytes to parties and back.

    Attributes:
        name: of the engine that a run over it is of.
    """

    name: str

    def exchange(self, requests: Mapping[int, bytes], timeout: float) -> Iterator[tuple[int, bytes]]:
        """Ask parties, and hand over what comes from them, whenever it was meant to come.

        A party that cannot be reached is asked when it can be, a party that went away while it was asked is asked again.

        Args:
            requests: party to what it is asked.
            timeout: seconds after which there is nothing more to wait for.
        """
        ...


class PartyError(TrainingError):
    """What a party did not do, and keeps the reason of to itself."""


class RemoteEngine(Engine):
    """Runs the rounds of a federation whose clients are elsewhere.

    What a party says is taken in in the order of the clients, so that a round comes to the same bits as on engine ``local``.
    A party that does not answer, or not as it should, is left out of the round: it is told in its next request which of its
    answers was counted last, and is then as it was before the others. Where it must not be missing (``min_clients`` not set),
    the round ends the run.

    Args:
        server: the server.
        transport: how parties are reached.
        run: name of the run; a later run sorts behind an earlier one.
        sizes: samples of an epoch of every party, by its number.
        timeout: seconds that a party has to answer.
        min_clients: as of :class:`Engine`.

    Attributes:
        counted: the latest round of which a party's answer was counted, by its number.
        report: of the latest round, or of what is judged after all of them.
        closing: what the parties answered at the end of the latest round.
        phase: rows that parties judge at the end of a round, see :class:`Request`.
        check_sums: given a party, a phase and what the party has judged, raises :class:`MessageError` where that cannot be.
        closed: called at the end of a round.
        signers: public keys by which parties sign what they say under masks; None: nobody looks.
    """

    name = "processes"

    def __init__(
        self,
        server: Server,
        transport: Transport,
        run: str,
        sizes: Mapping[int, int],
        timeout: float,
        min_clients: int | None = None,
    ) -> None:
        super().__init__(server, min_clients)
        self.transport, self.run, self.timeout = transport, run, timeout
        self._sizes = dict(sizes)
        self.counted: dict[int, int] = {}
        self.report = RoundReport(0.0)
        self.closing: dict[int, Answer] = {}
        self.phase = ""
        self.check_sums: Callable[[int, str, Mapping[str, float]], None] = _none_due
        self.closed: Callable[[int], None] | None = None
        self.signers: Mapping[int, bytes] | None = None
        self._absent: set[int] = set()

    @property
    def sizes(self) -> Mapping[int, int]:
        """Samples of an epoch of every party, by its number."""
        return self._sizes

    def _run_clients(self, current: Round) -> None:
        self.report = current.report
        payloads = {number: self.server.send(number, current.index) for number in current.chosen}
        counted = dict(self.counted)
        answers = self._asked(TRAIN, current.index, payloads, lambda number: self._whole_network(number, current.index))
        self._absent = set(current.chosen) - answers.keys()
        for number in current.chosen:
            current.report.bytes_down[number], current.report.bytes_up[number] = len(payloads[number]), 0
            try:
                self._take(number, answers.get(number), current)
            except ClientError as error:
                self._leave_out(current, number, error)
        if current.intake.hidden is not None:
            self._unmask(current, counted)

    def _unmask(self, current: Round, counted: Mapping[int, int]) -> None:
        """Have the parties add their messages under masks; who is not in the sum has not answered in this round.

        Args:
            current: the round.
            counted: the latest round of every party that was counted before it.
        """
        hidden = current.intake.hidden
        assert hidden is not None
        hidden.ask, hidden.repeats = partial(self._masked, hidden, current.index), MASKED_AGAIN
        hidden.run, hidden.signers = masked_as(self.run, current.index), self.signers
        try:
            left_out = current.intake.unmask()
        finally:
            for number, faults in hidden.faults.items():
                for fault in faults:
                    self._ignore(number, MASK, fault)
        for number in left_out:
            self.counted[number] = counted.get(number, NEVER)
            silent = "it fell silent before its numbers were in the sum"
            why = MessageError("masks", hidden.faults.get(number, [silent])[-1])
            self._leave_out(current, number, ClientError.of(f"client {number}", current.index, "masking", why))

    def _masked(self, hidden: Hidden, round_index: int, step: str, letters: Mapping[int, bytes]) -> dict[int, bytes]:
        """What parties answer in a step under masks."""
        packed = {number: msgpack.packb([step, content]) for number, content in letters.items()}
        answers = self._round_trip(MASK, round_index, packed, "")
        messages = {}
        for number in letters:
            try:
                messages[number] = self._checked(number, answers.get(number)).said
            except Exception as error:
                if number in answers:
                    hidden.faults.setdefault(number, []).append(f"step '{step}', {error}")
                else:
                    getLogger().warning(
                        f"round {round_index + 1}: client {number} is not in step '{step}' of the masks: {error}"
                    )
        return messages

    def _take(self, number: int, answer: Answer | MessageError | None, current: Round) -> None:
        """One party's part of a round. Raises :class:`ClientError`, of which the cause is what happened."""
        stage = "training"
        try:
            answered = self._checked(number, answer)
            stage, payload = "answering", answered.said
            current.report.bytes_up[number] = len(payload)
            numbers = check_numbers(answered.numbers, {"seen": MOST}, _OF_TRAINING)
            if not numbers["seen"] and numbers["loss"]:
                raise MessageError("numbers", f"'loss' is {numbers['loss']:g}, of no sample")
            if current.on_step is not None:
                current.on_step(self.samples[number])
            if current.intake.hidden is None:
                current.intake.add(number, payload)
            else:
                current.intake.add_header(number, payload)
        except Exception as error:
            raise ClientError.of(f"client {number}", current.index, stage, error) from error
        finally:
            if current.on_bytes is not None:
                current.on_bytes(current.report.bytes_down[number] + current.report.bytes_up[number])
        self.counted[number] = current.index
        current.count(numbers["loss"], int(numbers["seen"]), (numbers["dropped"], numbers["whole"]))

    def _checked(self, number: int, answer: Answer | MessageError | None) -> Answer:
        """An answer that says that what was asked for was done; raises what it says otherwise."""
        if answer is None:
            raise MessageError("absent", f"it has not answered within {self.timeout:g} s")
        if isinstance(answer, MessageError):
            raise answer
        if answer.party != number:
            raise MessageError("sender", f"it says that it is client {answer.party}")
        if answer.fault == "not finite":
            raise NotFiniteError(shortened(answer.detail))
        if answer.fault == "failed":
            raise PartyError(shortened(answer.detail))
        if answer.fault:
            raise MessageError(answer.fault, answer.detail.removeprefix(f"{answer.fault}: "))
        return answer

    def _serve(self, round_index: int) -> None:
        payload = self.server.serve(round_index + 1) if self.server.strategy.serves_aggregate else b""
        present = [number for number in self._sizes if number not in self._absent]  # nobody is waited for twice
        self.closing = self.judged(round_index, dict.fromkeys(present, payload), self.phase)
        if self.closed is not None:
            self.closed(round_index)

    def judged(self, round_index: int, payloads: Mapping[int, bytes], phase: str) -> dict[int, Answer]:
        """Have the parties take in what serves their users, and judge rows of theirs.

        Args:
            round_index: from 0.
            payloads: party to the server's message.
            phase: see :class:`Request`.

        Raises:
            ClientError: a party is missing, and must not be.
        """
        whole = self.server.serve(round_index + 1, whole=True) if any(payloads.values()) else b""
        answers = self._asked(JUDGE, round_index, payloads, lambda number: whole, phase)
        good = self._good(answers, payloads, round_index, phase, "serving its users")
        if phase and len(good) < min(self.min_clients or 0, len(payloads)):
            reasons = RoundReport(0.0, missing=self.report.unserved).reasons
            raise ClientError(
                f"round {round_index + 1}: {len(good)} of {len(payloads)} clients have judged their rows, min_clients asks "
                f"for {self.min_clients} ({reasons})"
            )
        return good

    def keep_best(self, round_index: int) -> None:
        """Have every party that serves its users by this round's network keep it as the best; raises as :meth:`judged`."""
        asked = dict.fromkeys(self.closing, b"")
        answers = self._asked(BEST, round_index, asked, lambda number: b"")
        self._good(answers, asked, round_index, "", "keeping its best network")

    def _good(
        self,
        answers: Mapping[int, Answer | MessageError],
        asked: Iterable[int],
        round_index: int,
        phase: str,
        stage: str,
    ) -> dict[int, Answer]:
        """Answers, but to training, that are what they should be; who has given no such one is named, or ends the run."""
        good: dict[int, Answer] = {}
        missing: dict[int, str] = {}
        for number in asked:
            try:
                answer = self._checked(number, answers.get(number))
                if answer.said:
                    raise MessageError("kind", f"it says {len(answer.said)} bytes that nobody has asked for")
                (self.check_sums if phase else _none_due)(number, phase, answer.numbers or {})
                good[number] = answer
            except Exception as error:
                failed = ClientError.of(f"client {number}", round_index, stage, error)
                if self.min_clients is None:
                    raise failed from error
                missing[number] = failed.reason
        if missing:
            reasons = RoundReport(0.0, missing=missing).reasons
            getLogger().warning(f"round {round_index + 1}: {len(missing)} clients are missing in {stage}: {reasons}")
        self.report.unserved |= missing
        return good

    def resize(self, sizes: Mapping[int, int]) -> None:
        """Samples of an epoch of every party, as a run began that goes on."""
        self._sizes = dict(sizes)

    def _whole_network(self, number: int, round_index: int) -> bytes:
        """The server's message to a party that does not hold what it was thought to hold."""
        self.server.link.forget(number)
        return self.server.send(number, round_index)

    def _asked(
        self,
        operation: str,
        round_index: int,
        payloads: Mapping[int, bytes],
        whole: Callable[[int], bytes],
        phase: str = "",
    ) -> dict[int, Answer | MessageError]:
        """What parties answer; a party that holds another version than it was told a change of is told the whole."""
        answers = self._round_trip(operation, round_index, payloads, phase)
        behind = [
            number for number, answer in answers.items() if isinstance(answer, Answer) and answer.fault == "version"
        ]
        if behind:
            getLogger().warning(f"client(s) {listed(behind)} hold an older network and are told all of the latest")
            answers |= self._round_trip(operation, round_index, {number: whole(number) for number in behind}, phase)
        return answers

    def _round_trip(
        self, operation: str, round_index: int, payloads: Mapping[int, bytes], phase: str
    ) -> dict[int, Answer | MessageError]:
        requests = {
            number: Request(self.run, operation, round_index, self.counted.get(number, NEVER), text, phase).to_bytes()
            for number, text in payloads.items()
        }
        due = {number: digest(request) for number, request in requests.items()}
        answers: dict[int, Answer | MessageError] = {}
        if not requests:
            return answers
        for number, packed in self.transport.exchange(requests, self.timeout):
            try:
                answer: Answer | MessageError = Answer.from_bytes(packed)
            except MessageError as error:
                answer = error
            stale = isinstance(answer, Answer) and bool(answer.request) and answer.request != due.get(number)
            if stale or number not in due or number in answers:
                self._ignore(number, "doubled" if number in answers and not stale else "late")
                continue
            if isinstance(answer, Answer) and not answer.fault:
                answers_to = (answer.run, answer.operation, answer.round)
                if not answer.request or answers_to != (self.run, operation, round_index):
                    answer = MessageError("kind", f"it does not say that it answers '{operation}' of this round")
            answers[number] = answer
            if len(answers) == len(requests):
                break
        return answers

    def _ignore(self, number: int, kind: str, why: str | None = None) -> None:
        counts = self.report.ignored.setdefault(number, {})
        counts[kind] = counts.get(kind, 0) + 1
        getLogger().warning(
            f"an answer of client {number} is not counted, it is {kind if why is None else f'none: {why}'}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The server's state, and what it has counted; the parties keep theirs."""
        return {"server": self.server.state_dict(), "counted": dict(self.counted)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.server.load_state_dict(state["server"])
        self.counted = dict(state["counted"])


class InProcess:
    """A transport to parties of this process.

    Args:
        parties: number to what answers.
    """

    name = "processes"

    def __init__(self, parties: Mapping[int, Callable[[bytes], bytes]]) -> None:
        self.answering = dict(parties)

    def exchange(self, requests: Mapping[int, bytes], timeout: float) -> Iterator[tuple[int, bytes]]:
        """As of :class:`Transport`; nothing is waited for."""
        for number, request in requests.items():
            yield number, self.answering[number](request)
