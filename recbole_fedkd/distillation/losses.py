"""The terms of the joint loss: ``CE(y, p) + gamma CE(q, p_tau) tau^2 + alpha KL(p_tau || q) tau^2 + lambda R(w)``.

The published AFD pairs ``CE(S, p)`` with ``KL(S || p)``, whose gradients are the same up to a factor. Here the divergence is
reversed, so the two terms differ: the first pulls the student over the teacher's whole support, the second penalises
mass where the teacher has none. FD (Jeong et al. 2018) is ``alpha = lambda = 0``.

Networks that teach each other: adaptive mutual distillation (FedKD: Wu et al., Nature Communications 13:2032, 2022), and
mutual learning with fixed weights (FML: Shen et al., arXiv:2006.16765, 2020).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from recbole_fedkd.registry import setting


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Logarithms of ``p_tau``: logits ``[batch, T]`` to the same shape."""
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def teacher_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """``CE(q, p)`` per sample, of logarithms of both: ``[batch, T]`` twice to ``[batch]``."""
    return -(teacher.exp() * student).sum(-1)


def reverse_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(p || q)`` per sample, of logarithms of both: ``[batch, T]`` twice to ``[batch]``."""
    return (student.exp() * (student - teacher)).sum(-1)


def sample_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over the samples ``[batch]``, a scalar; ``weights`` ``[batch]`` are 0 for rows that only fill a batch up."""
    return values.mean() if weights is None else (values * weights).sum() / weights.sum()


def label_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """``CE(y, p)`` of a batch: logits ``[batch, T]``, labels ``[batch]``, weights as of :func:`sample_mean`; a scalar."""
    if weights is None:
        return functional.cross_entropy(logits, labels)
    # For many networks at once torch takes the cross-entropy apart in Python; this is the same in fewer steps.
    own = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if logits.shape[-1] == 2:
        return sample_mean(functional.softplus(logits.sum(-1) - 2 * own), weights)
    return sample_mean(logits.logsumexp(-1) - own, weights)


def joint_loss(
    student_loss: Tensor,
    logits: Tensor,
    teacher: Tensor | None,
    known: Tensor | None,
    gamma: float,
    alpha: float,
    temperature: float,
    weights: Tensor | None = None,
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
        weights: as of :func:`sample_mean`.

    Returns:
        Scalar mean over the batch.
    """
    if teacher is None or known is None or (gamma == 0 and alpha == 0):
        return student_loss
    taught, target = softened(logits, temperature), softened(teacher, temperature)
    distilled = torch.zeros_like(student_loss)
    if gamma:
        distilled = distilled + gamma * temperature**2 * teacher_cross_entropy(taught, target)
    if alpha:
        distilled = distilled + alpha * temperature**2 * reverse_divergence(taught, target)
    return student_loss + sample_mean(distilled * known, weights)


def mutual_loss(
    logits: Tensor, peer_logits: Tensor, labels: Tensor, gap: Tensor, weights: Tensor | None = None
) -> Tensor:
    """One side of adaptive mutual distillation: ``CE + [KL(p_peer || p) + gap] / (CE + CE_peer)`` (FedKD, eq. 1-6).

    The peer teaches and is not taught by this loss, and the denominator only weighs: both are detached. Where both are still
    wrong, they listen to each other little.

    Args:
        logits: ``[batch, T]``.
        peer_logits: ``[batch, T]`` of the other network.
        labels: label indices ``[batch]``.
        gap: scalar, how far hidden states and attention are from the peer's, see :func:`matching_gap`.
        weights: as of :func:`sample_mean`.

    Returns:
        Scalar mean over the batch.
    """
    peer = peer_logits.detach()
    own_loss = label_cross_entropy(logits, labels, weights)
    confidence = (own_loss + label_cross_entropy(peer, labels, weights)).detach()
    return own_loss + (peer_divergence(logits, peer, weights) + gap) / confidence


def peer_divergence(logits: Tensor, peer_logits: Tensor, weights: Tensor | None) -> Tensor:
    """``KL(p_peer || p)`` of a batch: ``[batch, T]`` twice to a scalar; the peer teaches and is not taught by it."""
    taught, target = logits.log_softmax(-1), peer_logits.detach().log_softmax(-1)
    if weights is None:
        return functional.kl_div(taught, target, reduction="batchmean", log_target=True)
    return sample_mean((target.exp() * (target - taught)).sum(-1), weights)


@dataclass(frozen=True)
class MutualWeights:
    """The keys of :func:`weighted_mutual_loss`, one for each side."""

    student_label_weight: float = setting(
        0.5,
        "in [0, 1]",
        "Strategy fml: what labels count for in the loss of the network that travels; the rest is its peer's.",
    )
    teacher_label_weight: float = setting(
        0.5,
        "in [0, 1]",
        "Strategy fml: what labels count for in the loss of the network that stays; the rest is its peer's.",
    )


def weighted_mutual_loss(
    logits: Tensor, peer_logits: Tensor, labels: Tensor, label_weight: float, weights: Tensor | None = None
) -> Tensor:
    """One side of mutual learning: ``w CE + (1 - w) KL(p_peer || p)`` (FML, algorithm 1; Zhang et al., CVPR 2018).

    Args:
        logits: ``[batch, T]``.
        peer_logits: ``[batch, T]`` of the other network, which is not taught by this loss.
        labels: label indices ``[batch]``.
        label_weight: ``w``; FML's alpha for the network that stays, beta for the one that travels.
        weights: as of :func:`sample_mean`.

    Returns:
        Scalar mean over the batch.
    """
    own_loss = label_cross_entropy(logits, labels, weights)
    return label_weight * own_loss + (1 - label_weight) * peer_divergence(logits, peer_logits, weights)


def matching_gap(
    hidden: Tensor,
    peer_hidden: Tensor,
    attention: Mapping[str, Tensor],
    peer_attention: Mapping[str, Tensor],
    weights: Tensor | None = None,
) -> Tensor:
    """``MSE(H, H_peer) + MSE(A, A_peer)``, the peer detached (FedKD, eq. 3-4); a scalar.

    Args:
        hidden: ``[batch, h]``.
        peer_hidden: ``[batch, h]``, projected to the same width.
        attention: name to weights ``[batch, keys]``.
        peer_attention: the peer's; maps over other numbers of keys say nothing about each other and are left out.
        weights: as of :func:`sample_mean`.
    """
    gap = _squared_gap(hidden, peer_hidden, weights)
    for name, own in attention.items():
        if name in peer_attention and peer_attention[name].shape == own.shape:
            gap = gap + _squared_gap(own, peer_attention[name], weights)
    return gap


def _squared_gap(values: Tensor, peer_values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean squared difference ``[batch, width]`` twice to a scalar; the peer is detached."""
    if weights is None:
        return functional.mse_loss(values, peer_values.detach())
    return sample_mean((values - peer_values.detach()).pow(2).mean(-1), weights)


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
        # Out of place: torch.func may run this for many networks at once.
        touched = torch.zeros(table.shape[0], dtype=torch.bool, device=table.device).scatter(0, ids.flatten(), True)
        # Not times 0: what is not a number in another row would stay so.
        parts.append(torch.where(touched.unsqueeze(1), table, 0.0).pow(2).sum())
    return torch.stack(parts).sum()
