"""Keys: what a line of a properties file says of a key, and whether a value keeps to it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from recbole_fedkd.config.choices import spelled_out
from recbole_fedkd.config.files import DESCRIBED, FILES_OF_EVERY_RUN, PROPERTIES, RECBOLE_PROPERTIES
from recbole_fedkd.config.values import excess, parse_value
from recbole_fedkd.errors import InputError, listed, nearest, shown
from recbole_fedkd.registry import NoSettings, Setting, declared_settings, settings_of

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "string": (str,),
    "list": (list, tuple),
    "dict": (dict,),
}
ROLES = {
    "aside": "Where a run lies, how loud and how fast it is; its numbers do not depend on it.",
    "resumable": "A run that goes on may change it, beside what is aside.",
    "one_run": "It belongs to one run, and not to the one that goes on after it.",
    "derived": "Made of other keys, by a run that goes on once more.",
    "computed": "Made of other keys, and never set.",
    "question": "What a search or an experiment asks.",
    "federation": "Read by a federation alone, unless a model has a key of this name; all that is declared in Python is.",
    "attentive": "Decides how the population of the attentive model is built.",
    "students": "A population of the attentive model that is given it has students, and not heads on item factors.",
    "fields": "Encodes feature fields, which not every model embeds.",
    "central": "Read by RecBole's own trainer and loader, and not by the clients of a federation.",
    "memory": "A smaller value needs less memory.",
    "folder": "A folder.",
    "machine": "Of the machine that something runs on: a party or a coordinator may say it for its own.",
    "party": "How a party judges, and what it insists on: it may say it for its own.",
    "coordinator": "How many must answer: a coordinator may say it for its own.",
    "manifest": "Names what a manifest is of: whoever opens it may not name another.",
    "judging": "By what parties judge, which no coordinator may say otherwise.",
    "opens": "A file to open or code to run, however it is called.",
    "in_dataset": "Part of the names of files in the dataset's folder.",
    "filters": "Says which rows of interactions are kept.",
    "interval": "An interval of a count.",
    "column_intervals": "Columns, each with an interval of its values.",
    "pickle": "A file that RecBole pickles.",
    "first": "Read before all others, which depend on it.",
    "said": "Decides what clients say, and to whom it tells what.",
    "row": "Names a row of an experiment that names none.",
    "kept": "A run that goes on cannot do without it.",
    "partial": "A dictionary of which a user may give a part; what is left out comes from the layer below.",
    "network": "A dictionary of keys of an attentive network, or a list of such.",
    "files": "A dictionary by atomic file, also by those of additional_feat_suffix.",
    "column": "Names a column that has a meaning.",
    "fallback": "Holds where no file of RecBole defines the key.",
    "usual": "One of RecBole's keys that everybody needs.",
}
"""What can be known of a key beside its type and range, declared with them."""

_LARGEST_LAYER = 65536
# Sizes that make a machine stop, in keys of RecBole's models: by what their names speak of, the first that fits.
_MOST: tuple[tuple[re.Pattern[str], int | None], ...] = (
    (re.compile(r".*(thre?hold|round|anneal).*"), None),
    (re.compile(r"step|.*(layer|hop|depth|block|iter|order|head).*"), 1024),
    (
        re.compile(r"steps|k|nh|nv|.*(size|dim|channel|num|rank|factor|facet|memory|kernel|interest|len|term|CAN).*"),
        _LARGEST_LAYER,
    ),
)
_PATTERN_LINE = re.compile(r"^([\w-]+):\s*(.*?)\s*#\s*\((.+?)\)\s+(.*)$")


@dataclass(frozen=True)
class Key:
    """A config key as its yaml line defines it.

    Attributes:
        name: the key.
        default: the text of its default.
        types: allowed Python types; empty if the line names none that can be checked.
        rule: the constraint behind the type, such as ``>= 0``, ``in [0, 1)``, ``one of a|b`` or, for lists, ``each >= 1``
            (which also means: not empty; ``each, if any, one of a|b`` does not); may be empty.
        sentence: what the key is.
        elements: allowed types of a list's elements, or of a dictionary's values; empty if any will do.
        roles: what else there is to know of it, see ``ROLES``.
        untyped: whether it takes anything, whatever another declaration says.
        parts: keys that a dictionary may have; empty if any will do.
    """

    name: str
    default: str
    types: tuple[type, ...]
    rule: str
    sentence: str
    elements: tuple[type, ...] = ()
    roles: frozenset[str] = frozenset()
    untyped: bool = False
    parts: tuple[str, ...] = ()

    def over(self, other: Key) -> Key:
        """Another declaration of the key, as far as this one says nothing."""
        if self.untyped:
            return replace(self, default=other.default, sentence=self.sentence)
        types, elements = (self.types, self.elements) if self.types else (other.types, other.elements)
        sentence, rule = other.sentence or self.sentence, self.rule or other.rule
        return Key(self.name, other.default, types, rule, sentence, elements, self.roles, parts=self.parts)

    @staticmethod
    def of(setting: Setting) -> Key:
        """A key that its owner declares in Python."""
        default = "~" if setting.default is None else repr(setting.default)
        rule = spelled_out(setting.rule)
        return Key(setting.name, default, setting.kinds, rule, setting.sentence, setting.elements, setting.roles)

    def read(self, value: Any) -> Any:
        """The value as this key takes it: ``'1e-3'`` as a number, ``'yes'`` as True, 2024 as a text, ``'a,b'`` as a list.

        Raises:
            InputError: the value is not allowed.
        """
        value = self._converted(value)
        self.check(value)
        return value

    def _converted(self, value: Any) -> Any:
        kinds = set(self.types)
        if kinds == {bool}:
            word = value.strip().lower() if isinstance(value, str) else value
            return _SWITCHES.get(word, value) if isinstance(word, str | int) else value
        if kinds == {str} and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)  # a folder may be called 2024
        if isinstance(value, tuple) and str in kinds and not kinds & {list, tuple}:
            return ",".join(map(str, value))  # a text such as 500,100 reads as two numbers
        if isinstance(value, str) and value.strip() and kinds == {list, tuple} and self.elements == (str,):
            return [part.strip() for part in value.split(",")]
        if isinstance(value, str) and kinds and kinds <= {int, float}:
            value = _number(value)
        if int in kinds and float not in kinds and isinstance(value, float) and value.is_integer():
            return int(value)
        return value

    def check(self, value: Any) -> None:
        """Raise :class:`InputError` if the value is not allowed; None always is where it is the default."""
        if value is None and (self.default in ("~", "None", "") or "None" in self.rule):
            return
        if self.types and not self._has_type(value):
            raise InputError(f"{self.name} is {shown(value)}; it must be {self._allowed()}")
        for part, inner in value.items() if isinstance(value, Mapping) and not excess(value) else ():
            kinds, rule = self.elements, self.rule.removeprefix("each, if any, ")
            if kinds:
                Key(f"{self.name}.{part}", "0", kinds, rule, "").check(inner)
            elif problem := _beyond_numbers(inner, False):
                raise InputError(
                    f"{self.name}.{part} is {shown(inner)}, which {problem}; it must be finite and of 64 bits at most"
                )
        problem = excess(value) or _beyond_numbers(
            value, bool(self.types) and set(self.types) <= {int, float, list, tuple}
        )
        if problem:
            allowed = f"; it must be {self._allowed()}" if self.types else ""
            raise InputError(f"{self.name} is {shown(value)}, which {problem}{allowed}")
        if isinstance(value, Mapping) and self.elements:
            return
        for element in value if isinstance(value, list | tuple) and self.elements else []:
            if not isinstance(element, self.elements) or isinstance(element, bool):
                raise InputError(f"{self.name} is {shown(value)}; it must be {self._allowed()}")
        if self.rule and not _satisfies(value, self.rule):
            raise InputError(
                f"{self.name} is {shown(value)}; it must be {self._allowed()}{self._nearest_choice(value)}"
            )

    def check_parts(self, value: Any, further: Iterable[str] = ()) -> None:
        """Raise :class:`InputError` for a part of a dictionary that is none of its parts, nor one of ``further``."""
        if not self.parts or not isinstance(value, Mapping):
            return
        known = (*self.parts, *further)
        for part in value:
            if part not in known:
                hint = nearest(str(part), known) or f"; allowed are {listed(known)}"
                raise InputError(f"key '{self.name}.{part}' is unknown{hint}")

    def _has_type(self, value: Any) -> bool:
        if isinstance(value, bool):
            return bool in self.types
        # RecBole takes numbers for texts.
        return isinstance(value, self.types) or (str in self.types and isinstance(value, int | float))

    def _allowed(self) -> str:
        names = {
            float: "a number",
            int: "an integer",
            bool: "True or False",
            str: "a text",
            list: "a list",
            dict: "a dict",
        }
        kinds_allowed = [kind for kind in names if kind in self.types and not (kind is int and float in self.types)]
        kinds = " or ".join(names[kind] for kind in kinds_allowed)
        if self.rule.startswith("each, if any, one of "):
            return f"{kinds} of any of {self.rule[21:].replace('|', ', ')}"
        if self.elements:
            kinds += {float: " of numbers", int: " of integers"}.get(self.elements[0], " of texts")
        rule = "" if self.rule == "None" else self.rule
        told_rule = rule if rule.startswith("one of") else f"{kinds} {rule}".strip()
        return told_rule.replace("|", ", ")

    def _nearest_choice(self, value: Any) -> str:
        return nearest(str(value), self.rule[7:].split("|")) if self.rule.startswith("one of ") else ""


_SWITCHES = {
    "true": True, "yes": True, "on": True, "1": True, 1: True,
    "false": False, "no": False, "off": False, "0": False, 0: False,
}  # fmt: skip
_LARGEST_INTEGER, _LARGEST_SIZE = 2**63 - 1, 2**32 - 1


def _number(text: str) -> Any:
    """The number that a text spells, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _beyond_numbers(value: Any, sizes: bool) -> str | None:
    """What keeps a number, wherever in the value, from being computed with; None if nothing does.

    Args:
        value: any value.
        sizes: whether whole numbers in it are sizes, counts and the like.
    """
    if isinstance(value, Mapping):
        return next((problem for inner in value.values() if (problem := _beyond_numbers(inner, False))), None)
    if isinstance(value, list | tuple):
        return next((problem for inner in value if (problem := _beyond_numbers(inner, sizes))), None)
    if isinstance(value, float) and not math.isfinite(value):
        return "is no finite number"
    if isinstance(value, int) and abs(value) > (_LARGEST_SIZE if sizes else _LARGEST_INTEGER):
        return "is too large"
    return None


