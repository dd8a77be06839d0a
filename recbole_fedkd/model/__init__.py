"""Models: attention, networks, and the RecBole model classes made of them."""

from recbole_fedkd.model.encoding import with_attention
from recbole_fedkd.model.pair import TeacherAndStudent
from recbole_fedkd.model.population import AttnFedKD, RecBolePopulation
from recbole_fedkd.model.student import AttnStudent, AttnTeacher

MODELS = {model.__name__: model for model in (AttnFedKD, AttnStudent, AttnTeacher)}

__all__ = [
    "MODELS",
    "AttnFedKD",
    "AttnStudent",
    "AttnTeacher",
    "RecBolePopulation",
    "TeacherAndStudent",
    "with_attention",
]
