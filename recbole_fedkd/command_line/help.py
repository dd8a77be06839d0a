"""What ``--help`` and ``presets`` print, 100 columns wide, from the properties files alone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from recbole_fedkd.command_line.arguments import parse_arguments
from recbole_fedkd.config.choices import choices, shipped
from recbole_fedkd.config.defaults import default_values
from recbole_fedkd.config.early import recbole_arguments
from recbole_fedkd.config.files import DESCRIBED, FILES_OF_EVERY_RUN, PROPERTIES, RECBOLE_PROPERTIES, files_of_model
from recbole_fedkd.config.given import values_of_preset
from recbole_fedkd.config.keys import Key, declared_keys, keys_of_model, read_keys, read_sections, settings_of_model
from recbole_fedkd.config.known import KnownKeys
from recbole_fedkd.config.models import check_model_name
from recbole_fedkd.config.plugins import import_plugins, model_of, models_with_keys
from recbole_fedkd.config.synonyms import called_here
from recbole_fedkd.config.values import read_yaml
from recbole_fedkd.errors import InputError, nearest
from recbole_fedkd.registry import declared_settings

WIDTH = 100
_COLUMN = 34
_MODEL = "AttnFedKD"


def help_text(arguments: Iterable[str]) -> str:
    """The text that a command line with ``--help`` in it asks for: all, or what a word such as ``attention`` finds.

    Raises:
        InputError: an unknown model or preset, or a word that nothing has to do with.
    """
    rest = [argument for argument in arguments if argument not in ("--help", "-h", "help")]
    words = [argument for argument in rest if not argument.startswith("-")]
    given = parse_arguments([argument for argument in rest if argument not in words])
    preset_values = values_of_preset(given)
    model = given.get("model") or preset_values.get("model") or _MODEL
    plugins = import_plugins(given.get("plugins"))
    if model_of(plugins, model) is None:
        check_model_name(model)
    defaults = default_values(model, given.get("preset"))
    sections = _sections(model)
    if plugins:
        own = _keys_of_plugins(sections)
        sections = {"Keys of plugins": own, **sections}
        defaults = {**{name: declared_settings()[name].default for name in own}, **defaults}
    for model_class in sorted(models_with_keys(plugins), key=lambda one: one.__name__ == model):
        sections.pop(f"Model {model_class.__name__}", None)
        sections = {f"Model {model_class.__name__}": keys_of_model(model_class), **sections}
        defaults |= {name: setting.default for name, setting in settings_of_model(model_class).items()}
    if words:
        return _found(words[0].lstrip("-"), sections, defaults)
    preset = f" --preset={given['preset']}" if given.get("preset") else ""
    lines = [
        usage_of("run").format(
            models=_wrapped(f"{', '.join(sorted(choices('models')))}, or any RecBole model", 26).lstrip()
        )
    ]
    lines += ["Presets (--preset=NAME, or see recbole-fedkd presets):"]
    lines += [_entry(f"  {name}", sentence, column=22) for name, sentence in shipped()["presets"].items()]
    lines += ["", f"Every key, with its default for --model={model}{preset}:"]
    for heading, keys in sections.items():
        shown = [key for key in keys.values() if key.sentence]
        if shown:
            lines += ["", heading, *(_key_entry(key, defaults) for key in shown)]
    lines += ["", _wrapped(f"RecBole's other keys work too: {_RECBOLE_PAGE}", 0)]
    return "\n".join(lines)


def usage_of(command: str) -> str:
    """How a command is used, in words; ``run`` is the one without a name."""
    return (PROPERTIES / "usage" / f"{command}.txt").read_text(encoding="utf-8")


_RECBOLE_PAGE = "https://recbole.io/docs/user_guide/config_settings.html"


def presets_text() -> str:
    """Every preset with its question, its method, and what was measured of it."""
    lines = ["Presets: --preset=NAME. What was measured, and how: docs/results.", ""]
    sentences = shipped()["presets"]
    for name, preset in presets_described().items():
        lines += [name, _wrapped(preset["question"], 4), _wrapped(sentences[name], 4)]
        lines += [_wrapped(measured_in_words(preset["measured"]), 4), ""]
    return "\n".join(lines).rstrip()


def presets_described() -> dict[str, dict[str, Any]]:
    """Preset to its question and what was measured, see ``properties/described/presets.yaml``."""
    described: dict[str, dict[str, Any]] = read_yaml(
        PROPERTIES / "described" / "presets.yaml", "description of presets"
    )
    return described


def measured_in_words(measured: Mapping[str, str]) -> str:
    """``accuracy 0.4542, MAE 0.7167, 3,163,518 bytes (ml-100k, 16 clients)``."""
    apart = ("page", "data", "row", "with", "bytes")
    numbers = [f"{name} {value}" for name, value in measured.items() if name not in apart]
    numbers += [f"{measured['bytes']} bytes until the best round"] if "bytes" in measured else []
    extra = f", with {measured['with']}" if "with" in measured else ""
    return f"Measured: {', '.join(numbers)} ({measured['data']}{extra})"


def _sections(model: str) -> dict[str, dict[str, Key]]:
    """Heading to keys: of every run, of the model, and of RecBole those that everybody needs."""
    sections = {heading: dict(keys) for heading, keys in read_sections(PROPERTIES / "overall.yaml").items()}
    of_model: dict[str, Key] = {}
    for file in (RECBOLE_PROPERTIES / "model" / f"{model}.yaml", *files_of_model(model)):
        of_model.update({name: key for name, key in read_keys(file).items() if key.sentence} if file.is_file() else {})
    for keys in sections.values():
        for name in keys.keys() & of_model.keys():
            del keys[name]
    sections = {f"Model {model}": of_model, **sections}
    recbole = _recbole_keys()
    for heading, described in read_sections(DESCRIBED).items():
        names = [name for name, key in described.items() if "usual" in key.roles and name not in of_model]
        sections |= {heading: {name: recbole[name] for name in names}} if names else {}
    return sections


def _recbole_keys() -> dict[str, Key]:
    """RecBole's keys of every run."""
    return {name: key for file in FILES_OF_EVERY_RUN[1:] for name, key in read_keys(file).items()}


