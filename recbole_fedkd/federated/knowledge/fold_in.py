"""Item factors whose fold-in teaches: sums per item first, then, where it is asked for, label knowledge on top of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from recbole_fedkd.distillation.exchange import FactorSettings
from recbole_fedkd.federated.aggregate import Fold
from recbole_fedkd.federated.knowledge.base import Arrays, Sizes, Tensors, register_knowledge
from recbole_fedkd.federated.knowledge.factors import FactorKnowledge
from recbole_fedkd.federated.knowledge.label import LabelKnowledge
from recbole_fedkd.federated.message import ArraySpec
from recbole_fedkd.federated.task import Step
from recbole_fedkd.registry import read_settings, setting


@dataclass(frozen=True)
class FoldInSettings(FactorSettings):
    """The keys of item factors, and of what their fold-in teaches."""

    fold_in_weight: float = setting(
        1.0, ">= 0", "Knowledge fold_in: weight of the student's cross-entropy to what the fold-in says of a pair."
    )
    unrated_pairs: int = setting(
        0,
        "in [0, 1000]",
        "Knowledge fold_in: random items beside every row on which the fold-in teaches, and no label does.",
    )
    label_knowledge: bool = setting(
        False,
        "",
        "Knowledge fold_in: once the sums are exchanged, clients exchange mean logits per label too, as in AFD.",
    )


@register_knowledge
class FoldInKnowledge(FactorKnowledge):
    """Item factors, of which every client makes a teacher of its attentive student, pair by pair (``TaughtTask``).

    The exchange is that of ``factors``; after it, with ``label_knowledge``, that of ``label``, whose teacher has the terms
    ``gamma`` and ``alpha`` of the joint loss.
    """

    name = "fold_in"
    settings_type = FoldInSettings

    def __init__(self, settings: FoldInSettings, sizes: Sizes, labels: LabelKnowledge | None = None) -> None:
        super().__init__(settings, sizes)
        self.labels = labels
        self.of_network = labels is not None

    @classmethod
    def of(cls, config: Any, sizes: Sizes) -> Self:
        """With label knowledge, where the config has it."""
        settings = read_settings(cls.settings_type, config)
        return cls(settings, sizes, LabelKnowledge.of(config, sizes) if settings.label_knowledge else None)

    @property
    def needs_each(self) -> str | None:  # type: ignore[override]
        """As label knowledge says."""
        return self.labels.needs_each if self.labels is not None else None

    @property
    def same_for_all(self) -> bool:  # type: ignore[override]
        """As label knowledge says."""
        return self.labels is None or self.labels.same_for_all

    def collect(self, step: Step) -> dict[str, Tensor]:
        """What label knowledge is made of."""
        return self.labels.collect(step) if self.labels is not None else {}

    def upload(self, collected: Tensors, first: bool) -> Arrays:
        """A stage's sums, or label knowledge once there is none left."""
        if any(stage in collected for stage in self.settings.stages):
            beside = {name for stage in self.settings.stages for name in self.settings.beside(stage)}
            sums = {name: value for name, value in collected.items() if name in {*self.settings.stages, *beside}}
            return super().upload(sums, first)
        return self.labels.upload(collected, first) if self.labels is not None else {}

    def upload_arrays(self) -> dict[str, ArraySpec]:
        """Those of both."""
        return {**super().upload_arrays(), **self._of_labels("upload_arrays")}

    def download_arrays(self) -> dict[str, ArraySpec]:
        """Those of both."""
        return {**super().upload_arrays(), **self._of_labels("download_arrays")}

    def _of_labels(self, which: str) -> dict[str, ArraySpec]:
        arrays: Mapping[str, ArraySpec] = getattr(self.labels, which)() if self.labels is not None else {}
        return {name: ArraySpec(spec.shape, spec.dtype, spec.counts, optional=True) for name, spec in arrays.items()}

    def empty(self, state: Tensors) -> Fold:
        """Of what clients say next."""
        if self.labels is not None and self.next_stage(state) is None:
            return self.labels.empty(state)
        return super().empty(state)

    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """Totals of all stages so far, and label knowledge."""
        if self.labels is not None and self.next_stage(state) is None:
            statistics = self.labels.step(state, statistics)
        return super().step(state, statistics)

    def download(self, state: Tensors, client: int, round_index: int) -> Arrays:
        """Totals that the client does not have, and label knowledge."""
        known = self.labels.download(state, client, round_index) if self.labels is not None else {}
        return {**super().download(state, client, round_index), **known}

    def understood(self, received: Tensors, own: Tensors, fresh: bool) -> dict[str, Tensor]:
        """Totals, and the label teacher that the other clients make."""
        if self.labels is None:
            return super().understood(received, own, fresh)
        of_labels = {name: value for name, value in received.items() if name in self.labels.download_arrays()}
        rest = {name: value for name, value in received.items() if name not in of_labels}
        return {**rest, **self.labels.understood(of_labels, own, fresh)}

    def teacher(self, received: Tensors, step: Step) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        """The label teacher."""
        return self.labels.teacher(received, step) if self.labels is not None else (None, None)