def _satisfies(value: Any, rule: str) -> bool:
    if rule.startswith("each, if any, "):
        return all(_satisfies(element, rule[14:]) for element in value)
    if rule.startswith("each "):
        return len(value) > 0 and all(_satisfies(element, rule[5:]) for element in value)
    if rule.startswith("one of "):
        return str(value) in rule[7:].split("|")
    if not isinstance(value, int | float):
        return True  # a kind of value that the rule is not about
    interval = re.fullmatch(r"in ([\[(])(.+), (.+)([\])])", rule)
    if interval:
        low, high = float(interval[2]), float(interval[3])
        above = value >= low if interval[1] == "[" else value > low
        return bool(above and (value <= high if interval[4] == "]" else value < high))
    bound = re.fullmatch(r"(>=|>) (\S+)", rule)
    if bound:
        return bool(value >= float(bound[2]) if bound[1] == ">=" else value > float(bound[2]))
    return True


def read_keys(file: Path) -> dict[str, Key]:
    """The keys that a properties file defines, from its lines and their comments."""
    own = file.is_relative_to(PROPERTIES)
    described = {} if own else _described()
    keys: dict[str, Key] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if not (begins := re.match(r"^([\w-]+):", line)):
            continue
        name, matched = begins[1], _PATTERN_LINE.match(line)
        keys[name] = _key_of_line(matched, own) if matched else Key(name, "", (), "", "")
        if name in described and "fallback" not in described[name].roles:
            keys[name] = described[name].over(keys[name])
    return keys


