"""What the server of a run could tell of its clients: the run's first rounds again, with somebody who looks at what comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recbole_fedkd.checkpoint.reading import last_and_best
from recbole_fedkd.checkpoint.resumed import resumed_config
from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.data.schema import read_schema, rows_of_clients
from recbole_fedkd.engine import LocalEngine
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.server import Intake
from recbole_fedkd.files import writable_folder, write_json
from recbole_fedkd.privacy.audit import (
    CanaryAudit,
    audited,
    deviation_by_chance,
    guessable,
    item_scores,
    label_table,
    membership_auc,
)
from recbole_fedkd.privacy.release import PrivateRelease
from recbole_fedkd.quick_start import _prepare

MOST_CLIENTS, CANARIES = 60, 400
"""Clients that are looked at unless somebody asks for more, and canaries of a release."""

AUDIT = "audit.json"


@dataclass(frozen=True)
class Seen:
    """What a server can tell of the messages of one round.

    Attributes:
        round: from 1.
        kind: of the messages.
        masked: whether it has got them under masks.
        array: whose numbers tell an item's membership best; empty where none names an item.
        membership: AUC of a guess whether a client has rows of an item; .5: nothing. None: there was nothing to guess.
        chance: standard deviation of that AUC where messages say nothing.
        exact: share of the clients whose set of items is exactly that of the rows that are not zero; who has all items does not
            count, since any noise says that.
        labels: share of the clients whose rows of each label are told exactly; None where nothing of that kind is told.
        ratings: share of the clients whose whole table of items and labels is told exactly; None as before.
        samples: whether every message says how many rows its client has.
        pairs: clients and items that there were guesses for, of items that some of the clients have and others have not.
    """

    round: int
    kind: str
    masked: bool
    array: str
    membership: float | None
    chance: float
    exact: float
    labels: float | None
    ratings: float | None = None
    samples: bool = True
    pairs: int = 0


@dataclass(frozen=True)
class Audit:
    """An audit of a run.

    Attributes:
        run: its folder.
        settings: the keys that matter to privacy.
        clients: that were looked at, and how many there are.
        seen: of every round that was run again.
        canaries: of the release, where the run has one.
        users: the most that one of these clients has; guesses are about clients, not about their users.
    """

    run: str
    settings: Mapping[str, Any]
    clients: tuple[int, int]
    seen: tuple[Seen, ...]
    canaries: CanaryAudit | None
    users: int


class Tap:
    """Looks at what a server gets.

    Args:
        server: the server, whose intakes are looked into from now on.

    Attributes:
        taken: messages of the latest round.
        start: the network that they say what changed of, as codecs and noise left it to the clients; empty where they do not.
    """

    def __init__(self, server: Any) -> None:
        self.server = server
        self.taken: dict[int, Message] = {}
        self.start: dict[str, NDArray[np.generic]] = {}
        self._intake = server.intake
        self.last: Intake | None = None
        server.intake = self._tapped

    def _tapped(self, *arguments: Any) -> Intake:
        intake: Intake = self._intake(*arguments)
        self.taken, self.last, take = {}, intake, intake.take

        def taking(client: int, message: Message | None) -> None:
            self.start = dict(self.server.link.reference)
            take(client, message)
            if message is not None:
                self.taken[client] = message

        intake.take = taking  # type: ignore[method-assign]
        return intake

    def arrays(self) -> dict[int, Mapping[str, NDArray[np.generic]]]:
        """What the server has got of every client in the latest round, by array."""
        assert self.last is not None
        if self.last.hidden is not None:
            return dict(self.last.hidden.arrays_seen())
        return {number: message.arrays for number, message in self.taken.items()}


def audited_run(run: str | Path, rounds: int | None = None, most: int = MOST_CLIENTS, **keys: Any) -> Audit:
    """Run the first rounds of a run again, of some clients, and tell what their server could.

    Args:
        run: a run's folder, or a checkpoint.
        rounds: how many; None: two, or those of an exchange in stages.
        most: clients that are looked at, those with the lowest numbers that train.
        keys: config keys to change, such as ``data_path``.

    Raises:
        InputError: the run has no clients, or its data are not there.
    """
    checkpoint = last_and_best(run)[0]
    config = resumed_config(checkpoint, None, None, None, keys, None, run)
    return audit_of(config, str(run), rounds, most)


def audit_of(config: Any, run: str, rounds: int | None = None, most: int = MOST_CLIENTS) -> Audit:
    """As :func:`audited_run`, of a config; ``run`` is what it is called."""
    config["engine"] = "local"  # on which clients are asked one by one, whoever ran them
    if not config.federated or config["strategy"] == "local":
        raise InputError(
            f"run '{run}' is of strategy {config['strategy']}, in which nobody sends anything; nothing to audit"
        )
    trainer, loaders, _ = _prepare(config)
    engine, dataset = trainer.engine, loaders[0]._dataset
    assert isinstance(engine, LocalEngine)
    everybody = sorted(engine.samples)
    looked_at = everybody[:most]
    engine.held_out = frozenset(everybody) - set(looked_at) | engine.held_out
    server = engine.server
    release = server.release
    exchanges = server.strategy.exchange_rounds
    rounds = rounds or exchanges or 2
    lasts = exchanges or config["epochs"]
    if isinstance(release, PrivateRelease):
        lasts = release.start(len(everybody), lasts)
        rounds = min(rounds, lasts)
    schema = read_schema(dataset, len(engine.clients))
    parts = rows_of_clients(dataset, trainer.model.client_of_user)
    tables = np.zeros((len(looked_at), schema.item_num, max(len(schema.label_values), 2)), dtype=np.int32)
    for table, number in zip(tables, looked_at, strict=True):
        items, labels = parts[number].interactions[schema.item_field], schema.label_indices(parts[number])
        np.add.at(table, (items.numpy(), labels.numpy()), 1)
    tap, seen = Tap(server), []
    for index in range(rounds):
        start = {name: value.clone().numpy() for name, value in server.state.items() if isinstance(value, torch.Tensor)}
        engine.run_round(index)
        arrays = tap.arrays()
        if arrays:
            kind = next(iter(tap.taken.values())).kind
            seen.append(_seen(index, kind, arrays, start | tap.start, looked_at, tables, tap.last))
    canaries = None
    if isinstance(release, PrivateRelease):
        fold = server.strategy.empty(server.state, {0: 1, 1: 1})
        # As many rounds as the budget lasts for.
        canaries = audited(release, fold, server.link, CANARIES, lasts, config["seed"])
    settings = {name: config[name] for name in keys_with("said")}
    users = max(len(parts[number].interactions[schema.user_field].unique()) for number in looked_at)
    return Audit(run, settings, (len(looked_at), len(everybody)), tuple(seen), canaries, users)


def _seen(
    index: int,
    kind: str,
    arrays: Mapping[int, Mapping[str, NDArray[np.generic]]],
    start: Mapping[str, NDArray[np.generic]],
    looked_at: list[int],
    tables: NDArray[np.int32],
    intake: Intake | None,
) -> Seen:
    """What a round tells; ``tables`` ``[clients, items, labels]`` count the rows of those ``looked_at``, in their order."""
    places = [position for position, number in enumerate(looked_at) if number in arrays]
    of_clients = [item_scores(arrays[looked_at[position]], dict(start), tables.shape[1]) for position in places]
    inside = tables[places].sum(2) > 0
    pairs = guessable(inside[:, 1:])
    best, chance, array, exact = 0.5 if pairs else None, 0.0, "", 0.0
    for name in of_clients[0]:
        scores = np.stack([of_client[name] for of_client in of_clients])
        auc = membership_auc(scores[:, 1:], inside[:, 1:])
        if not array or (auc or 0.0) > (best or 0.0):
            best, array, chance = auc, name, deviation_by_chance(scores[:, 1:], inside[:, 1:])
            right = ((scores > 0)[:, 1:] == inside[:, 1:]).all(1)
            exact = float((right & ~inside[:, 1:].all(1)).mean())
    compared = [(label_table(arrays[looked_at[position]], tables.shape[2]), tables[position]) for position in places]
    counted = [(recovered, table) for recovered, table in compared if recovered is not None]
    labels = ratings = None
    if counted:
        labels = float(np.mean([np.array_equal(recovered.sum(0), table.sum(0)) for recovered, table in counted]))
        ratings = float(np.mean([np.array_equal(recovered, table) for recovered, table in counted]))
    masked = intake is not None and intake.hidden is not None
    return Seen(index + 1, kind, masked, array, best, chance, exact, labels, ratings, pairs=pairs)


def write_audit(audit: Audit, folder: Path) -> Path:
    """Write an audit as a page and as JSON into ``<folder>/audit``; returns the page."""
    from recbole_fedkd.report.audit_page import write_audit_page  # brings matplotlib

    base = folder if folder.is_dir() else folder.parent
    out = writable_folder(base / "audit", f"folder '{base / 'audit'}'")
    write_json(asdict(audit), out / AUDIT)
    return write_audit_page(asdict(audit), out)
