"""Kinds of knowledge: what clients that distil tell each other, and what they make of it; the loss is the strategy's."""

from recbole_fedkd.federated.knowledge.base import KNOWLEDGE, Knowledge, Sizes, register_knowledge
from recbole_fedkd.federated.knowledge.factors import FactorKnowledge
from recbole_fedkd.federated.knowledge.fold_in import FoldInKnowledge, FoldInSettings
from recbole_fedkd.federated.knowledge.gram import GramKnowledge
from recbole_fedkd.federated.knowledge.item import KNOWLEDGE_USES, ItemKnowledge
from recbole_fedkd.federated.knowledge.label import LabelKnowledge, LabelSettings
from recbole_fedkd.federated.knowledge.prediction import PredictionKnowledge
from recbole_fedkd.federated.knowledge.prototype import PrototypeKnowledge

__all__ = [
    "KNOWLEDGE",
    "KNOWLEDGE_USES",
    "FactorKnowledge",
    "FoldInKnowledge",
    "FoldInSettings",
    "GramKnowledge",
    "ItemKnowledge",
    "Knowledge",
    "LabelKnowledge",
    "LabelSettings",
    "PredictionKnowledge",
    "PrototypeKnowledge",
    "Sizes",
    "register_knowledge",
]
