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
    WeightedAggregation,
    class_sums,
    label_means,
    leave_one_out_teachers,
    teacher_of_others,
)
from recbole_fedkd.federated.aggregate import Fold, LatestOfEach, Sums, within
from recbole_fedkd.federated.knowledge.base import Arrays, Sizes, SumsByClass, Tensors, register_knowledge
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
class LabelKnowledge(SumsByClass):
    """Mean logits per label, ``T x T`` numbers (AFD, FD).

    Where the aggregation is additive, up go ``sums`` ``[T, T]`` (of weighted means) and ``weights`` ``[T]`` (0: absent), down
    their totals over the clients, the same for all: a client takes its own part off. Else up go ``means`` ``[T, T]`` and
    ``counts`` ``[T]``, down each client's own ``teacher`` ``[T, T]`` and ``known`` ``[T]``, made of the others. Where not
    everybody answers, a client that is silent is remembered.
    """

    name = "label"
    settings_type = LabelSettings
    elementwise = True

    def __init__(self, settings: LabelSettings, sizes: Sizes, aggregation: Aggregation | None = None) -> None:
        super().__init__(settings, sizes)
        self.aggregation = aggregation or AGGREGATIONS[settings.aggregation]()

    @classmethod
    def of(cls, config: Any, sizes: Sizes) -> Self:
        """With the aggregation that the config names, and its keys."""
        settings = read_settings(cls.settings_type, config)
        kind = AGGREGATIONS[settings.aggregation]
        return cls(settings, sizes, kind(read_settings(kind.settings_type, config)))

    def classes_of(self, step: Step) -> tuple[Tensor, int]:
        """Labels."""
        assert step.labels is not None
        return step.labels, self.sizes.labels

    def sums(self, step: Step, classes: Tensor, count: int) -> dict[str, Tensor]:
        """Sums of logits ``[count, T]`` and samples ``[count]``."""
        assert step.logits is not None
        sums, counts = class_sums(step.logits, classes, count)
        return {"sums": sums, "counts": counts}

    @property
    def needs_each(self) -> str | None:
        """An aggregation that needs all, or memory of those that are silent."""
        if not self.aggregation.additive:
            return f"aggregation={self.settings.aggregation}"
        return (
            None
            if self.sizes.everybody
            else "knowledge=label, which remembers who is silent (clients_per_round, min_clients),"
        )

    def without_effect(self, clients: int) -> str | None:
        """As the aggregation says."""
        return self.aggregation.without_effect(clients - 1)

    @property
    def same_for_all(self) -> bool:  # type: ignore[override]
        """Totals are."""
        return self.aggregation.additive

    def upload(self, collected: Tensors, first: bool) -> Arrays:
        """Means, or sums of them."""
        counts, how = collected["counts"], self.aggregation
        means = label_means(collected["sums"], counts)
        if not isinstance(how, WeightedAggregation):
            return {"means": means.cpu().numpy(), "counts": counts.int().cpu().numpy()}
        weights = how.weights(counts)
        sums = (weights.unsqueeze(-1) * means.double()).float()
        return {"sums": sums.cpu().numpy(), "weights": weights.to(how.weight_type).cpu().numpy()}

    def upload_arrays(self) -> dict[str, ArraySpec]:
        """Means, or sums of them."""
        labels, how = self.sizes.labels, self.aggregation
        if isinstance(how, WeightedAggregation):
            return {
                "sums": ArraySpec((labels, labels)),
                "weights": ArraySpec((labels,), _numpy(how.weight_type), counts=True),
            }
        return {"means": ArraySpec((labels, labels)), "counts": ArraySpec((labels,), np.int32, counts=True)}

    def empty(self, state: Tensors) -> Fold:
        """Totals, or everybody's latest knowledge."""
        if self.needs_each is None:
            return Sums(torch.float64)
        clients = self.sizes.clients
        nothing = {
            name: torch.from_numpy(np.zeros((clients, *spec.shape), spec.dtype))
            for name, spec in self.upload_arrays().items()
        }
        return LatestOfEach({name: state.get(f"latest_{name}", value) for name, value in nothing.items()})

    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """Totals, or every client's teacher, made of the others."""
        if self.needs_each is None:
            return dict(statistics)
        latest = {f"latest_{name}": value for name, value in statistics.items()}
        if self.same_for_all:
            return latest | {name: value.double().sum(0) for name, value in statistics.items()}
        teachers, known = leave_one_out_teachers(statistics["means"], statistics["counts"], self.aggregation)
        return latest | {"teacher": teachers, "known": known}

    def download_arrays(self) -> dict[str, ArraySpec]:
        """Totals, or a teacher."""
        labels, how = self.sizes.labels, self.aggregation
        if isinstance(how, WeightedAggregation):
            return {
                "sums": ArraySpec((labels, labels), np.float64),
                "weights": ArraySpec((labels,), _numpy(how.weight_type)),
            }
        return {"teacher": ArraySpec((labels, labels)), "known": ArraySpec((labels,), np.bool_)}

    def download(self, state: Tensors, client: int, round_index: int) -> Arrays:
        """Totals, or the client's teacher."""
        arrays = self.download_arrays()
        if not arrays.keys() <= state.keys():
            return {}
        own = {name: state[name] if self.same_for_all else state[name][client] for name in arrays}
        return {name: within(value.cpu().numpy(), arrays[name].dtype) for name, value in own.items()}

    def understood(self, received: Tensors, own: Tensors, fresh: bool) -> dict[str, Tensor]:
        """The teacher that the other clients make."""
        if "sums" not in received:
            return dict(received)
        sums, weights = received["sums"], received["weights"]
        nothing = torch.zeros_like(sums), torch.zeros_like(weights)
        own_part = (own["sums"], own["weights"]) if "sums" in own else nothing
        teacher, known = teacher_of_others(sums, weights, *own_part)
        return {"teacher": teacher.float(), "known": known}

    def teacher(self, received: Tensors, step: Step) -> tuple[Tensor | None, Tensor | None]:
        """The row of the sample's label."""
        if "teacher" not in received or step.labels is None:
            return None, None
        return received["teacher"][step.labels], received["known"][step.labels]


def _numpy(dtype: torch.dtype) -> type[np.generic]:
    kind: type[np.generic] = torch.empty(0, dtype=dtype).numpy().dtype.type
    return kind
