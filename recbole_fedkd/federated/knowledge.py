"""Kinds of knowledge: what clients that distil tell each other, and what they make of it.

A kind says what is collected of a trained network, what of it travels, and which teacher a sample gets; the loss is the
strategy's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.distillation.exchange import FactorSettings
from recbole_fedkd.distillation.knowledge import (
    item_histograms,
    item_sums,
    label_means,
    label_sums,
    leave_one_out_teachers,
    log_prior,
)
from recbole_fedkd.federated.aggregate import Fold, LatestOfEach, Sums
from recbole_fedkd.federated.message import ArraySpec, Message, MessageError
from recbole_fedkd.federated.task import FactorTask, Step, Task

Tensors = Mapping[str, Tensor]
Arrays = dict[str, NDArray[np.generic]]

KNOWLEDGE_USES = ("distil", "prior", "both")


@dataclass(frozen=True)
class KnowledgeSettings:
    """The keys of the config that say what is known and how it is used, see ``properties/overall.yaml``.

    Attributes:
        clients: number of clients ``K``.
        labels: number of labels ``T``.
        items: number of items ``I``, padding included.
        aggregation: how label knowledge is averaged.
        attention_temperature: of the aggregation ``attentive``.
        trim_ratio: of the aggregation ``trimmed_mean``.
        knowledge_use: of item knowledge.
        prior_strength: of the log-prior.
        factors: of item factors.
    """

    clients: int
    labels: int
    items: int
    aggregation: str
    attention_temperature: float
    trim_ratio: float
    knowledge_use: str
    prior_strength: float
    factors: FactorSettings


class Knowledge(ABC):
    """One kind of knowledge; it holds settings and no state.

    Attributes:
        additive: whether sums over the clients are all that the server needs.
        of_network: whether it is collected of what a trained network says, batch by batch.
        accumulates: whether a message adds to what the client has been told before.
        exchange_rounds: rounds before there is anything to train by.
    """

    additive = False
    of_network = True
    accumulates = False
    exchange_rounds = 0

    def __init__(self, settings: KnowledgeSettings) -> None:
        self.settings = settings

    @abstractmethod
    def collect(self, step: Step) -> dict[str, Tensor]:
        """What a batch adds; the sums of all batches are what a client knows."""

    def collect_of_many(self, step: Step, clients: Tensor, count: int) -> dict[str, Tensor]:
        """What a batch of several clients' samples adds, with a leading axis of clients.

        Args:
            step: of all samples together.
            clients: whose each sample is ``[size]``, from 0.
            count: number of clients.
        """
        raise NotImplementedError

    @abstractmethod
    def upload(self, collected: Tensors, first: bool) -> Arrays:
        """What goes up; ``first``: the client has never spoken before."""

    @abstractmethod
    def upload_arrays(self) -> dict[str, ArraySpec]:
        """What an upload holds."""

    @abstractmethod
    def empty(self, state: Tensors) -> Fold:
        """A fold of a round's uploads that has taken in none."""

    @abstractmethod
    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """The server's next state, given what the uploads of a round have come to."""

    @abstractmethod
    def download_arrays(self) -> dict[str, ArraySpec]:
        """What a download may hold."""

    @abstractmethod
    def download(self, state: Tensors, client: int, round_index: int) -> Arrays:
        """What goes down to a client; nothing if the server knows nothing new."""

    def delivered(self, state: Tensors, clients: Sequence[int]) -> dict[str, Tensor]:
        """The server's state once clients have answered its message."""
        return dict(state)

    @abstractmethod
    def teacher(self, received: Tensors, step: Step) -> tuple[Tensor | None, Tensor | None]:
        """Teacher's logits ``[batch, T]`` and mask ``[batch]`` of a batch; None without one."""

    def understood(self, received: Tensors, own: Tensors, fresh: bool) -> dict[str, Tensor]:
        """What a client makes of a message: ``own`` is what it has sent so far, ``fresh`` whether in the round before."""
        return dict(received)

    def installed(self, understood: Tensors) -> dict[str, Tensor]:
        """Buffers of the network that follow from it."""
        return {}

    def learns(self, received: Tensors) -> bool:
        """Whether there is something to train by, given what the client has been told."""
        return True

    def statistics(self, task: Task, received: Tensors) -> dict[str, Tensor]:
        """What a client's samples add that no network needs to be asked for."""
        return {}

    def taken_in(self, task: Task, received: Tensors, own: Tensors) -> None:  # noqa: B027
        """Tell the network what the client has been told, of which ``own`` it has said itself; most need not know."""


