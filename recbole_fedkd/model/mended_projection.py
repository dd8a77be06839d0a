"""RecBole's model by projection; in a file of its own, since RecBole's imports sklearn."""

from __future__ import annotations

from recbole.model import general_recommender
from recbole.utils import ModelType


class NCEPLRec(general_recommender.NCEPLRec):
    """RecBole trains this model, whose parameters are computed when it is built, for as many epochs as the config says."""

    type = ModelType.TRADITIONAL
