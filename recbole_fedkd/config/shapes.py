"""What dictionaries and lists of RecBole's keys hold: its files name the outer type alone, and its code trusts the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from recbole_fedkd.config.choices import choices
from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.errors import InputError, nearest, shown

_LEAVE_ONE_OUT = ("valid_and_test", "valid_only", "test_only")
_SUM_OF_SHARES = 1e-6
_LEVELS = ("debug", "info", "warning", "error", "critical")


def check_shape(name: str, value: Any) -> None:
    """Raise :class:`InputError` if the inner parts of a key's value, whose outer type is right, are not what RecBole reads."""
    check = _CHECKS.get(name)
    if check is not None and value is not None:
        check(name, value)


def check_fields(config: Any) -> None:
    """Raise :class:`InputError` if two keys that name columns name the same one; the rating may be the label."""
    key_of: dict[Any, str] = {}
    for key in (*keys_with("column"), "LABEL_FIELD"):
        name = config[key]
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{key} is {shown(name)}; it must be the name of a column")
        other = key_of.setdefault(name, key)
        if other != key and (other, key) != ("RATING_FIELD", "LABEL_FIELD"):
            raise InputError(f"{other} and {key} are both {shown(name)}; they must name different columns")


def _columns(name: str, value: Any) -> None:
    """Atomic file to columns."""
    for suffix, columns in value.items():
        if columns == "*" and name == "load_col":
            continue
        if not isinstance(columns, list | tuple) or not all(isinstance(column, str) for column in columns):
            raise InputError(f"{name}.{suffix} is {shown(columns)}; it must be a list of column names")


def _three(name: str, value: Any) -> None:
    if len(value) != 3:
        raise InputError(f"{name} is {shown(value)}; it must name three files, such as ['train', 'valid', 'test']")


def _name_or_names(name: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(text, str) for text in names):
        raise InputError(f"{name} is {shown(names)}; it must be a list of texts")


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _threshold(name: str, value: Any) -> None:
    """Column to the number from which it is a positive label."""
    if len(value) != 1 or not all(isinstance(column, str) and _is_number(low) for column, low in value.items()):
        raise InputError(f"{name} is {shown(value)}; it must name one column and a number, such as {{'rating': 4}}")


def _lengths(name: str, value: Any) -> None:
    if not all(isinstance(column, str) and _whole(length, 1) for column, length in value.items()):
        raise InputError(f"{name} is {shown(value)}; it must map column names to integers >= 1")


def _clip(name: str, value: Any) -> None:
    norm = value.get("max_norm")
    if not _is_number(norm) or norm <= 0:
        raise InputError(f"{name} is {shown(value)}; it must be such as {{'max_norm': 5}}, with a number > 0")
    kind = value.get("norm_type", 2)
    if not _is_number(kind) or kind <= 0:
        raise InputError(f"{name}.norm_type is {shown(kind)}; it must be a number > 0")


def _negatives(name: str, value: Any) -> None:
    distribution = value.get("distribution", "uniform")
    if distribution not in (None, "None", "none", "uniform", "popularity"):
        raise InputError(f"{name}.distribution is {shown(distribution)}; it must be one of uniform, popularity, none")
    if not _whole(value.get("sample_num", 1), 1) and distribution in ("uniform", "popularity"):
        raise InputError(f"{name}.sample_num is {shown(value['sample_num'])}; it must be an integer >= 1")
    alpha, dynamic, candidates = value.get("alpha", 1.0), value.get("dynamic", False), value.get("candidate_num", 0)
    if distribution in ("uniform", "popularity") and not _is_number(alpha):
        raise InputError(f"{name}.alpha is {shown(alpha)}; it must be a number")
    if not isinstance(dynamic, bool):
        raise InputError(f"{name}.dynamic is {shown(dynamic)}; it must be True or False")
    if not _whole(candidates, 1 if dynamic else 0):
        low = ">= 1, since dynamic is True" if dynamic else ">= 0"
        raise InputError(f"{name}.candidate_num is {shown(candidates)}; it must be an integer {low}")


