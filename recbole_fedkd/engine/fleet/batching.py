"""A RecBole model made ready to be called for many clients at once: some kinds of its modules are replaced.

Embeddings look rows up in what a client holds of a table, what drops out can be handed its masks, and losses leave out the
samples that only fill a batch up. As long as nothing is handed to them they compute what the modules did that they replace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from recbole.model.loss import BPRLoss
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.loss import _Loss

from recbole_fedkd.model.dropout import HandedAttention, HandedDropout
from recbole_fedkd.model.population import joint_tables, user_rows
from recbole_fedkd.model.shared import Rows


class NotBatchedError(Exception):
    """Why a model cannot be called for many clients at once."""


class ClientTable(nn.Module):
    """An ``nn.Embedding`` of which every client holds the rows of its users and those that it has touched.

    Args:
        embedding: what it replaces; row 0 is padding.
        users: the slice of rows that are the users'; none where it is empty.
        local_id: every user's number on its client ``[users]``.

    Attributes:
        weight: the rows of the embedding that are not the users'; of a table of users alone, all.
        users: the users' rows ``[users, d]`` of a table that holds others too; None otherwise.
        handed: number of every row of ``weight`` among those that a client holds ``[rows]``; None: there are all rows.
    """

    local_id: Tensor

    def __init__(self, embedding: nn.Embedding, users: Rows, local_id: Tensor) -> None:
        super().__init__()
        odd = embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm is not None
        if odd or embedding.padding_idx not in (None, 0):
            raise NotBatchedError(
                "it has an embedding that is sparse, scaled, bounded or padded elsewhere than in row 0"
            )
        weight = embedding.weight.detach()
        self.start, self.stop = users
        self.of_users = users == (0, len(weight))
        self.padding = embedding.padding_idx
        joint = self.start < self.stop and not self.of_users
        if joint and self.padding is not None:
            raise NotBatchedError("it has a table of several fields with a padding row")
        rest, own = self.parted(weight)
        self.users = nn.Parameter(own.clone()) if joint else None
        self.weight = nn.Parameter(rest.clone())
        self.register_buffer("local_id", local_id, persistent=False)
        self.handed: Tensor | None = None

    def parted(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of ``weight`` and, where others have them, of ``users`` in a table of the embedding's shape."""
        if self.of_users:
            return table, table[:0]
        return torch.cat([table[: self.start], table[self.stop :]]), table[self.start : self.stop]

    def forward(self, index: Tensor) -> Tensor:
        """Rows ``[..., d]`` by their numbers in the whole table ``[...]``."""
        if self.of_users:
            return self._rows(index if self.handed is None else self.local_id[index], self.weight)
        if self.users is None:
            return self._rows(index if self.handed is None else self.handed[index].long(), self.weight)
        users = self.stop - self.start
        of_user = (index >= self.start) & (index < self.stop)
        user = torch.where(of_user, index - self.start, 0)
        row = torch.where(of_user, 0, torch.where(index < self.start, index, index - users))
        if self.handed is not None:
            user, row = self.local_id[user], self.handed[row].long()
        rows = torch.where(of_user, len(self.weight) + user, row)
        return self._rows(rows, torch.cat([self.weight, self.users]))

    def _rows(self, rows: Tensor, table: Tensor) -> Tensor:
        vectors: Tensor = functional.embedding(rows, table, self.padding)
        return vectors


