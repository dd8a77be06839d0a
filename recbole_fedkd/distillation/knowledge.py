"""Label knowledge: what a client knows about each label, and the teacher that the other clients make of it.

Every client sends, per label ``t``, the mean logit vector of its samples with that label (FD: Jeong et al. 2018; AFD:
``S_t^k``). A label without a sample is absent: its count is 0 and no average ever reads its mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

AGGREGATIONS = ("uniform", "weighted")


def label_sums(logits: Tensor, labels: Tensor, label_count: int) -> tuple[Tensor, Tensor]:
    """Sum the logits of the samples of each label.

    Args:
        logits: ``[samples, T]``.
        labels: label indices ``[samples]``.
        label_count: ``T``.

    Returns:
        Sums ``[T, T]`` (row ``t``: label ``t``) in double precision, and counts ``[T]``.
    """
    sums = torch.zeros(label_count, logits.shape[1], dtype=torch.float64, device=logits.device)
    sums.index_add_(0, labels, logits.double())
    return sums, torch.bincount(labels, minlength=label_count)


def label_means(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean logit vector per label, ``[T, T]`` single precision; the row of an absent label is 0 and means nothing."""
    return (sums / counts.clamp(min=1).unsqueeze(-1)).float()


def leave_one_out_teachers(means: Tensor, counts: Tensor, aggregation: str) -> tuple[Tensor, Tensor]:
    """Build each client's teacher from the other clients only (AFD: ``S^{/k}``; FD).

    Args:
        means: ``[K, T, T]``, mean logits per client and label.
        counts: ``[K, T]``, samples per client and label; 0 marks an absent label, whose mean is ignored.
        aggregation: ``uniform`` averages clients alike (Jeong), ``weighted`` by their number of samples of the label.

    Returns:
        Teachers ``[K, T, T]`` and the mask ``[K, T]`` of the labels that at least one other client holds; rows outside
        the mask are 0.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation '{aggregation}' is none of {', '.join(AGGREGATIONS)}")
    present = counts > 0
    weights = (counts if aggregation == "weighted" else present).double()
    # The other clients' sum is taken directly, not as total minus own: one client's absence must change nothing else.
    others = 1.0 - torch.eye(len(means), dtype=torch.float64, device=means.device)
    contributions = torch.where(present.unsqueeze(-1), means.double(), 0.0) * weights.unsqueeze(-1)
    sums = torch.einsum("kj,jts->kts", others, contributions)
    total = torch.einsum("kj,jt->kt", others, weights)
    known = total > 0
    teachers = torch.where(known.unsqueeze(-1), sums / total.clamp(min=1e-12).unsqueeze(-1), 0.0)
    return teachers.float(), known
