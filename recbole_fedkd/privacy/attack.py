"""Wrong clients, to measure what they cost and what a defence is worth: some send what they should not.

Either their rows are wrong before they learn from them (``label_flip``, ``item_promotion``: Tolpegin et al., ESORICS 2020;
Zhang et al., PipAttack, WSDM 2022), or what they say is (``sign_flip``, ``scale``, ``noise``: Blanchard et al., NIPS 2017).
A wrong client does not keep to a bound on its message either: it changes the message after its own end has clipped it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.federated.message import Message, Schema
from recbole_fedkd.federated.stage import Arrays, Stage
from recbole_fedkd.privacy.settings import OF_MESSAGES, AttackSettings

_WHAT, _HOW = 0xA77B, 0xA77C
"""Part the seeds of an attack from all other seeds of a run."""


@dataclass(frozen=True)
class AttackOfClients:
    """An attack, and who is behind it.

    Attributes:
        kind: what the wrong clients do.
        strength: as of :class:`AttackSettings`.
        wrong: their numbers.
        seed: the run's.
    """

    kind: str
    strength: float
    wrong: frozenset[int]
    seed: int


class Attack(Stage):
    """What becomes of a wrong client's message after its own end has clipped it; nobody undoes it at the other end."""

    name = "attack"
    settings: AttackOfClients

    def encode(self, message: Message) -> Message:
        """A wrong client's numbers flipped, scaled or under noise; counts stay."""
        if message.sender not in self.settings.wrong:
            return message
        generator = np.random.default_rng([self.settings.seed, _HOW, message.sender, message.round])
        arrays: Arrays = {}
        for name, array in message.arrays.items():
            arrays[name] = array
            if array.dtype.kind == "f":
                with np.errstate(over="ignore"):  # who sends what is too large sends what is not finite
                    arrays[name] = self._changed(array.astype(np.float64), generator).astype(array.dtype)
        return replace(message, arrays=arrays)

    def _changed(self, array: Any, generator: np.random.Generator) -> Any:
        kind, strength = self.settings.kind, self.settings.strength
        if kind == "sign_flip":
            return -array
        if kind == "scale":
            return array * strength
        length = strength * np.sqrt(np.mean(array**2)) if array.size else 0.0
        return array + generator.standard_normal(array.shape) * length

    def decode(self, message: Message, schema: Schema | None) -> Message:
        """As it came."""
        return message


def attack_stages(config: Any, clients: int) -> tuple[tuple[type[Stage], AttackOfClients], ...]:
    """The stage of an attack on messages, where a config has one."""
    settings = AttackSettings.of(config)
    if settings is None or settings.kind not in OF_MESSAGES:
        return ()
    seed = config["seed"]
    return ((Attack, AttackOfClients(settings.kind, settings.strength, settings.wrong(clients, seed), seed)),)


def poisoned(
    settings: AttackSettings, rows: Mapping[str, Tensor], wrong: Tensor, label_values: Sequence[float], seed: int
) -> dict[str, Tensor]:
    """Columns of training rows as wrong clients have them.

    Args:
        settings: of the attack.
        rows: ``user`` and ``item`` numbers ``[n]``, and ``label`` ``[n]``, which is not there where all rows are positives.
        wrong: whether a row is one of a wrong client ``[n]``.
        label_values: the ordered label set.
        seed: the run's.

    Returns:
        The columns that differ, by the same names.
    """
    user, item, label = rows["user"], rows["item"], rows.get("label")
    if settings.kind == "label_flip" and label is not None:
        values = torch.tensor(label_values, dtype=label.dtype)
        places = torch.searchsorted(values, label.contiguous()).clamp(max=len(values) - 1)
        return {"label": torch.where(wrong, values.flip(0)[places], label)}
    if settings.kind == "label_flip":
        return {"item": _others(user, item, wrong, seed)}
    if settings.kind != "item_promotion":
        return {}
    known, counts = item.unique(return_counts=True)
    rarest = known[counts.argsort(stable=True)][: settings.items]
    rank = _place_among(user, wrong)
    taken = wrong & (rank < len(rarest))
    columns = {"item": torch.where(taken, rarest[rank.clamp(max=len(rarest) - 1)], item)}
    return columns | ({"label": torch.where(taken, max(label_values), label)} if label is not None else {})


def _place_among(user: Tensor, some: Tensor) -> Tensor:
    """Place of a row among those of its user that are marked ``[n]``, from 0; of the others anything."""
    order = torch.argsort(user * 2 + ~some, stable=True)
    ranked = user[order]
    first = torch.searchsorted(ranked, ranked)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)) - first)


def _others(user: Tensor, item: Tensor, wrong: Tensor, seed: int) -> Tensor:
    """Items ``[n]`` in which those of wrong clients' rows are items that their user has no row of, as far as there are."""
    generator = np.random.default_rng([seed, _WHAT])
    replaced, everything = item.clone(), np.arange(1, int(item.max()) + 1)
    for number in user[wrong].unique().tolist():
        places = torch.nonzero(user == number).flatten()
        free = np.setdiff1d(everything, item[places].numpy())
        drawn = generator.permutation(free)[: len(places)]
        replaced[places[: len(drawn)]] = torch.from_numpy(drawn)
    return replaced
