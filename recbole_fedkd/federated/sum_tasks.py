"""Tasks of what sums over clients' rows say: a head on item factors, a student that they teach, and models of sums alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from recbole_fedkd.distillation.losses import label_cross_entropy, teacher_cross_entropy
from recbole_fedkd.federated.draws import StreamDraws
from recbole_fedkd.federated.task import AttentiveTask, Samples, Step, Task
from recbole_fedkd.model.factor_head import FactorHead
from recbole_fedkd.model.gram import GramNetwork
from recbole_fedkd.model.known import ReceivedPairs
from recbole_fedkd.model.network import AttentiveNetwork
from recbole_fedkd.model.shared import SharedState


class FactorTask(Task):
    """A ``FactorHead`` on the rows that it knows, each as if it were not among them: ``CE(y, p) + lambda R(w)``.

    Args:
        head: the network.
        shared: the part that may be sent.
        batch_size: rows in a step.
        reg_weight: ``lambda``.
        seed: of the generator.
    """

    def __init__(self, head: FactorHead, shared: SharedState, batch_size: int, reg_weight: float, seed: int) -> None:
        self.network = self.head = self.teacher = head
        self.knows: set[str] = set()
        self.shared, self.labels = shared, len(head.exchange.values)
        self.batch_size, self.reg_weight = batch_size, reg_weight
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = StreamDraws(self.generator)

    def __len__(self) -> int:
        return len(self.head.exchange.labels)

    def batches(self) -> Iterator[Tensor]:
        """Numbers of rows, in random order."""
        return iter(self.draws.epoch().orders([len(self)])[0].split(self.batch_size))

    def step(self, batch: Tensor, with_logits: bool) -> Step:
        """Cross-entropy of the rows' labels plus the regulariser."""
        exchange = self.head.exchange
        logits, labels = self.head.rows(batch), exchange.labels[batch]
        loss = label_cross_entropy(logits, labels, None)
        if self.reg_weight and torch.is_grad_enabled():
            loss = loss + self.reg_weight * self.head.squared_norm()
        return Step(loss, len(batch), logits, labels, exchange.rows.items[batch])


class TaughtTask(AttentiveTask):
    """An attentive student that the fold-in teaches pair by pair: ``CE(y, p) + w CE(q_ui, p) + lambda R(w)``.

    ``q_ui`` is what the totals of an exchange say of the pair by the user's other rows, a discretised normal distribution.
    Beside every row may stand random items, on which it teaches and no label does.

    Attributes:
        teacher: what teaches.
        knows: stages that are in its tables.
        weight: ``w``.
        unrated: random items beside every row.
    """

    def __init__(self, *arguments: Any, weight: float, unrated: int) -> None:
        super().__init__(*arguments)
        assert isinstance(self.network, AttentiveNetwork) and isinstance(self.network.known, ReceivedPairs)
        self.teacher, self.weight, self.unrated = self.network.known, weight, unrated
        self.knows: set[str] = set()

    def step(self, batch: Samples, with_logits: bool) -> Step:
        """As of the base class; in a pass without gradients nobody teaches."""
        step = super().step(batch, with_logits)
        if not self.weight or not torch.is_grad_enabled():
            return step
        assert step.logits is not None
        users, items, logits = batch.users, batch.items, step.logits
        if self.unrated:
            repeated = torch.arange(len(users), device=users.device).repeat(self.unrated)
            drawn = torch.randint(1, self.item_count, (len(repeated),)).to(users.device)
            beside = replace(batch.select(repeated), items=drawn)
            users, items = torch.cat([users, beside.users]), torch.cat([items, drawn])
            logits = torch.cat([logits, self.network(*self.arguments(beside)).squeeze(1)])
        taught = teacher_cross_entropy(
            logits.log_softmax(-1), self.teacher.teacher(users, items).log_softmax(-1)
        ).mean()
        return replace(step, loss=step.loss + self.weight * taught)


class FloorTask(FactorTask):
    """A head that predicts what it knows; nothing is trained, its loss is measured."""

    learns = False


class SumTask(Task):
    """A network of sums on the rows that it knows; nothing is trained, its loss is measured.

    Args:
        network: of sums.
        shared: the part that may be sent, which is none.

    Attributes:
        heard: what has come down and is not answered yet.
    """

    learns = False
    labels = 2

    def __init__(self, network: GramNetwork, shared: SharedState) -> None:
        self.network: GramNetwork = network
        self.shared, self.heard = shared, dict[str, Tensor]()
        self.generator = torch.Generator()

    def __len__(self) -> int:
        return len(self.network.rows.items)

    def batches(self) -> Iterator[Tensor]:
        """None: there is nothing to train."""
        return iter(())

    def step(self, batch: Tensor, with_logits: bool) -> Step:
        """Cross-entropy of interactions."""
        rows = self.network.rows
        items = rows.items[batch]
        labels = torch.ones_like(items)
        logits = self.network(rows.users[batch], items.unsqueeze(1)).squeeze(1)
        return Step(label_cross_entropy(logits, labels, None), len(batch), logits, labels, items)
