"""What RecBole's models ask of the installation, the columns and the data, said before they are built.

RecBole finds out in the middle: as a missing module, a ``KeyError``, or an index out of range in the first batch.
"""

from __future__ import annotations

import importlib
import inspect
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from logging import getLogger
from typing import Any

import numpy as np
import psutil
import torch
from recbole.utils import ModelType
from torch.nn.modules.module import register_module_parameter_registration_hook

from recbole_fedkd.errors import InputError, nearest


def check_data(config: Any, dataset: Any) -> None:
    """Check that the data have what a model's keys ask for.

    Args:
        config: the run's config.
        dataset: the training split.

    Raises:
        InputError: a feature that no loaded column holds, or more candidates than there are items.
    """
    model = config["model"]
    features = config["selected_features"] if model in ("FDSA", "GRU4RecF", "SASRecF") else None
    if model == "S3Rec":
        features = [config["item_attribute"]]
    known = (
        [] if dataset.item_feat is None else [name for name in dataset.item_feat.columns if name != dataset.iid_field]
    )
    for name in features or []:
        if name not in known:
            key = "item_attribute" if model == "S3Rec" else "selected_features"
            raise InputError(
                f"{key} of model '{model}' names '{name}', but the loaded columns of .item are {known}; "
                f"set {key}, or load the column by load_col{nearest(str(name), known)}"
            )
    taken: dict[str, str] = {"GRU4RecCPR": "reranker_CAN_NUM", "SASRecCPR": "reranker_CAN_NUM"}
    if model == "RaCT" and config["train_stage"] != "actor_pretrain":
        taken["RaCT"] = "metrics_k"
    if model in taken:
        asked = config[taken[model]]
        if max(int(size) for size in str(asked).split(",")) > dataset.item_num:
            raise InputError(
                f"{taken[model]} is {asked}, but dataset '{config['dataset']}' has {dataset.item_num - 1} items; "
                f"it must be at most {dataset.item_num}"
            )


def reads_negatives(model: type) -> bool:
    """Whether the loss of a model reads sampled items, by its source: autoencoders are called pairwise too, and do not."""
    try:
        source = inspect.getsource(inspect.getmodule(model.calculate_loss))  # type: ignore[attr-defined, arg-type]
    except (OSError, TypeError, AttributeError):
        return False
    return "[self.NEG_ITEM_ID]" in source


def names_click_loss(model: type) -> bool:
    """Whether RecBole's source of a model, and of what it is derived from, names a binary cross-entropy."""
    modules = {parent.__module__ for parent in model.__mro__ if parent.__module__.startswith("recbole.model.")}
    return any("BCE" in inspect.getsource(importlib.import_module(module)) for module in modules)


@contextmanager
def _parameters_counted(model: str) -> Iterator[None]:
    """Stop the construction of a network whose parameters alone are more than this machine holds, before it is full.

    Raises:
        InputError: they are.
    """
    there, sizes = psutil.virtual_memory().total, dict[int, int]()

    def count(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            sizes[id(parameter)] = parameter.nbytes  # a shared one counts once
        if sum(sizes.values()) > there:
            raise InputError(
                f"model '{model}': its parameters take more than the {there / 1e9:.0f} GB of this machine; smaller sizes or "
                "fewer layers need less"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def building(config: Any) -> Iterator[None]:
    """Around the construction of a model of RecBole: whatever it raises is a sentence that names the model.

    What it prints belongs to the log. A model of the user's own keeps its traceback, which tells its author where the fault is.

    Raises:
        InputError: the model cannot be built.
    """
    printed = io.StringIO()
    try:
        with _parameters_counted(config["model"]), redirect_stdout(printed):
            yield
    except InputError:
        raise
    except (np.linalg.LinAlgError, ArithmeticError) as error:
        raise InputError(f"model '{config['model']}' cannot be computed {config.made_by()}: {error}") from error
    except Exception as error:  # a key of the wrong kind, a file that is not there, whatever RecBole did not check
        if not config.model_class.__module__.startswith(("recbole.model.", "recbole_fedkd.model.")):
            raise
        reason = str(error).strip().split("\n")[0]
        if "Weights only load failed" in reason:
            reason = "its pretrained file is a pickle, which could run code; train that stage with this package"
        raise InputError(
            f"model '{config['model']}' cannot be built on dataset '{config['dataset']}' as configured: "
            f"{type(error).__name__}: {reason}"
        ) from error
    finally:
        if printed.getvalue():
            getLogger().info(printed.getvalue().rstrip())


def check_labels(config: Any, train_dataset: Any) -> None:
    """RecBole's click models fail inside the first batch if there is no label; here it is said before."""
    sampled = config["train_neg_sample_args"]["distribution"] != "none"
    clicks = config["MODEL_TYPE"] == ModelType.CONTEXT and not sampled
    if clicks and config["LABEL_FIELD"] not in train_dataset.inter_feat:
        raise InputError(
            f"model '{config['model']}' needs a label, but dataset '{config['dataset']}' has no column "
            f"'{config['LABEL_FIELD']}'; set label_mode=threshold, or threshold={{'<field>': <value>}} as in RecBole"
        )
