"""Judging where the data are: what a party tells of its held-out rows is sums, of which everybody's metrics are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.data.threshold import positive_sentence
from recbole_fedkd.evaluation import JudgedRows
from recbole_fedkd.evaluation.metrics import label_ranks, labelled_ndcg
from recbole_fedkd.federated.envelope import PART_ROUNDING as _ROUNDING
from recbole_fedkd.federated.envelope import check_numbers
from recbole_fedkd.federated.message import MessageError
from recbole_fedkd.federation.together import population_of
from recbole_fedkd.machines.judgeable import PROTOCOLS, RANKED, asked_of
from recbole_fedkd.machines.ranking import ranking_due, ranking_of, ranking_sums
from recbole_fedkd.model.floors import own_floor

BINS = 4096
"""Of the histograms of scores that AUC is made of: rows of one bin count as equal, as half right."""

_BIN_NAMES = frozenset(f"{name} {number}" for name in ("clicks", "others") for number in range(BINS))

_FLOOR = "floor "
"""Before the names of sums of what ``Bias`` of a party's own rows would have said."""

_SPREAD = ("predicted", "labels")

_LEAST = 1e-15
"""RecBole's bound on probabilities in LogLoss."""


def protocol_of(name: str, config: Any, schema: DataSchema) -> str:
    """How a metric of a name comes about, and of which rating on a row is a positive one."""
    if schema.positives or not (name in RANKED or name in ("auc", "logloss") or config["label_mode"] == "threshold"):
        return PROTOCOLS[name]
    rule = positive_sentence("rating", config["rating_threshold"], None) if config["label_mode"] else "label 1"
    return f"{PROTOCOLS[name]}{' with' if name in RANKED else ', a click is'} {rule}"


class PartyJudge:
    """Judges one party's held-out rows.

    Args:
        config: the run's config.
        schema: what is public.
        rows: the party's training rows, which say who its users are.
        folder: holds ``valid.npz`` and ``test.npz``.
    """

    def __init__(self, config: Any, schema: DataSchema, rows: ClientRows, folder: Path) -> None:
        self.config, self.schema, self.folder = config, schema, folder
        self.owners = torch.full((schema.user_num,), -1)
        self.owners[rows.users] = 0
        self.own = rows
        self._known = torch.zeros(schema.user_num, dtype=torch.bool)
        self._known[rows.interactions[schema.user_field]] = True

    def rows(self, phase: str) -> int:
        """How many rows there are of a phase."""
        held_out = self._held_out(phase)
        return len(held_out.interactions[self.schema.item_field]) if held_out is not None else 0

    def _held_out(self, phase: str) -> ClientRows | None:
        file = self.folder / f"{phase}.npz"
        return ClientRows.load(file) if file.is_file() else None

    @torch.no_grad()
    def sums(self, network: nn.Module, phase: str) -> dict[str, float]:
        """Sums over the rows of a phase, see :func:`metrics_of`; of none where the party holds none.

        Args:
            network: the party's.
            phase: ``valid`` or ``test``.
        """
        rows = self._held_out(phase)
        if rows is None or not (count := len(rows.interactions[self.schema.item_field])):
            return {"rows": 0.0}
        before = network.training
        network.eval()
        model, sums = population_of(self.config, self.schema, [network], self.owners), {"rows": float(count)}
        values, ranks = _kinds(self.config, phase)
        try:
            if ranks:
                earlier = [self.own, *([self._held_out("valid")] if phase == "test" else [])]
                seen = [part for part in earlier if part is not None]
                relevant = _relevant(self.config, self.schema, rows)
                sums |= ranking_sums(self.config, self.schema, model, seen, rows, relevant)
            if values:
                sums |= self._of_values(model.predict_distribution(dict(rows.interactions)), rows, phase)
        finally:
            network.train(before)
        return sums

    def _of_values(self, distribution: Tensor, rows: ClientRows, phase: str) -> dict[str, float]:
        sums = _sums(self.config, self.schema, rows, distribution)
        labels, users, items = (rows.interactions[name] for name in _columns(self.schema))
        assert self.schema.known_items is not None  # of labels that are ratings
        judged = JudgedRows(self._known, self.schema.known_items)
        judged.add(_scores(self.schema, distribution), labels, users, items)
        sums |= judged.numbers()
        if phase == "test":
            floor = _sums(self.config, self.schema, rows, own_floor(self.config, self.schema, self.own, rows))
            sums |= {f"{_FLOOR}{name}": value for name, value in floor.items() if name not in {"rows", *_BIN_NAMES}}
        return sums


