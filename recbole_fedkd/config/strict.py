"""The config as this package has it, before RecBole's own: strict keys, merged in an order of its own.

Order, low to high: ``properties/overall.yaml``, RecBole's own files, ``properties/model``, the label mode, the dataset, the
preset, then the user's config files, config dictionary and command line. An unknown key is an error that names the
nearest valid one; types and ranges are read from the comments of the yaml files where the keys are defined. Nothing here needs
torch: what is asked of models and strategies is in :mod:`recbole_fedkd.config.outlines`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recbole_fedkd.config.federated import FederatedConfig
from recbole_fedkd.config.files import OWN_DEFAULTS, PROPERTIES, RECBOLE_PROPERTIES, files_of_model, preset_file
from recbole_fedkd.config.given import convert_given, read_files, values_of_preset
from recbole_fedkd.config.keys import keys_of_model, keys_with, merged_layers, read_sections, settings_of_model
from recbole_fedkd.config.known import KnownKeys
from recbole_fedkd.config.needs import check_columns, check_negatives, check_stages
from recbole_fedkd.config.outlines import has_dataset, keys_of, keys_of_all
from recbole_fedkd.config.shapes import check_fields
from recbole_fedkd.config.synonyms import called_here
from recbole_fedkd.config.transforms import check_transform
from recbole_fedkd.config.values import ConfigLoader, plain
from recbole_fedkd.errors import InputError, shown
from recbole_fedkd.privacy.settings import check_attack, check_privacy
from recbole_fedkd.registry import declared_settings


class StrictConfig(FederatedConfig):
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
        reads_history: whether the model gets the user's training history as columns of every row.
    """

    reads_history: bool
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
        check_stages(self)
        check_privacy(self)
        check_attack(self)
        check_columns(self)
        check_negatives(self)

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

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        self.attentive = self.outline.own
        # Names such as gamma, alpha or reg_weight mean something else to many a RecBole model: theirs come first.
        recbole_keys: dict[str, Any] = self.internal_config_dict
        self.internal_config_dict = {name: copy.copy(setting.default) for name, setting in declared_settings().items()}
        self._update_internal_config_dict(PROPERTIES / "overall.yaml")
        self.internal_config_dict.update(recbole_keys)
        self.internal_config_dict.update(OWN_DEFAULTS)
        self.reads_features = self.attentive and "features" in self.outline.traits
        files = files_of_model(model, self.reads_features)
        for file in files:
            self._update_internal_config_dict(file)
        declared = settings_of_model(model_class)
        self.internal_config_dict.update({name: copy.copy(setting.default) for name, setting in declared.items()})
        recbole_names = [name for names in self.parameters.values() for name in names]
        about = (self.outline.mentioned, self.outline.stock, keys_of_model(model_class), self._keys_of_plugins)
        self._known = KnownKeys(recbole_names, model, dataset, files, *about)
        self.unread_keys += self._known.check(self.external_config_dict)
        preset_values = values_of_preset(self.external_config_dict)
        if "label_mode" in preset_values:
            self.internal_config_dict["label_mode"] = preset_values["label_mode"]
        mode = self._chosen("label_mode")
        self.reads_history = False
        if mode is not None:
            self._update_internal_config_dict(PROPERTIES / "label_mode" / f"{mode}.yaml")
            self._set_columns(dataset)
            self._set_label_field(mode)
            self._set_rows(mode)
        preset = self._chosen("preset")
        if "preset" not in self.external_config_dict and preset and self._speaks_of_students(mode):
            preset = self.internal_config_dict["preset"] = "afd"
        if preset is not None:
            self._update_internal_config_dict(preset_file(preset))
            if not self.attentive and not self.outline.fields:
                self.internal_config_dict["attention"] = False
        self._set_strategy(model, model_class, self._chosen("strategy"))

    def _speaks_of_students(self, mode: str | None) -> bool:
        """Whether the user sets a key of students or of an exchange, or labels that no item factors are made of."""
        own = {key for kind in ("strategies", "knowledge", "aggregations") for key in keys_of_all(kind)}
        own |= keys_with("students") | keys_with("attentive") | keys_with("fields")
        own |= read_sections(PROPERTIES / "model" / "AttnStudent.yaml")["Network"].keys()
        given = {name for name, value in self.external_config_dict.items() if value is not None}
        return mode == "implicit" or bool(given & (own - keys_of("knowledge", "factors")))

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

    def _set_rows(self, mode: str) -> None:
        """RecBole's models on the labelled rows that every model gets; its sequential models would make rows of their own."""
        if self.attentive:
            return
        name = self.outline.name
        if self.outline.kind == "KNOWLEDGE":
            raise InputError(
                f"label_mode={mode} gives every model the same rows, without the knowledge graph that "
                f"{name} reads; leave label_mode unset for RecBole's own training of it"
            )
        pointwise = self.outline.input_kind == "POINTWISE"
        if self.outline.kind == "SEQUENTIAL":
            if not pointwise:
                raise InputError(
                    f"label_mode={mode} needs a model that learns from labels, which {name} is not; "
                    "leave label_mode unset for RecBole's own training of it"
                )
            if has_dataset(name):
                raise InputError(
                    f"label_mode={mode} gives every model the same rows, but RecBole prepares rows of its own for "
                    f"{name}; leave label_mode unset for RecBole's own training of it"
                )
            self.reads_history = True
            kinds = type(self.internal_config_dict["MODEL_TYPE"])
            self.internal_config_dict["MODEL_TYPE"] = kinds["CONTEXT"]
            self.internal_config_dict["repeatable"] = False
        elif not pointwise:
            # A pairwise model learns from every training row against sampled negatives, and its score is no probability.
            self._update_internal_config_dict(PROPERTIES / "label_mode" / "pairwise.yaml")

    def _set_label_field(self, mode: str) -> None:
        rating = self._chosen("RATING_FIELD")
        if mode == "rating":
            if not self.attentive or "clicks" in self.outline.traits:
                of_preset = f"preset {self._chosen('preset')} is one of AttnFedKD, use that model or another preset"
                use = "use label_mode=threshold" if "label_mode" in self.external_config_dict else of_preset
                raise InputError(
                    f"label_mode=rating needs a model with one output per rating, which {self.outline.name} is not; "
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

    def gives(self, key: str) -> bool:
        """Whether the user's files, dictionary or command line set a key; a checkpoint's value is not the user's."""
        values, saved = self.external_config_dict, self._checkpoint_values
        return key in values and not (key in saved and saved[key] == values[key])

    def check_names(self, names: Iterable[str]) -> None:
        """Check that each is the name of a key.

        Raises:
            InputError: one of them is not; the sentence tells the nearest that is.
        """
        self._known.check_names(names)

    def unread(self) -> list[str]:
        """The keys that are not read, each with what it is called here where it is known by another name."""
        return [f"{key}{called_here(key, self._known.keys) or ''}" for key in self.unread_keys]

    def plain_values(self) -> dict[str, Any]:
        """Every key as plain Python values (what a checkpoint or a JSON file can hold)."""
        values = {key: plain(value) for key, value in self.final_config_dict.items()}
        values["judged_metrics"] = list(self.judged_metrics)
        # A run may be resumed from another folder than the one it was started in.
        values["data_path"] = str(Path(values["data_path"]).resolve())
        return values
