"""Networks as RecBole models: ``AttnStudent`` and ``AttnTeacher`` train alone and centrally."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import Any, ClassVar, Protocol

import torch
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import InputType, ModelType
from torch import Tensor, nn
from torch.nn import functional

from recbole_fedkd.data.features import FeatureField
from recbole_fedkd.data.schema import ClientRows, DataSchema, all_rows, history_of, read_schema
from recbole_fedkd.distillation.exchange import FactorSettings
from recbole_fedkd.errors import InputError
from recbole_fedkd.model.asked_again import AskedAgain, Scored, scored_by
from recbole_fedkd.model.catalogue import Kept, rank_items, ranks_chosen
from recbole_fedkd.model.known import KnownPairs, ReceivedPairs, exchange_of
from recbole_fedkd.model.network import (
    NO_CONTEXT,
    Architecture,
    ArchitectureSettings,
    AttentiveNetwork,
    Context,
    FeatureTable,
    History,
)
from recbole_fedkd.model.ranking import expected_values
from recbole_fedkd.registry import read_settings


def read_architecture(config: Any, labels: int, different: Mapping[str, Any] | None = None) -> Architecture:
    """The network's keys of the config, ``properties/model`` documents each; ``different`` holds those of a teacher.

    Raises:
        InputError: features of labels where there is only one.
    """
    keys = ArchitectureSettings(
        **{key.name: config[key.name] for key in fields(ArchitectureSettings)} | dict(different or {})
    )
    if keys.known_features and config["label_mode"] == "implicit":
        raise InputError(
            "known_features is made of labels, and label_mode=implicit has one; unset it, or use label_mode=rating or threshold"
        )
    taught = config.taught_by_fold_in
    return Architecture(
        **asdict(keys),
        labels=labels,
        item_prior=config["knowledge"] == "item" and config["knowledge_use"] in ("prior", "both"),
        factors=read_settings(FactorSettings, config) if keys.known_features or taught else None,
        taught_by_fold_in=taught,
    )


def attentive_network(architecture: Architecture, schema: DataSchema, rows: ClientRows) -> AttentiveNetwork:
    """The network of the users who live on a client, whom it knows as 1 to m."""
    # Copies: the buffers of two networks of one client are two.
    columns = {field.name: field.read(rows.profiles[field.name]).clone() for field in schema.user}
    users = FeatureTable(
        schema.user_field, len(rows.users) + 1, columns, _vocabulary(schema.user), schema.known_users(rows)
    )
    vocabulary, known = _vocabulary(schema.item), schema.known_items
    items = FeatureTable(schema.item_field, schema.item_num, schema.item_columns, vocabulary, known)
    history = None
    if architecture.history_length > 0:
        # One more, for the row that may not see itself.
        history = History(*history_of(schema, rows, architecture.history_length + 1))
    context = {field.name: field.tokens for field in schema.context}
    factors = architecture.factors
    kind = ReceivedPairs if architecture.taught_by_fold_in else KnownPairs
    of_rows = kind(exchange_of(factors, schema, rows)) if factors is not None else None
    return AttentiveNetwork(architecture, users, items, history, context, of_rows)


def _vocabulary(fields: Sequence[FeatureField]) -> dict[str, int]:
    return {field.name: field.tokens for field in fields if field.tokens is not None}


class LabelledRecommender(AbstractRecommender):
    """A RecBole model over a T-way label distribution; subclasses say how logits come about.

    Its score is the expected label value ``E[v] = sum_t p_t v_t``, for rating prediction and for ranking alike.

    Args:
        config: the run's config.
        dataset: the training split, a ``FedKDDataset``, or what is public of it.
    """

    type = ModelType.CONTEXT
    input_type = InputType.POINTWISE
    embeds_features: ClassVar[bool] = True
    """Whether it reads ``AttnStudent``'s keys: an attentive network over features, and no model of ids alone."""
    joins_features: ClassVar[bool] = True
    """Whether its loss reads columns of users and items from a batch, beside those of the row."""

    label_values: Tensor
    kept: Kept | None = None
    """What rankings make of the parameters alone, where these change no more; None: it is made anew for every one."""

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__()
        self.user_field, self.item_field = config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]
        self.label_field = config["LABEL_FIELD"]
        schema = dataset if isinstance(dataset, DataSchema) else read_schema(dataset)
        self.item_num = schema.item_num
        self.device = config["device"]
        self.context_fields = schema.context
        self.register_buffer("label_values", torch.tensor(schema.label_values), persistent=False)

    def logits(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Raw logits ``[batch, targets, T]`` of users ``[batch]`` and items ``[batch, targets]``, in dataset ids.

        ``context``: of each target, as :meth:`context_of` reads it.
        """
        raise NotImplementedError

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """As long as it lasts, no parameter changes, so that what follows from them alone is computed once."""
        before, self.kept = self.kept, self.kept or Kept(self.item_num)
        try:
            yield
        finally:
            self.kept = before

    def context_of(self, interaction: Any) -> dict[str, Tensor]:
        """Context of the rows of an interaction, ``[rows, ...]`` per field.

        Raises:
            InputError: it lacks a column.
        """
        missing = [field.name for field in self.context_fields if field.name not in interaction]
        if missing:
            raise InputError(
                f"the model reads the context of a row, but the interaction has no column {', '.join(missing)}; give it, or "
                "train with feature_fields that leave it out"
            )
        return {field.name: field.read(interaction[field.name]) for field in self.context_fields}

    def predict_distribution(self, interaction: Any) -> Tensor:
        """Label distribution ``[batch, T]`` of each user-item pair."""
        users, items = interaction[self.user_field], interaction[self.item_field].unsqueeze(1)
        return self.logits(users, items, one_target(self.context_of(interaction))).squeeze(1).softmax(-1)

    def predict(self, interaction: Any) -> Tensor:
        """Expected label value ``[batch]`` of each user-item pair."""
        return self.predict_distribution(interaction) @ self.label_values

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Expected label value of every item, ``[users * items]``, each user in the context of the user's row."""
        users, context = interaction[self.user_field], one_target(self.context_of(interaction))
        return self.expected(self.rank(users, context)).flatten()

    def rank(self, users: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Raw logits ``[users, items, T]`` of every item, each user in one context ``[users, 1, ...]``."""
        raise NotImplementedError

    @property
    def ranks_chosen(self) -> bool:
        """Whether :meth:`score_chosen` costs less than :meth:`predict`."""
        return False

    @property
    def screens(self) -> bool:
        """Whether scores of some items of each user cost as much less than all as they are fewer."""
        return self.ranks_chosen

    def rank_chosen(self, users: Tensor, items: Tensor) -> Tensor:
        """Raw logits ``[users, n, T]`` of some items of each user ``[users, n]``, without a context."""
        return self.logits(users, items)

    def score_chosen(self, users: Tensor, items: Tensor) -> Tensor:
        """Expected label values ``[users, n]``; arguments as of :meth:`rank_chosen`."""
        return self.expected(self.rank_chosen(users, items))

    def expected(self, logits: Tensor) -> Tensor:
        """Expected label values ``[users, items]`` of logits ``[users, items, T]``."""
        if logits.stride(2) == 1:
            return logits.softmax(2) @ self.label_values
        # Items lie side by side: along them, five labels are summed up in a tenth of the time.
        return expected_values(logits.transpose(1, 2), self.label_values)

    def scored_again(self, users: Tensor) -> Scored:
        """Expected label values of any items of users ``[users]``, to be asked for again and again."""
        return lambda places, items: self.score_chosen(users[places], items)

    def catalogue_of(self, network: Any, client: int = 0) -> Any:
        """What a client's network has made of its parameters; None where nothing is kept, or the network makes nothing."""
        return (
            self.kept.of(client, network.catalogue)
            if self.kept is not None and getattr(network, "ranks", False)
            else None
        )


def one_target(context: Context) -> dict[str, Tensor]:
    """Context of rows ``[batch, ...]`` as that of one target each, ``[batch, 1, ...]``."""
    return {name: values.unsqueeze(1) for name, values in context.items()}


class NetworkBuilder(Protocol):
    """Builds networks of one kind, for any client."""

    def build(self, rows: ClientRows) -> nn.Module:
        """A network for the users who live on a client, whom it knows as 1 to m.

        It is called ``network(users [batch], items [batch, targets], context)`` for logits ``[batch, targets, T]``, has
        ``touched_squared_norm`` of the same arguments, and names its parameters with one row per local user in ``user_rows``.
        """


class NetworkRecommender(LabelledRecommender):
    """One network for all users, trained centrally; it holds the features of users and items itself.

    Args:
        config: the run's config.
        dataset: the training split, a ``FedKDDataset``.
        network: as a ``NetworkBuilder`` builds it, for all users.
    """

    joins_features = False

    def __init__(self, config: Any, dataset: Any, network: nn.Module) -> None:
        super().__init__(config, dataset)
        self.reg_weight = config["reg_weight"]
        self.network = network

    def logits(self, users: Tensor, items: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """See :meth:`LabelledRecommender.logits`."""
        logits: Tensor = self.network(users, items, context)
        return logits

    def rank(self, users: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """See :meth:`LabelledRecommender.rank`."""
        return rank_items(self.network, users, context, self.item_num, self.catalogue_of(self.network))

    @property
    def ranks_chosen(self) -> bool:
        """See :meth:`LabelledRecommender.ranks_chosen`."""
        return ranks_chosen(self.network)

    def rank_chosen(self, users: Tensor, items: Tensor) -> Tensor:
        """See :meth:`LabelledRecommender.rank_chosen`."""
        return rank_items(self.network, users, NO_CONTEXT, self.item_num, self.catalogue_of(self.network), items)

    def scored_again(self, users: Tensor) -> Scored:
        """See :meth:`LabelledRecommender.scored_again`."""
        if not self.ranks_chosen:
            return super().scored_again(users)
        everybody = torch.arange(len(users))
        asked = AskedAgain.of_one(self.network, users, self.catalogue_of(self.network))
        return scored_by([(everybody, everybody, asked)], self.expected)

    def calculate_loss(self, interaction: Any) -> Tensor:
        """``CE(y, p) + lambda R(w)`` of a batch."""
        users, items = interaction[self.user_field], interaction[self.item_field].unsqueeze(1)
        context = one_target(self.context_of(interaction))
        labels = torch.searchsorted(self.label_values, interaction[self.label_field])
        loss = functional.cross_entropy(self.logits(users, items, context).squeeze(1), labels)
        if self.reg_weight:
            norm: Callable[[Tensor, Tensor, Context], Tensor] = self.network.touched_squared_norm  # type: ignore[assignment]
            loss = loss + self.reg_weight * norm(users, items, context)
        return loss


class AttnStudent(NetworkRecommender):
    """The compact attentive network of AFD; alone and centrally trained it is the ceiling of the federation."""

    def __init__(self, config: Any, dataset: Any) -> None:
        schema = read_schema(dataset)
        architecture = read_architecture(config, len(schema.label_values))
        super().__init__(config, schema, attentive_network(architecture, schema, all_rows(dataset)))


class AttnTeacher(AttnStudent):
    """The same network, larger by its config: the one that would never leave its client."""
