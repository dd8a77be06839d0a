"""A client: its users' samples, its network, its optimiser. It hears and says bytes, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recbole_fedkd.distillation.knowledge import label_sums
from recbole_fedkd.federated.message import Message
from recbole_fedkd.federated.strategy import LocalResult, Strategy, to_tensors


class Network(Protocol):
    """What a client asks of its network, a ``torch.nn.Module``."""

    def __call__(self, users: Tensor, items: Tensor) -> Tensor:
        """Logits ``[batch, targets, T]`` of local users ``[batch]`` and items ``[batch, targets]``."""

    def touched_squared_norm(self, users: Tensor, items: Tensor) -> Tensor:
        """``R(w)`` of the batch, a scalar."""


@dataclass(frozen=True)
class Samples:
    """Training samples of one client.

    Attributes:
        users: local user ids ``[n]``, from 1.
        items: item ids ``[n]``.
        labels: label indices ``[n]``.
    """

    users: Tensor
    items: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True)
class ClientSettings:
    """The client's keys of the config, see ``properties/overall.yaml``.

    Attributes:
        local_epochs: passes over the samples in a round.
        batch_size: samples in a step.
        reg_weight: ``lambda`` of the regulariser.
        clean_pass: extract knowledge in a pass after training (no dropout), not from the last epoch's batches.
        negatives: sampled negatives per sample and epoch; 0 unless the samples are positives only.
        item_count: number of items, padding included; the range of negatives.
        labels: number of labels ``T``.
        seed: the run's seed; a client derives one per round from it.
        clip_grad_norm: arguments of torch's ``clip_grad_norm_``, or None to clip nothing.
    """

    local_epochs: int
    batch_size: int
    reg_weight: float
    clean_pass: bool
    negatives: int
    item_count: int
    labels: int
    seed: int
    clip_grad_norm: dict[str, Any] | None


@dataclass(frozen=True)
class TrainingReport:
    """What local training cost: summed loss over the last epoch's samples, and their number."""

    loss: float
    samples: int


EVALUATION_BATCH = 4096


def client_round_seed(seed: int, client: int, round_index: int) -> int:
    """Seed of one client in one round: the order in which clients run changes nothing."""
    return int(np.random.SeedSequence([seed, client + 1, round_index]).generate_state(1)[0])


