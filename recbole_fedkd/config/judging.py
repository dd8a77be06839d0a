"""How a model is judged: metrics of two kinds in one run, the evaluation modes behind them, and ``valid_metric``."""

from __future__ import annotations

import importlib.util
import re
from logging import getLogger
from typing import TYPE_CHECKING, Any

from recbole_fedkd.config.outlines import metric_names, metric_of
from recbole_fedkd.errors import InputError, nearest, shown

if TYPE_CHECKING:
    from recbole.config import Config
    from recbole.utils import EvaluatorType
else:
    Config = object  # RecBole's stands behind it, whole or as its source alone has it


class JudgedConfig(Config):
    """What goes before RecBole's ``Config`` as far as metrics and evaluation are concerned.

    Attributes:
        judged_metrics: every metric asked for; ``config["metrics"]`` holds those of the type that ``valid_metric`` has,
            which is what RecBole's own classes can digest.
    """

    internal_config_dict: dict[str, Any]
    external_config_dict: dict[str, Any]
    judged_metrics: list[str]
    _asked_modes: Any

    def _set_default_parameters(self) -> None:
        """As RecBole's, after the metrics are parted by type: RecBole refuses ranking and value metrics together."""
        final = self.final_config_dict
        metrics = _metric_names(final["metrics"])
        final["topk"] = _cutoffs(final["topk"])
        valid_metric = final["valid_metric"] = self._valid_metric(metrics, final["topk"])
        stem = valid_metric.partition("@")[0].lower()
        self.judged_metrics = list(metrics)
        primary = metric_of(stem).kind
        mixed = len({metric_of(metric.lower()).kind for metric in metrics}) > 1
        self._asked_modes = "full"
        if isinstance(final["eval_args"], dict):
            # RecBole would fill what the user left out from its own defaults, not from those of the model or label mode.
            final["eval_args"] = {**self.internal_config_dict["eval_args"], **final["eval_args"]}
            final["eval_args"]["split"] = _with_lists(final["eval_args"].get("split"))
            self._asked_modes = final["eval_args"].get("mode", "full")
            unasked = "mode" not in (self.external_config_dict.get("eval_args") or {})
            # A model's own mode, such as full sort, cannot be what somebody means who asks for metrics of the other kind.
            if mixed or unasked or final.get("label_mode") is not None:
                final["metrics"] = [metric for metric in metrics if metric_of(metric.lower()).kind == primary]
                final["eval_args"] = {**final["eval_args"], "mode": self.modes_of(primary)}
        lower = self.internal_config_dict.get("train_neg_sample_args")
        if isinstance(final.get("train_neg_sample_args"), dict) and isinstance(lower, dict):
            final["train_neg_sample_args"] = {**lower, **final["train_neg_sample_args"]}
        mode = final["eval_args"].get("mode")
        modes = list(mode.values()) if isinstance(mode, dict) else [mode]
        if primary == "RANKING" and "labeled" in modes:
            raise InputError(
                f"eval_args.mode is labeled, which judges rows one by one, and metrics {shown(final['metrics'])} rank items; "
                "use mode full or uni<N>"
            )
        if primary == "VALUE" and "full" in modes:
            raise InputError(
                f"eval_args.mode is full, which ranks all items, and metrics {shown(final['metrics'])} judge rows with labels; "
                "use mode labeled, or set label_mode"
            )
        try:
            super()._set_default_parameters()
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"the config cannot be used: {error}") from error
        # RecBole's own rule looks at the metric that RecBole registered; ours are registered beside them.
        final["valid_metric_bigger"] = not metric_of(stem).smaller

    def evaluation_modes(self, kind: EvaluatorType) -> dict[str, str]:
        """RecBole's evaluation mode per phase for metrics of one kind, from the ``eval_args.mode`` that was asked for.

        Value metrics need rows with labels: the held-out rows, or sampled negatives where all held-out rows are positives.
        Ranking metrics need candidates: those of ``uniN`` or ``popN`` where asked for, else all items.
        """
        return self.modes_of(kind.name)

    def modes_of(self, kind: str) -> dict[str, str]:
        """The same, by the name of the kind."""
        asked = self._asked_modes
        if not isinstance(asked, dict):
            asked = {"valid": asked, "test": asked}
        default = asked.get("valid", asked.get("test", "full"))
        modes = {}
        for phase in ("valid", "test"):
            mode = str(asked.get(phase, default))
            sampled = _samples_candidates(mode)
            if kind == "RANKING":
                modes[phase] = "full" if mode in ("labeled", "uni1") else mode
            elif self["label_mode"] == "implicit":
                modes[phase] = mode if sampled else "uni1"
            else:
                modes[phase] = mode if sampled and self["label_mode"] is None else "labeled"
        return modes

    def _valid_metric(self, metrics: list[str], topk: list[int]) -> str:
        """``valid_metric``: the user's, or one that there is.

        A default that the user's ``metrics`` do not have gives way to the first of these, and a default whose k the
        user's ``topk`` does not have takes the first k of it.
        """
        chosen = self.final_config_dict["valid_metric"]
        stem, at, k = str(chosen).partition("@")
        if "valid_metric" in self.external_config_dict:
            if stem.lower() not in metric_names():
                raise InputError(f"valid_metric {shown(chosen)} is unknown{nearest(stem, metric_names())}")
            if stem.lower() not in [metric.lower() for metric in metrics]:
                raise InputError(f"valid_metric '{chosen}' is not among metrics {shown(metrics)}; add it to them")
            return str(chosen)
        if stem.lower() not in [metric.lower() for metric in metrics]:
            stem, at, k = metrics[0], "", ""
        if not metric_of(stem.lower()).takes_k:
            return stem
        kept = at and k.isdigit() and int(k) in topk
        return f"{stem}@{k}" if kept else f"{stem}@{topk[0]}"

    def fit_catalogue(self, items: int) -> None:
        """Shorten a default ``topk`` to the items that there are to recommend, with a warning.

        Raises:
            InputError: the user's own ``topk``, or the k of the user's ``valid_metric``, is beyond them.
        """
        asked = self["topk"]
        ranked = [metric for metric in self.judged_metrics if metric_of(metric.lower()).takes_k]
        if not ranked or max(asked) <= items:
            return
        sentence = f"topk holds {max(asked)}, but dataset '{self['dataset']}' has only {items} item(s)"
        k = self["valid_metric"].partition("@")[2] if "valid_metric" in self.external_config_dict else ""
        if "topk" in self.external_config_dict or (k and int(k) > items):
            raise InputError(f"{sentence}; set topk to at most that, such as --topk=[{items}]")
        self.final_config_dict["topk"] = list(dict.fromkeys(min(k, items) for k in asked))
        self.final_config_dict["valid_metric"] = self._valid_metric(self.judged_metrics, self["topk"])
        getLogger().warning(f"{sentence}: judged at topk={self['topk']}, as you set none")

    def _check_valid_metric(self) -> None:
        """Before anything runs: ``valid_metric`` names a result key that its metric gives."""
        valid_metric, topk = self["valid_metric"], self["topk"]
        stem, at, k = valid_metric.partition("@")
        takes_k = metric_of(stem.lower()).takes_k
        if takes_k and (not k.isdecimal() or int(k[:20]) not in topk):
            raise InputError(
                f"valid_metric '{valid_metric}' needs @k with a k of topk {shown(topk)}, such as {stem}@{topk[0]}"
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


def _metric_names(metrics: Any) -> list[str]:
    """The metrics that are asked for, one or several, as they are spelled."""
    names = [metrics] if isinstance(metrics, str) else metrics
    if not isinstance(names, list | tuple) or not names:
        raise InputError(f"metrics is {shown(metrics)}; it must be a list of metric names")
    for name in names:
        if not isinstance(name, str) or name.lower() not in metric_names():
            raise InputError(f"metric {shown(str(name))} is unknown{nearest(str(name), metric_names())}")
    return list(dict.fromkeys(names))


def _with_lists(split: Any) -> Any:
    """A split with a list of shares, where a tuple was given: RecBole insists on it."""
    if not isinstance(split, dict):
        return split
    return {kind: list(shares) if isinstance(shares, tuple) else shares for kind, shares in split.items()}


def _cutoffs(topk: Any) -> list[int]:
    """The ks of ``topk``: a number or several."""
    numbers = list(topk) if isinstance(topk, list | tuple) else [topk]
    if not numbers or not all(isinstance(k, int) and not isinstance(k, bool) and 1 <= k < 2**31 for k in numbers):
        raise InputError(f"topk is {shown(topk)}; it must be an integer >= 1 or a list of them, such as [5, 10]")
    return list(dict.fromkeys(numbers))


def _samples_candidates(mode: Any) -> bool:
    """Whether an evaluation mode ranks among sampled items; raises :class:`InputError` for a mode that does not exist."""
    sampled = isinstance(mode, str) and bool(re.fullmatch("(uni|pop)[1-9][0-9]{0,8}", mode))
    if not sampled and mode not in ("full", "labeled"):
        raise InputError(f"eval_args.mode is {shown(mode)}; allowed are full, labeled, uni<N> and pop<N>")
    return sampled
