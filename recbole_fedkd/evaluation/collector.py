"""Collector and evaluator: RecBole's, with what the new metrics need and without what breaks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from recbole.evaluator import Collector, Evaluator
from recbole.evaluator.collector import DataStruct
from torch import Tensor

from recbole_fedkd.finite import NotFiniteError, all_finite

DISTRIBUTION = "label_distribution"
"""Interaction field in which the trainer hands over a model's label distribution ``[batch, T]``."""

# RecBole's metrics of click models: with T ratings they judge P(rating >= threshold) against rating >= threshold.
CLICK_METRICS = {"auc", "logloss"}


class LabelCollector(Collector):
    """RecBole's collector plus classes, users and, for T-way models, the positive label and its probability.

    Args:
        config: the config of the protocol.
        label_values: the model's label set, ordered; None for RecBole's models, whose labels are 0 and 1.
        made_by: half a sentence on what the model's scores come from, for the one about scores that are not finite.
    """

    def __init__(self, config: Any, label_values: Tensor | None, made_by: str = "") -> None:
        super().__init__(config)
        self.made_by = made_by
        self._seen, self._not_finite = 0, 0
        self.label_values = label_values if label_values is not None else torch.tensor([0.0, 1.0])

    def see_scores(self, scores: Tensor, masked: int = 0) -> None:
        """Count what a model says, and what of it is no number.

        Args:
            scores: of any shape.
            masked: how many of them are minus infinity on purpose: what is not to be recommended.
        """
        judged = scores.numel() - masked
        self._seen += judged
        if masked or not all_finite([scores]):
            self._not_finite += judged - int(torch.isfinite(scores).sum())

    def model_collect(self, model: Any) -> None:
        """At the end of a sweep: all scores must have been finite.

        Raises:
            NotFiniteError: some were not.
        """
        seen, bad = self._seen, self._not_finite
        self._seen, self._not_finite = 0, 0
        if bad:
            for name in self._of_sweep():
                del self.data_struct[name]
            told = f"{bad} of {seen} scores of model '{self.config['model']}' are not finite"
            raise NotFiniteError(f"{told}, {self.made_by}" if self.made_by else told)

    def _of_sweep(self) -> list[str]:
        """What has been collected in this sweep alone."""
        return [name for name in self.data_struct._data_dict if name.startswith("rec.") or name in _PER_SWEEP]

    def eval_batch_collect(
        self, scores_tensor: Tensor, interaction: Any, positive_u: Tensor, positive_i: Tensor
    ) -> None:
        """Collect one batch; arguments as in RecBole."""
        super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
        need, struct = self.register.need, self.data_struct
        values = self.label_values.to(scores_tensor.device)
        distribution = interaction.interaction.get(DISTRIBUTION)
        if need("rec.class"):
            if distribution is not None:
                struct.update_tensor("rec.class", values[distribution.argmax(-1)])
            else:
                struct.update_tensor("rec.class", (scores_tensor >= 0.5).to(values.dtype))
        if need("data.user") or self.config["user_metrics"]:
            struct.update_tensor("data.user", interaction[self.config["USER_ID_FIELD"]])
        if need("data.label_range"):
            struct.set("data.label_range", torch.stack([values.min(), values.max()]))
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
        return struct


_PER_SWEEP = ("data.label", "data.user", "data.label_range", "data.positive_label")


class PlainEvaluator(Evaluator):
    """RecBole's evaluator; results are Python floats, and click metrics see the positive label of T-way models.

    Attributes:
        judged: what the last sweep collected.
    """

    judged: DataStruct

    def evaluate(self, dataobject: DataStruct) -> OrderedDict[str, float]:
        """Metric name (lower case, ``@k`` behind) to value."""
        self.judged = dataobject
        clicks = dataobject
        if "rec.positive_score" in dataobject:
            clicks = DataStruct()
            clicks.set("rec.score", dataobject.get("rec.positive_score"))
            clicks.set("data.label", dataobject.get("data.positive_label"))
        result: OrderedDict[str, float] = OrderedDict()
        for metric in self.metrics:
            struct = clicks if metric in CLICK_METRICS else dataobject
            for name, value in self.metric_class[metric].calculate_metric(struct).items():
                result[name] = float(value)
        return result
