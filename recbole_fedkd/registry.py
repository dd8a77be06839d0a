"""Registries: what can be chosen by name, and the config keys that each of them brings along.

A strategy, a kind of knowledge, a codec, a stage, an aggregation or a partition declares its keys in a dataclass beside it.
Whatever is registered, also by a module of the user's own, is known to the config with its keys, their checks and their help.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, overload

from recbole_fedkd.errors import InputError

T = TypeVar("T")
_DECLARED = "declared"


@dataclass(frozen=True)
class Setting:
    """A config key as its owner declares it.

    Attributes:
        name: the key.
        kinds: its Python types; a number may be an integer.
        elements: types of a list's elements; empty if any will do.
        default: its value where nobody sets it.
        rule: what is allowed beyond the type, as in ``properties/overall.yaml``: ``>= 0``, ``in [0, 1)``, ``one of a|b``.
        sentence: what the key is.
        roles: what else there is to know of it, see ``config/keys.py``.
    """

    name: str
    kinds: tuple[type, ...]
    elements: tuple[type, ...]
    default: Any
    rule: str
    sentence: str
    roles: frozenset[str]


def setting(default: Any, rule: str, sentence: str, roles: str = "") -> Any:
    """A field of a settings dataclass that is a config key; its type is the annotation.

    Args:
        default: its value where nobody sets it.
        rule: what is allowed beyond the type; may be empty.
        sentence: what the key is.
        roles: names of roles, separated by spaces.
    """
    metadata = {_DECLARED: (default, rule, sentence, frozenset(roles.split()))}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


DICTIONARIES: dict[str, type] = {}
"""Config keys that take a dictionary, to the dataclass that declares its parts."""


def dictionary(key: str) -> Callable[[type[T]], type[T]]:
    """Decorator of a settings dataclass whose fields are the parts of a key that takes a dictionary."""

    def declared(settings_type: type[T]) -> type[T]:
        DICTIONARIES[key] = settings_type
        return settings_type

    return declared


@dataclass(frozen=True)
class NoSettings:
    """The settings of what has no key of its own."""


@cache
def settings_of(settings_type: type) -> dict[str, Setting]:
    """The keys that a settings dataclass declares, by name; its other fields are keys of somebody else that it reads."""
    hints = typing.get_type_hints(settings_type)
    declared = {}
    for field in dataclasses.fields(settings_type):
        if _DECLARED in field.metadata:
            default, rule, sentence, roles = field.metadata[_DECLARED]
            kinds, elements = _kinds(hints[field.name])
            declared[field.name] = Setting(field.name, kinds, elements, default, rule, sentence, roles)
    return declared


def read_settings(settings_type: type[T], config: Any) -> T:
    """The settings as a config, or any mapping, has them; keys that are not in it have their defaults."""
    names = [field.name for field in dataclasses.fields(settings_type)]  # type: ignore[arg-type]
    return settings_type(**{name: config[name] for name in names if name in config})


def _kinds(hint: Any) -> tuple[tuple[type, ...], tuple[type, ...]]:
    """Python types of a key and of its elements, of an annotation."""
    if isinstance(hint, types.UnionType):
        parts = [_kinds(part) for part in typing.get_args(hint) if part is not types.NoneType]
        return tuple(kind for kinds, _ in parts for kind in kinds), parts[0][1]
    outer, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if outer in (list, tuple):
        return (list, tuple), _kinds(inner[0])[0] if inner else ()
    return (float, int) if outer is float else (outer,), ()


class Registry(dict[str, T]):
    """Things by the name under which the config chooses them.

    Args:
        kind: what one of them is called.
        plural: what several are called; ``<plural>`` in a rule stands for all names.

    Attributes:
        settings: name to the dataclass of its keys.
    """

    def __init__(self, kind: str, plural: str) -> None:
        super().__init__()
        self.kind, self.plural = kind, plural
        self.settings: dict[str, type] = {}
        _ALL.append(self)

    @overload
    def register(self, name_or_class: str, settings: type = ...) -> Callable[[T], T]: ...
    @overload
    def register(self, name_or_class: T) -> T: ...

    def register(self, name_or_class: Any, settings: type = NoSettings) -> Any:
        """Decorator: of a class with a ``name``, whose keys ``settings_type`` declares; or, with a name, of anything.

        Args:
            name_or_class: the class; or the name, for a decorator of what has none.
            settings: dataclass of the keys of what has no ``settings_type``.

        Raises:
            InputError: something else has this name, or declares one of its keys in another way.
        """
        if isinstance(name_or_class, str):
            return lambda entry: self._add(name_or_class, entry, settings)
        return self._add(name_or_class.name, name_or_class, getattr(name_or_class, "settings_type", settings))

    def declared(self) -> Iterator[tuple[str, Setting]]:
        """Every key with the name of what declares it."""
        for name in self:
            for key in settings_of(self.settings[name]).values():
                yield name, key

    def _add(self, name: str, entry: T, settings: type) -> T:
        other = self.get(name)
        if other is not None and _home(other) != _home(entry):
            raise InputError(f"{self.kind} '{name}' is registered already ({_home(other)}); choose another name")
        for key in settings_of(settings).values():
            for registry in _ALL:
                for owner, known in registry.declared():
                    same = registry is self and owner == name
                    if known.name == key.name and known != key and not same:
                        raise InputError(
                            f"{self.kind} '{name}' declares the key '{key.name}', which {registry.kind} '{owner}' declares "
                            "in another way; choose another name"
                        )
        if missing := sorted(getattr(entry, "__abstractmethods__", ())):
            raise InputError(
                f"{self.kind} '{name}' ({_home(entry)}) has no {', no '.join(missing)}; its base says what for"
            )
        self[name] = entry
        self.settings[name] = settings
        return entry


def outdated(kind: type, answer: str, *methods: str) -> bool:
    """Whether a class overrides one of the methods that an inherited ``answer`` speaks of, and does not give it anew."""
    for base in kind.__mro__:
        if answer in vars(base):
            return False
        if any(method in vars(base) for method in methods):
            return True
    return False


def _home(entry: Any) -> str:
    """Where something is defined, whatever its module is called: a file that is imported again defines the same things."""
    module = sys.modules.get(entry.__module__)
    return f"{getattr(module, '__file__', None) or entry.__module__}, {entry.__qualname__}"


_ALL: list[Registry[Any]] = []


@contextmanager
def all_or_nothing() -> Iterator[None]:
    """What is registered inside is forgotten if an error comes out."""
    before = [(registry, dict(registry), dict(registry.settings)) for registry in _ALL]
    try:
        yield
    except BaseException:
        for registry, entries, settings in before:
            registry.clear()
            registry.update(entries)
            registry.settings = settings
        raise


def registries() -> dict[str, Registry[Any]]:
    """All of them, by what several of their things are called."""
    return {registry.plural: registry for registry in _ALL}


def declared_settings() -> dict[str, Setting]:
    """Every key that anything registered declares, by name."""
    return {key.name: key for registry in _ALL for _, key in registry.declared()}
