"""Which class runs where a model of RecBole is named: RecBole's own, or ours where RecBole's is wrong."""

from __future__ import annotations


def corrected(model: type) -> type:
    """The class that runs in a model's place; itself for nearly all.

    Args:
        model: any model class.
    """
    if not model.__module__.startswith("recbole.model.general_recommender."):
        return model
    # Here, because RecBole imports all models of a kind for one, which takes seconds, and this one is imported already.
    from recbole_fedkd.model.without_gradients import CORRECTED

    return CORRECTED.get(model, model)
