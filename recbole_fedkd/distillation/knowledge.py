"""Knowledge: what a client knows about each label or each item, and the teacher that the other clients make of it.

Label knowledge: every client sends, per label ``t``, the mean logit vector of its samples with that label (FD: Jeong et
al. 2018; AFD: ``S_t^k``). A label without a sample is absent: its count is 0 and no average ever reads its mean.

Item knowledge: sums and counts per item, so that the server needs their totals alone and a client takes its own part off.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recbole_fedkd.registry import NoSettings, Registry, setting


def class_sums(values: Tensor, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum what there is of the samples of each class, such as their logits by label or item.

    Args:
        values: ``[samples, d]``.
        classes: indices ``[samples]``.
        count: number of classes ``P``.

    Returns:
        Sums ``[P, d]`` in double precision, and samples ``[P]``.
    """
    sums = torch.zeros(count, values.shape[1], dtype=torch.float64, device=values.device)
    sums.index_add_(0, classes, values.double())
    return sums, torch.bincount(classes, minlength=count)


def label_means(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean logit vector per label, ``[T, T]`` single precision; the row of an absent label is 0 and means nothing."""
    return (sums / counts.clamp(min=1).unsqueeze(-1)).float()


class Aggregation(ABC):
    """How a teacher averages the other clients' label knowledge.

    Args:
        settings: of ``settings_type``; None: its defaults.

    Attributes:
        name: value of the config key ``aggregation``.
        additive: whether sums over the clients are all that it needs; if not, it needs every client's own.
        settings_type: dataclass of its keys.
    """

    name: str
    additive = False
    settings_type: type = NoSettings

    def __init__(self, settings: Any = None) -> None:
        self.settings = settings if settings is not None else self.settings_type()

    @abstractmethod
    def teachers(self, means: Tensor, counts: Tensor) -> Tensor:
        """Every client's teacher ``[K, T, T]`` in double precision, made of the other clients only.

        Args:
            means: ``[K, T, T]``, mean logits per client and label.
            counts: ``[K, T]``, samples per client and label; 0 marks an absent label, whose mean is ignored.
        """

    def without_effect(self, others: int) -> str | None:
        """What a setting does not do where a teacher is made of so many ``others``; None: they all do something."""
        return None


AGGREGATIONS: Registry[type[Aggregation]] = Registry("aggregation", "aggregations")
register_aggregation = AGGREGATIONS.register


class WeightedAggregation(Aggregation):
    """A mean with weights that a client knows by itself, so that sums of weights and of weighted means are enough.

    Attributes:
        weight_type: of the weights on the wire.
    """

    additive = True
    weight_type = torch.float64

    @abstractmethod
    def weights(self, counts: Tensor) -> Tensor:
        """What a client counts for in the mean of a label, of its samples ``counts [..., T]``, in double; 0 without."""

    def teachers(self, means: Tensor, counts: Tensor) -> Tensor:
        """What every client makes of the totals."""
        weights = self.weights(counts)
        sums = weights.unsqueeze(-1) * torch.where((counts > 0).unsqueeze(-1), means.double(), 0.0)
        return teacher_of_others(sums.sum(0), weights.sum(0), sums, weights)[0]


def teacher_of_others(sums: Tensor, weights: Tensor, own_sums: Tensor, own_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher ``[..., T, T]`` and the mask ``[..., T]`` of known labels that are left of totals without one's own part.

    In double precision the totals of a few thousand clients hold single precision without loss, as good as always, so that
    nothing of the own part is left.

    Args:
        sums: weighted means of all clients ``[T, T]``, double precision.
        weights: weights of all clients ``[T]``.
        own_sums: a client's own part of the sums ``[..., T, T]``.
        own_weights: and of the weights ``[..., T]``.
    """
    left = weights.double() - own_weights.double()
    known = left > 1e-9 * weights.double()  # sums of weights that are no whole numbers leave something of rounding
    teacher = (sums.double() - own_sums.double()) / torch.where(known, left, 1.0).unsqueeze(-1)
    return torch.where(known.unsqueeze(-1), teacher, 0.0), known


@register_aggregation
class Uniform(WeightedAggregation):
    """Clients alike (FD: Jeong et al.)."""

    name = "uniform"
    weight_type = torch.int32

    def weights(self, counts: Tensor) -> Tensor:
        """1."""
        return (counts > 0).double()


@register_aggregation
class Weighted(WeightedAggregation):
    """Clients by their number of samples of the label."""

    name = "weighted"
    weight_type = torch.int32

    def weights(self, counts: Tensor) -> Tensor:
        """The samples."""
        return counts.double()


@dataclass(frozen=True)
class AttentiveSettings:
    """The key of :class:`Attentive`."""

    attention_temperature: float = setting(
        0.1, "> 0", "Temperature of aggregation attentive; small: only the most similar clients count."
    )


@register_aggregation
class Attentive(Aggregation):
    """Clients by the similarity of their knowledge to one's own, see :func:`similarity_weights`."""

    name = "attentive"
    settings_type = AttentiveSettings

    def teachers(self, means: Tensor, counts: Tensor) -> Tensor:
        """Weighted means."""
        present = counts > 0
        similarity = similarity_weights(means, present, self.settings.attention_temperature)
        weights = heard_from(counts).double() * similarity.unsqueeze(-1)
        values = torch.where(present.unsqueeze(-1), means.double(), 0.0)
        sums = torch.einsum("kjt,jts->kts", weights, values)
        return sums / weights.sum(1).clamp(min=1e-300).unsqueeze(-1)


@register_aggregation
class Median(Aggregation):
    """Each logit by itself, so that a few wrong clients move it little."""

    name = "median"

    def teachers(self, means: Tensor, counts: Tensor) -> Tensor:
        """Medians; of an even number of clients the mean of the middle two."""
        return _ordered_means(means, counts > 0, 0.5)


@dataclass(frozen=True)
class TrimSettings:
    """The key of what leaves a share of the clients out."""

    trim_ratio: float = setting(
        0.1,
        "in [0, 0.5)",
        "Share of the clients that trimmed_mean leaves out at each end, and that other robust means take for wrong.",
    )


@register_aggregation
class TrimmedMean(Aggregation):
    """As :class:`Median`, with less left out."""

    name = "trimmed_mean"
    settings_type = TrimSettings

    def teachers(self, means: Tensor, counts: Tensor) -> Tensor:
        """Means of what lies between."""
        return _ordered_means(means, counts > 0, self.settings.trim_ratio)

    def without_effect(self, others: int) -> str | None:
        """A share of less than one client is nobody."""
        share = self.settings.trim_ratio
        if int(others * share):
            return None
        return f"trim_ratio={share} of {others} other client(s) is less than one: aggregation={self.name} leaves nobody out"


@register_aggregation
class Krum(TrimmedMean):
    """The one other client whose knowledge is nearest to that of the others (Blanchard et al., NIPS 2017)."""

    name = "krum"

    def teachers(self, means: Tensor, counts: Tensor) -> Tensor:
        """Its means; of labels that it does not have, those of the next one that has them."""
        return self._nearest(means, counts, lambda others: 1)

    def _nearest(self, means: Tensor, counts: Tensor, kept: Callable[[int], int]) -> Tensor:
        """Means over so many others of the lowest scores that have a label, given how many others there are."""
        present = counts > 0
        values = torch.where(present.unsqueeze(-1), means.double(), 0.0)
        distances = _distances(values, present)
        teachers = torch.zeros_like(values)
        for client in range(len(means)):
            others = torch.tensor([other for other in range(len(means)) if other != client], dtype=torch.long)
            scores = krum_scores(distances[others][:, others], int(len(others) * self.settings.trim_ratio))
            order = others[scores.argsort(stable=True)]
            have = present[order]
            heard = have & (have.long().cumsum(0) <= kept(len(others)))
            sums = (values[order] * heard.unsqueeze(-1)).sum(0)
            teachers[client] = sums / heard.sum(0).clamp(min=1).unsqueeze(-1)
        return teachers


@register_aggregation
class MultiKrum(Krum):
    """As :class:`Krum`, of all others but as many as may be wrong."""

    name = "multi_krum"

    def teachers(self, means: Tensor, counts: Tensor) -> Tensor:
        """Their means."""
        return self._nearest(means, counts, lambda others: others - int(others * self.settings.trim_ratio))


def krum_scores(distances: Tensor, wrong: int) -> Tensor:
    """Sum of the squared distances of each of ``n`` clients to its ``n - wrong - 2`` nearest, at least one; ``[n]``.

    Args:
        distances: squared, ``[n, n]``, alike both ways but for rounding.
        wrong: how many of them may be wrong.
    """
    count = len(distances)
    # Where one nearest counts, two that are each other's have one score: rounding must not say which of them comes first.
    distances = (distances + distances.T) / 2
    itself = torch.eye(count, dtype=torch.bool, device=distances.device)
    others = distances.masked_fill(itself, torch.inf).sort(1).values[:, : max(count - wrong - 2, 1)]
    return torch.where(others.isinf(), 0.0, others).sum(1)


def _distances(values: Tensor, present: Tensor) -> Tensor:
    """Squared distances between clients' means ``[K, T, T]``, on average over the labels that both have ``[K, K]``."""
    squares, have = values.square().sum(-1), present.double()
    products = torch.einsum("kts,jts->kj", values, values)
    both = have @ have.T
    summed = squares @ have.T + have @ squares.T - 2 * products
    return torch.where(both > 0, summed.clamp(min=0) / both.clamp(min=1), summed.max().clamp(min=1.0))


_AT_A_TIME = 2**22
"""Numbers that are ordered at a time."""


def leave_one_out_teachers(means: Tensor, counts: Tensor, aggregation: Aggregation) -> tuple[Tensor, Tensor]:
    """Build each client's teacher from the other clients only (AFD: ``S^{/k}``; FD).

    Args:
        means: ``[K, T, T]``, mean logits per client and label.
        counts: ``[K, T]``, samples per client and label; 0 marks an absent label, whose mean is ignored.
        aggregation: how clients are averaged.

    Returns:
        Teachers ``[K, T, T]`` and the mask ``[K, T]`` of the labels that at least one other client holds; rows outside
        the mask are 0.
    """
    present = (counts > 0).int()
    known = present.sum(0) > present
    teachers = aggregation.teachers(means, counts)
    return torch.where(known.unsqueeze(-1), teachers, 0.0).float(), known


def heard_from(counts: Tensor) -> Tensor:
    """Bool ``[K, K, T]``, from counts ``[K, T]``: client k hears label t from client j.

    The other clients are taken directly, not as total minus own: one client's absence must change nothing else.
    """
    others = ~torch.eye(len(counts), dtype=torch.bool, device=counts.device)
    return others.unsqueeze(-1) & (counts > 0)


def similarity_weights(means: Tensor, present: Tensor, temperature: float) -> Tensor:
    """How much each client listens to each other: ``softmax_j(cos(S_k, S_j) / temperature)``, ``[K, K]``, 0 for itself.

    The cosine is taken over the labels that both hold, of logits whose mean over the T outputs is 0 (softmax does not see
    it); clients without a common label count as dissimilar.

    Args:
        means: ``[K, T, T]``.
        present: bool ``[K, T]``.
        temperature: of the softmax.
    """
    centred = means.double() - means.double().mean(-1, keepdim=True)
    centred = torch.where(present.unsqueeze(-1), centred, 0.0)
    products = torch.einsum("kts,jts->kj", centred, centred)
    squared = centred.pow(2).sum(-1)
    common = torch.einsum("kt,jt->kj", squared, present.double())  # |S_k|^2 over the labels that j holds too
    cosine = products / (common * common.T).sqrt().clamp(min=1e-12)
    itself = torch.eye(len(means), dtype=torch.bool, device=means.device)
    return (cosine / temperature).masked_fill(itself, -torch.inf).softmax(1) if len(means) > 1 else cosine * 0.0


def _ordered_means(means: Tensor, present: Tensor, trim: float) -> Tensor:
    """For each client the mean of each logit over the others, without the share ``trim`` at each end; 0.5: the median.

    All are sorted once; the others of a client are all but the place that is its own. Clients are taken some at a time, so that
    memory is linear in their number.

    Args:
        means: ``[K, T, T]``.
        present: bool ``[K, T]``, the labels that a client has.
        trim: share of the others.
    """
    clients = len(means)
    ordered, holder = means.double().masked_fill(~present.unsqueeze(-1), torch.inf).sort(0)
    numbers = torch.arange(clients, device=means.device)
    own_place = torch.empty_like(holder).scatter_(0, holder, numbers.view(-1, 1, 1).expand_as(holder))
    ranks = numbers[:-1]
    averages = torch.zeros_like(means, dtype=torch.float64)
    for some in numbers.split(max(1, _AT_A_TIME // means.numel())):
        count = present.sum(0) - present[some].long()
        # At least one (odd) or two (even count) in the middle always stay.
        cut = torch.minimum((count * trim).floor().long(), (count - 1).clamp(min=0) // 2)
        rank = ranks.view(1, -1, 1, 1)
        others = rank + (rank >= own_place[some].unsqueeze(1))
        values = ordered.unsqueeze(0).expand(len(some), -1, -1, -1).gather(1, others)
        kept = (ranks.view(1, -1, 1) >= cut.unsqueeze(1)) & (ranks.view(1, -1, 1) < (count - cut).unsqueeze(1))
        total = values.masked_fill(~kept.unsqueeze(-1), 0.0).sum(1)
        averages[some] = total / kept.sum(1).clamp(min=1).unsqueeze(-1)
    return averages


def item_histograms(items: Tensor, labels: Tensor, item_count: int, label_count: int) -> Tensor:
    """Samples per item and label ``[I, T]``, from items ``[samples]`` and label indices ``[samples]``."""
    cells = torch.bincount(items * label_count + labels, minlength=item_count * label_count)
    return cells.view(item_count, label_count)


def log_prior(histograms: Tensor, strength: float) -> Tensor:
    """Log-probability of each label of an item before its user is known, ``[..., I, T]``.

    ``log((n_it + m g_t) / (n_i + m))`` with the shares ``g`` of the labels over all items: an item without a sample has the
    prior of all.

    Args:
        histograms: samples per item and label ``[..., I, T]``.
        strength: ``m``, the number of samples that the shares of all items are worth.
    """
    counts = histograms.double()
    shares = (counts.sum(-2, keepdim=True) + 1.0) / (counts.sum((-2, -1), keepdim=True) + counts.shape[-1])
    return ((counts + strength * shares) / (counts.sum(-1, keepdim=True) + strength)).log().float()
