"""How clients learn together: what a strategy asks of its model and of other keys, and which keys it leaves unread."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from recbole_fedkd.config.choices import choices
from recbole_fedkd.config.judging import JudgedConfig
from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.config.known import KnownKeys
from recbole_fedkd.config.outlines import (
    Outline,
    described,
    has_loader,
    keys_of,
    outline_of_name,
    trainer_name,
    traits_of_strategy,
)
from recbole_fedkd.errors import InputError, not_distilled


class FederatedConfig(JudgedConfig):
    """A config as far as its strategy is concerned.

    Attributes:
        outline: of the model.
        unread_keys: keys of the user that other models know and this one does not read.
        attentive: whether the model is one of this package.
        federated: whether users live on clients.
        shares_parameters: whether clients send their networks.
        trains_teacher: whether clients keep a teacher beside the student.
        learns_mutually: whether the two teach each other by weights that are keys.
        learns_factors: whether clients exchange item factors and train heads on them.
        taught_by_fold_in: whether clients exchange item factors, which teach their students.
        reads_features: whether the model is one of this package that embeds features of users, items and rows.
    """

    outline: Outline
    unread_keys: list[str]
    attentive: bool
    federated: bool
    reads_features: bool
    shares_parameters: bool
    trains_teacher: bool
    learns_mutually: bool
    learns_factors: bool
    taught_by_fold_in: bool
    _known: KnownKeys
    _checkpoint_values: Mapping[str, Any]

    def _chosen(self, key: str) -> Any:
        """Value of a key that decides which files are read, checked already here."""
        value = self.external_config_dict.get(key, self.internal_config_dict.get(key))
        self._known.keys[key].check(value)
        return value

    def _set_strategy(self, model: str, model_class: type, strategy: str | None) -> None:
        attentive = "population" in self.outline.traits
        if strategy is None and attentive:
            raise InputError(f"strategy is not set; it must be one of {', '.join(choices('strategies'))}")
        if attentive and strategy == "central":
            raise InputError("strategy 'central' trains one network on all data: use --model=AttnStudent for that")
        if strategy is None:
            strategy = self.internal_config_dict["strategy"] = "central"
        self.federated = strategy != "central"
        if not self.federated and self._chosen("holdout_clients"):
            raise InputError(
                f"holdout_clients is {self._chosen('holdout_clients')}, but strategy=central has no clients that could be kept "
                "out of training; set a strategy, or leave it unset"
            )
        if self.reads_features and self._chosen("known_features") is None:
            self.external_config_dict.pop("known_features", None)
            # Over clients it would be made of each one's own rows, which is no published method.
            self.internal_config_dict["known_features"] = (
                not self.federated and self._chosen("label_mode") != "implicit"
            )
        traits = traits_of_strategy(strategy) if self.federated else frozenset()
        self.shares_parameters = "shares_parameters" in traits
        self.trains_teacher = "trains_teacher" in traits
        self.learns_mutually = self.trains_teacher and "learns_mutually" in traits
        of_factors = self._of_factors(attentive, strategy)
        self.learns_factors, self.taught_by_fold_in = of_factors == "factors", of_factors == "fold_in"
        if not self._checkpoint_values:
            self._add_unread(getattr(model_class, "reads", frozenset()))
        pool = self._chosen("student_pool")
        if self.federated and attentive and pool and "shares_parameters" in traits:
            raise InputError(
                f"student_pool gives clients networks of different sizes, which strategy '{strategy}' cannot average; "
                "use a strategy that distils, or local"
            )
        small = "clicks" in self.outline.traits and self.outline.sums is None
        if "ratings" in self.outline.traits and self._chosen("label_mode") == "implicit":
            raise InputError(
                f"model '{model}' predicts ratings, and label_mode=implicit has none; use label_mode=rating or threshold, or "
                "the models Pop, EASE and GramEASE"
            )
        if not self.federated or self._exchanges_sums(model, strategy) or attentive:
            return
        if self.attentive and not small:
            raise InputError(
                f"strategy '{strategy}' of {model} over clients: use --model=AttnFedKD, the population of it"
            )
        if self.trains_teacher:
            raise InputError(
                f"strategy '{strategy}' trains an AttnTeacher beside an AttnStudent; use --model=AttnFedKD for it"
            )
        if "distils_on_server" in traits:
            raise InputError(
                f"strategy '{strategy}' makes up histories that an AttnStudent reads on the server; use --model=AttnFedKD"
            )
        if small:
            return
        kind = self.internal_config_dict["MODEL_TYPE"].name
        trainer = trainer_name(model, kind)
        if trainer == "TraditionalTrainer":
            raise InputError(
                f"model '{model}' learns nothing by gradient but in a way of its own, so there is nothing for clients to "
                "train; leave strategy unset"
            )
        if trainer != "Trainer" or has_loader(model, kind):
            raise InputError(
                f"model '{model}' is trained in a way of its own in RecBole (a special trainer or loader), so strategy "
                f"'{strategy}' cannot run over it; it runs over POINTWISE and PAIRWISE models"
            )
        if "taught_by_received" in traits:
            raise InputError(
                f"strategy '{strategy}' teaches an AttnStudent by the server's; use --model=AttnFedKD for it"
            )
        if "exchanges_knowledge" in traits and not self.outline.may_click:
            raise InputError(not_distilled(strategy, model))
        other_meaning = sorted(self._keys_of_strategy(strategy) & self._known.of_model)
        if other_meaning:
            raise InputError(
                f"strategy '{strategy}' and model '{model}' both read {', '.join(other_meaning)} and mean different things"
            )

    def _add_unread(self, reads: Set[str]) -> None:
        """Count the user's keys that this strategy and model leave unread, but for what it ``reads``."""
        unread = keys_with("central") if self.federated else keys_with("federation") - self._known.of_model
        unread = unread - reads
        if self.federated and "population" not in self.outline.traits:
            unread = unread | keys_with("attentive") - self._known.of_model
        self.unread_keys += [key for key in self.external_config_dict if key in unread]
        if self.attentive and not self.reads_features:
            # They stand in properties/overall.yaml, and these models embed no feature fields that could be encoded.
            self.unread_keys += [key for key in self.external_config_dict if key in keys_with("fields")]

    def _exchanges_sums(self, model: str, strategy: str) -> bool:
        """Whether the model is one of sums over clients; refuses what cannot go with them."""
        if self.outline.sums is None:
            if strategy == "sums":
                of_sums = [name for name in described()["models"] if outline_of_name(name).sums is not None]
                raise InputError(
                    f"strategy 'sums' exchanges the sums that a model is made of, and {model} is trained; it runs over "
                    f"{', '.join(of_sums)}"
                )
            return False
        if strategy not in ("sums", "local"):
            raise InputError(
                f"model '{model}' is made of sums and trains nothing, so that strategy '{strategy}' has nothing to do; use "
                "strategy=sums, or local for every client by itself"
            )
        if self._chosen("clients_per_round"):
            raise InputError("strategy=sums needs every client in its exchange; unset clients_per_round")
        return True

    def _keys_of_strategy(self, strategy: str) -> set[str]:
        """The keys that a strategy reads, and what it exchanges."""
        own = keys_of("strategies", strategy)
        exchanges = "exchanges_knowledge" in traits_of_strategy(strategy)
        return {*own, *(keys_of("knowledge", self._chosen("knowledge")) if exchanges else ())}

    def _of_factors(self, attentive: bool, strategy: str) -> str | None:
        """The kind of knowledge, where it is made of item factors; refuses what cannot go with them."""
        exchanges = self.federated and strategy != "sums" and "exchanges_knowledge" in traits_of_strategy(strategy)
        if exchanges and self._chosen("knowledge") == "gram":
            raise InputError(
                "knowledge=gram is what strategy=sums exchanges; use that, with --model=GramEASE or PureSVD"
            )
        knowledge: str = self._chosen("knowledge")
        if not exchanges or knowledge not in ("factors", "fold_in"):
            return None
        if not attentive:
            raise InputError(
                f"knowledge={knowledge} trains a network of its own on item factors; use --model=AttnFedKD"
            )
        if self._chosen("label_mode") == "implicit":
            raise InputError(
                f"knowledge={knowledge} is made of labels, and label_mode=implicit has one; use label_mode=rating or threshold"
            )
        if self._chosen("clients_per_round"):
            raise InputError(f"knowledge={knowledge} needs every client in its exchange; unset clients_per_round")
        if knowledge == "factors" and self._chosen("student_pool"):
            raise InputError(
                "knowledge=factors trains heads, all of one size; unset student_pool, or use knowledge=fold_in"
            )
        return knowledge
