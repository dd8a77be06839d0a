"""The terms of the joint loss: ``CE(y, p) + gamma CE(q, p_tau) tau^2 + alpha KL(p_tau || q) tau^2 + lambda R(w)``.

The published AFD pairs ``CE(S, p)`` with ``KL(S || p)``, whose gradients are the same up to a factor. Here the divergence is
reversed, so the two terms differ: the first pulls the student over the teacher's whole support, the second penalises
mass where the teacher has none. FD (Jeong et al. 2018) is ``alpha = lambda = 0``.

Networks that teach each other: adaptive mutual distillation (FedKD: Wu et al., Nature Communications 13:2032, 2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional


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


def mutual_loss(logits: Tensor, peer_logits: Tensor, labels: Tensor, gap: Tensor) -> Tensor:
    """One side of adaptive mutual distillation: ``CE + [KL(p_peer || p) + gap] / (CE + CE_peer)`` (FedKD, eq. 1-6).

    The peer teaches and is not taught by this loss, and the denominator only weighs: both are detached. Where both are still
    wrong, they listen to each other little.

    Args:
        logits: ``[batch, T]``.
        peer_logits: ``[batch, T]`` of the other network.
        labels: label indices ``[batch]``.
        gap: scalar, how far hidden states and attention are from the peer's, see :func:`matching_gap`.

    Returns:
        Scalar mean over the batch.
    """
    peer = peer_logits.detach()
    own_loss = functional.cross_entropy(logits, labels)
    confidence = (own_loss + functional.cross_entropy(peer, labels)).detach()
    divergence = functional.kl_div(logits.log_softmax(-1), peer.log_softmax(-1), reduction="batchmean", log_target=True)
    return own_loss + (divergence + gap) / confidence


def matching_gap(
    hidden: Tensor, peer_hidden: Tensor, attention: Mapping[str, Tensor], peer_attention: Mapping[str, Tensor]
) -> Tensor:
    """``MSE(H, H_peer) + MSE(A, A_peer)``, the peer detached (FedKD, eq. 3-4); a scalar.

    Args:
        hidden: ``[batch, h]``.
        peer_hidden: ``[batch, h]``, projected to the same width.
        attention: name to weights ``[batch, keys]``.
        peer_attention: the peer's; maps over other numbers of keys say nothing about each other and are left out.
    """
    gap = functional.mse_loss(hidden, peer_hidden.detach())
    for name, weights in attention.items():
        if name in peer_attention and peer_attention[name].shape == weights.shape:
            gap = gap + functional.mse_loss(weights, peer_attention[name].detach())
    return gap


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
