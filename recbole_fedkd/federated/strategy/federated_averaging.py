"""``fedavg``, ``fedgkd``, ``fedkd`` and ``fml``: clients send their networks, the server averages them.

FedAvg: McMahan et al., AISTATS 2017. FedProx: Li et al., MLSys 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.distillation.knowledge import TrimSettings
from recbole_fedkd.distillation.losses import MutualWeights, joint_loss
from recbole_fedkd.federated.aggregate import EveryUpload, Fold, MeanOfChangedRows, WeightedMean
from recbole_fedkd.federated.message import SERVER, ArraySpec, Message, Schema
from recbole_fedkd.federated.robust import ROBUST_MEANS, RobustMean
from recbole_fedkd.federated.strategy.base import LocalResult, ServerState, Strategy
from recbole_fedkd.federated.strategy.knowledge_exchange import DistillationSettings
from recbole_fedkd.federated.task import Step
from recbole_fedkd.model.shared import SharedState
from recbole_fedkd.optim.server import SERVER_OPTIMIZERS
from recbole_fedkd.registry import setting

PARAMETER, BUFFER = "p:", "b:"


@dataclass(frozen=True)
class AveragingSettings(TrimSettings):
    """The keys of :class:`FederatedAveraging`."""

    client_weights: str = setting(
        "samples",
        "one of samples|uniform",
        "What a client counts for in the server's mean: its samples, or as much as any other.",
    )
    row_mean: str = setting(
        "all",
        "one of all|changed",
        "A row (of items, say) is averaged over all clients of the round, or over those that changed it.",
    )
    robust_mean: str | None = setting(
        None,
        "one of <robust means>",
        "What stands for the clients' networks in place of their mean, so that a few wrong ones move it little; not set: the "
        "mean.",
    )
    serve_after: str = setting(
        "aggregation",
        "one of aggregation|training",
        "Users are served by what the server makes of all clients, or by their client's own network as training left it.",
    )
    proximal_weight: float = setting(
        0.0, ">= 0", "Weight mu of FedProx: mu / 2 times the squared distance to the server's network."
    )
    server_optimizer: str = setting(
        "fedavg",
        "one of <server optimizers>",
        "What the server makes of the clients' mean; fedavg takes it as it is.",
    )
    server_learning_rate: float = setting(1.0, "> 0", "Rate of the server's optimiser.")
    server_momentum: float = setting(0.9, "in [0, 1)", "Momentum of fedavgm, first moment's decay of fedadam.")
    server_beta2: float = setting(0.99, "in [0, 1)", "Second moment's decay of fedadam.")
    server_tau: float = setting(1.0e-3, "> 0", "Keeps the denominator of fedadam from zero.")


class FederatedAveraging(Strategy):
    """The shared part of the network down and up; the server's mean is weighted by samples, unless ``client_weights`` differs.

    Messages: ``model`` in both directions with ``p:<name>`` per parameter and ``b:<name>`` per float buffer. Rows that belong
    to single users are part of neither.
    """

    name = "fedavg"
    settings_type = AveragingSettings
    shares_parameters = True
    same_for_all = True
    pads = True

    @property
    def serves_aggregate(self) -> bool:
        """Unless a client's own network serves its users."""
        return bool(self.settings.serve_after == "aggregation")

    @property
    def needs_each(self) -> str | None:
        """Rows that count where a client has changed them, which nothing but the client's own network tells."""
        if self.settings.robust_mean is not None:
            return f"robust_mean={self.settings.robust_mean}"
        return "row_mean=changed" if self.settings.row_mean == "changed" else None

    @property
    def _robust(self) -> RobustMean | None:
        """What stands for the mean, where anything does."""
        settings = self.settings
        return ROBUST_MEANS[settings.robust_mean](settings.trim_ratio) if settings.robust_mean is not None else None

    def without_effect(self, clients: int, in_round: int) -> str | None:
        """As the robust mean says of those in a round."""
        return self._robust.without_effect(in_round) if self._robust is not None else None

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
        penalty: Tensor = 0.5 * self.settings.proximal_weight * torch.stack(distances).sum()
        return step.loss + penalty

    @property
    def adds_nothing(self) -> bool:  # type: ignore[override]
        """Without FedProx's term."""
        return not self.settings.proximal_weight

    def upload(self, result: LocalResult, client: int, round_index: int) -> Message | None:
        """The trained network."""
        return Message("model", round_index, client, _arrays(result.shared))

    def upload_schema(self, state: ServerState) -> Schema:
        """A whole network."""
        network = {name: value.numpy() for name, value in state.items() if name.startswith((PARAMETER, BUFFER))}
        return Schema("model", {name: ArraySpec(array.shape, array.dtype.type) for name, array in network.items()})

    def download_schema(self, state: ServerState) -> Schema:
        """A whole network."""
        return self.upload_schema(state)

    def empty(self, state: ServerState, samples: Mapping[int, int]) -> Fold:
        """The clients' mean, by samples or alike."""
        if self.settings.client_weights == "uniform":
            weights: tuple[Callable[[Message], float], float] = (lambda upload: 1.0, float(len(samples)))
        else:
            weights = (lambda upload: float(upload.training.samples), float(sum(samples.values())))
        if (robust := self._robust) is not None:
            return EveryUpload(lambda uploads: robust.of(uploads, state, [weights[0](upload) for upload in uploads]))
        return WeightedMean(*weights) if self.settings.row_mean == "all" else MeanOfChangedRows(*weights, state)

    def possible(self, statistics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A running variance (of batch normalisation) is not negative."""
        return {
            name: value.clamp(min=0) if name.startswith(BUFFER) and name.endswith("running_var") else value
            for name, value in statistics.items()
        }

    def step(self, state: ServerState, statistics: Mapping[str, Tensor]) -> ServerState:
        """The server's optimiser on the mean of the parameters; buffers take the mean."""
        mean = dict(statistics)
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


@dataclass(frozen=True)
class GlobalDistillationSettings(DistillationSettings, AveragingSettings):
    """The keys of :class:`GlobalDistillation`."""


class GlobalDistillation(FederatedAveraging):
    """``fedgkd``: the network that came down teaches the client's while it trains, so that it forgets less of the others.

    FedGKD: Yao et al., IEEE Transactions on Computers 2023, with the latest network alone. The teacher costs no byte.
    """

    name = "fedgkd"
    settings_type = GlobalDistillationSettings
    taught_by_received = True
    pads = True

    def loss(self, step: Step, received: Mapping[str, Tensor], shared: SharedState) -> Tensor:
        """The joint loss with the server's network as the teacher of every sample."""
        settings, own = self.settings, super().loss(step, received, shared)
        if step.teacher is None:
            return own
        assert step.logits is not None
        known = torch.ones(len(step.logits), dtype=torch.bool, device=step.logits.device)
        weights = settings.gamma, settings.alpha, settings.temperature
        return joint_loss(own, step.logits, step.teacher, known, *weights, step.weights)


class MutualDistillation(FederatedAveraging):
    """``fedkd``: the student is averaged; a larger teacher stays on its client, and the two teach each other.

    FedKD: Wu et al., Nature Communications 13:2032, 2022. The losses are those of ``TeacherAndStudent``.
    """

    name = "fedkd"
    trains_teacher = True


@dataclass(frozen=True)
class MutualLearningSettings(MutualWeights, AveragingSettings):
    """The keys of :class:`MutualLearning`."""


class MutualLearning(FederatedAveraging):
    """``fml``: a small network (the "meme") is averaged, the client's own stays, and the two learn from each other.

    ``L_own = alpha CE + (1 - alpha) KL(p_meme || p_own)``, ``L_meme = beta CE + (1 - beta) KL(p_own || p_meme)``. FML: Shen et
    al., arXiv:2006.16765, 2020, algorithm 1. alpha is ``teacher_label_weight``, beta ``student_label_weight``.
    """

    name = "fml"
    settings_type = MutualLearningSettings
    trains_teacher = True


def parameter_of(name: str) -> str:
    """Name in the network of an array of a message."""
    return name.partition(":")[2]


def _arrays(shared: SharedState) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Parameters and buffers as arrays of a message."""
    parameters = {PARAMETER + name: value for name, value in shared.parameters().items()}
    buffers = {BUFFER + name: value for name, value in shared.buffers().items()}
    return {name: value.detach().cpu().numpy() for name, value in {**parameters, **buffers}.items()}