class WeightedLoss(nn.Module):
    """A loss that is a mean over samples, of those samples alone that count.

    Args:
        loss: what it replaces.

    Attributes:
        weights: ``[batch]``, 0 for samples that only fill a batch up; None: all count.
        seen: the arguments of the last call.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.weights: Tensor | None = None
        self.seen: tuple[Tensor, ...] = ()

    def forward(self, *arguments: Tensor) -> Tensor:
        """The loss of tensors with a leading axis of samples."""
        self.seen = arguments
        if self.weights is None:
            whole: Tensor = self.loss(*arguments)
            return whole
        losses = vmap(lambda *sample: self.loss(*(part.unsqueeze(0) for part in sample)))(*arguments)
        mean: Tensor = (losses * self.weights).sum() / self.weights.sum()
        return mean


class BatchedModel:
    """A RecBole model whose modules have been replaced, and what of it belongs to whom.

    Sets ``user_rows`` and ``item_rows`` of the model, as the package's own networks declare them, and ``origins``: which
    table a parameter is a part of. Rows of all tables but the users' have one numbering: that of the items or, in a model
    that keeps all token fields in one table, of that table without its users.

    Args:
        model: a model of all users, changed in place.
        user_field: name of the user id field.
        item_field: name of the item id field.
        negative_prefix: of the fields of sampled negatives.
        item_num: number of items, padding included.
        local_id: every user's number on its client ``[users]``.

    Attributes:
        sources: fields that name rows, and the number of the row that the field's value 0 names.

    Raises:
        NotBatchedError: the model keeps something in a way that clients cannot hold in part.
    """

    def __init__(
        self, model: Any, user_field: str, item_field: str, negative_prefix: str, item_num: int, local_id: Tensor
    ) -> None:
        self.model = model
        if any(not parameter.requires_grad or parameter.dtype != torch.float32 for parameter in model.parameters()):
            raise NotBatchedError("it has parameters that are fixed or not of 32 bits")
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise NotBatchedError("it has a batch normalisation, in which the samples of a batch see each other")
        users = user_rows(model, user_field, len(local_id), item_num)
        embeddings = {
            f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Embedding)
        }
        for name in users:
            if name not in embeddings:
                raise NotBatchedError(f"'{name}' holds users' rows without being an embedding")
        joint = {name: (list(fields), list(offsets)) for name, fields, offsets in joint_tables(model)}
        layouts = list(joint.values())
        if any(layout != layouts[0] for layout in layouts):
            raise NotBatchedError("its tables of several fields differ in their fields")
        rows, self.sources = item_num, {item_field: 0, negative_prefix + item_field: 0}
        if joint:
            fields, offsets = layouts[0]
            start, stop = users.get(next(iter(joint)), (0, 0))
            rows = len(embeddings[next(iter(joint))].weight) - (stop - start)
            self.sources = {
                field: int(offset) - (stop - start if offset >= stop else 0)
                for field, offset in zip(fields, offsets, strict=True)
                if field != user_field
            }
        origins: dict[str, str] = {}
        of_users: list[str] = []
        of_items: list[str] = []
        for name, embedding in embeddings.items():
            path, span = name.removesuffix(".weight"), users.get(name, (0, 0))
            if name not in users and len(embedding.weight) != rows:
                continue
            table = ClientTable(embedding, span, local_id)
            _replace(model, path, table)
            (of_users if table.of_users else of_items).append(name)
            if table.users is not None:
                of_users.append(f"{path}.users")
                origins[f"{path}.users"] = name
        if not of_items:
            raise NotBatchedError("it has no table of items")
        model.user_rows, model.item_rows, model.origins = tuple(of_users), tuple(of_items), origins
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Dropout):
                _replace(model, path, HandedDropout(module.p, None))
            elif isinstance(module, nn.MultiheadAttention):
                try:
                    _replace(model, path, HandedAttention(module))
                except ValueError as error:
                    raise NotBatchedError(str(error)) from error
            elif isinstance(module, _Loss | BPRLoss):
                _replace(model, path, WeightedLoss(module))

    def learn_dropout(self, interaction: Any) -> None:
        """See in which order the model calls its dropout layers, and for what shapes, on a batch.

        Raises:
            NotBatchedError: it drops something else than parts of single samples.
        """
        calls = 0

        def called(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal calls
            assert isinstance(layer, HandedDropout)
            (values,) = arguments
            if len(values) != len(interaction):
                raise NotBatchedError("a dropout layer drops across the samples of a batch")
            layer.shapes[calls] = tuple(values.shape[1:])
            calls += 1

        layers = [module for module in self.model.modules() if isinstance(module, HandedDropout)]
        for layer in layers:
            layer.shapes.clear()
        hooks = [layer.register_forward_pre_hook(called) for layer in layers]
        try:
            self.model.train()
            with torch.no_grad():
                self.model.calculate_loss(interaction)
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def for_client(model: nn.Module, rows: Tensor, weights: Tensor) -> Iterator[None]:
    """Have a model's modules use what one client holds.

    Args:
        model: with replaced modules.
        rows: as ``ClientTable.handed``.
        weights: as ``WeightedLoss.weights``.
    """
    parts = [module for module in model.modules() if isinstance(module, ClientTable | WeightedLoss)]
    try:
        for part in parts:
            if isinstance(part, ClientTable):
                part.handed = rows
            else:
                part.weights = weights
        yield
    finally:
        for part in parts:
            if isinstance(part, ClientTable):
                part.handed = None
            else:
                part.weights, part.seen = None, ()


def seen_by_losses(model: nn.Module) -> Mapping[nn.Module, Sequence[Tensor]]:
    """What the last call handed to each loss of a model with replaced modules."""
    return {module.loss: module.seen for module in model.modules() if isinstance(module, WeightedLoss)}


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
