"""RecBole's transforms of item sequences (``transform``): whether a config can run them."""

from __future__ import annotations

import sys
from typing import Any

from recbole_fedkd.errors import InputError, nearest

# Transform to the key that it cannot do without.
_NEEDS = {"mask_itemseq": "mask_ratio", "inverse_itemseq": None, "crop_itemseq": "eta", "reorder_itemseq": "beta"}
# Model to the transform whose columns it reads.
_READS = {"BERT4Rec": "mask_itemseq", "SHAN": "inverse_itemseq"}


def check_transform(config: Any) -> None:
    """Check that the config's transform can run; RecBole finds out in the first batch.

    Raises:
        InputError: an unknown transform, one without its key, one that hides nothing, or a model that it does not fit.
    """
    name = config["transform"]
    needed = _READS.get(config["model"])
    if needed is not None and name != needed:
        raise InputError(f"transform is {name!r}, but model '{config['model']}' reads what transform={needed} makes")
    if name is None:
        return
    if name == "user_defined":
        transform = sys.modules.get("recbole.data.transform")  # without it, what is put there may still come
        if transform is not None and transform.UserDefinedTransform.__module__ == transform.__name__:
            raise InputError(
                "transform is 'user_defined', but RecBole's UserDefinedTransform is empty; put a class of your own into "
                "recbole.data.transform.UserDefinedTransform first"
            )
        return
    if name not in _NEEDS:
        allowed = [*_NEEDS, "user_defined"]
        raise InputError(
            f"transform '{name}' is unknown; it must be one of {', '.join(allowed)}{nearest(str(name), allowed)}"
        )
    if config["MODEL_TYPE"].name != "SEQUENTIAL" and not config.reads_history:
        raise InputError(f"transform={name} changes item sequences, which model '{config['model']}' does not have")
    key = _NEEDS[name]
    if key is None:
        return
    share = config[key]
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise InputError(f"transform={name} needs {key}, which is {share!r}; it must be a number in [0, 1]")
    length = config["MAX_ITEM_LIST_LENGTH"]
    if name == "mask_itemseq" and int(share * length) < 1:
        raise InputError(
            f"mask_ratio {share} of MAX_ITEM_LIST_LENGTH {length} items is less than one item to hide; "
            "raise mask_ratio or MAX_ITEM_LIST_LENGTH"
        )
