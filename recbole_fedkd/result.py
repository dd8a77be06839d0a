"""What a run returns: scores, bytes, seconds, rounds, and the tables that people read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from recbole.utils import EvaluatorType, InputType, get_environment, set_color
from texttable import Texttable

from recbole_fedkd.data.dataset import user_base_of
from recbole_fedkd.data.schema import label_values
from recbole_fedkd.evaluation import JudgedRows
from recbole_fedkd.trainer import CheckpointTrainer, FedKDTrainer


def floats(result: Mapping[str, float] | None) -> dict[str, float] | None:
    """Metrics as plain floats; None where nothing was judged."""
    return {name: float(value) for name, value in result.items()} if result is not None else None


def engine_that_ran(trainer: CheckpointTrainer) -> dict[str, str | None]:
    """The engine that ran the clients, and why it was not the one that was asked for."""
    if not isinstance(trainer, FedKDTrainer) or trainer.engine is None:
        return {"engine": None, "engine_fallback": None}
    return {"engine": trainer.engine.name, "engine_fallback": trainer.fallback}


def partition_summary(config: Any, trainer: CheckpointTrainer, dataset: Any) -> dict[str, Any] | None:
    """Users, samples and labels of every client; None without a federation."""
    if not isinstance(trainer, FedKDTrainer):
        return None
    owners = trainer.model.client_of_user[1:].cpu().numpy()
    histograms = user_base_of(dataset).label_histograms
    count = int(trainer.model.client_of_user.max()) + 1
    labels = np.zeros((count, histograms.shape[1]), dtype=np.int64)
    np.add.at(labels, owners, histograms)
    users = np.bincount(owners, minlength=count).tolist()
    clients = [
        {"users": number, "samples": sum(histogram), "labels": histogram}
        for number, histogram in zip(users, labels.tolist(), strict=True)
    ]
    return {
        "scheme": config["partition"],
        "client_num": count,
        "idle_clients": trainer.idle_clients,
        "held_out_clients": trainer.strangers,
        "label_values": label_values(dataset),
        "clients": clients,
    }


def cold_rows(config: Any, rows: JudgedRows | None) -> dict[str, Any] | None:
    """The judged rows of somebody, or something, without a training row; None where rows carry no labels of their own."""
    if rows is None or config.evaluation_modes(EvaluatorType.VALUE)["test"] != "labeled":
        return None
    return rows.cold_summary()


def spread(config: Any, rows: JudgedRows | None) -> dict[str, Any] | None:
    """How much predictions vary, and labels; None where scores are of another scale than labels, as those of pairs are."""
    if rows is None or not (config.attentive or config["MODEL_INPUT_TYPE"] == InputType.POINTWISE):
        return None
    return rows.spread()


def flat_sentence(spread: Mapping[str, Any]) -> str:
    """What to think of predictions that hardly vary."""
    return (
        f"the predictions hardly vary: their standard deviation is {spread['predictions']:.4f}, that of the labels "
        f"{spread['labels']:.4f}; a constant would do about as well, so the model has learned next to nothing"
    )


def result_table(
    result: Mapping[str, float],
    protocols: Mapping[str, str],
    floors: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> str:
    """A text table of metrics, values, those of floors, and the protocol behind each number."""
    table = Texttable(max_width=120 + 10 * len(floors))
    table.set_deco(Texttable.HEADER)
    table.set_cols_dtype(["t"] * (3 + len(floors)))
    table.set_cols_align(["l", "r", *"r" * len(floors), "l"])
    rows, above = [], ""
    for name, value in result.items():
        protocol = protocols.get(name, "")
        # What stands there once counts until something else does.
        shown, above = "" if protocol == above else protocol, protocol
        rows.append([name, _number(value), *(_number(floor.get(name)) for floor in floors.values()), shown])
    table.add_rows([["metric", "value", *floors, "protocol"], *rows])
    drawn: str = table.draw()
    return drawn


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if not np.isnan(value) else "undefined"


def log_result(config: Any, result: Mapping[str, Any]) -> None:
    """The result in the log."""
    logger, protocols, strangers = logging.getLogger(), result["protocols"], result["strangers"]
    if logger.isEnabledFor(logging.INFO):  # it measures the processor for a second
        logger.info("The running environment of this training is as follows:\n" + get_environment(config).draw())
    logger.info(set_color("best valid ", "yellow") + f": {result['best_valid_result']}")
    logger.info(set_color("test result", "yellow") + ":\n" + result_table(result["test_result"] or {}, protocols))
    if result["spread"] is not None and result["spread"]["flat"]:
        logger.warning(flat_sentence(result["spread"]))
    if strangers is not None:
        who = f"strangers ({strangers['clients']} clients, {strangers['users']} users)"
        logger.info(set_color(who, "yellow") + ":\n" + result_table(strangers["test_result"], protocols))
