"""Values: from the text of the command line and of yaml files to Python, and from anything to what JSON can hold.

Nothing is executed, and what is read is bounded: yaml's aliases can make a few lines stand for more than a memory holds.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from recbole_fedkd.errors import InputError

_WORDS = {"true": True, "false": False, "none": None, "null": None, "~": None}
_MOST_VALUES, _MOST_LEVELS = 100_000, 50
_MOST_BRACKETS = 1_000
_LARGEST_FILE = 10_000_000
_COLON = re.compile(r"([{,]\s*[\w.*-]+):(?=[^\s:])")  # of a name at the start of a map's entry
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.X,
)


class ConfigLoader(yaml.SafeLoader):
    """Yaml as RecBole's config files have it: ``1e-3`` is a number, ``!!python/tuple`` a tuple.

    A key that stands twice is an error, where yaml would quietly keep the last; dates are texts, and so is ``12:30``.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A dictionary of a mapping whose keys all differ."""
        # A merge key (<<) has no value of its own: the safe loader puts in its place what it names.
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        names = [self.construct_object(key, deep=True) for key in own]
        seen: set[Any] = set()
        for name in names:
            if isinstance(name, Hashable):
                if name in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{name}' stands there twice", node.start_mark)
                seen.add(name)
        return super().construct_mapping(node, deep)


_TIME = "tag:yaml.org,2002:timestamp"
_NUMBER = "tag:yaml.org,2002:float"
# Sixties: 1:30 would be 90.
_INTEGER = re.compile(r"^(?:[-+]?0b[01_]+|[-+]?0x[0-9a-fA-F_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*))$")
ConfigLoader.yaml_implicit_resolvers = {
    first: [
        (tag, _INTEGER if tag.endswith(":int") else pattern)
        for tag, pattern in resolvers
        if tag not in (_TIME, _NUMBER)
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
ConfigLoader.add_implicit_resolver(_NUMBER, _FLOAT, list("-+0123456789."))


def _tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


ConfigLoader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)


def read_yaml(file: str | Path, what: str) -> Any:
    """The content of a yaml file.

    Args:
        file: the file.
        what: what an error calls it, such as ``config file``.

    Raises:
        InputError: it cannot be read, is no yaml, or holds more than anybody writes.
    """
    path = Path(file)
    try:
        if path.is_char_device() or path.is_block_device():
            raise InputError(f"{what} '{file}' is a device; it must be a text file")
        if path.is_file() and path.stat().st_size > _LARGEST_FILE:
            raise InputError(f"{what} '{file}' has {path.stat().st_size} bytes; at most {_LARGEST_FILE} are read")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        if isinstance(error, UnicodeDecodeError):
            raise InputError(f"{what} '{file}' is not valid yaml: it is not encoded in utf-8 ({error})") from error
        raise InputError(f"{what} '{file}' cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        content = yaml.load(text, Loader=ConfigLoader)
    except (yaml.YAMLError, ValueError) as error:
        hint = "; yaml indents by spaces, and the file has tabs" if "\t" in text and "'\\t'" in str(error) else ""
        raise InputError(f"{what} '{file}' is not valid yaml: {error}{hint}") from error
    except (RecursionError, MemoryError) as error:
        raise InputError(f"{what} '{file}' is not usable yaml: it nests too deep") from error
    problem = excess(content)
    if problem:
        raise InputError(f"{what} '{file}' is not usable yaml: it {problem}")
    return content


def excess(value: Any) -> str | None:
    """What is too much about a value: its levels or its number of parts; None if nothing is."""
    waiting, count = [(value, 0)], 0
    while waiting:
        inner, level = waiting.pop()
        count += 1
        if level > _MOST_LEVELS:
            return "nests too deep"
        if count > _MOST_VALUES:
            return f"holds more than {_MOST_VALUES} values"
        if isinstance(inner, Mapping):
            waiting += [(below, level + 1) for below in inner.values()]
        elif isinstance(inner, list | tuple | set):
            waiting += [(below, level + 1) for below in inner]
    return None


def parse_value(text: str) -> Any:
    """A value from the command line: a Python literal, true/false in any case, a yaml list or map, or the text itself.

    ``{split: {RS: [0.8, 0.1, 0.1]}}`` and ``[row_sparse, sign]`` need no quotes: a shell eats those that Python wants.
    Nothing is executed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of a text such as 5if, which is none of Python's
            value = ast.literal_eval(text.strip() or text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        value = _of_yaml(text)
    # Of bytes, sets, complex numbers and ... no key is one.
    return value if isinstance(value, str | int | float | list | tuple | dict) or value is None else text


def _glued(value: Any) -> bool:
    """Whether a map in a value has a ``{name:value}``, which yaml takes for one long name without a value."""
    if isinstance(value, dict):
        glued = any(inner is None and isinstance(name, str) and ":" in name for name, inner in value.items())
        return glued or any(map(_glued, value.values()))
    return isinstance(value, list) and any(map(_glued, value))


def _of_yaml(text: str) -> Any:
    bare = text.strip()
    if bare.lower() in _WORDS:
        return _WORDS[bare.lower()]
    if bare[:1] + bare[-1:] in ("[]", "{}") and bare.count("[") + bare.count("{") <= _MOST_BRACKETS:
        try:
            value = yaml.load(bare, Loader=ConfigLoader)
            if _glued(value):
                value = yaml.load(_COLON.sub(r"\1: ", bare), Loader=ConfigLoader)
        except (yaml.YAMLError, ValueError, TypeError, RecursionError, MemoryError):
            return text
        # A map without values, {a, b}, is Python's set, and no key is one.
        bare_words = isinstance(value, dict) and value and all(inner is None for inner in value.values())
        return text if bare_words or excess(value) else value
    return text


def native(value: Any) -> Any:
    """Numpy's scalars and arrays, also inside lists and dictionaries, as Python's."""
    if isinstance(value, Mapping):
        return {native(key): native(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(native(inner) for inner in value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def plain(value: Any) -> Any:
    """As what JSON can hold; what it cannot is a text."""
    value = native(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
