"""Label knowledge: mean logits per label (AFD: Chen et al. 2021; FD: Jeong et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.distillation.knowledge import (
    AGGREGATIONS,
    Aggregation,
    label_means,
    label_sums,
    leave_one_out_teachers,
)
from recbole_fedkd.federated.aggregate import Fold, LatestOfEach
from recbole_fedkd.federated.knowledge.base import Arrays, Knowledge, Sizes, Tensors, register_knowledge
from recbole_fedkd.federated.message import ArraySpec
from recbole_fedkd.federated.task import Step
from recbole_fedkd.registry import read_settings, setting


@dataclass(frozen=True)
class LabelSettings:
    """The key of :class:`LabelKnowledge`, and those of the aggregation that it names."""

    aggregation: str = setting(
        "uniform",
        "one of <aggregations>",
        "How a teacher averages the other clients' label knowledge: alike, by samples, by similarity to its own, or robustly.",
    )


@register_knowledge
class LabelKnowledge(Knowledge):
    """Mean logits per label, ``T x T`` numbers (AFD, FD).

    Up: ``means`` ``[T, T]`` and ``counts`` ``[T]`` (0: absent). Down: ``teacher`` ``[T, T]`` and ``known`` ``[T]``, made of
    the other clients. A client that is silent is remembered.
    """

    name = "label"
    settings_type = LabelSettings

    def __init__(self, settings: LabelSettings, sizes: Sizes, aggregation: Aggregation | None = None) -> None:
        super().__init__(settings, sizes)
        self.aggregation = aggregation or AGGREGATIONS[settings.aggregation]()

    @classmethod
    def of(cls, config: Any, sizes: Sizes) -> Self:
        """With the aggregation that the config names, and its keys."""
        settings = read_settings(cls.settings_type, config)
        kind = AGGREGATIONS[settings.aggregation]
        return cls(settings, sizes, kind(read_settings(kind.settings_type, config)))

    def collect(self, step: Step) -> dict[str, Tensor]:
        """Sums of logits ``[T, T]`` and counts ``[T]``."""
        assert step.logits is not None and step.labels is not None
        sums, counts = label_sums(step.logits, step.labels, self.sizes.labels)
        return {"sums": sums, "counts": counts}

    def collect_of_many(self, step: Step, clients: Tensor, count: int) -> dict[str, Tensor]:
        """Sums ``[count, T, T]`` and counts ``[count, T]``: every pair of client and label is a label of its own."""
        assert step.logits is not None and step.labels is not None
        labels = self.sizes.labels
        sums, counts = label_sums(step.logits, clients * labels + step.labels, count * labels)
        return {"sums": sums.view(count, labels, -1), "counts": counts.view(count, labels)}

    def upload(self, collected: Tensors, first: bool) -> Arrays:
        """Means and counts."""
        means = label_means(collected["sums"], collected["counts"])
        return {"means": means.cpu().numpy(), "counts": collected["counts"].int().cpu().numpy()}

    def upload_arrays(self) -> dict[str, ArraySpec]:
        """Means and counts."""
        labels = self.sizes.labels
        return {"means": ArraySpec((labels, labels)), "counts": ArraySpec((labels,), np.int32, counts=True)}

    def empty(self, state: Tensors) -> Fold:
        """Everybody's latest knowledge."""
        clients, labels = self.sizes.clients, self.sizes.labels
        nothing = {
            "means": torch.zeros(clients, labels, labels),
            "counts": torch.zeros(clients, labels, dtype=torch.int32),
        }
        return LatestOfEach({name: state.get(name, value) for name, value in nothing.items()})

    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """Every client's teacher, made of the others."""
        means, counts = statistics["means"], statistics["counts"]
        teachers, known = leave_one_out_teachers(means, counts, self.aggregation)
        return {"means": means, "counts": counts, "teacher": teachers, "known": known}

    def download_arrays(self) -> dict[str, ArraySpec]:
        """A teacher."""
        labels = self.sizes.labels
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
