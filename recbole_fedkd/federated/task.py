"""What a client trains: a network on the client's own samples. The attentive network and any RecBole model look alike here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from recbole_fedkd.distillation.losses import label_cross_entropy
from recbole_fedkd.federated.draws import Draws, EpochDraws, StreamDraws, shuffled_order
from recbole_fedkd.model.factorization import click_logits
from recbole_fedkd.model.network import NO_CONTEXT, AttentiveNetwork, Context
from recbole_fedkd.model.shared import SharedState
from recbole_fedkd.model.student import one_target

CLEAN_BATCH = 4096
"""Samples at a time in a pass without gradients."""


@dataclass(frozen=True)
class Step:
    """What a network says of one batch.

    Attributes:
        loss: the network's own loss, a scalar mean over the batch.
        size: number of samples.
        logits: ``[size, T]``; None if nobody asked for them.
        labels: label indices ``[size]``; None like the logits.
        items: item ids ``[size]``; None like the logits.
        weights: ``[size]``, 0 for rows that only fill a batch up; None: all are samples.
        teacher: logits ``[size, T]`` of a network that teaches this one; None without one.
        hidden: last hidden layer ``[size, h]`` of a network that tells it; None like the logits.
    """

    loss: Tensor
    size: int
    logits: Tensor | None = None
    labels: Tensor | None = None
    items: Tensor | None = None
    weights: Tensor | None = None
    teacher: Tensor | None = None
    hidden: Tensor | None = None

    def select(self, rows: Tensor) -> Step:
        """What it says of some ``rows``, bool or numbers; the loss stays that of all."""
        parts = {name: getattr(self, name) for name in ("logits", "labels", "items", "weights", "teacher", "hidden")}
        chosen = {name: part[rows] for name, part in parts.items() if part is not None}
        return replace(self, size=len(torch.arange(self.size, device=rows.device)[rows]), **chosen)

    def detached(self) -> Step:
        """The same step outside of the autograd graph, in single precision."""
        logits, hidden = (part.detach().float() if part is not None else None for part in (self.logits, self.hidden))
        return replace(self, loss=self.loss.detach(), logits=logits, hidden=hidden)


class Task(ABC):
    """A network and the samples it is trained on.

    Attributes:
        network: the module; the client's optimiser holds its parameters.
        shared: the part of the network that a strategy may send.
        labels: number of labels ``T``.
        generator: what a client alone in its federation, and loaders of RecBole's other than of rows, draw from.
        draws: decide the order of the samples, and what else the task draws by itself; set before every round.
        learns: whether there is anything to train by gradient.
    """

    learns = True
    network: nn.Module
    shared: SharedState
    labels: int
    generator: torch.Generator
    draws: Draws

    @abstractmethod
    def __len__(self) -> int:
        """Samples of an epoch."""

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """Batches of one epoch in random order."""

    def clean_batches(self) -> Iterator[Any]:
        """Every sample once, in large batches, for a pass without gradients; by default their numbers."""
        return iter(torch.arange(len(self)).split(CLEAN_BATCH))

    @abstractmethod
    def step(self, batch: Any, with_logits: bool) -> Step:
        """Loss of a batch and, if asked for, its logits and labels."""


@dataclass(frozen=True)
class Samples:
    """Labelled samples of one client.

    Attributes:
        users: local user ids ``[n]``, from 1.
        items: item ids ``[n]``.
        labels: label indices ``[n]``.
        context: features of the row, ``[n]`` or ``[n, tokens]`` per field.
    """

    users: Tensor
    items: Tensor
    labels: Tensor
    context: Context = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.users)

    def select(self, rows: Tensor) -> Samples:
        """The samples ``rows``."""
        context = {name: values[rows] for name, values in self.context.items()}
        return Samples(self.users[rows], self.items[rows], self.labels[rows], context)


class AttentiveTask(Task):
    """An ``AttentiveNetwork`` on labelled samples: ``CE(y, p) + lambda R(w)``.

    Args:
        network: called as ``network(users [batch], items [batch, 1], context)``, logits ``[batch, 1, T]``.
        shared: the part that may be sent.
        samples: the client's training samples.
        labels: number of labels ``T``.
        batch_size: samples in a step.
        reg_weight: ``lambda``.
        negatives: sampled negatives per sample and epoch; 0 unless the samples are positives only.
        item_count: number of items, padding included; the range of negatives.
        seed: of the generator.
    """

    def __init__(
        self,
        network: nn.Module,
        shared: SharedState,
        samples: Samples,
        labels: int,
        batch_size: int,
        reg_weight: float,
        negatives: int,
        item_count: int,
        seed: int,
    ) -> None:
        self.network, self.shared, self.samples, self.labels = network, shared, samples, labels
        self.batch_size, self.reg_weight = batch_size, reg_weight
        self.negatives, self.item_count = negatives, item_count
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = StreamDraws(self.generator)
        if negatives:
            self._positives = torch.unique(samples.users * item_count + samples.items)

    def __len__(self) -> int:
        return len(self.samples) * (1 + self.negatives)

    def batches(self) -> Iterator[Samples]:
        """Batches of one epoch; negatives are drawn anew."""
        draws = self.draws.epoch()
        samples = self._epoch_samples(draws)
        device = samples.users.device
        for rows in draws.orders([len(samples)])[0].split(self.batch_size):
            yield samples.select(rows.to(device))

    def clean_batches(self) -> Iterator[Samples]:
        """Every sample once."""
        samples = self._epoch_samples(self.draws.epoch())
        for rows in torch.arange(len(samples), device=samples.users.device).split(CLEAN_BATCH):
            yield samples.select(rows)

    def step(self, batch: Samples, with_logits: bool) -> Step:
        """Cross-entropy of the labels plus the regulariser of the weights that the batch touches."""
        users, items, context = self.arguments(batch)
        return self.of_batch(self.network, users, items, batch.labels, self.reg_weight, context=context)

    @staticmethod
    def arguments(batch: Samples) -> tuple[Tensor, Tensor, Context]:
        """What the network is called with, one target a sample."""
        return batch.users, batch.items.unsqueeze(1), one_target(batch.context)

    @torch.no_grad()
    def logits_under(self, state: Mapping[str, Tensor], batch: Samples) -> Tensor:
        """Logits ``[size, T]`` of the network with other parameters, without dropout and outside of the autograd graph."""
        training = self.network.training
        self.network.eval()
        logits: Tensor = functional_call(self.network, dict(state), self.arguments(batch))
        self.network.train(training)
        return logits.squeeze(1)

    @classmethod
    def of_batch(
        cls,
        network: nn.Module,
        users: Tensor,
        items: Tensor,
        labels: Tensor,
        reg_weight: float,
        weights: Tensor | None = None,
        context: Context = NO_CONTEXT,
    ) -> Step:
        """The step of a network on a batch, a function of its arguments alone.

        Args:
            network: as of the class.
            users: ``[batch]``.
            items: ``[batch, targets]``.
            labels: ``[batch * targets]``.
            reg_weight: ``lambda``.
            weights: ``[batch * targets]``, see :class:`Step`.
            context: of each target.
        """
        loss, logits, hidden = cls.data_loss(network, users, items, labels, weights, context)
        loss = loss + regulariser(network, users, items, context, reg_weight)
        return Step(loss, len(labels), logits, labels, items.flatten(), weights, hidden=hidden)

    @staticmethod
    def data_loss(
        network: nn.Module, users: Tensor, items: Tensor, labels: Tensor, weights: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``CE(y, p)``, logits ``[batch * targets, T]`` and, where told, hidden states; arguments as of :meth:`of_batch`."""
        if isinstance(network, AttentiveNetwork):
            seen = network.observe(users, items, context)
            logits, hidden = seen.logits.flatten(0, 1), seen.hidden
        else:
            logits, hidden = network(users, items, context).flatten(0, 1), None
        return label_cross_entropy(logits, labels, weights), logits, hidden

    def _epoch_samples(self, draws: EpochDraws) -> Samples:
        """The samples, with freshly drawn negatives, each in the context of its positive, where the labels are implicit."""
        samples = self.samples
        if not self.negatives:
            return samples
        users = samples.users.repeat(self.negatives)
        items = sample_negatives(users, self._positives, self.item_count, draws)
        return Samples(
            torch.cat([samples.users, users]),
            torch.cat([samples.items, items]),
            torch.cat([samples.labels, torch.zeros_like(users)]),
            {name: torch.cat([values] * (1 + self.negatives)) for name, values in samples.context.items()},
        )


