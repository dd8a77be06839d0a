"""The config: RecBole's, plus this package's properties, minus everything that RecBole swallows.

Order, low to high: ``properties/overall.yaml``, RecBole's own files, ``properties/model``, the label mode, the dataset, the
preset, then the user's config files, config dictionary and command line. An unknown key is an error that names the
nearest valid one; types and ranges are read from the comments of the yaml files where the keys are defined.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import recbole
import recbole.data.dataset
import yaml
from recbole.config import Config
from recbole.data.dataloader import TrainDataLoader
from recbole.data.utils import get_dataloader
from recbole.evaluator import metric_types, metrics_dict, smaller_metrics
from recbole.trainer import Trainer
from recbole.utils import EvaluatorType, InputType, ModelType, get_model, get_trainer

from recbole_fedkd import compat
from recbole_fedkd.distillation.knowledge import AGGREGATIONS
from recbole_fedkd.engine import ENGINES
from recbole_fedkd.errors import InputError, nearest
from recbole_fedkd.evaluation import metrics as _metrics  # noqa: F401  (registers the metrics)
from recbole_fedkd.federated.codec import CODECS
from recbole_fedkd.federated.knowledge import KNOWLEDGE, KNOWLEDGE_USES
from recbole_fedkd.federated.strategy import STRATEGIES
from recbole_fedkd.model import MODELS, AttnFedKD, FactorizationRecommender
from recbole_fedkd.model.backbone import BACKBONES
from recbole_fedkd.model.student import ARCHITECTURE_KEYS
from recbole_fedkd.optim.adam_to_sgd import SWITCH_TESTS
from recbole_fedkd.optim.server import SERVER_OPTIMIZERS

_PACKAGE = Path(__file__).resolve().parent
PROPERTIES = _PACKAGE / "properties" if (_PACKAGE / "properties").is_dir() else _PACKAGE.parent / "properties"
"""In a wheel the properties lie inside the package, in a checkout or an editable install beside it."""

_RECBOLE_PROPERTIES = Path(recbole.__file__).resolve().parent / "properties"
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "string": (str,),
    "list": (list, tuple),
    "dict": (dict,),
}
_NESTED_KEYS = {
    "eval_args": {"split", "group_by", "order", "mode"},
    "train_neg_sample_args": {"distribution", "sample_num", "alpha", "dynamic", "candidate_num"},
}
# RecBole's files name types and no ranges.
_RULES_OF_RECBOLE_KEYS = {
    "epochs": ">= 1",
    "train_batch_size": ">= 1",
    "eval_batch_size": ">= 1",
    "eval_step": ">= 0",
    "stopping_step": ">= 0",
    "learning_rate": ">= 0",
    "weight_decay": ">= 0",
    "seed": ">= 0",
}
# Keys that only a federation reads, unless a RecBole model has one of the same name.
_FEDERATION_KEYS = {
    "engine", "fleet_memory", "fleet_threads", "partition", "client_num", "clients_per_round", "local_epochs",
    "reset_optimizer",
    "gamma", "alpha", "temperature", "knowledge", "aggregation", "knowledge_pass", "proximal_weight",
    "server_optimizer", "server_learning_rate", "server_momentum", "server_beta2", "server_tau", "knowledge_use",
    "prior_strength", "attention_temperature", "trim_ratio", "codecs", "broadcast_codecs", "error_feedback",
    "low_rank_start", "low_rank_end", "low_rank_rounds", "top_k_share", "teacher", "serve", "student_pool",
    "private_parameters", "client_weights", "row_mean", "serve_after", "serve_average",
}  # fmt: skip
# Keys of the federation that some RecBole models use for something else; a strategy that reads them cannot run over those.
_DISTILLATION_KEYS = {"gamma", "alpha", "temperature", "knowledge", "aggregation"}
# Keys of the federation that decide how AttnFedKD is built.
_ATTENTIVE_KEYS = {"student_pool", "teacher", "serve"}
# Keys of RecBole that its own trainer and loader read, and the clients of a federation do not.
_CENTRAL_KEYS = {"enable_scaler", "shuffle", "worker"}
# Keys that RecBole reads but defines in none of its files.
_UNDOCUMENTED_KEYS = {
    "model", "dataset", "config_files", "encoding", "numerical_features", "tail_ratio", "nproc", "world_size", "ip", "port",
    "offset", "local_rank", "neg_sampling", "training_neg_sample_num", "MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type",
    "device", "single_spec", "valid_neg_sample_args", "test_neg_sample_args", "config_file", "reg_weight",
}  # fmt: skip
# What `<name>` in a rule stands for: whatever is registered at the time, also from outside the package.
_REGISTRIES: dict[str, Callable[[], Iterable[str]]] = {
    "strategies": lambda: STRATEGIES,
    "engines": lambda: ENGINES,
    "backbones": lambda: BACKBONES,
    "aggregations": lambda: AGGREGATIONS,
    "codecs": lambda: CODECS,
    "knowledge": lambda: KNOWLEDGE,
    "knowledge uses": lambda: KNOWLEDGE_USES,
    "server optimizers": lambda: SERVER_OPTIMIZERS,
    "switch tests": lambda: SWITCH_TESTS,
    "presets": lambda: sorted(file.stem for file in (PROPERTIES / "preset").glob("*.yaml")),
}
_PATTERN_LINE = re.compile(r"^([\w-]+):\s*(.*?)\s*#\s*\((.+?)\)\s+(.*)$")


@dataclass(frozen=True)
class Key:
    """A config key as its yaml line defines it.

    Attributes:
        name: the key.
        default: the text of its default.
        types: allowed Python types; empty if the line names none that can be checked.
        rule: the constraint behind the type, such as ``>= 0``, ``in [0, 1)``, ``one of a|b`` or, for lists, ``each >= 1``
            (which also means: not empty; ``each, if any, one of a|b`` does not); may be empty.
        sentence: what the key is.
        elements: allowed types of a list's elements; empty if any will do.
    """

    name: str
    default: str
    types: tuple[type, ...]
    rule: str
    sentence: str
    elements: tuple[type, ...] = ()

    def check(self, value: Any) -> None:
        """Raise :class:`InputError` if the value is not allowed; None always is where it is the default."""
        if value is None and (self.default in ("~", "None", "") or "None" in self.rule):
            return
        if self.types and not self._has_type(value):
            raise InputError(f"{self.name} is {value!r}; it must be {self._allowed()}")
        for element in value if isinstance(value, list | tuple) and self.elements else []:
            if not isinstance(element, self.elements) or isinstance(element, bool):
                raise InputError(f"{self.name} is {value!r}; it must be {self._allowed()}")
        if self.rule and not _satisfies(value, self.rule):
            raise InputError(f"{self.name} is {value!r}; it must be {self._allowed()}{self._nearest_choice(value)}")

    def _has_type(self, value: Any) -> bool:
        if isinstance(value, bool):
            return bool in self.types
        # The command line turns '0' into 0 and '1e-3' stays a number: text keys take numbers as RecBole does.
        return isinstance(value, self.types) or (str in self.types and isinstance(value, int | float))

    def _allowed(self) -> str:
        names = {
            float: "a number",
            int: "an integer",
            bool: "True or False",
            str: "a text",
            list: "a list",
            dict: "a dict",
        }
        told = [kind for kind in names if kind in self.types and not (kind is int and float in self.types)]
        kinds = " or ".join(names[kind] for kind in told)
        if self.elements:
            kinds += {float: " of numbers", int: " of integers"}.get(self.elements[0], " of texts")
        told_rule = self.rule if self.rule.startswith("one of") else f"{kinds} {self.rule}".strip()
        return told_rule.replace("|", ", ")

    def _nearest_choice(self, value: Any) -> str:
        return nearest(str(value), self.rule[7:].split("|")) if self.rule.startswith("one of ") else ""


def _satisfies(value: Any, rule: str) -> bool:
    if rule.startswith("each, if any, "):
        return all(_satisfies(element, rule[14:]) for element in value)
    if rule.startswith("each "):
        return len(value) > 0 and all(_satisfies(element, rule[5:]) for element in value)
    if rule.startswith("one of "):
        return str(value) in rule[7:].split("|")
    interval = re.fullmatch(r"in ([\[(])(.+), (.+)([\])])", rule)
    if interval:
        low, high = float(interval[2]), float(interval[3])
        above = value >= low if interval[1] == "[" else value > low
        return bool(above and (value <= high if interval[4] == "]" else value < high))
    bound = re.fullmatch(r"(>=|>) (\S+)", rule)
    if bound:
        return bool(value >= float(bound[2]) if bound[1] == ">=" else value > float(bound[2]))
    return True


def read_keys(file: Path) -> dict[str, Key]:
    """The keys that a properties file defines, from its lines and their comments."""
    keys: dict[str, Key] = {}
    own = file.is_relative_to(PROPERTIES)
    for line in file.read_text(encoding="utf-8").splitlines():
        matched = _PATTERN_LINE.match(line)
        if matched:
            name, default, bracket, sentence = matched.groups()
            kinds, _, rule = bracket.partition(", ")
            for registry, names in _REGISTRIES.items():
                rule = rule.replace(f"<{registry}>", "|".join(names()))
            types: list[type] = []
            elements: tuple[type, ...] = ()
            for kind in re.split(r" or ", kinds):
                outer, _, inner = kind.strip().partition(" of ")
                types += _TYPES.get(outer, ())
                elements = _TYPES.get(inner, ()) if own else ()
            if types and not own:
                # Some of RecBole's comments contradict their own defaults.
                found = type(parse_value(default))
                types += [found] if found not in types and found is not type(None) else []
            if "None" in kinds:
                rule = rule or "None"
            rule = rule if own else rule or _RULES_OF_RECBOLE_KEYS.get(name, "")
            keys[name] = Key(name, default, tuple(types), rule, sentence, elements)
        elif re.match(r"^[\w-]+:", line):
            name = line.split(":")[0]
            keys[name] = Key(name, "", (), "", "")
    return keys


@lru_cache
def _keys_of_all_models() -> frozenset[str]:
    """Every key that some model knows: a config file may serve several models."""
    files = [*(_RECBOLE_PROPERTIES / "model").glob("*.yaml"), *(PROPERTIES / "model").glob("*.yaml")]
    return frozenset(name for file in files for name in read_keys(file))


def recbole_models() -> dict[str, str]:
    """Names of RecBole's models, lower case to their own spelling, without importing any of them."""
    names = {path.stem.lower(): path.stem for path in (_RECBOLE_PROPERTIES / "model").glob("*.yaml")}
    folders = [str(folder) for folder in (_RECBOLE_PROPERTIES.parent / "model").glob("*_recommender")]
    files = {module.name for module in pkgutil.iter_modules(folders)}
    return {lowered: name for lowered, name in names.items() if lowered in files}


