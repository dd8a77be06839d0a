"""Ranking where the data are: a party orders the catalogue for its own users, and tells sums over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from recbole.evaluator.register import metrics_dict
from torch import Tensor

from recbole_fedkd.data.rows import PAIRS
from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.evaluation.per_user import metric_info
from recbole_fedkd.finite import NotFiniteError
from recbole_fedkd.machines.judgeable import RANKED, asked_of

GROWING = ("hit", "mrr", "recall")
"""Those that do not fall where a list gets longer."""

USERS = "ranked users"
"""Name of the number of users that any of them is of."""


def ranking_sums(
    config: Any, schema: DataSchema, model: Any, seen: Sequence[ClientRows], judged: ClientRows, relevant: Tensor
) -> dict[str, float]:
    """Sums over users who have a relevant row, of a full sort as RecBole's.

    Args:
        config: the run's config.
        schema: what is public.
        model: of the party's network.
        seen: rows before the phase, of which the items are no candidates.
        judged: the phase's rows.
        relevant: which of these a list is to hold, bool ``[n]``.
    """
    names = schema.user_field, schema.item_field
    users, items = (judged.interactions[name][relevant] for name in names)
    met_users, met_items = (torch.cat([rows.interactions[name] for rows in seen]) for name in names)
    asked = [name for name in RANKED if name in asked_of(config)]
    length = min(max(config["topk"]), schema.item_num)
    sums = dict.fromkeys((f"{name}@{k}" for name in asked for k in config["topk"]), 0.0) | {USERS: 0.0}
    ranked = users.unique()
    for part in ranked.split(max(1, PAIRS // schema.item_num)) if len(ranked) else ():
        wanted = _grid(part, users, items, schema.item_num)
        hidden = _grid(part, met_users, met_items, schema.item_num) & ~wanted
        hidden[:, 0] = True  # the padding
        scores = model.full_sort_predict({names[0]: part}).view(len(part), -1)
        if not scores.isfinite().all():
            raise NotFiniteError("scores of its model are not finite")
        top = scores.masked_fill(hidden, -torch.inf).topk(length)
        hits = (wanted.gather(1, top.indices) & top.values.isfinite()).numpy()
        for name in asked:
            of_users = metric_info(metrics_dict[name](config), hits, wanted.sum(1).numpy())
            for k in config["topk"]:
                sums[f"{name}@{k}"] += float(of_users[:, min(k, length) - 1].sum())
        sums[USERS] += len(part)
    return sums


def ranking_due(
    config: Any, sums: Mapping[str, float], users: float
) -> tuple[dict[str, float], dict[str, tuple[float, float]], list[tuple[str, str]]]:
    """Counts, sums and parts of a ranking of at most so many users, as :func:`check_numbers` takes them."""
    ranked, places = sums.get(USERS, 0.0) * (1 + 1e-9), sorted(config["topk"])
    names = [(name, k) for name in RANKED if name in asked_of(config) for k in places]
    counts = {USERS: users, **{f"{name}@{k}": ranked for name, k in names if name == "hit"}}
    due = {f"{name}@{k}": (0.0, ranked) for name, k in names if name != "hit"}
    # A longer list finds no less; and of a user of whom it finds nothing, nothing is good.
    longer = [(f"{name}@{k}", f"{name}@{more}") for name in GROWING for k, more in pairwise(places)]
    return counts, due, [*longer, *((f"{name}@{k}", f"hit@{k}") for name, k in names)]


def ranking_of(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over users, of the sums of one party or of several."""
    users = sums.get(USERS)
    return {name: value / users for name, value in sums.items() if users and name.partition("@")[0] in RANKED}


def _grid(part: Tensor, users: Tensor, items: Tensor, item_num: int) -> Tensor:
    """Which items users hold, bool ``[users of the part, items]``, of rows ``[n]``; ``part`` ascends."""
    row = torch.searchsorted(part, users).clamp(max=len(part) - 1)
    mine = part[row] == users
    grid = torch.zeros(len(part), item_num, dtype=torch.bool)
    grid[row[mine], items[mine]] = True
    return grid
