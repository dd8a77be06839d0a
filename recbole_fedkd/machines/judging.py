"""Judging where the data are: what a party tells of its held-out rows is sums, of which everybody's metrics are made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.errors import InputError, listed
from recbole_fedkd.federation import population_of

ADDITIVE = ("mae", "rmse", "accuracy", "logloss")
"""Metrics that sums over rows suffice for."""

_LEAST = 1e-15
"""RecBole's bound on probabilities in LogLoss."""


def check_judgeable(config: object) -> None:
    """Raise :class:`InputError` for a config whose metrics, or whose model, are not judged by sums."""
    metrics = [name.lower() for name in config.judged_metrics]  # type: ignore[attr-defined]
    if not config.attentive:  # type: ignore[attr-defined]
        raise InputError(
            f"model '{config['model']}' is not judged where the data are; models of this package are"  # type: ignore[index]
        )
    if unknown := [name for name in metrics if name not in ADDITIVE]:
        raise InputError(
            f"metrics {listed(unknown)} are not sums over rows, so parties cannot judge them apart; set metrics to some of "
            f"{listed(ADDITIVE)}"
        )


class PartyJudge:
    """Judges one party's held-out rows.

    Args:
        config: the run's config.
        schema: what is public.
        rows: the party's training rows, which say who its users are.
        folder: holds ``valid.npz`` and ``test.npz``.
    """

    def __init__(self, config: object, schema: DataSchema, rows: ClientRows, folder: Path) -> None:
        self.config, self.schema, self.folder = config, schema, folder
        self.owners = torch.full((schema.user_num,), -1)
        self.owners[rows.users] = 0

    @torch.no_grad()
    def sums(self, network: nn.Module, phase: str) -> dict[str, float]:
        """Sums over the rows of a phase, see :func:`metrics_of`; of none where the party holds none.

        Args:
            network: the party's.
            phase: ``valid`` or ``test``.
        """
        if not (self.folder / f"{phase}.npz").is_file():
            return {"rows": 0.0}
        rows = ClientRows.load(self.folder / f"{phase}.npz")
        before = network.training
        network.eval()
        model = population_of(self.config, self.schema, [network], self.owners)
        try:
            distribution = model.predict_distribution(dict(rows.interactions))
        finally:
            network.train(before)
        return _sums(self.config, self.schema, rows, distribution)


def _sums(config: object, schema: DataSchema, rows: ClientRows, distribution: Tensor) -> dict[str, float]:
    values = torch.tensor(list(schema.label_values), dtype=torch.float32)
    labels = rows.interactions[str(schema.fields["label_field"])]
    scores = (distribution @ values).double().numpy()
    wrong = scores - labels.double().numpy()
    bound = config["rating_threshold"] if config["label_mode"] == "rating" else values[-1]  # type: ignore[index]
    positive = distribution[:, values >= bound].sum(-1).double().clamp(_LEAST, 1 - _LEAST).numpy()
    clicked = (labels >= bound).numpy()
    return {
        "rows": float(len(labels)),
        "absolute": float(np.abs(wrong).sum()),
        "squared": float((wrong**2).sum()),
        "right": float((values[distribution.argmax(-1)] == labels).sum()),
        "log_loss": float(-np.log(np.where(clicked, positive, 1 - positive)).sum()),
    }


def added(parts: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """The sums of several parties, in the order of their numbers."""
    total: dict[str, float] = {}
    for number in sorted(parts):
        for name, value in parts[number].items():
            total[name] = total.get(name, 0.0) + value
    return total


def metrics_of(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics by RecBole's names from sums; none where no row was judged."""
    rows = sums.get("rows", 0.0)
    if not rows:
        return {}
    return {
        "mae": sums["absolute"] / rows,
        "rmse": (sums["squared"] / rows) ** 0.5,
        "accuracy": sums["right"] / rows,
        "logloss": sums["log_loss"] / rows,
    }
