"""The attentive network: what a student or teacher computes, on plain id tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from types import MappingProxyType

import torch
from torch import Tensor, nn

from recbole_fedkd.distillation.exchange import FactorSettings
from recbole_fedkd.model.attention import Past, TargetAttention
from recbole_fedkd.model.backbone import BACKBONES
from recbole_fedkd.model.catalogue import Asking, Catalogue
from recbole_fedkd.model.compiled import has_compiler
from recbole_fedkd.model.known import KnownPairs
from recbole_fedkd.model.lookup import Tokens, look_up, touched_norm

Context = Mapping[str, Tensor]
"""Features of rows: field name to token ids or numbers, ``[batch, targets]`` or ``[batch, targets, length]`` (several tokens,
padded with 0). The second axis may be 1: all targets are then asked for in the same context."""

NO_CONTEXT: Context = MappingProxyType({})


@dataclass(frozen=True)
class FeatureTable:
    """Features of one side (users or items), one row per id; row 0 is padding.

    Attributes:
        id_field: name of the id field, itself a feature.
        rows: number of ids, padding included.
        columns: field name to ids ``[rows]`` (one token) or ``[rows, length]`` (several, padded with 0), or to numbers
            ``[rows]``.
        vocabulary: field name to the number of its tokens, padding included; fields without one are numbers.
        known: bool ``[rows]``, ids that training touches; None: all of them.
    """

    id_field: str
    rows: int
    columns: Mapping[str, Tensor]
    vocabulary: Mapping[str, int]
    known: Tensor | None = None


@dataclass(frozen=True)
class History:
    """Training interactions of each user, most recent first; one slot more than the network attends to.

    Attributes:
        items: ids ``[users, length + 1]``, 0 where there is none.
        labels: label indices ``[users, length + 1]``, 0 where there is none.
        context: features of each interaction, ``[users, length + 1]`` or ``[users, length + 1, tokens]`` per field.
    """

    items: Tensor
    labels: Tensor
    context: Context = dataclass_field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ArchitectureSettings:
    """The keys that shape an attentive network; see ``properties/model/AttnStudent.yaml`` for each."""

    embedding_size: int
    backbone: str
    hidden_sizes: Sequence[int]
    dropout_prob: float
    attention: bool
    attention_heads: int
    use_user_id: bool
    history_length: int
    known_features: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture(ArchitectureSettings):
    """All that shapes a network.

    ``labels``: their number ``T``. ``item_prior``: whether a log-prior per item is added to the logits. ``factors``: how to
    find what rows say of a pair; None: nothing is found. ``taught_by_fold_in``: whether that is received, to teach, and not
    found in the rows of its users.
    """

    labels: int
    item_prior: bool
    factors: FactorSettings | None = None
    taught_by_fold_in: bool = False


@dataclass(frozen=True)
class Observation:
    """What a network computes on the way to its logits.

    Attributes:
        logits: ``[batch, targets, T]``.
        hidden: last hidden layer ``[batch * targets, h]``.
        attention: weights ``[batch * targets, keys]`` over the ``fields`` and over the ``history``, as far as there is any.
    """

    logits: Tensor
    hidden: Tensor
    attention: Mapping[str, Tensor]


@torch.no_grad()
def expect_unknown(table: nn.Embedding, known: Tensor | None) -> None:
    """Give ids that training never touches the expected vector, which is zero, in place of what was drawn for them.

    Args:
        table: of vectors drawn around zero.
        known: bool ``[rows]``, the other ids; None: all of them are.
    """
    if known is not None:
        table.weight[~known] = 0


def _module_name(field: str) -> str:
    """Name of a field's embedding: a field may be called ``type`` or hold a dot, a module may not."""
    return "field_" + field.replace(".", "_")


def _column_name(field: str) -> str:
    """Name of the buffer with a field's tokens or numbers."""
    return "column_" + field.replace(".", "_")


def _history_name(field: str) -> str:
    """Name of the buffer with a context field of past interactions."""
    return "history_context_" + field.replace(".", "_")