def _kinds(config: Any, phase: str) -> tuple[bool, bool]:
    """Whether a phase judges rows, and ranks: a validation does what ``valid_metric`` needs, as of any run."""
    asked = asked_of(config) if phase == "test" else {str(config["valid_metric"]).lower().partition("@")[0]}
    return bool(asked - set(RANKED)), bool(asked & set(RANKED))


def _bound(config: Any, schema: DataSchema) -> float:
    """The least label that is positive."""
    return float(config["rating_threshold"] if config["label_mode"] == "rating" else schema.label_values[-1])


def _relevant(config: Any, schema: DataSchema, rows: ClientRows) -> Tensor:
    """Which rows a ranking is to find, bool ``[n]``."""
    if schema.positives:
        return torch.ones(len(rows.interactions[schema.item_field]), dtype=torch.bool)
    return rows.interactions[_columns(schema)[0]] >= _bound(config, schema)


def _columns(schema: DataSchema) -> tuple[str, str, str]:
    return str(schema.fields["label_field"]), schema.user_field, schema.item_field


def _scores(schema: DataSchema, distribution: Tensor) -> Tensor:
    return distribution @ torch.tensor(list(schema.label_values), dtype=torch.float32)


def _sums(config: Any, schema: DataSchema, rows: ClientRows, distribution: Tensor) -> dict[str, float]:
    values = torch.tensor(list(schema.label_values), dtype=torch.float32)
    labels, of_users, _ = (rows.interactions[name] for name in _columns(schema))
    scores = _scores(schema, distribution).double().numpy()
    wrong = scores - labels.double().numpy()
    bound = _bound(config, schema)
    positive = distribution[:, values >= bound].sum(-1).double().clamp(_LEAST, 1 - _LEAST).numpy()
    clicked = (labels >= bound).numpy()
    sums = {
        "rows": float(len(labels)),
        "absolute": float(np.abs(wrong).sum()),
        "squared": float((wrong**2).sum()),
        "right": float((values[distribution.argmax(-1)] == labels).sum()),
        "log_loss": float(-np.log(np.where(clicked, positive, 1 - positive)).sum()),
    }
    asked = asked_of(config)
    if "auc" in asked:
        for name, of_class in (("clicks", clicked), ("others", ~clicked)):
            bins = np.bincount((positive[of_class] * BINS).astype(int).clip(0, BINS - 1), minlength=BINS)
            sums |= {f"{name} {bin_number}": float(bins[bin_number]) for bin_number in np.flatnonzero(bins)}
    if "labelledndcg" in asked:
        ranks = label_ranks(labels.numpy(), values.numpy())
        users = of_users.numpy()
        for k in config["topk"]:
            gains = labelled_ndcg(scores, ranks, users, k)
            sums |= {f"labelledndcg@{k}": float(gains.sum()), f"judged users@{k}": float(len(gains))}
    return sums


