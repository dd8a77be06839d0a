"""``fedavg``, ``fedgkd`` and ``fedkd``: clients send their networks, the server averages them.

FedAvg: McMahan et al., AISTATS 2017. FedProx: Li et al., MLSys 2020.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.distillation.losses import joint_loss
from recbole_fedkd.federated.message import SERVER, Message
from recbole_fedkd.federated.strategy.base import LocalResult, ServerState, Strategy
from recbole_fedkd.federated.task import Step
from recbole_fedkd.model.shared import SharedState
from recbole_fedkd.optim.server import SERVER_OPTIMIZERS

PARAMETER, BUFFER, _SAMPLES = "p:", "b:", "samples"


class FederatedAveraging(Strategy):
    """The shared part of the network down and up; the server's mean is weighted by samples, unless ``client_weights`` differs.

    Messages: ``model`` in both directions with ``p:<name>`` per parameter and ``b:<name>`` per float buffer; up also
    ``samples`` ``[1]``. Rows that belong to single users are part of neither.
    """

    name = "fedavg"
    shares_parameters = True

    def initial_state(self, shared: SharedState) -> ServerState:
        """The network that every client starts from."""
        return {name: torch.tensor(array) for name, array in _arrays(shared).items()}

    def download(self, state: ServerState, client: int, round_index: int) -> Message | None:
        """The global network."""
        arrays = {name: value.numpy() for name, value in state.items() if name.startswith((PARAMETER, BUFFER))}
        return Message("model", round_index, SERVER, arrays)

    def installed(self, received: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """All of it."""
        return {parameter_of(name): value for name, value in received.items()}

    def loss(self, step: Step, received: Mapping[str, Tensor], shared: SharedState) -> Tensor:
        """The network's own loss plus ``mu / 2 * |w - w_global|^2`` (FedProx, eq. 2)."""
        if not self.settings.proximal_weight:
            return step.loss
        distances = [(value - received[PARAMETER + name]).pow(2).sum() for name, value in shared.parameters().items()]
        return step.loss + 0.5 * self.settings.proximal_weight * torch.stack(distances).sum()

    def upload(self, result: LocalResult, client: int, round_index: int) -> Message | None:
        """The trained network and the number of samples behind it."""
        arrays = _arrays(result.shared)
        arrays[_SAMPLES] = np.array([result.samples], dtype=np.int32)
        return Message("model", round_index, client, arrays)

    def aggregate(self, state: ServerState, uploads: list[Message]) -> ServerState:
        """Weighted mean, then the server's optimiser on the parameters (buffers take the mean)."""
        if not uploads:
            return state
        counts = np.array([float(message.arrays[_SAMPLES][0]) for message in uploads])
        alike = self.settings.client_weights == "uniform"
        weights = np.full(len(uploads), 1 / len(uploads)) if alike else counts / counts.sum()
        average = _mean if self.settings.row_mean == "all" else _mean_of_changed_rows
        return self.moved(state, average(state, uploads, weights.tolist()))

    def moved(self, state: ServerState, mean: ServerState) -> ServerState:
        """The server's next state, given the clients' mean of every array that they send."""
        settings = self.settings
        parameters = {name: value for name, value in mean.items() if name.startswith(PARAMETER)}
        step = SERVER_OPTIMIZERS[settings.server_optimizer]
        moved, memory = step(
            {name: state[name] for name in parameters},
            parameters,
            {name: value for name, value in state.items() if not name.startswith((PARAMETER, BUFFER))},
            settings.server_learning_rate,
            settings.server_momentum,
            settings.server_beta2,
            settings.server_tau,
        )
        return {**mean, **moved, **memory}


def _mean(state: ServerState, uploads: list[Message], weights: list[float]) -> ServerState:
    """Weighted mean of every array; ``state`` says nothing to it."""
    mean: ServerState = {}
    for message, weight in zip(uploads, weights, strict=True):
        for name, array in message.arrays.items():
            if name != _SAMPLES:
                part = torch.tensor(array) * weight
                mean[name] = mean[name] + part if name in mean else part
    return mean


def _mean_of_changed_rows(state: ServerState, uploads: list[Message], weights: list[float]) -> ServerState:
    """Weighted mean of every row (along the first axis) over the clients that changed it; a row nobody changed stays.

    Cold rows move as far as hot ones: the mean over all clients divides what the few did by the number of all. FedSubAvg: Ding
    et al., Federated submodel optimization for hot and cold data features, NeurIPS 2022.
    """
    moved: ServerState = {}
    weight_of_row: ServerState = {}
    for message, weight in zip(uploads, weights, strict=True):
        for name, array in message.arrays.items():
            if name != _SAMPLES:
                difference = (torch.tensor(array) - state[name]).view(len(array) if array.ndim else 1, -1)
                changed = (difference != 0).any(1)
                moved[name] = moved[name] + difference * weight if name in moved else difference * weight
                told = changed * weight
                weight_of_row[name] = weight_of_row[name] + told if name in weight_of_row else told
    return {
        name: state[name] + (total / torch.where(part > 0, part, 1.0).unsqueeze(1)).view(state[name].shape)
        for (name, total), part in zip(moved.items(), weight_of_row.values(), strict=True)
    }


class GlobalDistillation(FederatedAveraging):
    """``fedgkd``: the network that came down teaches the client's while it trains, so that it forgets less of the others.

    FedGKD: Yao et al., IEEE Transactions on Computers 2023, with the latest network alone. The teacher costs no byte.
    """

    name = "fedgkd"
    taught_by_received = True

    def loss(self, step: Step, received: Mapping[str, Tensor], shared: SharedState) -> Tensor:
        """The joint loss with the server's network as the teacher of every sample."""
        settings, own = self.settings, super().loss(step, received, shared)
        if step.teacher is None:
            return own
        assert step.logits is not None
        known = torch.ones(len(step.logits), dtype=torch.bool, device=step.logits.device)
        return joint_loss(own, step.logits, step.teacher, known, settings.gamma, settings.alpha, settings.temperature)


class MutualDistillation(FederatedAveraging):
    """``fedkd``: the student is averaged; a larger teacher stays on its client, and the two teach each other.

    FedKD: Wu et al., Nature Communications 13:2032, 2022. The losses are those of ``TeacherAndStudent``.
    """

    name = "fedkd"
    trains_teacher = True


def parameter_of(name: str) -> str:
    """Name in the network of an array of a message."""
    return name.partition(":")[2]


def _arrays(shared: SharedState) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Parameters and buffers as arrays of a message."""
    parameters = {PARAMETER + name: value for name, value in shared.parameters().items()}
    buffers = {BUFFER + name: value for name, value in shared.buffers().items()}
    return {name: value.detach().cpu().numpy() for name, value in {**parameters, **buffers}.items()}
