"""A compact student that may be shared and a larger teacher that never leaves its client, taught mutually."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from recbole_fedkd.distillation.losses import MutualWeights, matching_gap, mutual_loss, weighted_mutual_loss
from recbole_fedkd.model.catalogue import Catalogue
from recbole_fedkd.model.network import NO_CONTEXT, AttentiveNetwork, Context
from recbole_fedkd.model.shared import Rows

Kind = TypeVar("Kind")


def names_of(network: nn.Module, kind: str) -> tuple[str, ...]:
    """Names of parameters or buffers that a network declares as ``kind``, such as ``item_rows``; empty if it has none."""
    if isinstance(network, TeacherAndStudent):
        return network.declared(kind)
    declared = getattr(network, kind, ())
    return (declared,) if isinstance(declared, str) else tuple(declared)


class TeacherAndStudent(nn.Module):
    """The two networks of one client; outwards it is the one that serves predictions.

    Args:
        student: what travels, but for its user rows.
        teacher: stays; any width, depth, heads and backbone.
        serve: ``student``, ``teacher``, or ``both``: the mean of their label distributions.
        fixed: weights of mutual learning (FML); None: they teach each other by adaptive mutual distillation (FedKD).
    """

    def __init__(
        self, student: AttentiveNetwork, teacher: AttentiveNetwork, serve: str, fixed: MutualWeights | None = None
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.serve, self.fixed = student, teacher, serve, fixed
        if fixed is None:
            self.projection = nn.Linear(student.backbone.hidden_width, teacher.backbone.hidden_width, bias=False)

    @property
    def private_rows(self) -> dict[str, Rows]:
        """The student's user rows, and all of the teacher and of the projection between them."""
        rows = {
            name: (0, len(parameter)) for name, parameter in self.named_parameters() if not name.startswith("student.")
        }
        for name in self.student.user_rows:
            rows[f"student.{name}"] = (0, len(self.student.get_parameter(name)))
        return rows

    def forward(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Logits ``[batch, targets, T]`` of what serves; arguments as of ``AttentiveNetwork``."""
        return self.served([network(users, items, context) for network in self.serving()])

    @property
    def ranks(self) -> bool:
        """As of ``AttentiveNetwork``."""
        return all(network.ranks for network in self.serving())

    def catalogue(self) -> tuple[Catalogue, ...]:
        """What :meth:`rank` needs of the items, of each network that serves."""
        return tuple(network.catalogue() for network in self.serving())

    def rank(
        self,
        users: Tensor,
        context: Context = NO_CONTEXT,
        catalogue: tuple[Catalogue, ...] | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[users, items, T]`` of what serves; arguments as of ``AttentiveNetwork``."""
        serving = self.serving()
        known = catalogue or (None,) * len(serving)
        ranked = [network.rank(users, context, of, chosen) for network, of in zip(serving, known, strict=True)]
        return self.served(ranked)

    def serving(self) -> list[AttentiveNetwork]:
        """The networks whose logits :meth:`served` takes."""
        return self._of_serving(self.student, self.teacher)

    def _of_serving(self, of_student: Kind, of_teacher: Kind) -> list[Kind]:
        both = (("student", of_student), ("teacher", of_teacher))
        return [value for side, value in both if self.serve in (side, "both")]

    def served(self, logits: Sequence[Tensor]) -> Tensor:
        """Logits of what serves, given those of the networks that do: where both do, of their mean distribution."""
        if len(logits) == 1:
            return logits[0]
        mean = torch.stack([of_network.log_softmax(-1) for of_network in logits]).logsumexp(0) - math.log(2)
        # Of a ranking, items lie side by side.
        return mean if logits[0].stride(-1) == 1 else mean.mT.contiguous().mT

    def mutual_losses(
        self,
        users: Tensor,
        items: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        context: Context = NO_CONTEXT,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The student's and the teacher's loss, and the served logits ``[batch * targets, T]``.

        Args:
            users: local user ids ``[batch]``.
            items: item ids ``[batch, targets]``.
            labels: label indices ``[batch * targets]``.
            weights: ``[batch * targets]``, 0 for rows that only fill a batch up; None: all are samples.
            context: of each target.
        """
        student, teacher = self.student.observe(users, items, context), self.teacher.observe(users, items, context)
        of_student, of_teacher = student.logits.flatten(0, 1), teacher.logits.flatten(0, 1)
        served = self.served(self._of_serving(of_student, of_teacher))
        if self.fixed is not None:
            of_labels = self.fixed.student_label_weight, self.fixed.teacher_label_weight
            student_loss = weighted_mutual_loss(of_student, of_teacher, labels, of_labels[0], weights)
            return student_loss, weighted_mutual_loss(of_teacher, of_student, labels, of_labels[1], weights), served
        projected = self.projection(student.hidden)
        student_gap = matching_gap(projected, teacher.hidden, student.attention, teacher.attention, weights)
        teacher_gap = matching_gap(teacher.hidden, projected, teacher.attention, student.attention, weights)
        student_loss = mutual_loss(of_student, of_teacher, labels, student_gap, weights)
        teacher_loss = mutual_loss(of_teacher, of_student, labels, teacher_gap, weights)
        return student_loss, teacher_loss, served

    def touched_squared_norm(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """``R(w)`` of both."""
        of_student = self.student.touched_squared_norm(users, items, context)
        return of_student + self.teacher.touched_squared_norm(users, items, context)

    def declared(self, kind: str) -> tuple[str, ...]:
        """What both networks declare as ``kind``, such as ``item_rows``, by its name in this module."""
        both = (("student", self.student), ("teacher", self.teacher))
        return tuple(f"{side}.{name}" for side, network in both for name in names_of(network, kind))