def _keys_of_plugins(sections: Mapping[str, Mapping[str, Key]]) -> dict[str, Key]:
    """Keys that are declared and stand in no section."""
    shown = {name for keys in sections.values() for name in keys}
    return {name: key for name, key in declared_keys().items() if name not in shown}


def _found(word: str, sections: Mapping[str, Mapping[str, Key]], defaults: Mapping[str, Any]) -> str:
    """The keys that a word names or is about, what their values mean, and presets of that name."""
    above = {name for keys in sections.values() for name in keys}
    recbole = {name: key for name, key in _recbole_keys().items() if name not in above}
    everything = {**sections, "RecBole": recbole}
    lines: list[str] = []
    sought = word.lower()
    for heading, keys in everything.items():
        matching = [
            key for key in keys.values() if sought in key.name.lower() or sought in key.sentence.lower().split()
        ]
        matching.sort(key=lambda key: key.name.lower() != sought)
        if matching:
            lines += [*([""] if lines else []), heading, *(_key_entry(key, defaults) for key in matching)]
    for registry, names in shipped().items():
        if sought in names or sought in (registry, registry.rstrip("s"), registry.removesuffix("ies") + "y"):
            shown = names if sought not in names else {sought: names[sought]}
            lines += [*([""] if lines else []), registry.capitalize()]
            lines += [_entry(f"  {name}", sentence, column=22) for name, sentence in shown.items()]
    if not lines:
        known = KnownKeys(recbole_arguments(), str(defaults.get("model", _MODEL)), "", [])
        close = called_here(word, known.keys) or nearest(word, {*known.keys, *above})
        raise InputError(f"no key, model, strategy or preset has to do with '{word[:100]}'; --help lists all{close}")
    return "\n".join(lines)


def _key_entry(key: Key, defaults: Mapping[str, Any]) -> str:
    rule = f" [{key.rule.replace('|', ', ')}]" if key.rule and key.rule != "None" and key.name != "preset" else ""
    return _entry(f"  --{key.name}={_value_text(defaults.get(key.name))}", f"{key.sentence}{rule}")


def _value_text(value: Any) -> str:
    """A default as it may be typed; nothing for a key that is not set."""
    if value is None:
        return ""
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).strip()
    return str(value).encode("unicode_escape").decode() if isinstance(value, str) else str(value)


def _entry(left: str, right: str, column: int = _COLUMN) -> str:
    """A name, and its sentence in the column beside it or on the lines below."""
    text = _wrapped(right, column)
    if len(left) < column - 1:
        return f"{left:<{column}}{text.lstrip()}"
    return textwrap.fill(left, WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False) + f"\n{text}"


def _wrapped(text: str, indent: int) -> str:
    space = " " * indent
    return textwrap.fill(
        text, WIDTH, initial_indent=space, subsequent_indent=space, break_long_words=False, break_on_hyphens=False
    )
