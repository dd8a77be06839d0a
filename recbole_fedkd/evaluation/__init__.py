"""Judging: RecBole's evaluator, more metrics, several protocols in one run."""

from recbole_fedkd.evaluation.collector import DISTRIBUTION, LabelCollector, PlainEvaluator
from recbole_fedkd.evaluation.judge import Judge
from recbole_fedkd.evaluation.metrics import register_metric
from recbole_fedkd.evaluation.per_user import merged, user_values
from recbole_fedkd.evaluation.protocol import EvaluationData, Protocol, evaluation_data, with_candidates
from recbole_fedkd.evaluation.rows import JudgedRows

__all__ = [
    "DISTRIBUTION",
    "EvaluationData",
    "Judge",
    "JudgedRows",
    "LabelCollector",
    "PlainEvaluator",
    "Protocol",
    "evaluation_data",
    "merged",
    "register_metric",
    "user_values",
    "with_candidates",
]