def check_sums(
    config: Any, schema: DataSchema, sums: Mapping[str, float], declared: Mapping[str, float], phase: str
) -> None:
    """Raise :class:`MessageError` for sums that no rows as a party has declared them can come to.

    Args:
        config: the run's config.
        schema: what is public.
        sums: of the party.
        declared: what it has said of itself when it came, see :data:`~recbole_fedkd.federated.envelope.DECLARED`.
        phase: ``valid`` or ``test``.
    """
    rows, labels = declared[phase], schema.label_values
    if sums.get("rows") != rows:
        raise MessageError("numbers", f"it has judged {sums.get('rows')} rows, and has {rows:g} of '{phase}'")
    if not rows:
        check_numbers(sums, {"rows": 0}, {})
        return
    users = min(declared["users"], rows)
    values, ranks = _kinds(config, phase)
    counts, due, parts = ranking_due(config, sums, users) if ranks else ({}, {}, [])
    counts["rows"] = rows
    if not values:
        check_numbers(sums, counts, due, parts)
        return
    asked = asked_of(config)
    low, high = labels[0], labels[-1]
    span, square = (high - low) * (1 + _ROUNDING), rows * max(low**2, high**2) * (1 + _ROUNDING)
    between = (rows * low - rows * span * _ROUNDING, rows * high + rows * span * _ROUNDING)
    counts |= dict.fromkeys(("cold", "cold users", "cold items"), rows)
    due |= {"cold absolute": (0.0, rows * span), "predicted": between, "labels": between}
    due |= dict.fromkeys(("predicted squared", "labels squared"), (0.0, square))
    floors = ("", *([_FLOOR] if phase == "test" else []))
    for of in floors:
        counts[f"{of}right"] = rows
        due |= {f"{of}absolute": (0.0, rows * span), f"{of}squared": (0.0, rows * span**2)}
        due[f"{of}log_loss"] = (0.0, -rows * math.log(_LEAST) * (1 + _ROUNDING))
        for k in config["topk"] if "labelledndcg" in asked else ():
            counts[f"{of}judged users@{k}"] = users
            due[f"{of}labelledndcg@{k}"] = (0.0, sums.get(f"{of}judged users@{k}", 0.0) * (1 + _ROUNDING))
    bins = {name: value for name, value in sums.items() if "auc" in asked and name in _BIN_NAMES}
    counts |= dict.fromkeys(bins, rows)
    parts += [("cold users", "cold"), ("cold items", "cold"), ("cold absolute", "absolute")]
    check_numbers(sums, counts, due, parts)
    if "auc" in asked and sum(bins.values()) != rows:
        raise MessageError("numbers", f"its histograms hold {sum(bins.values()):g} rows of {rows:g}")
    if not sums["cold"] <= sums["cold users"] + sums["cold items"]:
        raise MessageError("numbers", f"'cold' is {sums['cold']:g}, more than rows of cold users and items are")
    both = [(f"{of}absolute", f"{of}squared") for of in floors] + [(of, f"{of} squared") for of in _SPREAD]
    for whole, squares in both:
        least = sums[whole] ** 2 / rows  # by Cauchy and Schwarz
        most = math.inf if whole in _SPREAD else sums[whole] * span
        if not least * (1 - _ROUNDING) <= sums[squares] <= most:
            raise MessageError("numbers", f"'{squares}' is {sums[squares]:g} where '{whole}' is {sums[whole]:g}")


def added(parts: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """The sums of several parties, in the order of their numbers."""
    total: dict[str, float] = {}
    for number in sorted(parts):
        for name, value in parts[number].items():
            total[name] = total.get(name, 0.0) + value
    return total


def metrics_of(sums: Mapping[str, float], labels: Sequence[float]) -> dict[str, float]:
    """Metrics by RecBole's names from sums; none where no row was judged.

    Args:
        sums: of one party, or of several.
        labels: the ordered label set.
    """
    rows = sums.get("rows", 0.0)
    if not rows:
        return {}
    metrics = ranking_of(sums)
    if "absolute" not in sums:
        return metrics
    metrics |= {
        "mae": sums["absolute"] / rows,
        "nmae": sums["absolute"] / rows / (labels[-1] - labels[0]),
        "rmse": (sums["squared"] / rows) ** 0.5,
        "accuracy": sums["right"] / rows,
        "logloss": sums["log_loss"] / rows,
        "auc": _area(sums),
    }
    for name, value in sums.items():
        if name.startswith("labelledndcg@"):
            users = sums[name.replace("labelledndcg", "judged users")]
            metrics[name] = value / users if users else math.nan
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def floor_of(sums: Mapping[str, float]) -> dict[str, float]:
    """Sums of what ``Bias`` of every party's own rows would have said, by the names of :func:`metrics_of`."""
    floor = {name.removeprefix(_FLOOR): value for name, value in sums.items() if name.startswith(_FLOOR)}
    return {"rows": sums["rows"], **floor} if floor else {}


def _histograms(sums: Mapping[str, float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows with a click and others by their bin, ``[BINS]`` each."""
    bins = {"clicks": np.zeros(BINS), "others": np.zeros(BINS)}
    for name, value in sums.items():
        kind, _, bin_number = name.partition(" ")
        if kind in bins and bin_number.isdigit() and int(bin_number) < BINS:
            bins[kind][int(bin_number)] = value
    return bins["clicks"], bins["others"]


def _area(sums: Mapping[str, float]) -> float:
    """AUC from the histograms of both classes, nan where one has no row: the share of pairs in the right order."""
    clicks, others = _histograms(sums)
    pairs = clicks.sum() * others.sum()
    below = np.cumsum(others) - others
    return float((clicks * (below + others / 2)).sum() / pairs) if pairs else math.nan


def area_within(sums: Mapping[str, float]) -> float:
    """How far AUC of histograms may be from that of the rows: half the share of pairs that lie in one bin."""
    clicks, others = _histograms(sums)
    pairs = clicks.sum() * others.sum()
    return float((clicks * others).sum() / 2 / pairs) if pairs else 0.0
