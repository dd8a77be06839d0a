"""A compact student that may be shared and a larger teacher that never leaves its client, taught mutually."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from recbole_fedkd.distillation.losses import matching_gap, mutual_loss
from recbole_fedkd.model.network import AttentiveNetwork
from recbole_fedkd.model.shared import Rows


class TeacherAndStudent(nn.Module):
    """The two networks of one client; outwards it is the one that serves predictions.

    Args:
        student: what travels, but for its user rows.
        teacher: stays; any width, depth, heads and backbone.
        serve: ``student``, ``teacher``, or ``both``: the mean of their label distributions.
    """

    def __init__(self, student: AttentiveNetwork, teacher: AttentiveNetwork, serve: str) -> None:
        super().__init__()
        self.student, self.teacher, self.serve = student, teacher, serve
        self.projection = nn.Linear(student.backbone.hidden_width, teacher.backbone.hidden_width, bias=False)

    @property
    def private_rows(self) -> dict[str, Rows]:
        """The student's user rows, and all of the teacher and of the projection between them."""
        rows = {
            name: (0, len(parameter)) for name, parameter in self.named_parameters() if not name.startswith("student.")
        }
        if self.student.architecture.use_user_id:
            name = f"student.{self.student.user_rows}"
            rows[name] = (0, len(self.get_parameter(name)))
        return rows

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Logits ``[batch, targets, T]`` of what serves; arguments as of ``AttentiveNetwork``."""
        if self.serve == "both":
            return self._served(self.student(users, items), self.teacher(users, items))
        served: AttentiveNetwork = getattr(self, self.serve)
        logits: Tensor = served(users, items)
        return logits

    def _served(self, of_student: Tensor, of_teacher: Tensor) -> Tensor:
        if self.serve == "both":
            distributions = torch.stack([of_student.log_softmax(-1), of_teacher.log_softmax(-1)])
            return distributions.logsumexp(0) - math.log(2)
        return of_student if self.serve == "student" else of_teacher

    def mutual_losses(self, users: Tensor, items: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The student's and the teacher's loss, and the served logits ``[batch, T]``.

        Args:
            users: local user ids ``[batch]``.
            items: item ids ``[batch]``.
            labels: label indices ``[batch]``.
        """
        student = self.student.observe(users, items.unsqueeze(1))
        teacher = self.teacher.observe(users, items.unsqueeze(1))
        of_student, of_teacher = student.logits.squeeze(1), teacher.logits.squeeze(1)
        projected = self.projection(student.hidden)
        student_gap = matching_gap(projected, teacher.hidden, student.attention, teacher.attention)
        teacher_gap = matching_gap(teacher.hidden, projected, teacher.attention, student.attention)
        student_loss = mutual_loss(of_student, of_teacher, labels, student_gap)
        teacher_loss = mutual_loss(of_teacher, of_student, labels, teacher_gap)
        return student_loss, teacher_loss, self._served(of_student, of_teacher)

    def touched_squared_norm(self, users: Tensor, items: Tensor) -> Tensor:
        """``R(w)`` of both."""
        return self.student.touched_squared_norm(users, items) + self.teacher.touched_squared_norm(users, items)
