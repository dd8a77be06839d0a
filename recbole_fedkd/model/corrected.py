"""Which class runs where a model of RecBole is named: RecBole's own, or ours where RecBole's is wrong."""

from __future__ import annotations

import importlib

# Model of RecBole to the module here that holds the class of the same name.
_OURS = {
    "ADMMSLIM": "without_gradients",
    "NCEPLRec": "mended_projection",
    "Pop": "without_gradients",
    "Random": "without_gradients",
    "DSSM": "mended_clicks",
    "KD_DAGFM": "mended_clicks",
    "DGCF": "mended_graph",
    "KTUP": "mended_graph",
    "BERT4Rec": "mended_sequential",
    "DIEN": "mended_sequential",
    "KSR": "mended_sequential",
}


def corrected(model: type) -> type:
    """The class that runs in a model's place; itself for nearly all.

    Args:
        model: any model class.
    """
    if not model.__module__.startswith("recbole.model.") or model.__name__ not in _OURS:
        return model
    # Here, because a module of models takes a while to import.
    module = importlib.import_module(f"recbole_fedkd.model.{_OURS[model.__name__]}")
    ours: type = getattr(module, model.__name__)
    return ours
