"""What is searched: RecBole's parameter lines, and what optuna draws from them.

One parameter a line: ``learning_rate loguniform -8,-4`` (exponents of e), ``dropout_prob uniform 0,0.5``,
``embedding_size quniform 8,64,8`` (multiples of 8), ``backbone choice [cnn,mlp]``.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.config.values import parse_value
from recbole_fedkd.errors import InputError, nearest

# How many numbers stand behind the kind of a parameter.
_NUMBERS = {"uniform": 2, "loguniform": 2, "quniform": 3}
ALGORITHMS = ("tpe", "random", "exhaustive")
_KINDS = ("choice", *_NUMBERS)


@dataclass(frozen=True)
class Parameter:
    """A key that is searched, and where.

    Attributes:
        name: config key.
        kind: ``choice``, ``uniform``, ``loguniform`` or ``quniform``.
        choices: values of a choice.
        numbers: low and high, and for ``quniform`` the step; of ``loguniform`` the logarithms.
    """

    name: str
    kind: str
    choices: tuple[Any, ...] = ()
    numbers: tuple[float, ...] = ()

    def distribution(self) -> BaseDistribution:
        """What optuna draws from: for a choice the values' JSON texts, for ``quniform`` the multiples of the step."""
        if self.kind == "choice":
            return CategoricalDistribution([_canonical(value) for value in self.choices])
        low, high = self.numbers[:2]
        if self.kind == "quniform":
            step = self.numbers[2]
            return IntDistribution(round(low / step), round(high / step))
        if self.kind == "loguniform":
            return FloatDistribution(math.exp(low), math.exp(high), log=True)
        return FloatDistribution(low, high)

    def value(self, drawn: Any) -> Any:
        """The key's value for what optuna drew."""
        if self.kind == "choice":
            return json.loads(drawn)
        if self.kind == "quniform":
            # 3 * 0.1 is 0.30000000000000004.
            value = round(drawn * self.numbers[2], 12)
            return int(value) if float(self.numbers[2]).is_integer() else value
        return drawn

    def all_draws(self) -> list[Any]:
        """Everything that optuna may draw.

        Raises:
            InputError: that is a continuum.
        """
        distribution = self.distribution()
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        if isinstance(distribution, IntDistribution):
            return list(range(distribution.low, distribution.high + 1))
        raise InputError(
            f"parameter '{self.name}' is {self.kind}, which an exhaustive search cannot go through; use choice or quniform"
        )


def read_parameters(file: str | Path) -> list[Parameter]:
    """Parameters of a file, in its order; what follows a ``#`` that no letter precedes is a comment.

    Raises:
        InputError: the file cannot be read, or a line of it; the sentence names file and line.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"params_file '{file}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"params_file '{file}' is no text: {error}") from error
    parameters: dict[str, Parameter] = {}
    for number, whole in enumerate(lines, start=1):
        line = re.sub(r"(^|\s)#.*", "", whole)
        if not line.strip():
            continue
        where = f"params_file '{file}', line {number}"
        parameter = _parameter(line, where)
        if parameter.name in parameters:
            raise InputError(f"{where}: parameter '{parameter.name}' stands there twice")
        if parameter.name in keys_with("question") | keys_with("one_run"):
            raise InputError(f"{where}: key '{parameter.name}' cannot be searched; every trial has the same")
        parameters[parameter.name] = parameter
    if not parameters:
        raise InputError(
            f"params_file '{file}' holds no parameter; a line is such as learning_rate choice [0.01,0.001]"
        )
    return list(parameters.values())


def _parameter(line: str, where: str) -> Parameter:
    parts = line.split(maxsplit=2)
    if len(parts) < 3:
        raise InputError(f"{where}: '{line.strip()}' is not of the form <key> <{'|'.join(_KINDS)}> <values>")
    name, kind, values = parts
    if kind not in _KINDS:
        raise InputError(
            f"{where}: '{kind}' is no kind of parameter; allowed are {', '.join(_KINDS)}{nearest(kind, _KINDS)}"
        )
    if kind == "choice":
        return Parameter(name, kind, choices=_choices(values, where))
    try:
        numbers = tuple(float(text) for text in values.split(","))
    except ValueError as error:
        raise InputError(f"{where}: '{values}' is not {_NUMBERS[kind]} numbers with commas between") from error
    if len(numbers) != _NUMBERS[kind] or not all(map(math.isfinite, numbers)):
        raise InputError(f"{where}: {kind} takes {_NUMBERS[kind]} finite numbers with commas between, not '{values}'")
    if numbers[0] > numbers[1]:
        raise InputError(f"{where}: low {numbers[0]:g} is above high {numbers[1]:g}")
    if kind == "quniform" and numbers[2] <= 0:
        raise InputError(f"{where}: step {numbers[2]:g} is not above 0")
    if kind == "loguniform":
        for end, exponent in zip(("low", "high"), numbers, strict=True):
            if not math.log(sys.float_info.min) <= exponent <= math.log(sys.float_info.max):
                raise InputError(
                    f"{where}: {end} {exponent:g} is the logarithm of no number; loguniform takes exponents of e"
                )
    return Parameter(name, kind, numbers=numbers)


def _choices(text: str, where: str) -> tuple[Any, ...]:
    """The values of a choice: a Python list as in RecBole, or one with bare words."""
    values = parse_value(text)
    if not isinstance(values, list | tuple) or not values:
        raise InputError(f"{where}: choice takes a list such as [a,b,c], not '{text}'")
    read = tuple(parse_value(value) if isinstance(value, str) else value for value in values)
    try:
        texts = [_canonical(value) for value in read]
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: '{text}' holds what JSON cannot: {error}") from error
    for canonical in texts:
        if texts.count(canonical) > 1:
            raise InputError(f"{where}: {canonical} stands in the choice twice")
    return read


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def check_searchable(parameters: Sequence[Parameter], keys: Mapping[str, Any], algorithm: str) -> None:
    """Raise :class:`InputError` for an unknown algorithm, or parameters that do not go with it or with the other keys."""
    if algorithm not in ALGORITHMS:
        raise InputError(
            f"algorithm is '{algorithm}'; it must be one of {', '.join(ALGORITHMS)}{nearest(algorithm, ALGORITHMS)}"
        )
    for parameter in parameters:
        if parameter.name in keys:
            raise InputError(f"key '{parameter.name}' is set and searched; it can be one of them only")
        if algorithm == "exhaustive":
            parameter.all_draws()
    for name in keys_with("one_run"):
        if name in keys:
            raise InputError(f"key '{name}' is that of a single run and cannot be in a search")
