"""How a model is judged: metrics of two kinds in one run, the evaluation modes behind them, and ``valid_metric``."""

from __future__ import annotations

import importlib.util
from typing import Any

from recbole.config import Config
from recbole.evaluator import metric_types, metrics_dict, smaller_metrics
from recbole.utils import EvaluatorType

from recbole_fedkd.errors import InputError, nearest
from recbole_fedkd.evaluation import metrics as _metrics  # noqa: F401  (registers the metrics)


class JudgedConfig(Config):
    """RecBole's ``Config`` as far as metrics and evaluation are concerned.

    Attributes:
        judged_metrics: every metric asked for; ``config["metrics"]`` holds those of the type that ``valid_metric`` has,
            which is what RecBole's own classes can digest.
    """

    internal_config_dict: dict[str, Any]
    judged_metrics: list[str]
    _asked_modes: Any

    def _set_default_parameters(self) -> None:
        """As RecBole's, after the metrics are parted by type: RecBole refuses ranking and value metrics together."""
        final = self.final_config_dict
        metrics = [final["metrics"]] if isinstance(final["metrics"], str) else final["metrics"]
        if not isinstance(metrics, list | tuple) or not metrics:
            raise InputError(f"metrics is {metrics!r}; it must be a list of metric names")
        for metric in metrics:
            if str(metric).lower() not in metric_types:
                raise InputError(f"metric '{metric}' is unknown{nearest(str(metric), metric_types)}")
        valid_metric = str(final["valid_metric"])
        stem = valid_metric.partition("@")[0].lower()
        if stem not in metric_types:
            raise InputError(f"valid_metric '{valid_metric}' is unknown{nearest(stem, metric_types)}")
        if stem not in [metric.lower() for metric in metrics]:
            raise InputError(f"valid_metric '{valid_metric}' is not among metrics {list(metrics)}")
        self.judged_metrics = list(metrics)
        primary = metric_types[stem]
        mixed = len({metric_types[metric.lower()] for metric in metrics}) > 1
        self._asked_modes = "full"
        if isinstance(final["eval_args"], dict):
            if final.get("label_mode") is not None:
                # RecBole would fill what the user left out from its own defaults, not from those of the label mode.
                final["eval_args"] = {**self.internal_config_dict["eval_args"], **final["eval_args"]}
            self._asked_modes = final["eval_args"].get("mode", "full")
            if mixed or final.get("label_mode") is not None:
                final["metrics"] = [metric for metric in metrics if metric_types[metric.lower()] == primary]
                final["eval_args"] = {**final["eval_args"], "mode": self.evaluation_modes(primary)}
        final["valid_metric"] = valid_metric
        try:
            super()._set_default_parameters()
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"the config cannot be used: {error}") from error
        # RecBole's own rule looks at the metric that RecBole registered; ours are registered beside them.
        final["valid_metric_bigger"] = stem not in smaller_metrics

    def evaluation_modes(self, kind: EvaluatorType) -> dict[str, str]:
        """RecBole's evaluation mode per phase for metrics of one kind, from the ``eval_args.mode`` that was asked for.

        Value metrics need rows with labels: the held-out rows, or sampled negatives where all held-out rows are positives.
        Ranking metrics need candidates: those of ``uniN`` or ``popN`` where asked for, else all items.
        """
        asked = self._asked_modes
        if not isinstance(asked, dict):
            asked = {"valid": asked, "test": asked}
        default = asked.get("valid", asked.get("test", "full"))
        modes = {}
        for phase in ("valid", "test"):
            mode = str(asked.get(phase, default))
            sampled = _samples_candidates(mode)
            if kind == EvaluatorType.RANKING:
                modes[phase] = "full" if mode in ("labeled", "uni1") else mode
            elif self["label_mode"] == "implicit":
                modes[phase] = mode if sampled else "uni1"
            else:
                modes[phase] = mode if sampled and self["label_mode"] is None else "labeled"
        return modes

    def _check_valid_metric(self) -> None:
        """Before anything runs: ``valid_metric`` names a result key that its metric gives."""
        valid_metric = self["valid_metric"]
        stem, at, k = valid_metric.partition("@")
        takes_k = hasattr(metrics_dict[stem.lower()](self), "topk")
        if takes_k and (not k.isdigit() or int(k) not in self["topk"]):
            raise InputError(
                f"valid_metric '{valid_metric}' needs @k with a k of topk {self['topk']}, such as {stem}@10"
            )
        if at and not takes_k:
            raise InputError(f"valid_metric '{valid_metric}' has a k, which {stem} does not take")
        if self["log_wandb"] and importlib.util.find_spec("wandb") is None:
            raise InputError("log_wandb is True, but the package wandb is not installed")

    def _set_train_neg_sample_args(self) -> None:
        try:
            super()._set_train_neg_sample_args()
        except (ValueError, KeyError) as error:
            raise InputError(f"train_neg_sample_args cannot be used: {error}") from error

    def _set_eval_neg_sample_args(self, phase: str) -> None:
        _samples_candidates(self.final_config_dict["eval_args"]["mode"][phase])
        super()._set_eval_neg_sample_args(phase)


def _samples_candidates(mode: Any) -> bool:
    """Whether an evaluation mode ranks among sampled items; raises :class:`InputError` for a mode that does not exist."""
    sampled = isinstance(mode, str) and mode[:3] in ("uni", "pop") and mode[3:].isdigit()
    if not sampled and mode not in ("full", "labeled"):
        raise InputError(f"eval_args.mode is '{mode}'; allowed are full, labeled, uni<N> and pop<N>")
    return sampled
