"""A party: a client where its data are. It is asked in bytes and answers in bytes, and may be asked anything twice.

A party keeps what it was before a round, after its training, and after what serves its users was taken in. Asked the same
again, it gives the answer that it gave; asked for a round again with another message, it goes back; and told that its answer
was not counted, it is as before the round, as a client that is left out on engine ``local``. All of that is on the disk before
an answer leaves, whole or not at all, so that a party may be killed at any moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import Tensor

from recbole_fedkd.checkpoint.sealed import read_sealed, write_sealed
from recbole_fedkd.checkpoint.state import restored
from recbole_fedkd.data.schema import ClientRows
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.client import Client
from recbole_fedkd.federated.envelope import (
    BEST,
    DECLARED,
    HELLO,
    JUDGE,
    MASK,
    NEVER,
    TRAIN,
    Answer,
    Request,
    digest,
    masked_as,
    shortened,
)
from recbole_fedkd.federated.message import Message, MessageError, without_arrays
from recbole_fedkd.federated.stage import received_through
from recbole_fedkd.federation.parties import build_client
from recbole_fedkd.files import remove_temporaries
from recbole_fedkd.finite import NotFiniteError
from recbole_fedkd.machines.judging import PartyJudge
from recbole_fedkd.machines.manifest import Manifest

STATE, BEST_STATE = "state.pth", "best.pth"
"""Files of a party's folder: what it is, and the network of the best round."""

Snapshot = tuple[dict[str, Tensor], dict[str, Any]]
"""A client's network and state, see :meth:`Client.snapshot`."""


@dataclass
class _Done:
    """An operation of the current round that was done.

    Attributes:
        request: digest of the request.
        answer: the bytes that were answered.
        after: the client afterwards.
        counted: the round up to which the server had counted the party when it asked.
        kept: the client's message, where nobody gets it but under masks; else None.
    """

    request: bytes
    answer: bytes
    after: Snapshot
    counted: int
    kept: bytes | None = None


@dataclass
class _State:
    """What a party remembers.

    Attributes:
        run: of the run; empty: of none.
        round: the latest that it was asked for; :data:`NEVER`: none.
        before: the client before that round; None: as it was built.
        trained: its training in that round.
        judged: what it did at the end of it.
    """

    run: str = ""
    round: int = NEVER
    before: Snapshot | None = None
    trained: _Done | None = None
    judged: _Done | None = None


