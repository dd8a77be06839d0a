"""``afd`` and ``fd``: clients exchange what they know, and nothing else.

AFD: Chen, Zhang, Ma, Journal of Software 32(12), 2021. FD: Jeong et al., arXiv:1811.11479.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from recbole_fedkd.distillation.losses import joint_loss
from recbole_fedkd.federated.aggregate import Fold
from recbole_fedkd.federated.knowledge import Knowledge
from recbole_fedkd.federated.message import SERVER, Message, Schema
from recbole_fedkd.federated.strategy.base import LocalResult, ServerState, Strategy
from recbole_fedkd.federated.task import Step
from recbole_fedkd.model.shared import SharedState
from recbole_fedkd.registry import setting


@dataclass(frozen=True)
class DistillationSettings:
    """The keys of the joint loss."""

    gamma: float = setting(0.05, ">= 0", "Weight of the cross-entropy to the teacher.")
    alpha: float = setting(0.02, ">= 0", "Weight of the reverse Kullback-Leibler divergence to the teacher.")
    temperature: float = setting(1.0, "> 0", "Temperature tau of student and teacher in both distillation terms.")


@dataclass(frozen=True)
class ExchangeSettings(DistillationSettings):
    """The keys of :class:`AttentiveFederatedDistillation`, and those of the knowledge that it names."""

    knowledge: str = setting(
        "label",
        "one of <knowledge>",
        "What is distilled; label: the mean logits per label, T x T numbers; item: sums and counts per item; factors: sums "
        "per item from which everybody computes item vectors, and a head on them; fold_in: the same sums, which teach a "
        "student pair by pair; prototype: mean hidden states; prediction: what networks say of items, and what a model of the "
        "server makes of it.",
        roles="said",
    )


class AttentiveFederatedDistillation(Strategy):
    """Knowledge up, the leave-one-out teacher down, the joint loss in between (AFD).

    What the messages ``knowledge`` (up) and ``teacher`` (down) hold is the kind of knowledge's affair, see
    ``federated/knowledge/``.
    """

    name = "afd"
    settings_type: type = ExchangeSettings
    exchanges_knowledge = True
    remembers_sent = True

    def download(self, state: ServerState, client: int, round_index: int) -> Message | None:
        """What the other clients know; nothing before the first aggregation."""
        arrays = self.knowledge.download(state, client, round_index)
        return Message("teacher", round_index, SERVER, arrays) if arrays else None

    def delivered(self, state: ServerState, clients: Sequence[int]) -> ServerState:
        """As the kind of knowledge says."""
        return self.knowledge.delivered(state, clients)

    def understood(self, received: Mapping[str, Tensor], own: Mapping[str, Tensor], fresh: bool) -> dict[str, Tensor]:
        """The teacher, and whatever else follows from the message."""
        return self.knowledge.understood(received, own, fresh)

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """As the kind of knowledge says."""
        return self.knowledge.elementwise

    @property
    def pads(self) -> bool:  # type: ignore[override]
        """As the kind of knowledge says."""
        return self.knowledge.pads

    def installed(self, received: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Buffers that follow from it."""
        return self.knowledge.installed(received)

    def loss(self, step: Step, received: Mapping[str, Tensor], shared: SharedState) -> Tensor:
        """The joint loss."""
        settings = self.settings
        assert step.logits is not None
        teacher, known = self.knowledge.teacher(received, step)
        loss = joint_loss(
            step.loss,
            step.logits,
            teacher,
            known,
            settings.gamma,
            settings.alpha,
            settings.temperature,
            step.weights,
        )
        penalty = self.knowledge.penalty(received, step)
        return loss if penalty is None else loss + penalty

    def upload(self, result: LocalResult, client: int, round_index: int) -> Message | None:
        """What the client knows."""
        uploaded = result.uploaded
        arrays = uploaded if uploaded is not None else self.knowledge.upload(result.collected, result.first)
        arrays = self.knowledge.disguised(arrays, client, round_index)
        return Message("knowledge", round_index, client, arrays) if arrays else None

    @property
    def needs_each(self) -> str | None:
        """As the kind of knowledge says."""
        return self.knowledge.needs_each

    def without_effect(self, clients: int, in_round: int) -> str | None:
        """As the kind of knowledge says."""
        return self.knowledge.without_effect(clients)

    @property
    def same_for_all(self) -> bool:  # type: ignore[override]
        """As the kind of knowledge says."""
        return self.knowledge.same_for_all

    def audience(self, state: ServerState, client: int) -> int | None:
        """As the kind of knowledge says."""
        return self.knowledge.audience(state, client)

    def empty(self, state: ServerState, samples: Mapping[int, int]) -> Fold:
        """As the kind of knowledge says."""
        return self.knowledge.empty(state)

    def step(self, state: ServerState, statistics: Mapping[str, Tensor]) -> ServerState:
        """As the kind of knowledge says."""
        return self.knowledge.step(state, statistics)

    def upload_schema(self, state: ServerState) -> Schema:
        """As the kind of knowledge says."""
        return Schema("knowledge", self.knowledge.upload_arrays())

    def download_schema(self, state: ServerState) -> Schema:
        """As the kind of knowledge says."""
        return Schema("teacher", self.knowledge.download_arrays())


class FederatedDistillation(AttentiveFederatedDistillation):
    """FD: the same exchange with the teacher's cross-entropy alone (Jeong et al.: alpha = 0, a uniform mean, the default)."""

    name = "fd"

    def __init__(self, settings: Any = None, knowledge: Knowledge | None = None) -> None:
        asked = settings or ExchangeSettings()
        super().__init__(replace(asked, alpha=0.0), knowledge)
        self.asked_alpha = asked.alpha

    def without_effect(self, clients: int, in_round: int) -> str | None:
        """A weight that it does not take, or what the kind of knowledge says."""
        if self.asked_alpha not in (0.0, type(self.settings)().alpha):
            return f"alpha={self.asked_alpha:g} changes nothing: strategy fd has the teacher's cross-entropy alone"
        return super().without_effect(clients, in_round)
