"""What a file of your own needs to bring along a strategy, knowledge, an aggregation, a codec, a stage, a partition, a metric.

Name the file in the config key ``plugins``; what it registers is there, on the command line, on every engine and in every
process of ``compare``. A model is any RecBole model class in such a file, found by its name.
"""

from recbole_fedkd.data.partition import UserBase, register_partition
from recbole_fedkd.distillation.knowledge import Aggregation, WeightedAggregation, register_aggregation
from recbole_fedkd.evaluation.metrics import register_metric
from recbole_fedkd.federated.encoding import Codec, register_codec
from recbole_fedkd.federated.knowledge import Knowledge, LabelKnowledge, LabelSettings, register_knowledge
from recbole_fedkd.federated.message import SERVER, ArraySpec, Message, Schema
from recbole_fedkd.federated.stage import Stage, register_stage
from recbole_fedkd.federated.strategy import LocalResult, Strategy, register_strategy
from recbole_fedkd.federated.strategy.federated_averaging import AveragingSettings, FederatedAveraging
from recbole_fedkd.federated.strategy.knowledge_exchange import AttentiveFederatedDistillation, ExchangeSettings
from recbole_fedkd.federated.task import Step
from recbole_fedkd.registry import setting

__all__ = [
    "SERVER",
    "Aggregation",
    "ArraySpec",
    "AttentiveFederatedDistillation",
    "AveragingSettings",
    "Codec",
    "ExchangeSettings",
    "FederatedAveraging",
    "Knowledge",
    "LabelKnowledge",
    "LabelSettings",
    "LocalResult",
    "Message",
    "Schema",
    "Stage",
    "Step",
    "Strategy",
    "UserBase",
    "WeightedAggregation",
    "register_aggregation",
    "register_codec",
    "register_knowledge",
    "register_metric",
    "register_partition",
    "register_stage",
    "register_strategy",
    "setting",
]
