"""Metrics of single users, which paired tests need; a run's own numbers are the evaluator's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recbole.evaluator.base_metric import TopkMetric

from recbole_fedkd.evaluation.metrics import LabelledNDCG, label_ranks, labelled_ndcg_of_users

Values = Mapping[str, NDArray[np.float64]]


def user_values(
    metrics: Mapping[str, Any], struct: Any, topk: Iterable[int], users: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], Values]:
    """Values of single users from what one protocol collected.

    Args:
        metrics: result name to metric object of RecBole's kind.
        struct: RecBole's ``DataStruct`` of a sweep.
        topk: cut-offs.
        users: user of every ranked list, for ranking metrics, of whose lists the mean counts; None for value metrics,
            whose rows name theirs.

    Returns:
        User ids ``[n]``, ascending, and metric name to values ``[n]``: ranking metrics at every cut-off, ``accuracy``, ``mae``
        and labelled NDCG; nan where a user is not judged. Metrics that are no mean over users or rows are left out.
    """
    values: dict[str, NDArray[np.float64]] = {}
    if users is not None:
        lists_of, index, lists = np.unique(users, return_inverse=True, return_counts=True)
        for name, metric in metrics.items():
            if isinstance(metric, TopkMetric) and hasattr(metric, "metric_info"):
                hits, lengths = metric.used_info(struct)
                per_user = np.asarray(metric_info(metric, hits, lengths), dtype=np.float64)
                for k in topk:
                    values[f"{name}@{k}"] = np.bincount(index, per_user[:, k - 1]) / lists
        return lists_of, values
    rows = struct.get("data.user").numpy()
    ids, index = np.unique(rows, return_inverse=True)
    counts = np.bincount(index)
    labels = struct.get("data.label").numpy().astype(np.float64)
    if "accuracy" in metrics:
        right = struct.get("rec.class").numpy() == struct.get("data.label").numpy()
        values["accuracy"] = np.bincount(index, right) / counts
    if "mae" in metrics:
        error = np.abs(struct.get("rec.score").numpy().astype(np.float64) - labels)
        values["mae"] = np.bincount(index, error) / counts
    for metric in metrics.values():
        if isinstance(metric, LabelledNDCG):
            scores = struct.get("rec.score").numpy().astype(np.float64)
            ranks = label_ranks(struct.get("data.label").numpy(), struct.get("data.label_set").numpy())
            for k in topk:
                values[f"labelledndcg@{k}"] = labelled_ndcg_of_users(scores, ranks, rows, k)
    return ids.astype(np.int64), values


def metric_info(metric: Any, hits: Any, lengths: Any) -> Any:
    """RecBole's metrics differ in whether they ask for the number of relevant items."""
    takes_lengths = metric.metric_info.__code__.co_argcount > 2
    return metric.metric_info(hits, lengths) if takes_lengths else metric.metric_info(hits)


def merged(
    parts: Iterable[tuple[NDArray[np.int64], Values]], client_of_user: NDArray[np.int64] | None = None
) -> dict[str, list[float]]:
    """One table of several protocols.

    Args:
        parts: user ids and values, as :func:`user_values` returns them.
        client_of_user: ``[users]``, indexed by user id; None without clients.

    Returns:
        ``user``, ``client`` where users have one, and a list per metric, nan where a protocol does not judge a user.
    """
    parts = list(parts)
    users = np.unique(np.concatenate([ids for ids, _ in parts]))
    table: dict[str, list[float]] = {"user": users.tolist()}
    if client_of_user is not None:
        table["client"] = client_of_user[users].tolist()
    for ids, values in parts:
        slots = np.searchsorted(users, ids)
        for name, column in values.items():
            full = np.full(len(users), np.nan)
            full[slots] = column
            table[name] = full.tolist()
    return table