def _evaluation(name: str, value: Any) -> None:
    if "split" in value:
        _split(f"{name}.split", value["split"])
    if value.get("order", "RO") not in ("RO", "TO"):
        raise InputError(f"{name}.order is {shown(value['order'])}; it must be RO (random) or TO (by time)")
    group = value.get("group_by")
    if group is not None and not (isinstance(group, str) and group.lower() in ("none", "user")):
        raise InputError(f"{name}.group_by is {shown(group)}; it must be user or none")
    mode = value.get("mode")
    if isinstance(mode, Mapping):
        for phase in mode:
            if phase not in ("valid", "test"):
                raise InputError(f"key '{name}.mode.{phase}' is unknown; allowed are valid and test")
    elif "mode" in value and not isinstance(mode, str):
        raise InputError(
            f"{name}.mode is {shown(mode)}; it must be one of full, labeled, uni<N> and pop<N>, or such as "
            "{'valid': 'uni100', 'test': 'full'}"
        )


def _split(name: str, value: Any) -> None:
    """``{'RS': three shares}``, ``{'TS': three shares}`` or ``{'LS': which rows are left out}``.

    Whole numbers such as ``[8, 1, 1]`` are proportions, as RecBole documents them; fractions are shares, and a sum other
    than 1, which RecBole would quietly stretch, is an error.
    """
    allowed = (
        "{'RS': [0.8, 0.1, 0.1]}, {'LS': 'valid_and_test'} for leave-one-out, or {'TS': [0.8, 0.1, 0.1]} to test on the "
        "latest of all rows"
    )
    if not isinstance(value, Mapping) or len(value) != 1:
        raise InputError(f"{name} is {shown(value)}; it must be one of {allowed}")
    kind, shares = next(iter(value.items()))
    if kind == "LS":
        if shares not in _LEAVE_ONE_OUT:
            raise InputError(
                f"{name}.LS is {shown(shares)}; it must be one of {', '.join(_LEAVE_ONE_OUT)}"
                f"{nearest(str(shares), _LEAVE_ONE_OUT)}"
            )
        return
    if kind not in ("RS", "TS"):
        raise InputError(f"{name} is {shown(value)}; it must be one of {allowed}")
    what = f"{name}.{kind} is {shown(shares)}"
    rule = "it must be three shares, of training, validation and test, such as [0.8, 0.1, 0.1] or [8, 1, 1]"
    if not isinstance(shares, list | tuple) or not all(map(_is_number, shares)):
        raise InputError(f"{what}; {rule}")
    if len(shares) != 3:
        two = f"; [{shares[0]}, 0, {shares[1]}] has no validation" if len(shares) == 2 else ""
        raise InputError(f"{what}, which are {len(shares)} shares; {rule}{two}")
    if min(shares) < 0:
        raise InputError(f"{what}, which holds a negative share; {rule}")
    if shares[0] <= 0:
        raise InputError(f"{what}, which leaves nothing to train on; {rule}")
    if shares[1] + shares[2] <= 0:
        raise InputError(f"{what}, which leaves nothing to judge by; {rule}")
    total = sum(shares)
    whole = all(float(share).is_integer() for share in shares)
    if not whole and abs(total - 1) > _SUM_OF_SHARES:
        raise InputError(f"{what}, which sums to {total:g}; {rule}")


def _gpu(name: str, value: Any) -> None:
    numbers = value if isinstance(value, list | tuple) else str(value).split(",")
    # CUDA reads what it does not know as "no GPU": cuda:0 would quietly run on the processor.
    if isinstance(value, bool | dict | float) or not all(
        str(number).strip() in ("", "-1", "cpu") or re.fullmatch(r"\d{1,4}|(GPU|MIG)-[\w/-]+", str(number).strip())
        for number in numbers
    ):
        raise InputError(
            f"{name} is {shown(value)}; it must be the number of a GPU or several, such as 0 or 0,1; empty: the processor"
        )


def _learner(name: str, value: Any) -> None:
    known = choices("learners")
    if str(value).lower() not in known:
        raise InputError(f"{name} is {shown(value)}; it must be one of {', '.join(known)}{nearest(str(value), known)}")


def _state(name: str, value: Any) -> None:
    if str(value).lower() not in _LEVELS:
        raise InputError(f"{name} is {shown(value)}; it must be one of {', '.join(_LEVELS).upper()}")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(("load_col", "unload_col", "unused_col"), _columns),
    "benchmark_filename": _three,
    "additional_feat_suffix": _name_or_names,
    "threshold": _threshold,
    "seq_len": _lengths,
    "clip_grad_norm": _clip,
    "train_neg_sample_args": _negatives,
    "eval_args": _evaluation,
    "gpu_id": _gpu,
    "learner": _learner,
    "state": _state,
}