class Client:
    """One client of the federation.

    Args:
        number: from 0.
        network: the client's own network; its parameters stay here unless the strategy sends them.
        samples: the client's training samples, never shared.
        build_optimizer: makes the optimiser of the network's parameters; it lives as long as the client.
        strategy: the local objective and what is sent.
        settings: how to train.
    """

    def __init__(
        self,
        number: int,
        network: Network,
        samples: Samples,
        build_optimizer: Callable[[nn.Module], Optimizer],
        strategy: Strategy,
        settings: ClientSettings,
    ) -> None:
        assert isinstance(network, nn.Module)
        self.number = number
        self.network = network
        self.samples = samples
        self.optimizer = build_optimizer(network)
        self.strategy = strategy
        self.settings = settings
        self.received: dict[str, Tensor] = {}
        self._result: LocalResult | None = None
        if settings.negatives:
            self._positives = torch.unique(samples.users * settings.item_count + samples.items)

    def receive(self, payload: bytes) -> None:
        """Take the server's message in; empty bytes leave what was received before."""
        if payload:
            device = self.samples.users.device
            received = to_tensors(Message.from_bytes(payload))
            self.received = {name: tensor.to(device) for name, tensor in received.items()}

    def train(self, round_index: int, on_step: Callable[[int], None] | None = None) -> TrainingReport:
        """Train for the round's local epochs.

        Args:
            round_index: from 0; with the run's seed it decides order, dropout and negatives.
            on_step: told the number of samples after each step.

        Returns:
            Loss and samples of the last local epoch.
        """
        module = self.network
        assert isinstance(module, nn.Module)
        module.train()
        seed = client_round_seed(self.settings.seed, self.number, round_index)
        device = self.samples.users.device
        # Dropout draws from torch's global streams; they are given back, so that nobody else's draws depend on clients.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self._train(module, torch.Generator().manual_seed(seed), on_step)

    def _train(
        self, module: nn.Module, generator: torch.Generator, on_step: Callable[[int], None] | None
    ) -> TrainingReport:
        collect = self.strategy.exchanges_knowledge and not self.settings.clean_pass
        total = torch.zeros((), dtype=torch.float64)
        seen = 0
        for epoch in range(self.settings.local_epochs):
            samples = self._epoch_samples(generator)
            order = torch.randperm(len(samples), generator=generator).to(samples.users.device)
            total = torch.zeros((), dtype=torch.float64, device=samples.users.device)
            seen = len(samples)
            last = epoch == self.settings.local_epochs - 1
            if collect and last:
                self._result = self._empty_result()
            for batch in order.split(self.settings.batch_size):
                users, items, labels = samples.users[batch], samples.items[batch].unsqueeze(1), samples.labels[batch]
                logits = self.network(users, items).squeeze(1)
                loss = self.strategy.loss(logits, labels, self.received)
                if self.settings.reg_weight:
                    loss = loss + self.settings.reg_weight * self.network.touched_squared_norm(users, items)
                self.optimizer.zero_grad()
                loss.backward()
                if self.settings.clip_grad_norm:
                    nn.utils.clip_grad_norm_(module.parameters(), **self.settings.clip_grad_norm)
                self.optimizer.step()
                total += loss.detach() * len(batch)
                if collect and last:
                    self._add_knowledge(logits.detach(), labels)
                if on_step is not None:
                    on_step(len(batch))
        if self.strategy.exchanges_knowledge and self.settings.clean_pass:
            self._extract_knowledge(self._epoch_samples(generator) if self.settings.negatives else self.samples)
        return TrainingReport(float(total), seen)

    def send(self, round_index: int) -> bytes:
        """What the strategy uploads, serialised; empty if nothing."""
        if self._result is None:
            return b""
        message = self.strategy.upload(self._result, self.number, round_index)
        return message.to_bytes() if message is not None else b""

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and last teacher; the network is saved with the model."""
        return {"optimizer": self.optimizer.state_dict(), "received": dict(self.received)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        device = self.samples.users.device
        self.received = {name: tensor.to(device) for name, tensor in state["received"].items()}

    def _epoch_samples(self, generator: torch.Generator) -> Samples:
        """The samples, with freshly drawn negatives where the labels are implicit."""
        if not self.settings.negatives:
            return self.samples
        samples = self.samples
        users = samples.users.repeat(self.settings.negatives)
        items = sample_negatives(users, self._positives, self.settings.item_count, generator)
        return Samples(
            torch.cat([samples.users, users]),
            torch.cat([samples.items, items]),
            torch.cat([samples.labels, torch.zeros_like(users)]),
        )

    def _empty_result(self) -> LocalResult:
        labels, device = self.settings.labels, self.samples.users.device
        return LocalResult(
            torch.zeros(labels, labels, dtype=torch.float64, device=device),
            torch.zeros(labels, dtype=torch.long, device=device),
        )

    def _add_knowledge(self, logits: Tensor, labels: Tensor) -> None:
        assert self._result is not None
        sums, counts = label_sums(logits, labels, self.settings.labels)
        self._result.logit_sums += sums
        self._result.label_counts += counts

    @torch.no_grad()
    def _extract_knowledge(self, samples: Samples) -> None:
        """Logit sums per label in one clean pass: the trained network, without dropout, every sample once (AFD)."""
        module = self.network
        assert isinstance(module, nn.Module)
        module.eval()
        self._result = self._empty_result()
        for start in range(0, len(samples), EVALUATION_BATCH):
            batch = slice(start, start + EVALUATION_BATCH)
            logits = self.network(samples.users[batch], samples.items[batch].unsqueeze(1)).squeeze(1)
            self._add_knowledge(logits, samples.labels[batch])


def sample_negatives(users: Tensor, positives: Tensor, item_count: int, generator: torch.Generator) -> Tensor:
    """Draw for each entry an item that is no training positive of its user, uniformly, in bulk.

    Only training positives are excluded, as in RecBole: a held-out item may be drawn, or it would stand out as the one
    that never is.

    Args:
        users: user ids ``[n]``.
        positives: sorted unique keys ``user * item_count + item`` of the training positives.
        item_count: number of items, padding (id 0, never drawn) included.
        generator: where the draws come from.

    Returns:
        Item ids ``[n]``.

    Raises:
        ValueError: a user holds every item, so there is no negative.
    """
    per_user = torch.bincount(positives // item_count)
    if (per_user >= item_count - 1).any():
        raise ValueError(f"user {int(per_user.argmax())} has interacted with every item; no negative can be sampled")
    items = torch.empty_like(users)
    pending = torch.arange(len(users), device=users.device)
    while len(pending):
        drawn = torch.randint(1, item_count, (len(pending),), generator=generator).to(users.device)
        items[pending] = drawn
        keys = users[pending] * item_count + drawn
        slot = torch.searchsorted(positives, keys).clamp(max=len(positives) - 1)
        pending = pending[positives[slot] == keys]
    return items