def _key_of_line(line: re.Match[str], own: bool) -> Key:
    name, default, bracket, sentence = line.groups()
    form, _, roles = bracket.partition("; ")
    kinds, _, rule = form.removesuffix(";").partition(", ")
    types: list[type] = []
    elements: tuple[type, ...] = ()
    parts: tuple[str, ...] = ()
    for kind in re.split(r" or ", kinds):
        outer, _, inner = kind.strip().partition(" of ")
        types += _TYPES.get(outer, ())
        elements = _TYPES.get(inner, ()) if own else ()
        parts = tuple(inner.split("|")) if own and "|" in inner else ()
    if types and default and not own:
        # Some of RecBole's comments contradict their own defaults.
        type_of_default = type(parse_value(default))
        types += [type_of_default] if type_of_default not in types and type_of_default is not type(None) else []
    rule = spelled_out(rule) or ("None" if "None" in kinds else "")
    roles_told, untyped = frozenset(roles.split()), kinds.strip() == "any"
    return Key(name, default, tuple(types), rule, sentence, elements, roles_told, untyped, parts)


@lru_cache
def _described() -> dict[str, Key]:
    return read_keys(DESCRIBED)


def described_keys() -> dict[str, Key]:
    """What this package says of RecBole's keys, whether RecBole's files define them or not."""
    return dict(_described())