class LabelKnowledge(Knowledge):
    """Mean logits per label, ``T x T`` numbers (AFD, FD).

    Up: ``means`` ``[T, T]`` and ``counts`` ``[T]`` (0: absent). Down: ``teacher`` ``[T, T]`` and ``known`` ``[T]``, made of
    the other clients. A client that is silent is remembered.
    """

    def collect(self, step: Step) -> dict[str, Tensor]:
        """Sums of logits ``[T, T]`` and counts ``[T]``."""
        assert step.logits is not None and step.labels is not None
        sums, counts = label_sums(step.logits, step.labels, self.settings.labels)
        return {"sums": sums, "counts": counts}

    def collect_of_many(self, step: Step, clients: Tensor, count: int) -> dict[str, Tensor]:
        """Sums ``[count, T, T]`` and counts ``[count, T]``: every pair of client and label is a label of its own."""
        assert step.logits is not None and step.labels is not None
        labels = self.settings.labels
        sums, counts = label_sums(step.logits, clients * labels + step.labels, count * labels)
        return {"sums": sums.view(count, labels, -1), "counts": counts.view(count, labels)}

    def upload(self, collected: Tensors, first: bool) -> Arrays:
        """Means and counts."""
        means = label_means(collected["sums"], collected["counts"])
        return {"means": means.cpu().numpy(), "counts": collected["counts"].int().cpu().numpy()}

    def upload_arrays(self) -> dict[str, ArraySpec]:
        """Means and counts."""
        labels = self.settings.labels
        return {"means": ArraySpec((labels, labels)), "counts": ArraySpec((labels,), np.int32, counts=True)}

    def empty(self, state: Tensors) -> Fold:
        """Everybody's latest knowledge."""
        clients, labels = self.settings.clients, self.settings.labels
        nothing = {
            "means": torch.zeros(clients, labels, labels),
            "counts": torch.zeros(clients, labels, dtype=torch.int32),
        }
        return LatestOfEach({name: state.get(name, value) for name, value in nothing.items()})

    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """Every client's teacher, made of the others."""
        means, counts, settings = statistics["means"], statistics["counts"], self.settings
        teachers, known = leave_one_out_teachers(
            means, counts, settings.aggregation, settings.attention_temperature, settings.trim_ratio
        )
        return {"means": means, "counts": counts, "teacher": teachers, "known": known}

    def download_arrays(self) -> dict[str, ArraySpec]:
        """A teacher."""
        labels = self.settings.labels
        return {"teacher": ArraySpec((labels, labels)), "known": ArraySpec((labels,), np.bool_)}

    def download(self, state: Tensors, client: int, round_index: int) -> Arrays:
        """The client's teacher."""
        if "teacher" not in state:
            return {}
        return {"teacher": state["teacher"][client].cpu().numpy(), "known": state["known"][client].cpu().numpy()}

    def teacher(self, received: Tensors, step: Step) -> tuple[Tensor | None, Tensor | None]:
        """The row of the sample's label."""
        if "teacher" not in received or step.labels is None:
            return None, None
        return received["teacher"][step.labels], received["known"][step.labels]


