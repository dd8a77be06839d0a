"""Collector and evaluator: RecBole's, with what the new metrics need and without what breaks."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from logging import getLogger
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.evaluator import Collector, Evaluator
from recbole.evaluator.collector import DataStruct
from recbole.utils import EvaluatorType
from torch import Tensor

from recbole_fedkd.errors import listed
from recbole_fedkd.evaluation.catalogue_metrics import EMPTY
from recbole_fedkd.evaluation.metrics import UNDEFINED
from recbole_fedkd.evaluation.rows import JudgedRows, known_rows
from recbole_fedkd.finite import NotFiniteError, all_finite

DISTRIBUTION = "label_distribution"
"""Interaction field in which the trainer hands over a model's label distribution ``[batch, T]``."""

ALL_SCORES = ("rec.score", "rec.meanrank")
"""What RecBole's collector makes of every score, not of lists of the best."""

# RecBole's metrics of click models: with T ratings they judge P(rating >= threshold) against rating >= threshold.
CLICK_METRICS = {"auc", "logloss"}


class LabelCollector(Collector):
    """RecBole's collector plus classes, users and, for T-way models, the positive label and its probability.

    Args:
        config: the config of the protocol.
        label_values: the label set, ascending; not given: 0 and 1.
        made_by: half a sentence on what the model's scores come from, for the one about scores that are not finite.
        client_of_user: ``[users]``, for the same sentence; None without clients.

    Attributes:
        judged_rows: sums over the rows with labels of the last sweep; None where metrics rank.
    """

    def __init__(
        self,
        config: Any,
        label_values: Tensor | None = None,
        made_by: str = "",
        client_of_user: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(config)
        self.made_by, self.client_of_user = made_by, client_of_user
        self._seen, self._not_finite = 0, 0
        self._wrong_users: set[int] = set()
        self.judged_rows: JudgedRows | None = None
        self._rows: JudgedRows | None = None
        self.label_values = label_values if label_values is not None else torch.tensor([0.0, 1.0])

    @property
    def needs_all_scores(self) -> bool:
        """Whether metrics ask for more than lists of the best items."""
        return any(map(self.register.need, ALL_SCORES))

    def data_collect(self, train_data: Any) -> None:
        """As RecBole's; and which users and items have a training row."""
        super().data_collect(train_data)
        if self.config["eval_type"] == EvaluatorType.VALUE:
            self._rows = known_rows(train_data)

    def see_scores(self, scores: Tensor, users: Tensor, masked: int = 0) -> None:
        """Count what a model says, and what of it is no number.

        Args:
            scores: ``[n]`` or ``[n, items]``.
            users: whom each row is for ``[n]``.
            masked: how many of them are minus infinity on purpose: what is not to be recommended.
        """
        judged = scores.numel() - masked
        self._seen += judged
        if masked or not all_finite([scores]):
            bad = judged - int(torch.isfinite(scores).sum())
            self._not_finite += bad
            if bad and self.client_of_user is not None:
                # Minus infinity may be meant; among the items of one user it is not alone.
                rows = scores.view(len(users), -1)
                wrong = (rows.isnan() | (rows == torch.inf)).any(1) | ~rows.isfinite().any(1)
                self._wrong_users.update(users.to(wrong.device)[wrong].tolist())

    def model_collect(self, model: Any) -> None:
        """At the end of a sweep: all scores must have been finite.

        Raises:
            NotFiniteError: some were not.
        """
        seen, bad, users = self._seen, self._not_finite, sorted(self._wrong_users)
        self._seen, self._not_finite, self._wrong_users = 0, 0, set()
        if bad:
            for name in self._of_sweep():
                del self.data_struct[name]
            sentence = f"{bad} of {seen} scores of model '{self.config['model']}' are not finite"
            if users and self.client_of_user is not None:
                sentence += f" (client(s) {listed(sorted(set(self.client_of_user[users].tolist())))})"
            raise NotFiniteError(f"{sentence}, {self.made_by}" if self.made_by else sentence)

    def _of_sweep(self) -> list[str]:
        """What has been collected in this sweep alone."""
        return [name for name in self.data_struct._data_dict if name.startswith("rec.") or name in _PER_SWEEP]

    def eval_batch_collect(
        self, scores_tensor: Tensor, interaction: Any, positive_u: Tensor, positive_i: Tensor
    ) -> None:
        """Collect one batch; arguments as in RecBole."""
        super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
        need, struct = self.register.need, self.data_struct
        fields = tuple(self.config[name] for name in ("LABEL_FIELD", "USER_ID_FIELD", "ITEM_ID_FIELD"))
        if self._rows is not None and fields[0] in interaction:
            self._rows.add(scores_tensor, *(interaction[field] for field in fields))
        values = self.label_values.to(scores_tensor.device)
        distribution = interaction.interaction.get(DISTRIBUTION)
        if need("rec.class"):
            if distribution is not None:
                struct.update_tensor("rec.class", values[distribution.argmax(-1)])
            else:
                # The nearest label, of two the larger: of a probability that is score >= 0.5.
                between = (values[1:] + values[:-1]) / 2
                struct.update_tensor("rec.class", values[torch.bucketize(scores_tensor, between, right=True)])
        if need("rec.items"):
            # Where there are fewer candidates than places, RecBole fills up with what is masked.
            items = struct.get("rec.items")[-len(scores_tensor) :]
            items.masked_fill_(scores_tensor.gather(1, items) == -torch.inf, EMPTY)
        if self.config["USER_ID_FIELD"] in interaction.interaction:
            struct.update_tensor("data.user", interaction[self.config["USER_ID_FIELD"]])
        if need("data.label_set"):
            struct.set("data.label_set", values)
        if distribution is not None and self.config["label_mode"] == "rating":
            positive = values >= self.config["rating_threshold"]
            struct.update_tensor("rec.positive_score", distribution[:, positive].sum(-1))
            label = interaction[self.config["LABEL_FIELD"]] >= self.config["rating_threshold"]
            struct.update_tensor("data.positive_label", label.to(values.dtype))

    def get_data_struct(self) -> DataStruct:
        """Everything collected, on the CPU; what belongs to one sweep is forgotten.

        RecBole calls ``.cpu()`` on counters and ints too, which crashes four of its metrics (issue 2194).
        """
        collected = self.data_struct._data_dict
        for name, value in collected.items():
            if isinstance(value, Tensor):
                collected[name] = value.cpu()
        struct = copy.deepcopy(self.data_struct)
        for name in self._of_sweep():
            del self.data_struct[name]
        if self._rows is not None:
            self.judged_rows, self._rows = self._rows, JudgedRows(*self._rows.known)
        return struct


_PER_SWEEP = ("data.label", "data.user", "data.label_set", "data.positive_label")


class PlainEvaluator(Evaluator):
    """RecBole's evaluator; results are Python floats, and click metrics see the positive label of T-way models.

    Attributes:
        judged: what the last sweep collected.
    """

    judged: DataStruct

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._told: set[str] = set()

    def evaluate(self, dataobject: DataStruct) -> OrderedDict[str, float]:
        """Metric name (lower case, ``@k`` behind) to value; nan, and a warning, where it is not defined on what was judged.

        Raises:
            NotFiniteError: a metric is infinite.
        """
        self.judged = dataobject
        clicks = dataobject
        if "rec.positive_score" in dataobject:
            clicks = DataStruct()
            clicks.set("rec.score", dataobject.get("rec.positive_score"))
            clicks.set("data.label", dataobject.get("data.positive_label"))
        result: OrderedDict[str, float] = OrderedDict()
        for metric in self.metrics:
            struct = clicks if metric in CLICK_METRICS else dataobject
            with np.errstate(over="ignore"):
                values = self.metric_class[metric].calculate_metric(struct)
            for name, value in values.items():
                result[name] = float(value)
                if math.isinf(result[name]):
                    raise NotFiniteError(f"metric {name} is {result[name]}: the scores are too large to be judged")
            if math.isnan(result[name]) and metric not in self._told:
                self._told.add(metric)
                reason = UNDEFINED.get(metric, "it is nan")
                getLogger().warning(f"metric {name} is not defined on what is judged: {reason}")
        return result
