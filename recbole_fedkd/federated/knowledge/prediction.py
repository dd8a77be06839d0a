"""Predictions: some of what a client's network says goes up, what a hidden model of the server learns of all comes down."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recbole_fedkd.distillation.hidden_model import learned, said_to, started
from recbole_fedkd.distillation.knowledge import class_sums
from recbole_fedkd.federated.aggregate import Fold, LatestOfEach
from recbole_fedkd.federated.knowledge.base import Arrays, SumsByItem, Tensors, register_knowledge
from recbole_fedkd.federated.message import ArraySpec
from recbole_fedkd.federated.task import Step
from recbole_fedkd.registry import setting

_SAMPLED = 0x97F
"""Parts the seeds of what is sampled from all other seeds of a run."""


@dataclass(frozen=True)
class PredictionSettings:
    """The keys of :class:`PredictionKnowledge`."""

    predicted_share: float = setting(
        0.5,
        "in (0, 1]",
        "Knowledge prediction: share of the items that a client has met of which it tells its prediction.",
    )
    swapped_share: float = setting(
        0.1, "in [0, 1]", "Knowledge prediction: share of them whose predictions are swapped with those of others."
    )
    hidden_model_size: int = setting(16, "in [1, 1024]", "Knowledge prediction: width of the server's model.")
    hidden_model_epochs: int = setting(
        5, ">= 1", "Knowledge prediction: passes of the server over the predictions in a round."
    )
    hidden_model_rate: float = setting(0.01, "> 0", "Knowledge prediction: learning rate of the server's model (Adam).")
    told_items: int = setting(
        200, ">= 1", "Knowledge prediction: items of which the server tells a client what its model says."
    )


@register_knowledge
class PredictionKnowledge(SumsByItem):
    """Predictions up, soft labels down, no model in either direction (PTF-FedRec: Yuan et al., ICDE 2024).

    Up: ``predictions`` ``[I, T]``, the mean label distribution of some of the items that the client has met (its drawn
    negatives among them), some of them swapped; zeros for all others. The server trains a model of its own on the latest of
    everybody (``distillation/hidden_model.py``). Down: what that says of ``told_items`` items, in the same form.

    To the server a client is one user: it is made for ``partition=user``. Clients are taught on samples of their own batches
    whose items they are told of; the paper adds those items to their samples. What is sampled and swapped follows from the
    run's seed, and hides nothing from a server that knows it.
    """

    name = "prediction"
    settings_type = PredictionSettings

    def sums(self, step: Step, classes: Tensor, count: int) -> dict[str, Tensor]:
        """Sums of label distributions ``[count, T]`` and samples ``[count]``."""
        assert step.logits is not None
        sums, seen = class_sums(step.logits.softmax(-1), classes, count)
        return {"sums": sums, "seen": seen}

    def upload(self, collected: Tensors, first: bool) -> Arrays:
        """Of every item that the client has met; see :meth:`disguised`."""
        means = collected["sums"] / collected["seen"].clamp(min=1).unsqueeze(-1)
        return {"predictions": means.float().cpu().numpy()}

    def disguised(self, arrays: Arrays, client: int, round_index: int) -> Arrays:
        """A sample of them, some swapped."""
        settings, seed = self.settings, [self.sizes.seed, client, round_index, _SAMPLED]
        generator = np.random.default_rng(np.random.SeedSequence(seed))
        return {
            "predictions": sampled(arrays["predictions"], settings.predicted_share, settings.swapped_share, generator)
        }

    def upload_arrays(self) -> dict[str, ArraySpec]:
        """One table."""
        return {"predictions": ArraySpec((self.sizes.items, self.sizes.labels))}

    def empty(self, state: Tensors) -> Fold:
        """Everybody's latest."""
        shape = self.sizes.clients, self.sizes.items, self.sizes.labels
        return LatestOfEach({"predictions": state.get("predictions", torch.zeros(shape))})

    def step(self, state: Tensors, statistics: Tensors) -> dict[str, Tensor]:
        """The server's model learns from them."""
        sizes, settings, predictions = self.sizes, self.settings, statistics["predictions"].clamp(0, 1)
        rounds = int(state["rounds"]) if "rounds" in state else 0
        generator = torch.Generator().manual_seed(sizes.seed + rounds)
        names = ("clients", "items", "biases")
        model = {name: state[name] for name in names if name in state}
        model = model or started(sizes.clients, sizes.items, sizes.labels, settings.hidden_model_size, generator)
        model = learned(model, predictions, settings.hidden_model_epochs, settings.hidden_model_rate, generator)
        return {**model, "predictions": predictions, "rounds": torch.tensor(rounds + 1)}

    def download_arrays(self) -> dict[str, ArraySpec]:
        """One table."""
        return self.upload_arrays()

    def download(self, state: Tensors, client: int, round_index: int) -> Arrays:
        """What the server's model says of some items; nothing before it has learned."""
        if "clients" not in state:
            return {}
        known = (state["predictions"].sum(-1) > 0).sum(0)
        return {"predictions": said_to(state, client, known, self.settings.told_items).numpy()}

    def understood(self, received: Tensors, own: Tensors, fresh: bool) -> dict[str, Tensor]:
        """Logits ``teacher`` ``[I, T]`` and which there are, ``known`` ``[I]``."""
        predictions = received["predictions"]
        return {"teacher": predictions.clamp(min=1e-6).log(), "known": predictions.sum(-1) > 0}


def sampled(
    table: NDArray[np.generic], share: float, swapped: float, generator: np.random.Generator
) -> NDArray[np.generic]:
    """A share of the rows of a table ``[I, T]`` that are not zero, at least one; a share of those change places in pairs."""
    rows = np.flatnonzero(table.any(1))
    kept = generator.permutation(rows)[: max(1, round(share * len(rows)))]
    pairs = min(round(swapped * len(kept) / 2), len(kept) // 2)
    predictions = table[kept]
    predictions[:pairs], predictions[pairs : 2 * pairs] = table[kept[pairs : 2 * pairs]], table[kept[:pairs]]
    disguised = np.zeros_like(table)
    disguised[kept] = predictions
    return disguised