class ItemKnowledge(Knowledge):
    """Sums and counts per item: mean logits as a distillation target, label histograms as a log-prior on the logits.

    Up: every round ``sums`` ``[I, T]`` and ``seen`` ``[I]`` (to distil), once ``histogram`` ``[I, T]`` (for the prior).
    Down: their totals over the clients, the histograms' where a client does not have the latest. Everything is additive,
    so that totals are all that a server needs to learn, and a client takes its own part off what it gets.
    """

    additive = True

    @property
    def _distils(self) -> bool:
        return self.settings.knowledge_use in ("distil", "both")

    @property
    def _uses_prior(self) -> bool:
        return self.settings.knowledge_use in ("prior", "both")

    def collect(self, step: Step) -> dict[str, Tensor]:
        """Sums of logits ``[I, T]``, samples ``[I]`` and label histogram ``[I, T]``."""
        assert step.logits is not None and step.labels is not None and step.items is not None
        collected = {}
        if self._distils:
            collected["sums"], collected["seen"] = item_sums(step.logits, step.items, self.settings.items)
        if self._uses_prior:
            collected["histogram"] = item_histograms(step.items, step.labels, self.settings.items, self.settings.labels)
        return collected

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
        return _Totals(state.get("spoken", torch.zeros(self.settings.clients, dtype=torch.bool)))

    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """Totals: of the round's sums, and of all histograms ever sent."""
        following = {name: value for name, value in state.items() if name in ("histogram", "version", "told")}
        following |= {name: value for name, value in statistics.items() if name != "histogram"}
        if "histogram" in statistics:
            before = state.get("histogram", torch.zeros_like(statistics["histogram"]))
            following["histogram"] = before + statistics["histogram"]
            following["version"] = state.get("version", torch.zeros(1, dtype=torch.int64)) + 1
            following.setdefault("told", torch.zeros(self.settings.clients, dtype=torch.int64))
        return following

    def download_arrays(self) -> dict[str, ArraySpec]:
        """Totals, each where there is something new."""
        return {name: spec._replace(optional=True) for name, spec in self._totals.items()}

    @property
    def _totals(self) -> dict[str, ArraySpec]:
        items, labels = self.settings.items, self.settings.labels
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
        if "histogram" in state and bool(state["told"][client] < state["version"][0]):
            names.append("histogram")
        return {name: state[name].cpu().numpy() for name in names}

    def delivered(self, state: Tensors, clients: Sequence[int]) -> dict[str, Tensor]:
        """They have the latest histograms now."""
        if "told" not in state:
            return dict(state)
        return {
            **state,
            "told": state["told"].index_fill(0, torch.tensor(clients, dtype=torch.long), int(state["version"][0])),
        }

    def understood(self, received: Tensors, own: Tensors, fresh: bool) -> dict[str, Tensor]:
        """The other clients' part of the totals: mean logits ``teacher`` and mask ``known`` per item, and the log-prior."""
        made = {}
        if "sums" in received:
            sums, seen = received["sums"], received["seen"]
            if fresh:
                sums, seen = sums - own["sums"], seen - own["seen"]
            made["known"] = seen > 0
            made["teacher"] = sums / seen.clamp(min=1).unsqueeze(-1)
        if "histogram" in received:
            histogram = received["histogram"] - own["histogram"] if "histogram" in own else received["histogram"]
            made["item_prior"] = log_prior(histogram, self.settings.prior_strength)
        return made

    def installed(self, understood: Tensors) -> dict[str, Tensor]:
        """The log-prior, which the network adds to its logits."""
        return {name: value for name, value in understood.items() if name == "item_prior"}

    def teacher(self, received: Tensors, step: Step) -> tuple[Tensor | None, Tensor | None]:
        """The row of the sample's item."""
        if "teacher" not in received or step.items is None:
            return None, None
        return received["teacher"][step.items], received["known"][step.items]


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

    def merge(self, other: Self) -> None:
        """Add the other's."""
        super().merge(other)
        self.spoken |= other.spoken

    def finish(self) -> dict[str, Tensor]:
        """The sums, and who has spoken."""
        return {**self.sums, "spoken": self.spoken}


