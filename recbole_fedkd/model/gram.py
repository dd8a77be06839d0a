"""``GramEASE`` and ``PureSVD``: rankings that follow from which items have users in common, over clients or in one place."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from recbole_fedkd.data.schema import ClientRows, DataSchema, all_rows, read_schema
from recbole_fedkd.distillation import gram
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.distillation.gram import GramSettings, ItemMap
from recbole_fedkd.errors import InputError
from recbole_fedkd.model.factorization import click_logits
from recbole_fedkd.model.network import NO_CONTEXT, Context
from recbole_fedkd.model.student import LabelledRecommender
from recbole_fedkd.model.with_rows import WithRows
from recbole_fedkd.registry import read_settings


class GramNetwork(WithRows):
    """Scores that are linear in a user's interactions, see :class:`~recbole_fedkd.distillation.gram.ItemMap`.

    Until anything is known all scores are zero. Of few users the scores themselves are kept, of many the map.

    Args:
        rows: interactions of the users that it serves, users from 1.
        settings: the keys.
        kind: ``ease`` or ``svd``.
        weights: what each row counts for in its user's scores ``[n]``; None: all alike.
    """

    beside: ClassVar[tuple[str, ...]] = ("rows", "weights", "_folded", "_pairs")
    user_rows: ClassVar[tuple[str, ...]] = ()
    item_rows: ClassVar[tuple[str, ...]] = ()
    known: Tensor
    scores: Tensor
    own: Tensor
    into: Tensor
    out: Tensor

    def __init__(self, rows: Rows, settings: GramSettings, kind: str, weights: Tensor | None = None) -> None:
        super().__init__()
        self.weights = weights
        self.rows, self.settings, self.kind = rows, settings, kind
        self.dummy_param = nn.Parameter(torch.zeros(1))  # an optimiser wants something
        items, width = rows.item_count, settings.gram_size
        self.keeps_scores = rows.user_count - 1 <= width
        empty = {
            "known": torch.zeros(1, dtype=torch.bool),
            "scores": torch.zeros(rows.user_count, items) if self.keeps_scores else torch.zeros(0),
            "own": torch.zeros(0 if self.keeps_scores else items),
            "into": torch.zeros(0 if self.keeps_scores else items, width),
            "out": torch.zeros(0 if self.keeps_scores else items, width),
        }
        for name, value in empty.items():
            self.register_buffer(name, value)
        self._folded: Tensor | None = None
        self._pairs = torch.unique(rows.users * items + rows.items)
        self.register_load_state_dict_post_hook(GramNetwork._forget)

    @property
    def informed(self) -> bool:
        """Whether anything is known."""
        return bool(self.known)

    @torch.no_grad()
    def know(self, factors: Tensor, diagonal: Tensor) -> None:
        """Take in ``F [items, k]`` and the diagonal of the Gram matrix ``[items]``, both double."""
        settings = self.settings
        if self.kind == "ease":
            item_map = gram.ease_map(factors, diagonal, settings.gram_shrinkage)
        else:
            item_map = gram.svd_map(factors, settings.gram_size)
        self.known.fill_(True)
        if self.keeps_scores:
            every = torch.arange(self.rows.item_count, device=self.rows.items.device).expand(self.rows.user_count, -1)
            self.scores.copy_(item_map.scores(self._folded_by(item_map), every, self._seen_rows().double()))
            return
        for name in ("own", "into", "out"):
            getattr(self, name).copy_(getattr(item_map, name))
        self._folded = None

    def forward(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Logits ``[batch, targets, 2]`` of items ``[batch, targets]`` for local users ``[batch]``, in any context."""
        if self.keeps_scores:
            return click_logits(self.scores[users].gather(1, items))
        item_map = ItemMap(self.own, self.into, self.out)
        if self._folded is None:
            self._folded = self._folded_by(item_map)
        keys = users.unsqueeze(1) * self.rows.item_count + items
        return click_logits(item_map.scores(self._folded[users], items, torch.isin(keys, self._pairs).float()))

    def touched_squared_norm(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Zero: nothing is learned."""
        return self.dummy_param.sum() * 0

    def _folded_by(self, item_map: ItemMap) -> Tensor:
        into = item_map.into[self.rows.items]
        return self.rows.per_user(into if self.weights is None else into * self.weights.to(into).unsqueeze(1))

    def _seen_rows(self) -> Tensor:
        shape, device = (self.rows.user_count, self.rows.item_count), self.rows.items.device
        seen = torch.zeros(shape, dtype=torch.bool, device=device)
        seen[self.rows.users, self.rows.items] = True
        return seen

    def _forget(self, _keys: object) -> None:
        self._folded = None


class GramBuilder:
    """Builds networks, each of the interactions of its own users; where there is no exchange it knows these alone."""

    def __init__(self, config: Any, schema: DataSchema) -> None:
        model = config.model_class
        self.schema, self.settings, self.kind = schema, model.sum_settings(config), model.kind
        self.alone = config["strategy"] in ("central", "local")
        self.by_time = config["eval_args"]["order"] == "TO"

    def build(self, rows: ClientRows) -> GramNetwork:
        """The network of a client's users; of labelled rows the positives count."""
        schema = self.schema
        positive = schema.label_indices(rows) == 1
        users, items = schema.own_numbers(rows)[positive], rows.interactions[schema.item_field][positive]
        pairs, pair_of_row = torch.unique(
            users * schema.item_num + items, return_inverse=True
        )  # an interaction counts once
        weights, half_life, time = None, self.settings.recent_half_life, schema.fields["time_field"]
        if half_life is None:
            half_life = gram.HALF_LIFE if self.by_time and time in rows.interactions else 0.0
        if half_life:
            if time not in rows.interactions:
                raise InputError(
                    f"recent_half_life is {half_life}, but the dataset has no column '{time}' of times; leave it 0"
                )
            weight_of_row = gram.recency(users, rows.interactions[time][positive], half_life)
            weights = weight_of_row.new_zeros(len(pairs)).scatter_reduce(
                0, pair_of_row, weight_of_row, "amax"
            )  # as of its latest
        users, items = pairs // schema.item_num, pairs % schema.item_num
        known = Rows(users, items, torch.ones(len(items), dtype=torch.double), len(rows.users) + 1, schema.item_num)
        network = GramNetwork(known, self.settings, self.kind, weights)
        if self.alone:
            network.know(*gram.exchanged(self.settings, network.rows))
        return network


class GramRecommender(LabelledRecommender):
    """Centrally, the exchange in one place that has all interactions."""

    embeds_features = False
    builder = GramBuilder
    kind: ClassVar[str]
    sums: ClassVar[str] = "gram"
    reads: ClassVar[frozenset[str]] = frozenset(field.name for field in fields(GramSettings))

    @classmethod
    def sum_settings(cls, config: Any) -> GramSettings:
        """The keys of the exchange."""
        return read_settings(GramSettings, config)

    def __init__(self, config: Any, dataset: Any) -> None:
        schema = read_schema(dataset)
        super().__init__(config, schema)
        self.network = self.builder(config, schema).build(all_rows(dataset))

    def logits(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """See :meth:`LabelledRecommender.logits`."""
        logits: Tensor = self.network(users, items, context)
        return logits

    def rank(self, users: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """See :meth:`LabelledRecommender.rank`."""
        return self.logits(users, torch.arange(self.item_num, device=users.device).expand(len(users), -1))

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Zero: nothing is learned by gradient."""
        return self.network.dummy_param.sum() * 0


class GramEASE(GramRecommender):
    """EASE (Steck 2019) from the leading directions of the Gram matrix and its exact diagonal."""

    kind = "ease"


class PureSVD(GramRecommender):
    """PureSVD (Cremonesi, Koren, Turrin 2010)."""

    kind = "svd"
    reads = GramRecommender.reads - {"gram_shrinkage"}
