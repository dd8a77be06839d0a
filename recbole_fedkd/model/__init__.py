"""Models: attention, networks, and the RecBole model classes made of them."""

from recbole_fedkd.model.batch_norm import normalise_single_rows
from recbole_fedkd.model.corrected import corrected
from recbole_fedkd.model.encoding import has_fields, with_attention
from recbole_fedkd.model.factorization import MF, FactorizationRecommender, PFedRec
from recbole_fedkd.model.floors import MFEM, Bias, FoldIn
from recbole_fedkd.model.gram import GramEASE, GramNetwork, GramRecommender, PureSVD
from recbole_fedkd.model.pair import TeacherAndStudent
from recbole_fedkd.model.population import AttnFedKD, NetworkPopulation, RecBolePopulation
from recbole_fedkd.model.requirements import (
    building,
    check_data,
    check_labels,
    names_click_loss,
    reads_negatives,
)
from recbole_fedkd.model.student import AttnStudent, AttnTeacher

_OF_FEATURES, _OF_CLICKS, _OF_RATINGS = (AttnFedKD, AttnStudent, AttnTeacher), (MF, PFedRec), (Bias, FoldIn, MFEM)
MODELS = {model.__name__: model for model in (*_OF_FEATURES, *_OF_CLICKS, *_OF_RATINGS, GramEASE, PureSVD)}

__all__ = [
    "MF",
    "MFEM",
    "MODELS",
    "AttnFedKD",
    "AttnStudent",
    "AttnTeacher",
    "Bias",
    "FactorizationRecommender",
    "FoldIn",
    "GramEASE",
    "GramNetwork",
    "GramRecommender",
    "NetworkPopulation",
    "PFedRec",
    "PureSVD",
    "RecBolePopulation",
    "TeacherAndStudent",
    "building",
    "check_data",
    "check_labels",
    "corrected",
    "has_fields",
    "names_click_loss",
    "normalise_single_rows",
    "reads_negatives",
    "with_attention",
]
