"""``afd`` and ``fd``: clients exchange what they know about each label, and nothing else.

AFD: Chen, Zhang, Ma, Journal of Software 32(12), 2021. FD: Jeong et al., arXiv:1811.11479.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from recbole_fedkd.distillation.knowledge import label_means, leave_one_out_teachers
from recbole_fedkd.distillation.losses import joint_loss
from recbole_fedkd.federated.message import SERVER, Message
from recbole_fedkd.federated.strategy.base import LocalResult, ServerState, Strategy, StrategySettings
from recbole_fedkd.federated.task import Step
from recbole_fedkd.model.shared import SharedState


class AttentiveFederatedDistillation(Strategy):
    """Label knowledge up, the leave-one-out teacher down, the joint loss in between (AFD).

    Messages: ``label_knowledge`` up with ``means`` ``[T, T]`` and ``counts`` ``[T]`` (0: absent);
    ``label_teacher`` down with ``teacher`` ``[T, T]`` and ``known`` ``[T]``.
    """

    name = "afd"
    exchanges_knowledge = True

    def download(self, state: ServerState, client: int, round_index: int) -> Message | None:
        """The teacher made of the other clients' knowledge; nothing before the first aggregation."""
        if "means" not in state:
            return None
        teachers, known = leave_one_out_teachers(state["means"], state["counts"], self.settings.aggregation)
        arrays = {"teacher": teachers[client].cpu().numpy(), "known": known[client].cpu().numpy()}
        return Message("label_teacher", round_index, SERVER, arrays)

    def loss(self, step: Step, received: Mapping[str, Tensor], shared: SharedState) -> Tensor:
        """The joint loss."""
        settings = self.settings
        assert step.logits is not None and step.labels is not None
        return joint_loss(
            step.loss,
            step.logits,
            step.labels,
            received.get("teacher"),
            received.get("known"),
            settings.gamma,
            settings.alpha,
            settings.temperature,
        )

    def upload(self, result: LocalResult, client: int, round_index: int) -> Message | None:
        """Mean logits per label."""
        assert result.logit_sums is not None and result.label_counts is not None
        means = label_means(result.logit_sums, result.label_counts)
        arrays = {"means": means.cpu().numpy(), "counts": result.label_counts.int().cpu().numpy()}
        return Message("label_knowledge", round_index, client, arrays)

    def aggregate(self, state: ServerState, uploads: list[Message]) -> ServerState:
        """Replace the knowledge of the clients that spoke; the others keep theirs."""
        clients, labels = self.settings.clients, self.settings.labels
        means = state["means"].clone() if "means" in state else torch.zeros(clients, labels, labels)
        counts = state["counts"].clone() if "counts" in state else torch.zeros(clients, labels, dtype=torch.int32)
        for message in uploads:
            means[message.sender] = torch.tensor(message.arrays["means"])
            counts[message.sender] = torch.tensor(message.arrays["counts"])
        return {"means": means, "counts": counts}


class FederatedDistillation(AttentiveFederatedDistillation):
    """FD: the same exchange with the teacher's cross-entropy alone and a uniform mean (Jeong et al.: alpha = 0)."""

    name = "fd"

    def __init__(self, settings: StrategySettings) -> None:
        super().__init__(replace(settings, alpha=0.0, aggregation="uniform"))