class Party:
    """One client of a federation, at home.

    Args:
        folder: its rows, and what it remembers.
        manifest: what is public.
        tell: told in words what it has done.

    Attributes:
        number: of the client.
        client: as it is.

    Raises:
        InputError: the folder holds no party, or one of another federation.
    """

    def __init__(self, folder: Path, manifest: Manifest, tell: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.manifest, self._tell = folder, manifest, tell
        self.number = manifest.number_of(folder)
        self.rows = ClientRows.load(folder / "rows.npz")
        self.client = self._built()
        self._judge = PartyJudge(manifest.config, manifest.schema, self.rows, folder)
        self._current: Snapshot | None = None  # that the client is at; None: it is as it was built, or under way
        self._masks: PartyMasks | None = None
        if manifest.config["secure_aggregation"]:
            # Needs an extra, and says so before anything is trained.
            from recbole_fedkd.machines.masks import PartyMasks

            self._new_masks, self._identity = PartyMasks, manifest.identity_of(folder, self.number)
        self._state = _State()
        remove_temporaries(folder)
        if (folder / STATE).is_file():
            self._state = _read_state(folder / STATE)
            if self._state.before is not None:
                with restored(folder / STATE):
                    self._go_to(self._state.before)

    def _built(self) -> Client:
        return build_client(self.manifest.config, self.manifest.schema, self.rows, self.number)

    def hello(self) -> bytes:
        """Who it is, and how much it has: what it says when it comes."""
        counts = (len(self.client.task), len(self.rows.users), self._judge.rows("valid"), self._judge.rows("test"))
        numbers = dict(zip(DECLARED, map(float, counts), strict=True))
        return Answer(self.number, self._state.run, HELLO, 0, self.manifest.digest, numbers=numbers).to_bytes()

    def answer(self, packed: bytes) -> bytes:
        """Do what is asked, once, and say what came of it.

        Args:
            packed: a :class:`Request`; anybody may have sent it.

        Returns:
            An :class:`Answer`, also where nothing was done.
        """
        asked: Request | None = None
        try:
            asked = Request.from_bytes(packed)
            if asked.operation == HELLO:
                return self.hello()
            return self._answered(asked, digest(packed))
        except MessageError as error:
            fault, detail = error.fault, str(error)
        except NotFiniteError as error:
            fault, detail = "not finite", str(error)
        except Exception as error:
            # The words of an error may quote what the party holds: they stay here.
            getLogger().exception(f"party {self.number} could not do what it was asked")
            fault, detail = "failed", f"{type(error).__name__}, of which the party's own log tells more"
        run, operation, number = (asked.run, asked.operation, asked.round) if asked is not None else ("", "", 0)
        named = digest(packed) if asked is not None else b""
        return Answer(
            self.number, run, operation, number, named, fault=shortened(fault), detail=shortened(detail)
        ).to_bytes()

    def _answered(self, asked: Request, name: bytes) -> bytes:
        state = self._state
        done = {TRAIN: state.trained, JUDGE: state.judged}.get(asked.operation)
        if done is not None and (asked.run, asked.round, name) == (state.run, state.round, done.request):
            return done.answer
        if asked.run < state.run:
            raise MessageError("run", "a later run has begun here")
        if asked.run > state.run:
            self._begin(asked.run)
        elif asked.round < state.round:
            raise MessageError("round", f"round {asked.round + 1} is over here, which is in round {state.round + 1}")
        if asked.operation == JUDGE and asked.phase == "test":
            return self._test(asked, name)
        if self._state.round < asked.round:
            self._settle(asked)
        if asked.operation == BEST:
            return self._keep_best(asked, name)
        if asked.operation == MASK:
            return self._mask(asked, name)
        return self._train(asked, name) if asked.operation == TRAIN else self._serve(asked, name)

    def _begin(self, run: str) -> None:
        """Forget everything: another run begins."""
        self.client = self._built()
        self._current = self.client.snapshot()
        self._state = _State(run, before=self._current)

    def _settle(self, asked: Request) -> None:
        """A new round begins: what of the one before counts is what the client is now."""
        state = self._state
        after = self._after_training(asked.counted)
        if state.judged is not None and (state.judged.counted >= state.round) == (asked.counted >= state.round):
            after = state.judged.after
        self._state = _State(state.run, asked.round, after)

    def _after_training(self, counted: int) -> Snapshot | None:
        """The client after its training in the current round, or before it where that does not count."""
        state = self._state
        return state.trained.after if state.trained is not None and counted >= state.round else state.before

    def _train(self, asked: Request, name: bytes) -> bytes:
        client = self._hearing(asked, self._state.before)
        training = client.train(asked.round)
        answer = kept = client.send(asked.round)
        if kept and self.manifest.config["secure_aggregation"]:
            answer = without_arrays(whole_message(client, kept)).to_bytes()
        dropped, whole = client.link.codec_error
        numbers = {"loss": training.loss, "seen": training.seen, "dropped": dropped, "whole": whole}
        packed = Answer(self.number, asked.run, TRAIN, asked.round, name, answer, numbers).to_bytes()
        self._current = client.snapshot()
        self._state.trained = _Done(name, packed, self._current, asked.counted, kept if kept != answer else None)
        self._state.judged = self._masks = None
        self._write()
        self._tell(f"round {asked.round + 1}: loss {training.loss / max(training.seen, 1):.4f}, {len(answer):,} B up")
        return packed

    def _mask(self, asked: Request, name: bytes) -> bytes:
        """A step of the sum under masks, of the message that training has left."""
        trained = self._state.trained
        if trained is None or not trained.kept:
            raise MessageError("masks", "it has no message of this round")
        if self._masks is None:
            self._go_to(trained.after)
            run, message = masked_as(asked.run, asked.round), whole_message(self.client, trained.kept)
            self._masks = self._new_masks(self.manifest.config, self.client, message, self._identity, run)
        answer = self._masks.answer(name, asked.message)
        return Answer(self.number, asked.run, MASK, asked.round, name, answer).to_bytes()

    def _serve(self, asked: Request, name: bytes) -> bytes:
        """Take in what serves the users from now on, and judge."""
        client = self._hearing(asked, self._after_training(asked.counted))
        client.serve()
        sums = self._judge.sums(client.task.network, asked.phase) if asked.phase else {}
        packed = Answer(self.number, asked.run, JUDGE, asked.round, name, numbers=sums).to_bytes()
        self._current = client.snapshot()
        self._state.judged = _Done(name, packed, self._current, asked.counted)
        self._write()
        return packed

    def _keep_best(self, asked: Request, name: bytes) -> bytes:
        """The network that serves now is that of the best round."""
        served = self._state.judged
        if served is None:
            raise MessageError("round", "nothing was taken in yet that could be the best")
        write_sealed({"run": asked.run, "round": asked.round, "client": served.after}, self.folder / BEST_STATE)
        return Answer(self.number, asked.run, BEST, asked.round, name).to_bytes()

    def _test(self, asked: Request, name: bytes) -> bytes:
        """Judge the test rows by the best round's network; nothing else changes."""
        kept = self.client.snapshot()
        if (self.folder / BEST_STATE).is_file():
            best, _ = read_sealed(self.folder / BEST_STATE, "best network of a party")
            if best["run"] == asked.run:
                self.client.restore(best["client"])
        try:
            sums = self._judge.sums(self.client.task.network, asked.phase)
        finally:
            self.client.restore(kept)
        self._tell("the run is over, its test rows are judged; waits for the next run, Ctrl-C ends it")
        return Answer(self.number, asked.run, JUDGE, asked.round, name, numbers=sums).to_bytes()

    def _hearing(self, asked: Request, at: Snapshot | None) -> Client:
        """The client, under way from a snapshot with what it is told."""
        self._go_to(at)
        self._current = None
        if asked.message:
            self.client.receive(asked.message)
        return self.client

    def _go_to(self, snapshot: Snapshot | None) -> None:
        """Be as at the time of a snapshot."""
        if snapshot is not None and snapshot is not self._current:
            self.client.restore(snapshot)
        self._current = snapshot

    def _write(self) -> None:
        _write_state(self._state, self.folder / STATE)


def whole_message(client: Client, packed: bytes) -> Message:
    """A client's message as the server would have it, of what its end of the wire has made."""
    return received_through(client.link.stages, Message.from_bytes(packed), None)


def _write_state(state: _State, file: Path) -> None:
    """Write what a party remembers, whole or not at all."""
    parts = {name: getattr(state, name) for name in ("before", "trained", "judged")}
    done = {name: vars(part) if isinstance(part, _Done) else part for name, part in parts.items()}
    write_sealed({"run": state.run, "round": state.round, **done}, file)


def _read_state(file: Path) -> _State:
    """Read what :func:`_write_state` has written.

    Raises:
        InputError: it is damaged, or something else.
    """
    content, _ = read_sealed(file, "state of a party")
    try:
        done = {name: _Done(**content[name]) if content[name] is not None else None for name in ("trained", "judged")}
        return _State(content["run"], content["round"], content["before"], **done)
    except (KeyError, TypeError) as error:
        raise InputError(f"'{file}' does not hold the state of a party: {error}") from error


def begin_as(client: Snapshot, run: str, file: Path) -> None:
    """Have a party begin a run as a client that is known already."""
    _write_state(_State(run, before=client), file)


def served(file: Path) -> Snapshot | None:
    """The client that serves a party's users, from the file of its state; None: the one that was built."""
    state = _read_state(file)
    done = state.judged or state.trained
    return done.after if done is not None else state.before