def keys_with(role: str) -> Set[str]:
    """Names of the keys that have a role (see ``ROLES``), of every run, of RecBole and of what is registered.

    Alone, not joined with others, they come in the order in which they are declared.
    """
    assert role in ROLES, role
    declared = {name: setting.roles | {"federation"} for name, setting in declared_settings().items()}
    return {name: True for name, roles in [*_roles_in_files(), *declared.items()] if role in roles}.keys()


@lru_cache
def _roles_in_files() -> tuple[tuple[str, frozenset[str]], ...]:
    files = (DESCRIBED, PROPERTIES / "model" / "AttnStudent.yaml", PROPERTIES / "overall.yaml")
    return tuple((name, key.roles) for file in files for name, key in read_keys(file).items())


def merged_layers(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of config keys as one, later ones win; dictionaries of which a part may be given are merged part by part."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            lower = merged.get(key)
            both = isinstance(value, Mapping) and isinstance(lower, Mapping) and key in keys_with("partial")
            merged[key] = {**lower, **value} if both and lower else value
    return merged


def declared_keys() -> dict[str, Key]:
    """The keys that come with what is registered, also from outside the package.

    Raises:
        InputError: one of them is a key of every run already.
    """
    return _new_keys(declared_settings(), "a plugin")


def settings_of_model(model_class: type) -> dict[str, Setting]:
    """What a model of the user's own declares in its ``settings_type``; a model without one declares nothing."""
    return settings_of(getattr(model_class, "settings_type", NoSettings))


def keys_of_model(model_class: type) -> dict[str, Key]:
    """The keys that a model of the user's own declares.

    Raises:
        InputError: one of them is a key of every run already.
    """
    return _new_keys(settings_of_model(model_class), f"model '{model_class.__name__}'")


def _new_keys(settings: Mapping[str, Setting], owner: str) -> dict[str, Key]:
    declared = {name: Key.of(setting) for name, setting in settings.items()}
    for file in FILES_OF_EVERY_RUN:
        for name, key in read_keys(file).items():
            if name in declared and key.sentence != declared[name].sentence:
                raise InputError(f"{owner} declares the key '{name}', which every run has; it must have another name")
    return declared


@lru_cache
def read_sections(file: Path) -> dict[str, dict[str, Key]]:
    """The keys of a properties file by the comment above them, which is the heading of those that follow."""
    keys, heading, above = read_keys(file), "", ""
    sections: dict[str, dict[str, Key]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name = re.match(r"^([\w-]+):", line)
        if name:
            heading, above = above or heading, ""
            sections.setdefault(heading, {})[name[1]] = keys[name[1]]
        else:
            above = line[2:].strip() if line.startswith("# ") else ""
    return sections


@lru_cache
def sizes_of_models() -> frozenset[str]:
    """Keys that RecBole defines in the files of its models alone."""
    of_all = {name for file in FILES_OF_EVERY_RUN for name in read_keys(file)}
    of_models = {name for file in (RECBOLE_PROPERTIES / "model").glob("*.yaml") for name in read_keys(file)}
    return frozenset(of_models - of_all - _described().keys())


def check_size(name: str, value: Any) -> None:
    """Raise :class:`InputError` for a size of a network of RecBole that no machine holds; RecBole names no bounds."""
    most = next((most for pattern, most in _MOST if pattern.fullmatch(name)), None)
    if most is None:
        return
    if isinstance(value, list | tuple):  # sizes, also where the name speaks of layers
        most = _LARGEST_LAYER
    for element in value if isinstance(value, list | tuple) else [value]:
        if isinstance(element, int) and element > most:
            raise InputError(f"{name} is {shown(value)}; it must be {most} at most")


@lru_cache
def text_keys() -> frozenset[str]:
    """Keys of every run that take nothing but texts."""
    keys = [*_described().values(), *(key for file in FILES_OF_EVERY_RUN for key in read_keys(file).values())]
    return frozenset(key.name for key in keys if key.types == (str,))