class FactorKnowledge(Knowledge):
    """Sums per item from which everybody computes the same item vectors, stage by stage (``distillation/exchange.py``).

    Up: in each round of the exchange the next stage's sums. Down: the totals of the stages that the client does not have. When
    the exchange is over nothing travels any more, and clients train their heads by themselves.
    """

    additive = True
    of_network = False
    accumulates = True

    @property
    def exchange_rounds(self) -> int:  # type: ignore[override]
        """One per stage."""
        return len(self.settings.factors.stages)

    def collect(self, step: Step) -> dict[str, Tensor]:
        """Nothing: the network is not asked."""
        return {}

    def learns(self, received: Tensors) -> bool:
        """Once the exchange is over."""
        return self._next_stage(received) is None

    def statistics(self, task: Task, received: Tensors) -> dict[str, Tensor]:
        """The next stage's sums."""
        assert isinstance(task, FactorTask)
        stage = self._next_stage(received)
        return {} if stage is None else task.head.exchange.answer(stage, _double(received))

    def taken_in(self, task: Task, received: Tensors, own: Tensors) -> None:
        """The head computes what it knows."""
        assert isinstance(task, FactorTask)
        if "histogram" in received:
            task.head.know(_double(received), _double(own))

    def upload(self, collected: Tensors, first: bool) -> Arrays:
        """The sums per item in single precision; what is no item's in double, which no codec takes."""
        stages = self.settings.factors.stages
        sent = {name: value.float() if name in stages else value for name, value in collected.items()}
        return {name: value.cpu().numpy() for name, value in sent.items()}

    def upload_arrays(self) -> dict[str, ArraySpec]:
        """One stage of all, and what goes with it."""
        items, settings = self.settings.items, self.settings.factors
        arrays = {}
        for stage in settings.stages:
            arrays[stage] = ArraySpec((items, settings.numbers(stage, self.settings.labels, items)), optional=True)
            for name, shape in settings.beside(stage).items():
                arrays[name] = ArraySpec(shape, np.float64, optional=True)
        return arrays

    def empty(self, state: Tensors) -> Fold:
        """Totals of the stage."""
        return Sums()

    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """The totals of all stages so far."""
        told = state.get("told", torch.zeros(self.settings.clients, dtype=torch.int64))
        return {**state, **statistics, "told": told}

    def download_arrays(self) -> dict[str, ArraySpec]:
        """Totals of any stages."""
        return self.upload_arrays()

    def download(self, state: Tensors, client: int, round_index: int) -> Arrays:
        """Totals of the stages that the client does not have."""
        stages = self._finished(state)[int(state["told"][client]) :] if "told" in state else []
        names = [name for stage in stages for name in (stage, *self.settings.factors.beside(stage))]
        return {name: state[name].cpu().numpy() for name in names}

    def delivered(self, state: Tensors, clients: Sequence[int]) -> dict[str, Tensor]:
        """They have all stages so far."""
        if "told" not in state:
            return dict(state)
        told = state["told"].index_fill(0, torch.tensor(clients, dtype=torch.long), len(self._finished(state)))
        return {**state, "told": told}

    def teacher(self, received: Tensors, step: Step) -> tuple[None, None]:
        """None: what is known is what the head sees."""
        return None, None

    def _finished(self, totals: Tensors) -> list[str]:
        return [stage for stage in self.settings.factors.stages if stage in totals]

    def _next_stage(self, totals: Tensors) -> str | None:
        return next((stage for stage in self.settings.factors.stages if stage not in totals), None)


def _double(tensors: Tensors) -> dict[str, Tensor]:
    return {name: value.double() for name, value in tensors.items()}


KNOWLEDGE: dict[str, type[Knowledge]] = {"label": LabelKnowledge, "item": ItemKnowledge, "factors": FactorKnowledge}
