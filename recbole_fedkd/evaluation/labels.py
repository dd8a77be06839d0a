"""What the held-out rows are labelled with: which are positive, which labels there are, and what cannot be judged by them."""

from __future__ import annotations

from logging import getLogger
from typing import Any

import torch
from recbole.evaluator import metric_types
from recbole.utils import EvaluatorType, ModelType
from torch import Tensor

from recbole_fedkd.data.threshold import one_sided, positive_sentence
from recbole_fedkd.errors import InputError


def positive_rows(config: Any, split: Any) -> Tensor | None:
    """Which rows of a split have a positive label, bool ``[rows]``; None where every row counts, as rows have no labels."""
    field = config["LABEL_FIELD"]
    if field not in split.inter_feat or config["label_mode"] == "implicit":
        return None
    bound = config["rating_threshold"] if field == config["RATING_FIELD"] else 0.5
    positive: Tensor = split.inter_feat[field] >= bound
    return positive


def relevant_rows(config: Any, split: Any) -> Tensor | None:
    """Indices of the rows that ranking metrics look for; None where every held-out row counts.

    Raises:
        InputError: there is none.
    """
    positive = None if config["MODEL_TYPE"] == ModelType.SEQUENTIAL else positive_rows(config, split)
    if positive is None:
        return None
    rows = torch.nonzero(positive).flatten()
    if not len(rows):
        raise InputError(
            f"no held-out row has a positive label, so ranking metrics {config['metrics']} have nothing to rank; "
            f"{_more_positives(config, split)}"
        )
    return rows


def _more_positives(config: Any, split: Any) -> str:
    """The keys by which held-out rows become positive."""
    field, other = config["RATING_FIELD"], "or hold out more rows (eval_args.split)"
    if config["LABEL_FIELD"] == field and len(split.inter_feat):
        highest = float(split.inter_feat[field].max())
        return f"their highest {field} is {highest:g}: lower rating_threshold ({config['rating_threshold']:g}), {other}"
    if config["label_mode"] == "threshold":
        return f"lower rating_threshold ({config['rating_threshold']:g}), {other}"
    if config["threshold"]:
        return f"lower threshold ({config['threshold']}), {other}"
    return f"a label of '{config['LABEL_FIELD']}' (LABEL_FIELD) is positive from 0.5 on: set threshold, {other}"


def described_labels(config: Any, dataset: Any) -> str:
    """What makes a row positive, for the reader of a number."""
    field = config["RATING_FIELD"]
    if config["label_mode"] == "threshold" or config["LABEL_FIELD"] == field:
        column = "rating" if config["label_mode"] else field
        return positive_sentence(column, config["rating_threshold"], dataset.label_scale)
    asked = config["threshold"] or {}
    return " and ".join(f"{name} >= {value:g}" for name, value in asked.items()) or "label 1"


def label_set(config: Any, dataset: Any) -> list[float]:
    """The labels that a row of the whole dataset may have, ascending; 0 and 1 where rows have none, or none other."""
    field = config["LABEL_FIELD"]
    if config["label_mode"] is not None:
        return [float(value) for value in dataset.label_values]
    labels_there = dataset.inter_feat[field].unique().tolist() if field in dataset.inter_feat else []
    return sorted({float(value) for value in labels_there}) if set(labels_there) - {0.0, 1.0} else [0.0, 1.0]


def check_held_out(config: Any, dataset: Any, split: Any, phase: str) -> None:
    """Say before training what value metrics cannot tell on the held-out rows of a phase.

    Raises:
        InputError: metrics of clicks over labels that are none, or a ``valid_metric`` that is not defined on these rows.
    """
    metrics = [
        metric.lower() for metric in config.judged_metrics if metric_types[metric.lower()] == EvaluatorType.VALUE
    ]
    if not metrics or config.evaluation_modes(EvaluatorType.VALUE)[phase] != "labeled":
        return
    if config["label_mode"] is None and config["LABEL_FIELD"] in dataset.inter_feat:
        _check_clicks(config, dataset, metrics)
    positive = positive_rows(config, split)
    sided = one_sided(positive.numpy()) if positive is not None else None
    if positive is None or sided is None:
        return
    described = described_labels(config, dataset)
    if bool(positive.all()) or not bool(positive.any()):
        undefined = f"held-out {phase} rows: {sided} ({described})"
        if phase == "valid" and config["valid_metric"].lower() == "auc":
            raise InputError(
                f"{undefined}, so that valid_metric AUC is not defined; take another valid_metric, hold out more rows "
                "(eval_args.split) or change the threshold"
            )
        getLogger().warning(f"{undefined}: AUC is not defined on them, and Accuracy and LogLoss tell nothing")
        return
    whole = positive_rows(config, dataset)
    if whole is not None and one_sided(whole.numpy()) is None:
        getLogger().warning(f"held-out {phase} rows: {sided} ({described}), of the whole dataset they are not")


def _check_clicks(config: Any, dataset: Any, metrics: list[str]) -> None:
    """RecBole's AUC takes every label but 1 as negative, a rating of 5 too; its LogLoss of such labels is no likelihood."""
    field = config["LABEL_FIELD"]
    labels = label_set(config, dataset)
    strange = [label for label in labels if not 0 <= label <= 1]
    for metric, wrong in (("auc", set(labels) - {0.0, 1.0}), ("logloss", set(strange))):
        if metric in metrics and wrong:
            raise InputError(
                f"metric {metric.upper() if metric == 'auc' else 'LogLoss'} needs labels 0 and 1, but '{field}' "
                f"(LABEL_FIELD) holds {min(labels):g} to {max(labels):g}; set threshold={{'{field}': <value>}} and another "
                "LABEL_FIELD, or label_mode"
            )
