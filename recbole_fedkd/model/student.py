"""Networks as RecBole models: ``AttnStudent`` and ``AttnTeacher`` train alone and centrally."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import InputType, ModelType
from torch import Tensor, nn
from torch.nn import functional

from recbole_fedkd.model.network import Architecture, AttentiveNetwork, FeatureTable, History

FULL_SORT_ROWS = 32768
"""User-item pairs that a full sort scores at a time; bounds its memory."""


ARCHITECTURE_KEYS = (
    "embedding_size",
    "backbone",
    "hidden_sizes",
    "dropout_prob",
    "attention",
    "attention_heads",
    "use_user_id",
    "history_length",
)


def read_architecture(config: Any, labels: int, different: Mapping[str, Any] | None = None) -> Architecture:
    """The network's keys of the config, ``properties/model`` documents each; ``different`` holds those of a teacher."""
    values = {key: config[key] for key in ARCHITECTURE_KEYS}
    return Architecture(
        labels=labels,
        **{**values, **(different or {})},
        item_prior=config["knowledge"] == "item" and config["knowledge_use"] in ("prior", "both"),
    )


def read_tables(dataset: Any, history_length: int) -> tuple[FeatureTable, FeatureTable, History | None]:
    """User table, item table and histories of a training split (a ``FedKDDataset``)."""
    tables = []
    for source, id_field in (("user", dataset.uid_field), ("item", dataset.iid_field)):
        columns = dataset.side_fields(source)
        vocabulary = {field: dataset.num(field) for field in columns}
        tables.append(FeatureTable(id_field, dataset.num(id_field), columns, vocabulary))
    history = History(*dataset.history(history_length)) if history_length > 0 else None
    return tables[0], tables[1], history


class LabelledRecommender(AbstractRecommender):
    """A RecBole model over a T-way label distribution; subclasses say how logits come about.

    Its score is the expected label value ``E[v] = sum_t p_t v_t``, for rating prediction and for ranking alike.

    Args:
        config: the run's config.
        dataset: the training split, a ``FedKDDataset``.
    """

    type = ModelType.CONTEXT
    input_type = InputType.POINTWISE
    embeds_features: ClassVar[bool] = True
    """Whether it reads ``AttnStudent``'s keys: an attentive network over features, and no model of ids alone."""

    label_values: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__()
        self.user_field, self.item_field = config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]
        self.label_field = config["LABEL_FIELD"]
        self.item_num = dataset.num(self.item_field)
        self.device = config["device"]
        self.register_buffer("label_values", torch.tensor(dataset.label_values), persistent=False)

    def logits(self, users: Tensor, items: Tensor) -> Tensor:
        """Raw logits ``[batch, targets, T]`` of users ``[batch]`` and items ``[batch, targets]``, in dataset ids."""
        raise NotImplementedError

    def predict_distribution(self, interaction: Any) -> Tensor:
        """Label distribution ``[batch, T]`` of each user-item pair."""
        logits = self.logits(interaction[self.user_field], interaction[self.item_field].unsqueeze(1))
        return logits.squeeze(1).softmax(-1)

    def predict(self, interaction: Any) -> Tensor:
        """Expected label value ``[batch]`` of each user-item pair."""
        return self.predict_distribution(interaction) @ self.label_values

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Expected label value of every item, ``[users * items]``."""
        users = interaction[self.user_field]
        catalogue = torch.arange(self.item_num, device=users.device)
        scores = [
            self.logits(part, catalogue.expand(len(part), -1)).softmax(-1) @ self.label_values
            for part in users.split(max(1, FULL_SORT_ROWS // self.item_num))
        ]
        return torch.cat(scores).flatten()


class NetworkBuilder(Protocol):
    """Builds networks of one kind, for any users."""

    def build(self, members: Tensor) -> nn.Module:
        """A network for the users ``members [n]``, which it knows as 1 to n.

        It is called ``network(users [batch], items [batch, targets])`` for logits ``[batch, targets, T]``, has
        ``touched_squared_norm`` of the same arguments, and names its parameters with one row per local user in ``user_rows``.
        """


class NetworkRecommender(LabelledRecommender):
    """One network for all users, trained centrally.

    Args:
        config: the run's config.
        dataset: the training split, a ``FedKDDataset``.
        network: as a ``NetworkBuilder`` builds it, for all users.
    """

    def __init__(self, config: Any, dataset: Any, network: nn.Module) -> None:
        super().__init__(config, dataset)
        self.reg_weight = config["reg_weight"]
        self.network = network

    def logits(self, users: Tensor, items: Tensor) -> Tensor:
        """See :meth:`LabelledRecommender.logits`."""
        logits: Tensor = self.network(users, items)
        return logits

    def calculate_loss(self, interaction: Any) -> Tensor:
        """``CE(y, p) + lambda R(w)`` of a batch."""
        users, items = interaction[self.user_field], interaction[self.item_field].unsqueeze(1)
        labels = torch.searchsorted(self.label_values, interaction[self.label_field])
        loss = functional.cross_entropy(self.logits(users, items).squeeze(1), labels)
        if self.reg_weight:
            norm: Callable[[Tensor, Tensor], Tensor] = self.network.touched_squared_norm  # type: ignore[assignment]
            loss = loss + self.reg_weight * norm(users, items)
        return loss


class AttnStudent(NetworkRecommender):
    """The compact attentive network of AFD; alone and centrally trained it is the ceiling of the federation."""

    def __init__(self, config: Any, dataset: Any) -> None:
        users, items, history = read_tables(dataset, config["history_length"])
        architecture = read_architecture(config, len(dataset.label_values))
        super().__init__(config, dataset, AttentiveNetwork(architecture, users, items, history))


class AttnTeacher(AttnStudent):
    """The same network, larger by its config: the one that would never leave its client."""
