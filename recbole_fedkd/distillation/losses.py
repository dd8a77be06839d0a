"""The terms of the joint loss: ``CE(y, p) + gamma CE(q, p_tau) tau^2 + alpha KL(p_tau || q) tau^2 + lambda R(w)``.

The published AFD pairs ``CE(S, p)`` with ``KL(S || p)``, whose gradients are the same up to a factor. Here the divergence is
reversed, so the two terms differ: the first pulls the student over the teacher's whole support, the second penalises
mass where the teacher has none. FD (Jeong et al. 2018) is ``alpha = lambda = 0``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def teacher_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``CE(q, p_tau) tau^2`` per sample: ``[batch, T]`` twice to ``[batch]``."""
    target = (teacher_logits / temperature).softmax(-1)
    return -(target * (logits / temperature).log_softmax(-1)).sum(-1) * temperature**2


def reverse_divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``KL(p_tau || q) tau^2`` per sample: ``[batch, T]`` twice to ``[batch]``."""
    student = (logits / temperature).log_softmax(-1)
    target = (teacher_logits / temperature).log_softmax(-1)
    return (student.exp() * (student - target)).sum(-1) * temperature**2


def joint_loss(
    student_loss: Tensor,
    logits: Tensor,
    teacher: Tensor | None,
    known: Tensor | None,
    gamma: float,
    alpha: float,
    temperature: float,
) -> Tensor:
    """Joint loss of a batch: the student's own loss plus the two terms of distillation.

    Args:
        student_loss: ``CE(y, p) + lambda R(w)``, or what a RecBole model minimises by itself; scalar mean over the batch.
        logits: the student's raw logits ``[batch, T]``.
        teacher: the teacher's logits ``[batch, T]``; None before the first exchange.
        known: bool ``[batch]``, False for samples that no other client can teach; they get no teacher term.
        gamma: weight of ``CE(q, p_tau)``.
        alpha: weight of ``KL(p_tau || q)``.
        temperature: ``tau``.

    Returns:
        Scalar mean over the batch.
    """
    if teacher is None or known is None or (gamma == 0 and alpha == 0):
        return student_loss
    distilled = torch.zeros_like(student_loss)
    if gamma:
        distilled = distilled + gamma * teacher_cross_entropy(logits, teacher, temperature)
    if alpha:
        distilled = distilled + alpha * reverse_divergence(logits, teacher, temperature)
    return student_loss + (distilled * known).mean()


def touched_squared_norm(tables: Iterable[tuple[Tensor, Tensor]], dense: Iterable[Tensor]) -> Tensor:
    """``R(w)``: squared L2 norm of the weights that a batch touches.

    Args:
        tables: pairs of an embedding table ``[rows, d]`` and the row ids of the batch (any shape); a row counts once, and
            rows outside the batch do not count, so they are not decayed.
        dense: weights that every batch touches.

    Returns:
        Scalar.
    """
    parts = [weight.pow(2).sum() for weight in dense]
    for table, ids in tables:
        touched = torch.zeros(table.shape[0], dtype=table.dtype, device=table.device)
        touched[ids.flatten()] = 1.0
        parts.append(torch.dot(table.pow(2).sum(1), touched))
    return torch.stack(parts).sum()
