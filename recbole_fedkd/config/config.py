"""The config: RecBole's, plus this package's properties, minus everything that RecBole swallows.

Order, low to high: ``properties/overall.yaml``, RecBole's own files, ``properties/model``, the label mode, the dataset, the
preset, then the user's config files, config dictionary and command line. An unknown key is an error that names the
nearest valid one; types and ranges are read from the comments of the yaml files where the keys are defined.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recbole_fedkd import compat  # before RecBole's modules, of which it readies what they import

# isort: split
import recbole.data.dataset
from recbole.data.dataloader import TrainDataLoader
from recbole.data.utils import get_dataloader
from recbole.trainer import TraditionalTrainer, Trainer
from recbole.utils import InputType, ModelType, get_trainer

from recbole_fedkd.config.files import OWN_DEFAULTS, PROPERTIES, RECBOLE_PROPERTIES, files_of_model, preset_file
from recbole_fedkd.config.given import convert_given, named, read_files, values_of_preset
from recbole_fedkd.config.judging import JudgedConfig
from recbole_fedkd.config.keys import (
    keys_of_model,
    keys_with,
    merged_layers,
    read_keys,
    read_sections,
    settings_of_model,
)
from recbole_fedkd.config.known import KnownKeys, keys_in_source
from recbole_fedkd.config.models import find_model
from recbole_fedkd.config.plugins import import_plugins, model_of, models_with_keys
from recbole_fedkd.config.shapes import check_fields
from recbole_fedkd.config.synonyms import called_here
from recbole_fedkd.config.transforms import check_transform
from recbole_fedkd.config.values import ConfigLoader, plain
from recbole_fedkd.distillation.exchange import FactorSettings
from recbole_fedkd.distillation.knowledge import AGGREGATIONS
from recbole_fedkd.distillation.losses import MutualWeights
from recbole_fedkd.errors import InputError, shown
from recbole_fedkd.federated.knowledge import KNOWLEDGE
from recbole_fedkd.federated.strategy import STRATEGIES
from recbole_fedkd.model import MODELS, AttnFedKD, Bias, corrected, has_fields
from recbole_fedkd.model.factorization import FactorizationRecommender
from recbole_fedkd.model.gram import GramRecommender
from recbole_fedkd.privacy.settings import check_attack, check_privacy
from recbole_fedkd.registry import declared_settings, settings_of


class FedKDConfig(JudgedConfig):
    """RecBole's ``Config`` with strict keys; ``sys.argv`` is never read, the command line is an argument.

    Args:
        model: model name or class.
        dataset: dataset name.
        config_file_list: yaml files, later ones win.
        config_dict: keys that win over the files.
        command_line: keys that win over everything.
        checkpoint_values: keys of a checkpoint, which win over defaults and lose to everything else.

    Raises:
        InputError: whatever is missing, unknown, of the wrong type or out of range.

    Attributes:
        unread_keys: keys of the user that other models know and this one does not read.
        attentive: whether the model is one of this package.
        federated: whether users live on clients.
        trains_teacher: whether clients keep a teacher beside the student.
        learns_mutually: whether the two teach each other by weights that are keys.
        learns_factors: whether clients exchange item factors and train heads on them.
        taught_by_fold_in: whether clients exchange item factors, which teach their students.
        reads_history: whether the model gets the user's training history as columns of every row.
        reads_features: whether the model is one of this package that embeds features of users, items and rows.
        keeps_logs: whether a run of it has a log file and TensorBoard's curves.
        of_one_party: whether the data set is one party's own rows, which need not hold every label.
        fingerprint: what the data set is held against when it is loaded; None unless a checkpoint says so.
    """

    unread_keys: list[str]
    attentive: bool
    federated: bool
    reads_history: bool
    reads_features: bool
    trains_teacher: bool
    learns_mutually: bool
    learns_factors: bool
    taught_by_fold_in: bool
    fingerprint: Any = None
    keeps_logs: bool = False
    of_one_party: bool = False
    _known: KnownKeys
    _keys_of_plugins: set[str]

    def __init__(
        self,
        model: str | type | None = None,
        dataset: str | None = None,
        config_file_list: list[str] | None = None,
        config_dict: Mapping[str, Any] | None = None,
        command_line: Mapping[str, Any] | None = None,
        checkpoint_values: Mapping[str, Any] | None = None,
    ) -> None:
        for name, keys in (("config_dict", config_dict), ("command_line", command_line)):
            if keys is not None and not isinstance(keys, Mapping):
                raise InputError(f"{name} is {shown(keys)}; it must be a dict of config keys")
        self._command_line = dict(command_line or {})
        self._checkpoint_values = dict(checkpoint_values or {})
        self.unread_keys = []
        # RecBole edits the dictionary that it is given.
        super().__init__(model, dataset, config_file_list, copy.deepcopy(dict(config_dict or {})))
        self._check_valid_metric()
        check_fields(self)
        check_transform(self)
        check_privacy(self)
        check_attack(self)

    def compatibility_settings(self) -> None:
        """Replaces RecBole's, which reads names that numpy 2 removed."""
        compat.apply()

    def _build_yaml_loader(self) -> type[ConfigLoader]:
        """Replaces RecBole's, which changes yaml's own loader for the whole process."""
        return ConfigLoader

    def _convert_config_dict(self, config_dict: Mapping[Any, Any]) -> dict[Any, Any]:
        """As RecBole's, but a text is read as a literal and never executed."""
        return convert_given(config_dict)

    def _merge_external_config_dict(self) -> None:
        layers = (self._checkpoint_values, self.file_config_dict, self.variable_config_dict, self.cmd_config_dict)
        self.external_config_dict = merged_layers(*layers)

    def _load_config_files(self, file_list: Any) -> dict[str, Any]:
        return read_files(file_list)

    def _load_cmd_line(self) -> dict[str, Any]:
        return self._convert_config_dict(self._command_line)

    def _get_model_and_dataset(self, model: str | type | None, dataset: str | None) -> tuple[str, type, str]:
        chosen, name = named(self.external_config_dict, model, dataset)
        plugins = import_plugins(self.external_config_dict.get("plugins"))
        self._keys_of_plugins = {key for own in models_with_keys(plugins) for key in keys_of_model(own)}
        if isinstance(chosen, str):
            own = model_of(plugins, chosen)
            return chosen, find_model(chosen) if own is None else own, name
        return chosen.__name__, corrected(chosen), name

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        self.attentive = issubclass(model_class, tuple(MODELS.values()))
        # Names such as gamma, alpha or reg_weight mean something else to many a RecBole model: theirs come first.
        recbole_keys: dict[str, Any] = self.internal_config_dict
        self.internal_config_dict = {name: copy.copy(setting.default) for name, setting in declared_settings().items()}
        self._update_internal_config_dict(PROPERTIES / "overall.yaml")
        self.internal_config_dict.update(recbole_keys)
        self.internal_config_dict.update(OWN_DEFAULTS)
        self.reads_features = self.attentive and getattr(model_class, "embeds_features", False)
        files = files_of_model(model, self.reads_features)
        for file in files:
            self._update_internal_config_dict(file)
        declared = settings_of_model(model_class)
        self.internal_config_dict.update({name: copy.copy(setting.default) for name, setting in declared.items()})
        recbole_names = [name for names in self.parameters.values() for name in names]
        stock = model_class.__module__.startswith(("recbole.", "recbole_fedkd."))
        mentioned, own = keys_in_source(model_class), keys_of_model(model_class)
        self._known = KnownKeys(
            recbole_names, model, dataset, files, mentioned, stock, own, elsewhere=self._keys_of_plugins
        )
        self.unread_keys += self._known.check(self.external_config_dict)
        preset_values = values_of_preset(self.external_config_dict)
        if "label_mode" in preset_values:
            self.internal_config_dict["label_mode"] = preset_values["label_mode"]
        mode = self._chosen("label_mode")
        self.reads_history = False
        if mode is not None:
            self._update_internal_config_dict(PROPERTIES / "label_mode" / f"{mode}.yaml")
            self._set_columns(dataset)
            self._set_label_field(mode, model_class)
            self._set_rows(mode, model_class)
        preset = self._chosen("preset")
        if "preset" not in self.external_config_dict and preset and self._speaks_of_students(mode):
            preset = self.internal_config_dict["preset"] = "afd"
        if preset is not None:
            self._update_internal_config_dict(preset_file(preset))
            if not self.attentive and not has_fields(model_class):
                self.internal_config_dict["attention"] = False
        self._set_strategy(model, model_class, self._chosen("strategy"))

    def _speaks_of_students(self, mode: str | None) -> bool:
        """Whether the user sets a key of students or of an exchange, or labels that no item factors are made of."""
        own = {key.name for one in (STRATEGIES, KNOWLEDGE, AGGREGATIONS) for _, key in one.declared()}
        own |= keys_with("students") | keys_with("attentive") | keys_with("fields")
        own |= read_sections(PROPERTIES / "model" / "AttnStudent.yaml")["Network"].keys()
        given = {name for name, value in self.external_config_dict.items() if value is not None}
        return mode == "implicit" or bool(given & (own - settings_of(FactorSettings).keys()))

    def _set_columns(self, dataset: str) -> None:
        """The columns that are loaded where labels are made.

        They are known for some datasets; of others it is all that lie there for a model that reads features, else the four
        usual ones.
        """
        own_dataset = PROPERTIES / "dataset" / f"{dataset}.yaml"
        if own_dataset.is_file():
            self._update_internal_config_dict(own_dataset)
        elif not (RECBOLE_PROPERTIES / "dataset" / f"{dataset}.yaml").is_file():
            usual = {"inter": [self._chosen(name) for name in keys_with("column")]}
            self.internal_config_dict["load_col"] = None if self.reads_features else usual

    def _set_rows(self, mode: str, model_class: type) -> None:
        """RecBole's models on the labelled rows that every model gets; its sequential models would make rows of their own."""
        if self.attentive:
            return
        if model_class.type == ModelType.KNOWLEDGE:  # type: ignore[attr-defined]
            raise InputError(
                f"label_mode={mode} gives every model the same rows, without the knowledge graph that "
                f"{model_class.__name__} reads; leave label_mode unset for RecBole's own training of it"
            )
        pointwise = getattr(model_class, "input_type", None) == InputType.POINTWISE
        if model_class.type == ModelType.SEQUENTIAL:  # type: ignore[attr-defined]
            if not pointwise:
                raise InputError(
                    f"label_mode={mode} needs a model that learns from labels, which {model_class.__name__} is not; "
                    "leave label_mode unset for RecBole's own training of it"
                )
            if hasattr(recbole.data.dataset, f"{model_class.__name__}Dataset"):
                raise InputError(
                    f"label_mode={mode} gives every model the same rows, but RecBole prepares rows of its own for "
                    f"{model_class.__name__}; leave label_mode unset for RecBole's own training of it"
                )
            self.reads_history = True
            self.internal_config_dict["MODEL_TYPE"] = ModelType.CONTEXT
            self.internal_config_dict["repeatable"] = False
        elif not pointwise:
            # A pairwise model learns from every training row against sampled negatives, and its score is no probability.
            self._update_internal_config_dict(PROPERTIES / "label_mode" / "pairwise.yaml")

    def _chosen(self, key: str) -> Any:
        """Value of a key that decides which files are read, checked already here."""
        value = self.external_config_dict.get(key, self.internal_config_dict.get(key))
        self._known.keys[key].check(value)
        return value

    def _set_label_field(self, mode: str, model_class: type) -> None:
        rating = self._chosen("RATING_FIELD")
        if mode == "rating":
            if not self.attentive or issubclass(model_class, FactorizationRecommender | GramRecommender):
                of_preset = f"preset {self._chosen('preset')} is one of AttnFedKD, use that model or another preset"
                use = "use label_mode=threshold" if "label_mode" in self.external_config_dict else of_preset
                raise InputError(
                    f"label_mode=rating needs a model with one output per rating, which {model_class.__name__} is not; "
                    f"{use}"
                )
            if self.external_config_dict.get("threshold") is not None:
                raise InputError("threshold is set but label_mode is 'rating'; use label_mode=threshold")
            self.internal_config_dict["LABEL_FIELD"] = rating
        elif mode == "threshold":
            threshold = {rating: self._chosen("rating_threshold")}
            chosen = self.external_config_dict.get("threshold", threshold)
            if chosen != threshold:
                raise InputError(
                    f"threshold is {chosen}, but label_mode=threshold takes rating_threshold; set that instead"
                )
            self.internal_config_dict["threshold"] = threshold

    def _set_strategy(self, model: str, model_class: type, strategy: str | None) -> None:
        attentive = issubclass(model_class, AttnFedKD)
        if strategy is None and attentive:
            raise InputError(f"strategy is not set; it must be one of {', '.join(STRATEGIES)}")
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
        self.trains_teacher = self.federated and STRATEGIES[strategy].trains_teacher
        self.learns_mutually = self.trains_teacher and issubclass(STRATEGIES.settings[strategy], MutualWeights)
        of_factors = self._of_factors(attentive, strategy)
        self.learns_factors, self.taught_by_fold_in = of_factors == "factors", of_factors == "fold_in"
        unread = keys_with("central") if self.federated else keys_with("federation") - self._known.of_model
        unread = unread - getattr(model_class, "reads", frozenset())
        if self.federated and not attentive:
            unread = unread | keys_with("attentive") - self._known.of_model
        if not self._checkpoint_values:
            self.unread_keys += [key for key in self.external_config_dict if key in unread]
        pool = self._chosen("student_pool")
        if self.federated and attentive and pool and STRATEGIES[strategy].shares_parameters:
            raise InputError(
                f"student_pool gives clients networks of different sizes, which strategy '{strategy}' cannot average; "
                "use a strategy that distils, or local"
            )
        small = issubclass(model_class, FactorizationRecommender)
        if self.attentive and not getattr(model_class, "embeds_features", False) and not self._checkpoint_values:
            # They stand in properties/overall.yaml, and these models embed no feature fields that could be encoded.
            self.unread_keys += [key for key in self.external_config_dict if key in keys_with("fields")]
        if issubclass(model_class, Bias) and self._chosen("label_mode") == "implicit":
            raise InputError(
                f"model '{model}' predicts ratings, and label_mode=implicit has none; use label_mode=rating or threshold, or "
                "the models Pop, EASE and GramEASE"
            )
        if not self.federated or self._exchanges_sums(model, model_class, strategy) or attentive:
            return
        if self.attentive and not small:
            raise InputError(
                f"strategy '{strategy}' of {model} over clients: use --model=AttnFedKD, the population of it"
            )
        if self.trains_teacher:
            raise InputError(
                f"strategy '{strategy}' trains an AttnTeacher beside an AttnStudent; use --model=AttnFedKD for it"
            )
        if STRATEGIES[strategy].distils_on_server:
            raise InputError(
                f"strategy '{strategy}' makes up histories that an AttnStudent reads on the server; use --model=AttnFedKD"
            )
        if small:
            return
        kind = self.internal_config_dict["MODEL_TYPE"]
        loader = get_dataloader({"model": model, "MODEL_TYPE": kind}, "train")
        if get_trainer(kind, model) is TraditionalTrainer:
            raise InputError(
                f"model '{model}' learns nothing by gradient but in a way of its own, so there is nothing for clients to "
                "train; leave strategy unset"
            )
        if get_trainer(kind, model) is not Trainer or loader is not TrainDataLoader:
            raise InputError(
                f"model '{model}' is trained in a way of its own in RecBole (a special trainer or loader), so strategy "
                f"'{strategy}' cannot run over it; it runs over POINTWISE and PAIRWISE models"
            )
        if STRATEGIES[strategy].taught_by_received:
            raise InputError(
                f"strategy '{strategy}' teaches an AttnStudent by the server's; use --model=AttnFedKD for it"
            )
        other_meaning = sorted(self._keys_of_strategy(strategy) & self._known.of_model)
        if other_meaning:
            raise InputError(
                f"strategy '{strategy}' and model '{model}' both read {', '.join(other_meaning)} and mean different things"
            )

    def _exchanges_sums(self, model: str, model_class: type, strategy: str) -> bool:
        """Whether the model is one of sums over clients; refuses what cannot go with them."""
        of_sums = [name for name, kind in MODELS.items() if hasattr(kind, "sums")]
        if not hasattr(model_class, "sums"):
            if strategy == "sums":
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
        owners = [STRATEGIES.settings[strategy]]
        if STRATEGIES[strategy].exchanges_knowledge:
            owners.append(KNOWLEDGE.settings[self._chosen("knowledge")])
        return {name for owner in owners for name in settings_of(owner)}

    def gives(self, key: str) -> bool:
        """Whether the user's files, dictionary or command line set a key; a checkpoint's value is not the user's."""
        values, saved = self.external_config_dict, self._checkpoint_values
        return key in values and not (key in saved and saved[key] == values[key])

    def _of_factors(self, attentive: bool, strategy: str) -> str | None:
        """The kind of knowledge, where it is made of item factors; refuses what cannot go with them."""
        exchanges = self.federated and STRATEGIES[strategy].exchanges_knowledge and strategy != "sums"
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

    def check_names(self, names: Iterable[str]) -> None:
        """Check that each is the name of a key.

        Raises:
            InputError: one of them is not; the sentence tells the nearest that is.
        """
        self._known.check_names(names)

    def unread(self) -> list[str]:
        """The keys that are not read, each with what it is called here where it is known by another name."""
        return [f"{key}{called_here(key, self._known.keys) or ''}" for key in self.unread_keys]

    def _init_device(self) -> None:
        if isinstance(self.final_config_dict["gpu_id"], list):
            self.final_config_dict["gpu_id"] = tuple(self.final_config_dict["gpu_id"])
        super()._init_device()

    def made_by(self) -> str:
        """Half a sentence on what a model's scores come from: its training, or of a model without gradients its own keys."""
        if self["MODEL_TYPE"] != ModelType.TRADITIONAL:
            return f"after training with learner {self['learner']}, learning_rate {self['learning_rate']:g}"
        file = RECBOLE_PROPERTIES / "model" / f"{self['model']}.yaml"
        own = read_keys(file) if file.is_file() else ()
        values = ", ".join(f"{name} {self[name]}" for name in own if self[name] is not None)
        return f"as configured: {values}" if values else "on these data"

    def view(self, **changes: Any) -> FedKDConfig:
        """The same config with some keys changed, for a second evaluation protocol."""
        other = copy.copy(self)
        other.final_config_dict = {**self.final_config_dict, **changes}
        return other

    def plain_values(self) -> dict[str, Any]:
        """Every key as plain Python values (what a checkpoint or a JSON file can hold)."""
        values = {key: plain(value) for key, value in self.final_config_dict.items()}
        values["judged_metrics"] = list(self.judged_metrics)
        # A run may be resumed from another folder than the one it was started in.
        values["data_path"] = str(Path(values["data_path"]).resolve())
        return values
