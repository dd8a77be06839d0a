"""Prototypes: the mean hidden state of the samples of an item, or of a label (FedProto: Tan et al., AAAI 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.distillation.knowledge import class_sums
from recbole_fedkd.distillation.losses import sample_mean
from recbole_fedkd.federated.aggregate import Fold, Sums
from recbole_fedkd.federated.knowledge.base import Arrays, SumsByClass, Tensors, register_knowledge
from recbole_fedkd.federated.message import ArraySpec
from recbole_fedkd.federated.task import Step
from recbole_fedkd.registry import setting


@dataclass(frozen=True)
class PrototypeSettings:
    """The keys of :class:`PrototypeKnowledge`."""

    prototype_of: str = setting(
        "item",
        "one of item|label",
        "Knowledge prototype: what has a prototype, every item, or, as FedProto has it, every label.",
    )
    prototype_weight: float = setting(
        1.0, ">= 0", "Knowledge prototype: weight lambda of a hidden state's squared distance to its prototype."
    )


@register_knowledge
class PrototypeKnowledge(SumsByClass):
    """The mean hidden state of the samples of an item or a label, which clients pull theirs towards.

    Local objective: ``L + lambda |f(x) - C_j|^2 / h`` of the sample's class ``j``, ``f(x)`` the last hidden layer, ``h`` wide
    (FedProto, its local objective, sample by sample as its published code has it). Server: ``C_j`` is the
    mean over the samples of all clients (its global aggregation). Classes are ``P`` items, or labels as in the paper.

    Up: ``sums`` ``[P, h]`` and ``seen`` ``[P]``. Down: ``prototypes`` ``[P, h]`` and ``known`` ``[P]``, the same for all.
    """

    name = "prototype"
    settings_type = PrototypeSettings
    needs_each = None
    same_for_all = True
    reads_hidden = True
    pads = True

    @property
    def _classes(self) -> int:
        return self.sizes.items if self.settings.prototype_of == "item" else self.sizes.labels

    def classes_of(self, step: Step) -> tuple[Tensor, int]:
        """Items or labels."""
        owner = step.items if self.settings.prototype_of == "item" else step.labels
        assert owner is not None
        return owner, self._classes

    def sums(self, step: Step, classes: Tensor, count: int) -> dict[str, Tensor]:
        """Sums of hidden states ``[count, h]`` and samples ``[count]``."""
        assert step.hidden is not None
        sums, seen = class_sums(step.hidden, classes, count)
        return {"sums": sums, "seen": seen}

    def upload(self, collected: Tensors, first: bool) -> Arrays:
        """Both."""
        return {"sums": collected["sums"].float().cpu().numpy(), "seen": collected["seen"].int().cpu().numpy()}

    def upload_arrays(self) -> dict[str, ArraySpec]:
        """Both."""
        classes = self._classes
        return {"sums": ArraySpec((classes, self.sizes.hidden)), "seen": ArraySpec((classes,), np.int32, counts=True)}

    def empty(self, state: Tensors) -> Fold:
        """Totals of the round."""
        return Sums()

    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """Means of what somebody has seen."""
        seen = statistics["seen"]
        return {"prototypes": statistics["sums"] / seen.clamp(min=1).unsqueeze(-1), "known": seen > 0}

    def possible(self, statistics: Tensors) -> Tensors:
        """Counts are not negative."""
        return {**statistics, "seen": statistics["seen"].clamp(min=0)}

    def download_arrays(self) -> dict[str, ArraySpec]:
        """Prototypes, and which there are."""
        classes = self._classes
        return {"prototypes": ArraySpec((classes, self.sizes.hidden)), "known": ArraySpec((classes,), np.bool_)}

    def download(self, state: Tensors, client: int, round_index: int) -> Arrays:
        """The same to everybody."""
        return {name: state[name].cpu().numpy() for name in self.download_arrays() if name in state}

    def teacher(self, received: Tensors, step: Step) -> tuple[None, None]:
        """None: hidden states are taught, and no logits."""
        return None, None

    def penalty(self, received: Tensors, step: Step) -> Tensor | None:
        """``lambda |f(x) - C_j|^2 / h``, the mean over the batch; nothing of a class without a prototype."""
        if "prototypes" not in received or not self.settings.prototype_weight:
            return None
        assert step.hidden is not None
        classes, _ = self.classes_of(step)
        distance = (step.hidden - received["prototypes"][classes]).pow(2).mean(-1)
        weight: float = self.settings.prototype_weight
        return weight * sample_mean(distance * received["known"][classes], step.weights)


def hidden_width(network: torch.nn.Module) -> int:
    """Width ``h`` of the last hidden layer of an attentive network; 0 of one that tells none."""
    return int(getattr(getattr(network, "backbone", None), "hidden_width", 0))