def find_model(name: str) -> type:
    """Model class of this package or of RecBole; raises :class:`InputError` with the nearest name for any other."""
    if name in MODELS:
        return MODELS[name]
    known = recbole_models()
    if known.get(name.lower()) != name:
        raise InputError(f"model '{name}' is unknown{nearest(name, [*MODELS, *known.values()])}")
    try:
        with compat.anomaly_detection_kept():
            model: type = get_model(name)
    except ImportError as error:
        raise InputError(f"model '{name}' needs a package that is not installed: {error}") from error
    return model


def parse_value(text: str) -> Any:
    """A value from the command line: a Python literal, true/false in any case, a yaml list, or the text itself.

    Nothing is executed.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        lowered = text.lower()
        if re.fullmatch(r"\[[\w., -]*\]", text):
            return yaml.safe_load(text)  # [row_sparse, sign]: a shell eats the quotes that Python wants
        return {"true": True, "false": False, "none": None, "~": None}.get(lowered, text)


class FedKDConfig(Config):
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
        judged_metrics: every metric asked for; ``config["metrics"]`` holds those of the type that ``valid_metric`` has,
            which is what RecBole's own classes can digest.
        unread_keys: keys of the user that other models know and this one does not read.
        attentive: whether the model is one of this package.
        federated: whether users live on clients.
        trains_teacher: whether clients keep a teacher beside the student.
        reads_history: whether the model gets the user's training history as columns of every row.
    """

    external_config_dict: dict[str, Any]
    internal_config_dict: dict[str, Any]
    judged_metrics: list[str]
    unread_keys: list[str]
    attentive: bool
    federated: bool
    reads_history: bool
    trains_teacher: bool
    _asked_modes: Any
    _model_keys: set[str]

    def __init__(
        self,
        model: str | type | None = None,
        dataset: str | None = None,
        config_file_list: list[str] | None = None,
        config_dict: Mapping[str, Any] | None = None,
        command_line: Mapping[str, Any] | None = None,
        checkpoint_values: Mapping[str, Any] | None = None,
    ) -> None:
        self._command_line = dict(command_line or {})
        self._checkpoint_values = dict(checkpoint_values or {})
        self.unread_keys = []
        # RecBole edits the dictionary that it is given.
        super().__init__(model, dataset, config_file_list, copy.deepcopy(dict(config_dict or {})))
        self._check_valid_metric()

    @classmethod
    def read_given(
        cls,
        config_file_list: list[str] | None,
        config_dict: Mapping[str, Any] | None,
        command_line: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """The user's own keys merged, without any default and unchecked; arguments as of the constructor."""
        reader = cls.__new__(cls)
        reader._command_line = dict(command_line or {})
        reader.yaml_loader = reader._build_yaml_loader()
        files = reader._load_config_files(config_file_list)
        return {**files, **reader._convert_config_dict(dict(config_dict or {})), **reader._load_cmd_line()}

    def compatibility_settings(self) -> None:
        """Replaces RecBole's, which reads names that numpy 2 removed."""
        compat.apply()

    def _convert_config_dict(self, config_dict: dict[str, Any]) -> dict[str, Any]:
        """As RecBole's, but a text is read as a literal and never executed, and numpy's scalars become Python's."""
        return {
            key: parse_value(value) if isinstance(value, str) else _native(value) for key, value in config_dict.items()
        }

    def _merge_external_config_dict(self) -> None:
        super()._merge_external_config_dict()
        self.external_config_dict = {**self._checkpoint_values, **self.external_config_dict}

    def _load_config_files(self, file_list: list[str] | None) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for file in file_list or []:
            try:
                content = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=self.yaml_loader)
            except OSError as error:
                raise InputError(f"config file '{file}' cannot be read: {error.strerror}") from error
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise InputError(f"config file '{file}' is not valid yaml: {error}") from error
            if content is not None and not isinstance(content, dict):
                raise InputError(
                    f"config file '{file}' holds a {type(content).__name__}; it must hold `key: value` lines"
                )
            merged.update(content or {})
        return merged

    def _load_cmd_line(self) -> dict[str, Any]:
        return self._convert_config_dict(self._command_line)

    def _get_model_and_dataset(self, model: str | type | None, dataset: str | None) -> tuple[str, type, str]:
        chosen = model or self.external_config_dict.get("model") or self._preset_values().get("model")
        name = dataset or self.external_config_dict.get("dataset")
        if not chosen:
            raise InputError("no model is named; give --model=<name>, such as AttnFedKD")
        if not name:
            raise InputError("no dataset is named; give --dataset=<name>, such as ml-100k")
        if isinstance(chosen, str):
            return chosen, find_model(chosen), name
        return chosen.__name__, chosen, name

    def _preset_values(self) -> dict[str, Any]:
        """The keys of the preset that the user names; its model and label mode decide what else is read."""
        preset = self.external_config_dict.get("preset")
        if preset is None:
            return {}
        read_keys(PROPERTIES / "overall.yaml")["preset"].check(preset)
        text = (PROPERTIES / "preset" / f"{preset}.yaml").read_text(encoding="utf-8")
        values: dict[str, Any] = yaml.load(text, Loader=self.yaml_loader)
        return values

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        self.attentive = issubclass(model_class, tuple(MODELS.values()))
        # Names such as gamma, alpha or reg_weight mean something else to many a RecBole model: theirs come first.
        recbole_keys: dict[str, Any] = self.internal_config_dict
        self.internal_config_dict = {}
        self._update_internal_config_dict(PROPERTIES / "overall.yaml")
        self.internal_config_dict.update(recbole_keys)
        small = issubclass(model_class, FactorizationRecommender)
        files = [PROPERTIES / "model" / "AttnStudent.yaml"] if self.attentive and not small else []
        own = PROPERTIES / "model" / f"{model}.yaml"
        if own.is_file() and own not in files:
            files.append(own)
        for file in files:
            self._update_internal_config_dict(file)
        self._known = self._known_keys(model, model_class, dataset, files)
        self._check_keys(self.external_config_dict)
        named = self._preset_values()
        if "label_mode" in named:
            self.internal_config_dict["label_mode"] = named["label_mode"]
        mode = self._chosen("label_mode")
        self.reads_history = False
        if mode is not None:
            self._update_internal_config_dict(PROPERTIES / "label_mode" / f"{mode}.yaml")
            self._set_columns(dataset)
            self._set_label_field(mode, model_class)
            self._set_rows(mode, model_class)
        preset = self._chosen("preset")
        if preset is not None:
            self._update_internal_config_dict(PROPERTIES / "preset" / f"{preset}.yaml")
        self._set_strategy(model, model_class, self._chosen("strategy"))

    def _set_columns(self, dataset: str) -> None:
        """The columns that are loaded where labels are made: known for some datasets, the four usual ones for others."""
        own_dataset = PROPERTIES / "dataset" / f"{dataset}.yaml"
        if own_dataset.is_file():
            self._update_internal_config_dict(own_dataset)
        elif not (_RECBOLE_PROPERTIES / "dataset" / f"{dataset}.yaml").is_file():
            names = ("USER_ID_FIELD", "ITEM_ID_FIELD", "RATING_FIELD", "TIME_FIELD")
            self.internal_config_dict["load_col"] = {"inter": [self._chosen(name) for name in names]}

    def _set_rows(self, mode: str, model_class: type) -> None:
        """RecBole's models on the labelled rows that every model gets; its sequential models would make rows of their own."""
        if self.attentive:
            return
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
        self._known[key].check(value)
        return value

    def _set_label_field(self, mode: str, model_class: type) -> None:
        rating = self._chosen("RATING_FIELD")
        if mode == "rating":
            if not self.attentive or issubclass(model_class, FactorizationRecommender):
                raise InputError(
                    f"label_mode=rating needs a model with one output per rating, which {model_class.__name__} is not; "
                    "use label_mode=threshold"
                )
            if self.external_config_dict.get("threshold") is not None:
                raise InputError("threshold is set but label_mode is 'rating'; use label_mode=threshold")
            self.internal_config_dict["LABEL_FIELD"] = rating
        elif mode == "threshold":
            threshold = {rating: self._chosen("rating_threshold")}
            given = self.external_config_dict.get("threshold", threshold)
            if given != threshold:
                raise InputError(
                    f"threshold is {given}, but label_mode=threshold takes rating_threshold; set that instead"
                )
            self.internal_config_dict["threshold"] = threshold

    def _set_strategy(self, model: str, model_class: type, strategy: str | None) -> None:
        population = issubclass(model_class, AttnFedKD)
        if strategy is None and population:
            raise InputError(f"strategy is not set; it must be one of {', '.join(STRATEGIES)}")
        if population and strategy == "central":
            raise InputError("strategy 'central' trains one network on all data: use --model=AttnStudent for that")
        if strategy is None:
            strategy = self.internal_config_dict["strategy"] = "central"
        self.federated = strategy != "central"
        self.trains_teacher = self.federated and STRATEGIES[strategy].trains_teacher
        unread = _CENTRAL_KEYS if self.federated else _FEDERATION_KEYS - self._model_keys
        if self.federated and not population:
            unread = unread | _ATTENTIVE_KEYS - self._model_keys
        if not self._checkpoint_values:
            self.unread_keys += [key for key in self.external_config_dict if key in unread]
        pool = self._chosen("student_pool")
        if self.federated and population and pool and STRATEGIES[strategy].shares_parameters:
            raise InputError(
                f"student_pool gives clients networks of different sizes, which strategy '{strategy}' cannot average; "
                "use a strategy that distils, or local"
            )
        small = issubclass(model_class, FactorizationRecommender)
        if small and not self._checkpoint_values:
            # They stand in properties/overall.yaml, and these models embed no feature fields that could be encoded.
            self.unread_keys += [key for key in ("attention", "attention_heads") if key in self.external_config_dict]
        if not self.federated or population:
            return
        if self.attentive and not small:
            raise InputError(
                f"strategy '{strategy}' of {model} over clients: use --model=AttnFedKD, the population of it"
            )
        if self.trains_teacher:
            raise InputError(
                f"strategy '{strategy}' trains an AttnTeacher beside an AttnStudent; use --model=AttnFedKD for it"
            )
        if small:
            return
        kind = self.internal_config_dict["MODEL_TYPE"]
        loader = get_dataloader({"model": model, "MODEL_TYPE": kind}, "train")
        if get_trainer(kind, model) is not Trainer or loader is not TrainDataLoader:
            raise InputError(
                f"model '{model}' is trained in a way of its own in RecBole (a special trainer or loader), so strategy "
                f"'{strategy}' cannot run over it; it runs over POINTWISE and PAIRWISE models"
            )
        if STRATEGIES[strategy].taught_by_received:
            raise InputError(
                f"strategy '{strategy}' teaches an AttnStudent by the server's; use --model=AttnFedKD for it"
            )
        other_meaning = sorted(_DISTILLATION_KEYS & self._model_keys)
        if STRATEGIES[strategy].exchanges_knowledge and other_meaning:
            raise InputError(
                f"strategy '{strategy}' and model '{model}' both read {', '.join(other_meaning)} and mean different things"
            )

    def _known_keys(self, model: str, model_class: type, dataset: str, files: list[Path]) -> dict[str, Key]:
        keys = {name: Key(name, "~", (), "", "") for name in _UNDOCUMENTED_KEYS}
        for names in self.parameters.values():
            keys.update({name: Key(name, "~", (), "", "") for name in names})
        recbole_files = [
            PROPERTIES / "overall.yaml",
            _RECBOLE_PROPERTIES / "overall.yaml",
            _RECBOLE_PROPERTIES / "dataset" / "sample.yaml",
        ]
        recbole_files += [
            file
            for file in (
                _RECBOLE_PROPERTIES / "dataset" / f"{dataset}.yaml",
                _RECBOLE_PROPERTIES / "model" / f"{model}.yaml",
            )
            if file.is_file()
        ]
        for file in recbole_files + files:
            for name, key in read_keys(file).items():
                if key.types or name not in keys:
                    keys[name] = key
        keys["gpu_id"] = Key("gpu_id", "~", (), "", "")  # '0', 0 and (0, 1) all mean something to RecBole
        own = _RECBOLE_PROPERTIES / "model" / f"{model}.yaml"
        self._model_keys = set(read_keys(own)) if own.is_file() else set()
        # A model of RecBole or of the user may read keys that no file defines: its source says which.
        for parent in inspect.getmro(model_class):
            if parent.__module__.startswith(("torch", "builtins")):
                continue
            try:
                source = inspect.getsource(importlib.import_module(parent.__module__))
            except (OSError, TypeError):
                continue
            for name in re.findall(r"config\[[\"']([\w-]+)[\"']\]", source):
                keys.setdefault(name, Key(name, "~", (), "", ""))
                self._model_keys.add(name)
        return keys

    def check_names(self, names: Iterable[str]) -> None:
        """Check that each is the name of a key.

        Raises:
            InputError: one of them is not; the sentence tells the nearest that is.
        """
        elsewhere = _keys_of_all_models()
        for name in names:
            if name not in self._known and name not in elsewhere:
                raise InputError(f"key '{name}' is unknown{nearest(str(name), {*self._known, *elsewhere})}")

    def _check_keys(self, values: dict[str, Any]) -> None:
        self.check_names(values)
        elsewhere = _keys_of_all_models()
        for name, value in list(values.items()):
            if name not in self._known and name in elsewhere:
                self.unread_keys.append(name)
                continue
            if name in ("model", "dataset"):
                continue
            self._known[name].check(value)
            if self._known[name].types == (str,) and isinstance(value, int | float):
                values[name] = str(value)  # a folder may be called 2024
            if name in _NESTED_KEYS and isinstance(value, dict):
                for nested in value:
                    if nested not in _NESTED_KEYS[name]:
                        raise InputError(f"key '{name}.{nested}' is unknown{nearest(str(nested), _NESTED_KEYS[name])}")
            if name == "learning_rates":
                for pattern, rate in value.items():
                    Key(f"learning_rates.{pattern}", "0", (float, int), ">= 0", "").check(rate)
            if name == "teacher":
                self._check_architecture(name, value)
            if name == "student_pool":
                for place, each in enumerate(value or []):
                    self._check_architecture(f"student_pool[{place}]", each)

    def _check_architecture(self, name: str, values: Any) -> None:
        """Keys in which a network differs from the config's own."""
        if not isinstance(values, dict):
            raise InputError(f"{name} is {values!r}; it must be a dict of {', '.join(ARCHITECTURE_KEYS)}")
        for key, value in values.items():
            if key not in ARCHITECTURE_KEYS:
                raise InputError(f"key '{name}.{key}' is unknown{nearest(str(key), ARCHITECTURE_KEYS)}")
            if key in self._known:
                replace(self._known[key], name=f"{name}.{key}").check(value)

    def _set_default_parameters(self) -> None:
        """As RecBole's, after the metrics are parted by type: RecBole refuses ranking and value metrics together."""
        final = self.final_config_dict
        metrics = [final["metrics"]] if isinstance(final["metrics"], str) else final["metrics"]
        if not isinstance(metrics, list | tuple) or not metrics:
            raise InputError(f"metrics is {metrics!r}; it must be a list of metric names")
        for metric in metrics:
            if str(metric).lower() not in metric_types:
                raise InputError(f"metric '{metric}' is unknown{nearest(str(metric), metric_types)}")
        valid_metric = str(final["valid_metric"])
        stem = valid_metric.partition("@")[0].lower()
        if stem not in metric_types:
            raise InputError(f"valid_metric '{valid_metric}' is unknown{nearest(stem, metric_types)}")
        if stem not in [metric.lower() for metric in metrics]:
            raise InputError(f"valid_metric '{valid_metric}' is not among metrics {list(metrics)}")
        self.judged_metrics = list(metrics)
        primary = metric_types[stem]
        mixed = len({metric_types[metric.lower()] for metric in metrics}) > 1
        self._asked_modes = "full"
        if isinstance(final["eval_args"], dict):
            if final.get("label_mode") is not None:
                # RecBole would fill what the user left out from its own defaults, not from those of the label mode.
                final["eval_args"] = {**self.internal_config_dict["eval_args"], **final["eval_args"]}
            self._asked_modes = final["eval_args"].get("mode", "full")
            if mixed or final.get("label_mode") is not None:
                final["metrics"] = [metric for metric in metrics if metric_types[metric.lower()] == primary]
                final["eval_args"] = {**final["eval_args"], "mode": self.evaluation_modes(primary)}
        final["valid_metric"] = valid_metric
        try:
            super()._set_default_parameters()
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"the config cannot be used: {error}") from error
        # RecBole's own rule looks at the metric that RecBole registered; ours are registered beside them.
        final["valid_metric_bigger"] = stem not in smaller_metrics

    def evaluation_modes(self, kind: EvaluatorType) -> dict[str, str]:
        """RecBole's evaluation mode per phase for metrics of one kind, from the ``eval_args.mode`` that was asked for.

        Value metrics need rows with labels: the held-out rows, or sampled negatives where all held-out rows are positives.
        Ranking metrics need candidates: those of ``uniN`` or ``popN`` where asked for, else all items.
        """
        asked = self._asked_modes
        if not isinstance(asked, dict):
            asked = {"valid": asked, "test": asked}
        default = asked.get("valid", asked.get("test", "full"))
        modes = {}
        for phase in ("valid", "test"):
            mode = str(asked.get(phase, default))
            sampled = _samples_candidates(mode)
            if kind == EvaluatorType.RANKING:
                modes[phase] = "full" if mode in ("labeled", "uni1") else mode
            elif self["label_mode"] == "implicit":
                modes[phase] = mode if sampled else "uni1"
            else:
                modes[phase] = mode if sampled and self["label_mode"] is None else "labeled"
        return modes

    def _check_valid_metric(self) -> None:
        """Before anything runs: ``valid_metric`` names a result key that its metric gives."""
        valid_metric = self["valid_metric"]
        stem, at, k = valid_metric.partition("@")
        takes_k = hasattr(metrics_dict[stem.lower()](self), "topk")
        if takes_k and (not k.isdigit() or int(k) not in self["topk"]):
            raise InputError(
                f"valid_metric '{valid_metric}' needs @k with a k of topk {self['topk']}, such as {stem}@10"
            )
        if at and not takes_k:
            raise InputError(f"valid_metric '{valid_metric}' has a k, which {stem} does not take")
        if self["log_wandb"] and importlib.util.find_spec("wandb") is None:
            raise InputError("log_wandb is True, but the package wandb is not installed")

    def _set_train_neg_sample_args(self) -> None:
        try:
            super()._set_train_neg_sample_args()
        except (ValueError, KeyError) as error:
            raise InputError(f"train_neg_sample_args cannot be used: {error}") from error

    def _set_eval_neg_sample_args(self, phase: str) -> None:
        _samples_candidates(self.final_config_dict["eval_args"]["mode"][phase])
        super()._set_eval_neg_sample_args(phase)

    def view(self, **changes: Any) -> FedKDConfig:
        """The same config with some keys changed, for a second evaluation protocol."""
        other = copy.copy(self)
        other.final_config_dict = {**self.final_config_dict, **changes}
        return other

    def plain_values(self) -> dict[str, Any]:
        """Every key as plain Python values (what a checkpoint or a JSON file can hold)."""
        values = {key: _plain(value) for key, value in self.final_config_dict.items()}
        values["judged_metrics"] = list(self.judged_metrics)
        # A run may be resumed from another folder than the one it was started in.
        values["data_path"] = str(Path(values["data_path"]).resolve())
        return values


def _samples_candidates(mode: Any) -> bool:
    """Whether an evaluation mode ranks among sampled items; raises :class:`InputError` for a mode that does not exist."""
    sampled = isinstance(mode, str) and mode[:3] in ("uni", "pop") and mode[3:].isdigit()
    if not sampled and mode not in ("full", "labeled"):
        raise InputError(f"eval_args.mode is '{mode}'; allowed are full, labeled, uni<N> and pop<N>")
    return sampled


def _native(value: Any) -> Any:
    """Numpy's scalars, also inside lists and dictionaries, as Python's."""
    if isinstance(value, Mapping):
        return {key: _native(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_native(inner) for inner in value)
    return value.item() if isinstance(value, np.generic) else value


def _plain(value: Any) -> Any:
    value = _native(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
