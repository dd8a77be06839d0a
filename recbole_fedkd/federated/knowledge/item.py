"""Item knowledge: sums and counts per item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.distillation.knowledge import class_sums, item_histograms, log_prior
from recbole_fedkd.federated.aggregate import Fold, Sums, added
from recbole_fedkd.federated.knowledge.base import Arrays, SumsByItem, Tensors, register_knowledge
from recbole_fedkd.federated.message import ArraySpec, Message, MessageError
from recbole_fedkd.federated.task import Step
from recbole_fedkd.registry import setting

KNOWLEDGE_USES = ("distil", "prior", "both")


@dataclass(frozen=True)
class ItemSettings:
    """The keys of :class:`ItemKnowledge`."""

    knowledge_use: str = setting(
        "both",
        "one of <knowledge uses>",
        "Item knowledge as distillation target, as a log-prior on the logits (AttnFedKD), or as both.",
    )
    prior_strength: float = setting(
        10.0, "> 0", "Samples that the labels of all items are worth in the log-prior of one item."
    )


@register_knowledge
class ItemKnowledge(SumsByItem):
    """Sums and counts per item: mean logits as a distillation target, label histograms as a log-prior on the logits.

    Up: every round ``sums`` ``[I, T]`` and ``seen`` ``[I]`` (to distil), once ``histogram`` ``[I, T]`` (for the prior).
    Down: their totals over the clients, the histograms' where a client does not have the latest. Everything is additive,
    so that totals are all that a server needs to learn, and a client takes its own part off what it gets.
    """

    name = "item"
    settings_type = ItemSettings
    needs_each = None
    same_for_all = True
    elementwise = True

    @property
    def differs_first(self) -> bool:  # type: ignore[override]
        """Where the histogram goes up, once."""
        return self._uses_prior

    @property
    def _distils(self) -> bool:
        return self.settings.knowledge_use in ("distil", "both")

    @property
    def _uses_prior(self) -> bool:
        return self.settings.knowledge_use in ("prior", "both")

    def sums(self, step: Step, classes: Tensor, count: int) -> dict[str, Tensor]:
        """Sums of logits ``[count, T]``, samples ``[count]`` and label histogram ``[count, T]``."""
        assert step.logits is not None and step.labels is not None
        summed = {}
        if self._distils:
            summed["sums"], summed["seen"] = class_sums(step.logits, classes, count)
        if self._uses_prior:
            summed["histogram"] = item_histograms(classes, step.labels, count, self.sizes.labels)
        return summed

    def upload(self, collected: Tensors, first: bool) -> Arrays:
        """What is used; the histogram does not change and is sent once."""
        arrays: Arrays = {}
        if self._distils:
            arrays["sums"] = collected["sums"].float().cpu().numpy()
            arrays["seen"] = collected["seen"].int().cpu().numpy()
        if self._uses_prior and first:
            arrays["histogram"] = collected["histogram"].int().cpu().numpy()
        return arrays

    def upload_arrays(self) -> dict[str, ArraySpec]:
        """What is used; the histogram comes once."""
        arrays = self._totals
        return {name: spec._replace(optional=True) if name == "histogram" else spec for name, spec in arrays.items()}

    def empty(self, state: Tensors) -> Fold:
        """Totals of the round."""
        return _Totals(state.get("spoken", torch.zeros(self.sizes.clients, dtype=torch.bool)))

    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """Totals: of the round's sums, and of all histograms ever sent."""
        following = {name: value for name, value in state.items() if name in ("histogram", "version", "held")}
        following |= {name: value for name, value in statistics.items() if name != "histogram"}
        if "histogram" in statistics:
            before = state.get("histogram", torch.zeros_like(statistics["histogram"]))
            following["histogram"] = torch.from_numpy(added(before.numpy(), statistics["histogram"].numpy()))
            following["version"] = state.get("version", torch.zeros(1, dtype=torch.int64)) + 1
            following["held"] = self.versions_of(state)
        return following

    def download_arrays(self) -> dict[str, ArraySpec]:
        """Totals, each where there is something new; a bound on what clients send may leave no count."""
        return {name: spec._replace(optional=True, empty=True) for name, spec in self._totals.items()}

    @property
    def _totals(self) -> dict[str, ArraySpec]:
        items, labels = self.sizes.items, self.sizes.labels
        arrays = {}
        if self._distils:
            arrays["sums"] = ArraySpec((items, labels))
            arrays["seen"] = ArraySpec((items,), np.int32, counts=True)
        if self._uses_prior:
            arrays["histogram"] = ArraySpec((items, labels), np.int32, counts=True)
        return arrays

    def download(self, state: Tensors, client: int, round_index: int) -> Arrays:
        """The totals; the histograms' only for a client that does not have the latest."""
        names = [name for name in ("sums", "seen") if name in state]
        if "histogram" in state and bool(state["held"][client] < state["version"][0]):
            names.append("histogram")
        return {name: state[name].cpu().numpy() for name in names}

    def version(self, state: Tensors) -> int:
        """How often histograms have come."""
        return int(state["version"][0])

    def understood(self, received: Tensors, own: Tensors, fresh: bool) -> dict[str, Tensor]:
        """The other clients' part of the totals: mean logits ``teacher`` and mask ``known`` per item, and the log-prior."""
        knowledge = {}
        if "sums" in received:
            sums, seen = received["sums"], received["seen"]
            if fresh:
                sums, seen = sums - own["sums"], seen - own["seen"]
            knowledge["known"] = seen > 0
            knowledge["teacher"] = sums / seen.clamp(min=1).unsqueeze(-1)
        if "histogram" in received:
            histogram = received["histogram"] - own["histogram"] if "histogram" in own else received["histogram"]
            # Totals under noise, or that travelled in few bits, may be less than a client's own.
            knowledge["item_prior"] = log_prior(histogram.clamp(min=0), self.settings.prior_strength)
        return knowledge

    def installed(self, understood: Tensors) -> dict[str, Tensor]:
        """The log-prior, which the network adds to its logits."""
        return {name: value for name, value in understood.items() if name == "item_prior"}


class _Totals(Sums):
    """Sums of item knowledge; a client's histogram counts once.

    Args:
        spoken: bool ``[K]``, whose histogram is counted already.
    """

    def __init__(self, spoken: Tensor) -> None:
        super().__init__()
        self.spoken = spoken.clone()

    def add(self, upload: Message) -> None:
        """Add its arrays."""
        if "histogram" in upload.arrays:
            if self.spoken[upload.sender]:
                raise MessageError("doubled", "its histogram is counted already")
            self.spoken[upload.sender] = True
        super().add(upload)

    def add_many(self, senders: Sequence[int], arrays: Mapping[str, NDArray[np.generic]]) -> bool:
        """Add their arrays."""
        if "histogram" in arrays:
            if bool(self.spoken[list(senders)].any()):
                return False
            self.spoken[list(senders)] = True
        return super().add_many(senders, arrays)

    def heard_of(self, senders: Sequence[int]) -> None:
        """Their histograms are counted."""
        if "histogram" in self.sums:
            self.spoken[list(senders)] = True

    def merge(self, other: Self) -> None:
        """Add the other's."""
        super().merge(other)
        self.spoken |= other.spoken

    def finish(self) -> dict[str, Tensor]:
        """The sums, and who has spoken."""
        return {**self.sums, "spoken": self.spoken}
