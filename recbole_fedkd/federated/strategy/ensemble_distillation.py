"""``feddf``: the server distils the clients' networks into their mean, on pairs without labels.

FedDF: Lin, Kong, Stich, Jaggi, NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from recbole_fedkd.federated.aggregate import EveryUpload, Fold
from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.strategy.base import ServerState, to_tensors
from recbole_fedkd.federated.strategy.federated_averaging import AveragingSettings, FederatedAveraging, parameter_of
from recbole_fedkd.federated.task import AttentiveTask, shuffled
from recbole_fedkd.registry import setting


@dataclass(frozen=True)
class EnsembleSettings(AveragingSettings):
    """The keys of :class:`EnsembleDistillation`."""

    server_epochs: int = setting(
        5, ">= 0", "Strategy feddf: passes of the server over its unlabelled pairs in a round; 0: fedavg."
    )
    unlabelled_pairs: int = setting(
        2048, "in [1, 1000000]", "Strategy feddf: pairs of made-up users and items on which the server distils."
    )
    distillation_rate: float = setting(0.001, "> 0", "Strategy feddf: the server's learning rate (Adam).")


class EnsembleDistillation(FederatedAveraging):
    """The clients' mean, then taught by the mean of what their networks say: ``KL(softmax(mean_k f(x, w_k)) || f(x, w))``.

    FedDF, algorithm 1, with one architecture. Its unlabelled images are pairs here: users whom the server makes up, with a
    history of random items and labels, and random items. No row of anybody's is needed, and no byte more than ``fedavg``.

    The server computes in double precision: what the mean lacks is the difference of two outputs that are nearly the same, of
    which single precision leaves little but rounding, and Adam makes steps of full length of that.

    Attributes:
        unlabelled: the server's network and its pairs; clients have none.
    """

    name = "feddf"
    settings_type = EnsembleSettings
    distils_on_server = True
    unlabelled: AttentiveTask | None = None

    @property
    def needs_each(self) -> str | None:
        """What every client's own network says of a pair."""
        return f"strategy={self.name}"

    def empty(self, state: ServerState, samples: Mapping[int, int]) -> Fold:
        """All networks."""
        averaged = super().empty(state, samples)

        def distilled(uploads: list[Message]) -> ServerState:
            if self.unlabelled is not None and self.settings.server_epochs:
                uploads = [_in_double(upload) for upload in uploads]
            for upload in uploads:
                averaged.add(upload)
            networks = [to_tensors(upload.arrays) for upload in uploads]
            student = self.distilled(averaged.finish(), networks, uploads[0].round)
            return {name: value.to(state[name].dtype) for name, value in student.items()}

        return EveryUpload(distilled)

    def distilled(self, mean: ServerState, networks: list[ServerState], round_index: int) -> ServerState:
        """The mean network, taught by what all of them say of the unlabelled pairs.

        Args:
            mean: what it starts from, as arrays of a message are named.
            networks: the clients'.
            round_index: from 0, decides the order of the pairs.
        """
        task, settings = self.unlabelled, self.settings
        if task is None or not settings.server_epochs:
            return mean
        device = next(task.network.parameters()).device
        teacher = torch.stack([_said(task, network, device) for network in networks]).mean(0).softmax(-1)
        weights = {name: value.to(device, torch.double, copy=True).requires_grad_() for name, value in mean.items()}
        optimizer = torch.optim.Adam(weights.values(), lr=settings.distillation_rate)
        generator = torch.Generator().manual_seed(round_index)
        for _ in range(settings.server_epochs):
            for rows in shuffled(len(task), task.batch_size, generator):
                logits = _logits(task, weights, rows.to(device))
                loss = functional.kl_div(logits.log_softmax(-1), teacher[rows.to(device)], reduction="batchmean")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return {name: value.detach().cpu() for name, value in weights.items()}


def _in_double(upload: Message) -> Message:
    return replace(upload, arrays={name: array.astype(np.float64) for name, array in upload.arrays.items()})


def _logits(task: AttentiveTask, network: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Logits ``[rows, T]`` of a network on some of the pairs, without dropout."""
    batch = task.samples.select(rows)
    weights = {parameter_of(name): value for name, value in network.items()}
    logits: Tensor = functional_call(task.network, weights, task.arguments(batch))
    return logits.squeeze(1)


@torch.no_grad()
def _said(task: AttentiveTask, network: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Logits ``[pairs, T]`` of a client's network on all pairs."""
    weights = {name: value.to(device, torch.double) for name, value in network.items()}
    return torch.cat([_logits(task, weights, rows) for rows in torch.arange(len(task), device=device).split(1024)])