class MutualTask(AttentiveTask):
    """A ``TeacherAndStudent`` on labelled samples: both losses of mutual distillation. Arguments as of the base class."""

    @staticmethod
    def data_loss(
        network: nn.Module, users: Tensor, items: Tensor, labels: Tensor, weights: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor, None]:
        """The sum of both losses, each of which moves its own network, and the logits of what serves."""
        losses: Callable[..., tuple[Tensor, Tensor, Tensor]] = network.mutual_losses  # type: ignore[assignment]
        student_loss, teacher_loss, logits = losses(users, items, labels, weights, context)
        return student_loss + teacher_loss, logits, None


def regulariser(
    network: nn.Module, users: Tensor, items: Tensor, context: Context, reg_weight: float
) -> Tensor | float:
    """``lambda R(w)`` of a batch; arguments as of :meth:`AttentiveTask.of_batch`. Nothing in a pass without gradients."""
    if not reg_weight or not torch.is_grad_enabled():
        return 0.0
    norm: Callable[[Tensor, Tensor, Context], Tensor] = network.touched_squared_norm  # type: ignore[assignment]
    return reg_weight * norm(users, items, context)


class RecBoleTask(Task):
    """A RecBole model on RecBole's own training loader: whatever ``calculate_loss`` minimises, nothing changed.

    Logits are those of a click model, ``[0, z]`` with ``sigmoid(z)`` its click probability. They are read where the
    model hands ``z`` to its binary cross-entropy, so that one forward pass serves loss and distillation alike.

    Args:
        model: a POINTWISE or PAIRWISE model.
        shared: the part that may be sent.
        build_loader: makes the training loader of the client's rows; called with ``shuffle``. A client without rows never
            makes one.
        rows: number of the client's rows.
        item_field: name of the item id field.
        device: where batches go.
        seed: of the generator of a client that draws from the run's streams.
    """

    labels = 2

    def __init__(
        self,
        model: nn.Module,
        shared: SharedState,
        build_loader: Callable[[bool], Any],
        rows: int,
        item_field: str,
        device: torch.device,
        seed: int,
    ) -> None:
        self.network, self.shared, self.rows, self.device = model, shared, rows, device
        self.item_field = item_field
        self._build_loader = build_loader
        self._loader: Any = None
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = StreamDraws(self.generator)
        self._handed: list[tuple[Tensor, Tensor]] = []
        self._labels_checked = False
        self._loss_module = click_loss(model)
        if self._loss_module is not None:
            self._loss_module.register_forward_pre_hook(self._keep_handed)

    @property
    def is_click_model(self) -> bool:
        """Whether the model minimises one binary cross-entropy, so that it has logits to distil."""
        return self._loss_module is not None

    def __len__(self) -> int:
        return self.rows

    def batches(self) -> Iterator[Any]:
        """RecBole's training batches, its negatives included."""
        if self._loader is None:
            self._loader = self._build_loader(True)
            self._loader.generator = self.generator
            self._loader.sampler.generator = self.generator
        yield from self._drawing(self._loader)

    def clean_batches(self) -> Iterator[Any]:
        """Every row once."""
        yield from self._drawing(self._build_loader(False))

    def _drawing(self, loader: Any) -> Any:
        """A loader that draws, where it can, by the client's own draws; a lone client's goes on as RecBole's does."""
        if hasattr(loader, "draws"):
            loader.draws = None if isinstance(self.draws, StreamDraws) else self.draws
        return loader

    def step(self, batch: Any, with_logits: bool) -> Step:
        """The model's own loss; logits and labels of a click model."""
        interaction = batch.to(self.device)
        self._handed.clear()
        loss = total_loss(self.network, interaction)
        if not with_logits:
            return Step(loss, len(interaction))
        ((scores, labels),) = self._handed
        if not self._labels_checked:
            # Once: DMF, for one, can be told to learn from ratings.
            self._labels_checked = True
            if not ((labels == 0) | (labels == 1)).all():
                raise ValueError(
                    "the model hands values other than 0 and 1 to its cross-entropy; only clicks can be distilled"
                )
        logits = handed_logits(self._loss_module, scores)
        return Step(loss, len(interaction), logits, labels.long(), interaction[self.item_field])

    def _keep_handed(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._handed.append((arguments[0].reshape(-1), arguments[1].reshape(-1)))


def click_loss(model: nn.Module) -> nn.Module | None:
    """The binary cross-entropy that a click model hands its scores to; None if it has none, or several."""
    losses = [module for module in model.modules() if is_click(module)]
    return losses[0] if len(losses) == 1 else None


def is_click(module: nn.Module) -> bool:
    """Whether a module is a binary cross-entropy."""
    return isinstance(module, nn.BCEWithLogitsLoss | nn.BCELoss)


def handed_logits(loss: nn.Module | None, handed: Tensor) -> Tensor:
    """Logits ``[batch, 2]`` of no click and of a click, from what a model hands to its cross-entropy ``[batch]``."""
    return click_logits(torch.logit(handed, 1e-6) if isinstance(loss, nn.BCELoss) else handed)


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers ``0..count-1`` in random order, ``[batch_size]`` at a time.

    RecBole's loader is torch's: with the same generator both give the same order, so that a
    federation of one client trains as RecBole does.
    """
    yield from shuffled_order(count, generator).split(batch_size)


def sample_negatives(users: Tensor, positives: Tensor, item_count: int, draws: EpochDraws) -> Tensor:
    """Draw for each entry an item that is no training positive of its user, uniformly, in bulk.

    Only training positives are excluded, as in RecBole: a held-out item may be drawn, or it would stand out as the one
    that never is.

    Args:
        users: user ids ``[n]``.
        positives: sorted unique keys ``user * item_count + item`` of the training positives.
        item_count: number of items, padding (id 0, never drawn) included.
        draws: of the client in an epoch.

    Returns:
        Item ids ``[n]``.

    Raises:
        ValueError: a user holds every item, so there is no negative.
    """
    per_user = torch.bincount(positives // item_count)
    if (per_user >= item_count - 1).any():
        raise ValueError(f"user {int(per_user.argmax())} has interacted with every item; no negative can be sampled")
    device = users.device

    def taken(places: Tensor, items: Tensor) -> Tensor:
        keys = users[places.to(device)] * item_count + items.to(device)
        slot = torch.searchsorted(positives, keys).clamp(max=len(positives) - 1)
        return (positives[slot] == keys).to(places.device)

    return draws.negatives([len(users)], item_count, taken).to(device)


def total_loss(model: Any, interaction: Any) -> Tensor:
    """What a RecBole model minimises on a batch, a scalar: some models return a tuple, some a tensor of shape [1]."""
    parts = model.calculate_loss(interaction)
    loss = sum(part.reshape(()) for part in (parts if isinstance(parts, tuple) else (parts,)))
    assert isinstance(loss, Tensor)
    return loss
