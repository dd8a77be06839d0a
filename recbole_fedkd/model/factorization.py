"""``MF`` and ``PFedRec``: the small models of cross-device federated recommendation, where one user is one client.

With a user's rows on the user's client and the items shared, federated averaging of ``MF`` is FedMF (Chai, Wang, Chen, Yang,
IEEE Intelligent Systems 36(5), 2021). PFedRec (Zhang et al., IJCAI 2023) has a score function in place of the user's vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recbole_fedkd.data.schema import ClientRows, DataSchema, all_rows, read_schema
from recbole_fedkd.distillation.losses import touched_squared_norm
from recbole_fedkd.model.network import NO_CONTEXT, Context, expect_unknown
from recbole_fedkd.model.student import NetworkBuilder, NetworkRecommender


@dataclass(frozen=True)
class RowSums:
    """Tables ``[c, rows, d]`` of which few rows are other than zero.

    Attributes:
        ids: of rows ``[c, n]``; what stands for a row several times is added up.
        values: ``[c, n, d]``.
        rows: of each table.
    """

    ids: Tensor
    values: Tensor
    rows: int

    def added_to(self, tables: Tensor) -> Tensor:
        """``tables + self``, in place."""
        width = tables.shape[2]
        tables.view(-1, width).index_add_(0, placed(self.ids, self.rows), self.values.reshape(-1, width))
        return tables


def dense(gradient: Tensor | RowSums) -> Tensor:
    """A gradient with all its rows."""
    if isinstance(gradient, Tensor):
        return gradient
    return gradient.added_to(gradient.values.new_zeros(len(gradient.ids), gradient.rows, gradient.values.shape[2]))


@dataclass(frozen=True)
class Factors:
    """Names of the parameters of a network whose scores are ``u . i + b_u + b_i``, and nothing else.

    Attributes:
        user: a row per local user; one row: of all users alike.
        item: a row per item.
        user_bias: as many rows as ``user``; None: there are none.
        item_bias: as many as ``item``; None like it.
    """

    user: str
    item: str
    user_bias: str | None = None
    item_bias: str | None = None


def looked_up(tables: Tensor, ids: Tensor) -> Tensor:
    """Rows ``[c, n, d]`` of many tables ``[c, rows, d]``, each by ids of its own ``[c, n]``."""
    return tables.flatten(0, 1).index_select(0, placed(ids, tables.shape[1])).view(*ids.shape, -1)


def placed(ids: Tensor, rows: int) -> Tensor:
    """Rows of tables behind each other, of so many ``rows`` each: ``[c, n]`` to ``[c * n]``."""
    return (ids + torch.arange(0, len(ids) * rows, rows, device=ids.device).unsqueeze(1)).flatten()


def click_logits(scores: Tensor) -> Tensor:
    """Scores ``z [...]`` as logits of two labels ``[..., 2]``: the softmax of ``[0, z]`` is ``sigmoid(z)``."""
    return torch.stack([torch.zeros_like(scores), scores], -1)


class FactorizationNetwork(nn.Module):
    """Inner product of a user's and an item's vector, with or without a bias of each.

    Args:
        users: number of local users, padding included.
        items: number of items, padding included.
        width: size ``d`` of the vectors.
        biases: whether there are any.
    """

    def __init__(self, users: int, items: int, width: int, biases: bool) -> None:
        super().__init__()
        self.user_embedding, self.item_embedding = nn.Embedding(users, width), nn.Embedding(items, width)
        for table in (self.user_embedding, self.item_embedding):
            nn.init.normal_(table.weight, std=0.1)
        self.user_bias = nn.Embedding(users, 1) if biases else None
        self.item_bias = nn.Embedding(items, 1) if biases else None
        for bias in (self.user_bias, self.item_bias):
            if bias is not None:
                nn.init.zeros_(bias.weight)

    @property
    def user_rows(self) -> tuple[str, ...]:
        """Names of the parameters with one row per local user, which no strategy may send."""
        return ("user_embedding.weight",) + ("user_bias.weight",) * (self.user_bias is not None)

    @property
    def item_rows(self) -> tuple[str, ...]:
        """Names of the parameters and buffers with one row per item."""
        return ("item_embedding.weight",) + ("item_bias.weight",) * (self.item_bias is not None)

    def forward(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Logits ``[batch, targets, 2]`` of local users ``[batch]`` and items ``[batch, targets]``, in any context."""
        scores = (self.user_embedding(users).unsqueeze(1) * self.item_embedding(items)).sum(-1)
        if self.user_bias is not None and self.item_bias is not None:
            scores = scores + self.user_bias(users) + self.item_bias(items).squeeze(-1)
        return click_logits(scores)

    @property
    def factors(self) -> Factors:
        """What a score is made of."""
        biases = ("user_bias.weight", "item_bias.weight") if self.user_bias is not None else ()
        return Factors("user_embedding.weight", "item_embedding.weight", *biases)

    def touched_squared_norm(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """``R(w)`` of a batch (arguments as in :meth:`forward`): rows outside the batch do not count."""
        tables = [(self.user_embedding.weight, users), (self.item_embedding.weight, items)]
        if self.user_bias is not None and self.item_bias is not None:
            tables += [(self.user_bias.weight, users), (self.item_bias.weight, items)]
        return touched_squared_norm(tables, [])


class ScoreFunctionNetwork(nn.Module):
    """A linear score function over item vectors; the user is the function (PFedRec).

    Args:
        items: number of items, padding included.
        width: size ``d`` of the vectors.
    """

    user_rows: ClassVar[tuple[str, ...]] = ()
    item_rows: ClassVar[tuple[str, ...]] = ("item_embedding.weight",)
    factors: ClassVar[Factors] = Factors("score.weight", "item_embedding.weight", "score.bias")

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.item_embedding, self.score = nn.Embedding(items, width), nn.Linear(width, 1)

    def forward(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Logits ``[batch, targets, 2]`` of items ``[batch, targets]``; ``users [batch]`` are all alike."""
        return click_logits(self.score(self.item_embedding(items)).squeeze(-1))

    def touched_squared_norm(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """``R(w)`` of a batch (arguments as in :meth:`forward`): item rows outside the batch do not count."""
        return touched_squared_norm([(self.item_embedding.weight, items)], list(self.score.parameters()))


class _FactorizationBuilder:
    """Builds ``MF``'s networks."""

    def __init__(self, config: Any, schema: DataSchema) -> None:
        self.schema, self.width, self.biases = schema, config["embedding_size"], config["biases"]

    def build(self, rows: ClientRows) -> FactorizationNetwork:
        """The network of a client's users."""
        network = FactorizationNetwork(len(rows.users) + 1, self.schema.item_num, self.width, self.biases)
        expect_unknown(network.user_embedding, self.schema.known_users(rows))
        expect_unknown(network.item_embedding, self.schema.known_items)
        return network


class _ScoreFunctionBuilder:
    """Builds ``PFedRec``'s networks."""

    def __init__(self, config: Any, schema: DataSchema) -> None:
        self.schema, self.width = schema, config["embedding_size"]

    def build(self, rows: ClientRows) -> ScoreFunctionNetwork:
        """The network of a client's users: one function for all of them."""
        network = ScoreFunctionNetwork(self.schema.item_num, self.width)
        expect_unknown(network.item_embedding, self.schema.known_items)
        return network


class FactorizationRecommender(NetworkRecommender):
    """A small network of two labels, alone and centrally trained, or one per client where a ``strategy`` is set."""

    embeds_features = False
    builder: ClassVar[type[_FactorizationBuilder] | type[_ScoreFunctionBuilder]]

    def __init__(self, config: Any, dataset: Any) -> None:
        schema = read_schema(dataset)
        builder: NetworkBuilder = self.builder(config, schema)
        super().__init__(config, schema, builder.build(all_rows(dataset)))


class MF(FactorizationRecommender):
    """Matrix factorisation with the cross-entropy of clicks."""

    builder = _FactorizationBuilder


class PFedRec(FactorizationRecommender):
    """Item vectors and one score function per client; centrally trained there is one, which ranks alike for everybody."""

    builder = _ScoreFunctionBuilder
