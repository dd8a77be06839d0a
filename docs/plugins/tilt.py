"""A metric: how far predictions lie above the ratings on average, below them if negative."""

from recbole.evaluator.base_metric import AbstractMetric
from recbole.utils import EvaluatorType

from recbole_fedkd.extend import register_metric


@register_metric
class Tilt(AbstractMetric):
    """``--metrics=[Tilt,MAE] --valid_metric=MAE``, of models that predict ratings."""

    smaller = True
    metric_type = EvaluatorType.VALUE
    metric_need = ["rec.score", "data.label"]

    def calculate_metric(self, dataobject):
        """``{"tilt": mean of predictions less ratings}``."""
        predicted, rated = dataobject.get("rec.score"), dataobject.get("data.label")
        return {"tilt": round(float((predicted - rated).mean()), self.decimal_place)}
