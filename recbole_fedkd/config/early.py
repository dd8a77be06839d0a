"""What can be refused, and told, before torch is loaded: all that keys say, alone and together, by the config's own code."""

from __future__ import annotations

import importlib.util
import logging
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any

from recbole_fedkd.config.files import RECBOLE_PROPERTIES
from recbole_fedkd.config.given import named, read_given
from recbole_fedkd.config.models import check_model
from recbole_fedkd.config.outlines import metric_names, metric_of, outline_of_name
from recbole_fedkd.config.plugins import check_plugins_there
from recbole_fedkd.config.strict import StrictConfig

_RECBOLE = RECBOLE_PROPERTIES.parent


def check_early(
    model: str | None,
    dataset: str | None,
    config_file_list: list[str],
    command_line: Mapping[str, Any],
) -> Any:
    """Refuse what ``FedKDConfig`` would refuse, in the same words; what it needs to be loaded for is said later.

    What plugins bring, and a checkpoint says, is only known later: with those no key is checked here.

    Returns:
        The config, without a device; None where it is only known later.

    Raises:
        InputError: a name or a value that cannot be used, or values that do not go with each other.
    """
    given = read_given(config_file_list, None, command_line)
    if given.get("resume"):
        return None
    if given.get("plugins"):
        named(given, model, dataset)
        check_plugins_there(given["plugins"])
        return None
    return early_config()(model, dataset, config_file_list, None, command_line)


@lru_cache
def early_config() -> Any:
    """The class of configs that know models by their outlines."""

    class EarlyConfig(StrictConfig, recbole_config()):  # type: ignore[misc]
        """A config with all its checks, of a model that is not loaded, and without a device."""

        def compatibility_settings(self) -> None:
            """Nothing that RecBole's other modules need is needed here."""

        def _get_model_and_dataset(self, model: Any, dataset: Any) -> tuple[str, type, str]:
            chosen, name = named(self.external_config_dict, model, dataset)
            check_model(str(chosen))
            self._keys_of_plugins = set()
            self.outline = outline_of_name(str(chosen))
            kinds = enumerations()
            members = {"type": kinds["ModelType"][self.outline.kind], "sums": self.outline.sums}
            if self.outline.input_kind is not None:
                members["input_type"] = kinds["InputType"][self.outline.input_kind]
            return str(chosen), type(str(chosen), (), members), name

        def _init_device(self) -> None:
            """Devices are torch's to know."""

    return EarlyConfig


@lru_cache
def recbole_config() -> Any:
    """RecBole's ``Config``, of its source alone: the two packages that it imports, which bring torch, are stood in for."""
    kinds = enumerations()
    types = {name: kinds["EvaluatorType"][metric_of(name).kind] for name in metric_names()}
    smaller = [name for name in metric_names() if metric_of(name).smaller]
    utils = {**kinds, **_argument_lists(), "get_model": None, "set_color": None}
    spec = importlib.util.spec_from_file_location(f"{__name__}_recbole", _RECBOLE / "config" / "configurator.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _standing_in(
        {"recbole.evaluator": {"metric_types": types, "smaller_metrics": smaller}, "recbole.utils": utils}
    ):
        spec.loader.exec_module(module)
    silent = logging.Logger("early")  # what there is to warn of is said by the run
    silent.addHandler(logging.NullHandler())
    vars(module)["getLogger"] = lambda: silent
    return module.Config


def recbole_arguments() -> list[str]:
    """Names that RecBole lists as its own arguments, read without loading RecBole."""
    lists = _argument_lists()
    return [name for kind in ("general", "training", "evaluation", "dataset") for name in lists[f"{kind}_arguments"]]


@lru_cache
def _argument_lists() -> dict[str, Any]:
    return runpy.run_path(str(_RECBOLE / "utils" / "argument_list.py"))


@lru_cache
def enumerations() -> dict[str, Any]:
    """RecBole's enumerations, of models, inputs and metrics."""
    return runpy.run_path(str(_RECBOLE / "utils" / "enum_type.py"))


@contextmanager
def _standing_in(contents: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Modules of these contents in place of those that there are, or are not yet."""
    before = {name: sys.modules.get(name) for name in contents}
    for name, content in contents.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