class AttentiveNetwork(nn.Module):
    """Field embeddings, target attention over the history, attention over the fields, backbone (AFD).

    A token is embedded, of several the mean is taken, and a number, brought to mean 0 and deviation 1, is multiplied with a
    vector of its field's. The context of a row stands among the fields of its item; a past interaction is the sum of its
    item, its label and its context.

    The tables are lookups, not parameters: the item table is public, the user table and the history belong to
    whoever owns the users. They are never part of a ``state_dict``.

    Args:
        architecture: sizes and switches.
        users: features of the users this network serves; ids are local to it.
        items: features of all items.
        history: histories of the same users, or None to do without.
        context: fields of rows to the numbers of their tokens, padding included; None: a number.
        known: what the rows of the same users say of a pair, or None to do without. Its features are one field more, its logits
            are added to the network's, which start at zero, and its item vectors to what the history is asked for and by.
    """

    history_items: Tensor
    history_labels: Tensor
    item_prior: Tensor

    @property
    def user_rows(self) -> tuple[str, ...]:
        """Names of the parameters with one row per local user, which no strategy may send."""
        return (f"embeddings.{_module_name(self.user_id_field)}.weight",) if self.architecture.use_user_id else ()

    @property
    def item_rows(self) -> tuple[str, ...]:
        """Names of the parameters and buffers whose first axis is the item id."""
        columns = tuple(_column_name(field) for field in self.item_fields if field != self.item_id_field)
        prior = ("item_prior",) if self.architecture.item_prior else ()
        return (f"embeddings.{_module_name(self.item_id_field)}.weight", *columns, *prior)

    @property
    def user_buffers(self) -> tuple[str, ...]:
        """Names of the buffers with one row per local user."""
        columns = tuple(_column_name(field) for field in self.user_fields if field != self.user_id_field)
        if self.history_attention is None:
            return columns
        return (*columns, "history_items", "history_labels", *map(_history_name, self.context_fields))

    @property
    def received_buffers(self) -> tuple[str, ...]:
        """Names of the buffers that a client fills by what it receives."""
        return ("item_prior",) if self.architecture.item_prior else ()

    @property
    def item_references(self) -> tuple[str, ...]:
        """Names of the buffers that hold item ids."""
        return ("history_items",) if self.history_attention is not None else ()

    def __init__(
        self,
        architecture: Architecture,
        users: FeatureTable,
        items: FeatureTable,
        history: History | None,
        context: Mapping[str, int | None] = MappingProxyType({}),
        known: KnownPairs | None = None,
    ) -> None:
        super().__init__()
        self.architecture, self.known = architecture, known
        seen = self._seen
        width = architecture.embedding_size
        self.user_id_field, self.item_id_field = users.id_field, items.id_field
        self.item_count = items.rows
        self.user_fields = [users.id_field] * architecture.use_user_id + list(users.columns)
        self.item_fields = [items.id_field, *items.columns]
        self.context_fields = list(context)
        vocabulary = {users.id_field: users.rows, items.id_field: items.rows, **users.vocabulary, **items.vocabulary}
        vocabulary |= {field: tokens for field, tokens in context.items() if tokens is not None}
        self.embeddings, self.numbers = nn.ModuleDict(), nn.ModuleDict()
        for field in self.user_fields + self.item_fields + self.context_fields:
            if field in vocabulary:
                self.embeddings[_module_name(field)] = nn.Embedding(vocabulary[field], width)
            else:
                self.numbers[_module_name(field)] = nn.Linear(1, width, bias=False)
        for table in (users, items):
            for field, column in table.columns.items():
                self.register_buffer(_column_name(field), column, persistent=False)
        fields = len(self.user_fields) + len(self.item_fields) + len(self.context_fields)
        self.history_attention: TargetAttention | None = None
        if history is not None and architecture.history_length > 0:
            self.register_buffer("history_items", history.items, persistent=False)
            self.register_buffer("history_labels", history.labels, persistent=False)
            for field in self.context_fields:
                self.register_buffer(_history_name(field), history.context[field], persistent=False)
            self.label_embedding = nn.Linear(architecture.labels, width, bias=False)
            self.history_attention = TargetAttention(width, architecture.attention_heads, history.items.shape[1])
            fields += 1
        if seen is not None:
            self.known_field = nn.Linear(seen.width, width)
            self.known_vectors = nn.Linear(seen.exchange.settings.factor_size, width, bias=False)
            fields += 2
        self.field_attention = TargetAttention(width, architecture.attention_heads) if architecture.attention else None
        self.backbone = BACKBONES[architecture.backbone](
            fields, width, architecture.hidden_sizes, architecture.labels, architecture.dropout_prob
        )
        if architecture.item_prior:
            # Filled by what clients tell each other, never learned; part of the state, because judging needs it.
            self.register_buffer("item_prior", torch.zeros(items.rows, architecture.labels))
        if seen is not None:
            # The network starts at what is known, and learns what differs from it.
            for weight in self.backbone.layers[-1].parameters():
                nn.init.zeros_(weight)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)
        if self.history_attention is not None:
            nn.init.normal_(self.label_embedding.weight, std=0.1)
        for vector in self.numbers.parameters():
            nn.init.normal_(vector, std=0.1)
        for field, table in ((items.id_field, items), *([(users.id_field, users)] * architecture.use_user_id)):
            expect_unknown(self.embeddings[_module_name(field)], table.known)  # type: ignore[arg-type]

    def _embed(self, field: str, ids: Tensor) -> Tensor:
        """Embed one field of the users or items ``ids`` (any shape) to ``[*ids.shape, d]``."""
        if field in (self.user_id_field, self.item_id_field):
            vectors: Tensor = self.embeddings[_module_name(field)](ids)
            return vectors
        return self._embed_values(field, getattr(self, _column_name(field))[ids], ids.dim())

    def _embed_values(self, field: str, values: Tensor, dims: int) -> Tensor:
        """Embed tokens or numbers of one field, of ``dims`` axes, to one more; of an axis beyond those the mean is taken."""
        if _module_name(field) in self.numbers:
            scaled: Tensor = self.numbers[_module_name(field)](values.unsqueeze(-1))
            return scaled
        return Tokens(values, masked=values.dim() > dims).looked_up(self._weight(field))

    def _past(self, users: Tensor, known: Tensor | None) -> Past:
        """The histories of users; ``known`` as of :meth:`_fields`."""
        items, more, table = self.history_items.index_select(0, users), None, self._weight(self.item_id_field)
        if known is not None:
            table = table + known
        for field in self.context_fields:
            own = self._embed_values(field, getattr(self, _history_name(field)).index_select(0, users), 2)
            more = own if more is None else more + own
        return Past(items, table, (self.history_labels.index_select(0, users), self.label_embedding.weight.T), more)

    def _weight(self, field: str) -> Tensor:
        """The table of a field of tokens ``[tokens, d]``."""
        weight = self.embeddings[_module_name(field)].weight
        assert isinstance(weight, Tensor)
        return weight

    def _known_vectors(self) -> Tensor | None:
        """Vectors of all items by what is known of them ``[items, d]``."""
        return None if self._seen is None else self.known_vectors(self._seen.pair_features.vectors)

    def _read(self, field: str, ids: Tensor) -> Tokens:
        """Tokens of a field of users or items ``ids [n]``."""
        if field in (self.user_id_field, self.item_id_field):
            return Tokens(ids)
        column: Tensor = getattr(self, _column_name(field))
        return Tokens(ids, column, masked=column.dim() > 1)

    def _table(self, field: str, tokens: Tokens, every: Tensor) -> tuple[Tensor, Tokens]:
        """What the vectors of a field are looked up in, and how; those of numbers ``[n]`` are rows 0 to n - 1, ``every``."""
        if _module_name(field) in self.numbers:
            return self._embed_values(field, tokens.numbers(), 1), Tokens(every)
        return self._weight(field), tokens

    def _fields(self, users: Tensor, items: Tensor, context: Context, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """Vectors of the fields of items and rows, then of users, ``[n, fields, d]``, and the mean of the former ``[n, d]``.

        Args:
            users: of each target ``[n]``.
            items: the targets ``[n]``.
            context: of each target ``[n, ...]``.
            known: as of :meth:`_known_vectors`, one field more.
        """
        every = torch.arange(len(items), device=items.device)
        of_items = {field: self._read(field, items) for field in self.item_fields}
        of_rows = {field: Tokens(every, context[field], context[field].dim() > 1) for field in self.context_fields}
        of_users = {field: self._read(field, users) for field in self.user_fields}
        looked_up = [self._table(field, tokens, every) for field, tokens in (of_items | of_rows | of_users).items()]
        averaged = len(of_items) + len(of_rows)
        if known is not None:
            looked_up.insert(averaged, (known, Tokens(items)))
            averaged += 1
        tables, read = zip(*looked_up, strict=True)
        return look_up(tables, read, averaged)

    def observe(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Observation:
        """Score items for users, with what a peer that is taught can match. Arguments as of :meth:`forward`."""
        batch, targets = items.shape
        width = self.architecture.embedding_size
        asking, asked = users.unsqueeze(1).expand(-1, targets).flatten(), items.flatten()
        of_targets = {
            name: values.expand(-1, targets, *values.shape[2:]).flatten(0, 1) for name, values in context.items()
        }
        known = self._known_vectors()
        vectors, query = self._fields(asking, asked, of_targets, known)
        query, parts = query.view(batch, targets, width), [vectors]
        attention = {}
        if self.history_attention is not None:
            pooled, weights = self.history_attention.over(query, self._past(users, known), items)
            attention["history"] = weights.flatten(0, 1)
            parts.append(pooled.view(-1, 1, width))
        shortcut: Tensor | float = 0.0
        if self._seen is not None:
            middle, features = self._seen.described(asking, asked)
            parts.append(self.known_field(features).unsqueeze(1))
            shortcut = self._seen(middle, features).unflatten(0, (batch, targets))
        fields = torch.cat(parts, 1)
        if self.field_attention is not None:
            attended, weights = self.field_attention(query.reshape(-1, 1, width), fields)
            attention["fields"] = weights.squeeze(1)
            fields = fields + attended
        hidden: Tensor = self.backbone.hidden(fields)
        logits: Tensor = self.backbone.logits(hidden).unflatten(0, (batch, targets)) + shortcut
        if self.architecture.item_prior:
            logits = logits + self.item_prior[items]
        return Observation(logits, hidden, attention)

    def forward(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Score items for users.

        Args:
            users: local user ids ``[batch]``.
            items: item ids ``[batch, targets]``.
            context: of each target, with all of the network's context fields.

        Returns:
            Raw logits ``[batch, targets, T]``.
        """
        return self.observe(users, items, context).logits

    @property
    def _seen(self) -> KnownPairs | None:
        """What it knows of a pair as features; what merely teaches it, it does not see."""
        return self.known if self.architecture.known_features or not self.architecture.taught_by_fold_in else None

    @property
    def ranks(self) -> bool:
        """Whether :meth:`rank` can be asked: it is in machine code, for the processor."""
        table = self.embeddings[_module_name(self.item_id_field)].weight
        on_processor = table.device.type == "cpu" and table.dtype == torch.float32
        return on_processor and has_compiler() and bool(self.architecture.hidden_sizes)

    @torch.no_grad()
    def catalogue(self) -> Catalogue:
        """What :meth:`rank` needs of the items, whoever asks; it holds as long as no parameter changes."""
        every = torch.arange(self.item_count)
        of_items = [self._table(field, self._read(field, every), every) for field in self.item_fields]
        items, rows, users = len(of_items), len(self.context_fields), len(self.user_fields)
        of_item, of_row = [*range(items)], [*range(items, items + rows)]
        known = self._known_vectors()
        if known is not None:
            of_items.append((known, Tokens(every)))
            of_item.append(items + rows)
        own = len(of_item) + rows
        of_both = range(own + users, own + users + (self.history_attention is not None) + (self._seen is not None))
        places = of_item, [*of_row, *range(own, own + users)], [*of_both]
        return Catalogue(of_items, places, rows, (self.field_attention, self.history_attention), self.backbone)

    def rank(
        self,
        users: Tensor,
        context: Context = NO_CONTEXT,
        catalogue: Catalogue | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[users, items, T]`` of every item, as :meth:`forward` has them but for the last bits; no gradient.

        Args:
            users: local user ids ``[users]``.
            context: of each user, with an axis of one target.
            catalogue: of the parameters as they are; None: it is made.
            chosen: items of each user ``[users, items]``; None: all.
        """
        asked = catalogue if catalogue is not None else self.catalogue()
        logits = asked.rank(self.asking(users, context, asked), self.architecture.labels, chosen)
        prior = self.item_prior[... if chosen is None else chosen] if self.architecture.item_prior else None
        return logits if prior is None else logits + prior

    def asking(self, users: Tensor, context: Context, catalogue: Catalogue) -> Asking:
        """Users as :meth:`rank` has a catalogue asked; arguments as of that."""
        of_rows = [self._embed_values(field, context[field], 2) for field in self.context_fields]
        of_users = [self._embed(field, users).unsqueeze(1) for field in self.user_fields]
        none = catalogue.table.new_zeros(len(users), 0, self.architecture.embedding_size)
        of_context = torch.cat([none, *of_rows], 1)
        shift = of_context.sum(1) / catalogue.averaged if of_rows else None
        past, keys = users.new_zeros(len(users), 0), none
        if self.history_attention is not None:
            histories = self._past(users, self._known_vectors())
            past, keys = histories.items, histories.keys()

        def pair(position: int) -> tuple[Tensor, Tensor]:
            assert self._seen is not None
            middle, features = self._seen.pair_features.of_user(int(users[position]))
            field = torch.addmm(self.known_field.bias.unsqueeze(1), self.known_field.weight, features.T)
            return field, self._seen(middle, features).T

        return Asking(torch.cat([of_context, *of_users], 1), shift, past, keys, None if self._seen is None else pair)

    def touched_squared_norm(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """``R(w)`` of a batch (arguments as in :meth:`forward`): embedding rows outside the batch do not count."""
        asked = items.flatten()
        readers = {field: [self._read(field, users)] for field in self.user_fields}
        readers |= {field: [self._read(field, asked)] for field in self.item_fields}
        readers |= {field: [Tokens(context[field].flatten())] for field in self.context_fields}
        if self.history_attention is not None:
            readers[self.item_id_field].append(Tokens(users, self.history_items))
            for field in self.context_fields:
                readers[field].append(Tokens(users, getattr(self, _history_name(field))))
        tables = [
            (self._weight(field), read) for field, read in readers.items() if _module_name(field) not in self.numbers
        ]
        parts = [module for name, module in self.named_children() if name != "embeddings"]
        return touched_norm(tables, [weight for module in parts for weight in module.parameters()])
