"""Pages of what the package declares: keys, presets, what can be chosen by name, the command line, the Python API."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

import recbole_fedkd
from recbole_fedkd import extend
from recbole_fedkd.command_line import _COMMANDS
from recbole_fedkd.command_line.help import help_text, measured_in_words, presets_described, usage_of
from recbole_fedkd.config.choices import choices, shipped
from recbole_fedkd.config.files import DESCRIBED, FILES_OF_EVERY_RUN, PROPERTIES
from recbole_fedkd.config.keys import Key, declared_keys, read_keys, read_sections
from recbole_fedkd.federated.strategy import STRATEGIES
from recbole_fedkd.registry import registries, settings_of

KINDS = {bool: "True or False", int: "integer", float: "number", str: "text", list: "list", dict: "dict"}


def pages() -> dict[str, str]:
    """All of them, by their place in the site."""
    return {
        "reference/keys.md": keys_page(),
        "reference/presets.md": presets_page(),
        "reference/choices.md": choices_page(),
        "reference/command-line.md": command_line_page(),
        "reference/python.md": python_page(),
    }


# Keys


def keys_page() -> str:
    """Every key of this package and the usual ones of RecBole, by section."""
    lines = [
        "# Every key",
        "",
        "In a config file `key: value`, on the command line `--key=value`, in Python `config_dict={key: value}`. Types and "
        "ranges are what is checked before anything runs. A table's link is the key's own, such as `#key-gamma`.",
        "",
    ]
    for heading, keys in sections().items():
        lines += [f"## {heading}", "", *key_table(keys), ""]
    lines += [
        "## Other keys of RecBole",
        "",
        "They work too, with RecBole's meaning: <https://recbole.io/docs/user_guide/config_settings.html>. "
        "`recbole-fedkd --help WORD` finds any of them.",
    ]
    return "\n".join(lines) + "\n"


def sections() -> dict[str, list[Key]]:
    """Heading to keys: of every run, of what is registered and stands nowhere else, of models, and RecBole's usual ones."""
    found = {heading: list(keys.values()) for heading, keys in read_sections(PROPERTIES / "overall.yaml").items()}
    told = {key.name for keys in found.values() for key in keys}
    rest = [key for name, key in declared_keys().items() if name not in told]
    if rest:
        found["Of what can be chosen by name"] = rest
    for file in sorted((PROPERTIES / "model").glob("*.yaml")):
        keys = [key for key in read_keys(file).values() if key.sentence]
        if keys:
            found[f"Model {file.stem}"] = keys
    recbole = {name: key for file in FILES_OF_EVERY_RUN[1:] for name, key in read_keys(file).items()}
    for heading, described in read_sections(DESCRIBED).items():
        usual = [recbole[name] for name, key in described.items() if "usual" in key.roles and name in recbole]
        if usual:
            found[heading] = usual
    return found


def key_table(keys: Iterable[Key]) -> list[str]:
    """A row per key."""
    lines = ["| key | default | takes | what it is |", "|---|---|---|---|"]
    for key in keys:
        default = "" if key.default in ("~", "", "None") else f"`{key.default}`"
        cells = [f"`{key.name}`{{#key-{key.name}}}", default, taken(key), key.sentence]
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    return lines


def taken(key: Key) -> str:
    """Type and range in words."""
    kinds = [kind for kind in KINDS if kind in key.types and not (kind is int and float in key.types)]
    words = " or ".join(KINDS[kind] for kind in kinds)
    if key.elements:
        words += f" of {KINDS[key.elements[0]].removeprefix('a ')}s"
    rule = "" if key.rule == "None" else key.rule
    if "one of " in rule:
        before, _, names = rule.partition("one of ")
        return f"{'any of' if before else 'one of'} {', '.join(f'`{name}`' for name in names.split('|'))}"
    return f"{words}, {rule}" if words and rule else words or rule


def cell(text: str) -> str:
    """Text of a table's cell."""
    return plain(" ".join(text.replace("|", "\\|").split()))


def plain(text: str) -> str:
    """A sentence in which ``<name>`` is no tag, outside of code."""
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;") for part in re.split(r"(`[^`]*`)", text))


# Presets


def presets_page() -> str:
    """Every preset: question, method, what was measured, its file."""
    sentences, lines = shipped()["presets"], ["# Presets", ""]
    lines += ["`--preset=<name>` is a named set of keys, its model included; your own keys win over it.", ""]
    described = presets_described()
    for name in [*described, *(name for name in sentences if name not in described)]:
        told = described.get(name, {})
        lines += [
            f"## {name}",
            "",
            *([f"*{told['question']}*", ""] if "question" in told else []),
            plain(sentences[name]),
            "",
        ]
        if "measured" in told:
            lines += [
                f"{measured_in_words(told['measured'])}: [the whole table](../results/{told['measured']['page']}).",
                "",
            ]
        text = (PROPERTIES / "preset" / f"{name}.yaml").read_text(encoding="utf-8")
        keys = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
        lines += ["```yaml", keys.strip(), "```", ""]
    return "\n".join(lines)


# What can be chosen by name


def choices_page() -> str:
    """Everything that is registered, with its sentence, what its class says of itself, and its keys."""
    lines = ["# What can be chosen by name", "", "Made of the registries; what a plugin registers joins them.", ""]
    known, sentences = registries(), shipped()
    for kind in [*sentences, *(kind for kind in known if kind not in sentences)]:
        if kind in ("presets",):
            continue
        names = choices(kind) if kind in sentences else list(known[kind])
        lines += [f"## {kind.capitalize()}", ""]
        for name in names:
            lines += [f"### {name}", "", plain(sentences.get(kind, {}).get(name, "")), ""]
            if kind == "strategies" and name in STRATEGIES:
                lines += [f"[Its equations](../equations.md#{name})", ""]
            if kind in known and name in known[kind]:
                lines += declaration(known[kind][name], known[kind].settings[name])
    return "\n".join(lines) + "\n"


def declaration(entry: Any, settings: type) -> list[str]:
    """What a class or function says of itself, and its keys."""
    lines = [as_markdown(inspect.getdoc(entry) or ""), ""]
    keys = [Key.of(setting) for setting in settings_of(settings).values()]
    if keys:
        linked = ", ".join(f"[`{key.name}`](keys.md#key-{key.name})" for key in keys)
        lines += [f"Keys: {linked}", ""]
    return lines


def as_markdown(docstring: str) -> str:
    """The text of a docstring before its sections, in Markdown."""
    text = re.split(r"^(?:Args|Attributes|Returns|Raises|Yields):", docstring, flags=re.M)[0].strip()
    return code_in_markdown(text)


def code_in_markdown(text: str) -> str:
    """Restructured text's marks of code as Markdown's."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda found: f"`{found[1].rpartition('.')[2]}`", text)
    return plain(re.sub(r"``(.+?)``", r"`\1`", text))


def with_declarations(markdown: str) -> str:
    """The page of equations, each strategy with its keys and presets; one that stands there without any is added."""
    for name, strategy in STRATEGIES.items():
        of_strategy = [preset for preset in shipped()["presets"] if _strategy_of(preset) == name]
        lines = [f"Key: `--strategy={name}`"]
        keys = [f"[`{key}`](reference/keys.md#key-{key})" for key in settings_of(STRATEGIES.settings[name])]
        lines[0] += f"; its own: {', '.join(keys)}" if keys else ""
        if of_strategy:
            lines += [f"Presets: {', '.join(f'[`{each}`](reference/presets.md#{each})' for each in of_strategy)}"]
        told = "\n\n".join(lines)
        heading = f"## {name}\n"
        if heading in markdown:
            before, _, after = markdown.partition(heading)
            section, mark, rest = after.partition("\n## ")
            markdown = f"{before}{heading}{section.rstrip()}\n\n{told}\n{mark}{rest}"
        else:
            markdown = f"{markdown.rstrip()}\n\n{heading}\n{as_markdown(inspect.getdoc(strategy) or '')}\n\n{told}\n"
    return markdown


def _strategy_of(preset: str) -> str | None:
    found = re.search(r"^strategy: (\S+)", (PROPERTIES / "preset" / f"{preset}.yaml").read_text(encoding="utf-8"), re.M)
    return found[1] if found else None


# The command line and Python


def command_line_page() -> str:
    """What ``--help`` prints of everything but the keys, and of every command."""
    usage = help_text(["--help"]).partition("\nPresets (")[0].rstrip()
    lines = [
        "# The command line",
        "",
        "```text",
        usage,
        "```",
        "",
        "`recbole-fedkd presets` lists the presets, `--help` every key.",
        "",
    ]
    for name in _COMMANDS:
        lines += [f"## {name}", "", "```text", usage_of(name).rstrip(), "```", ""]
    return "\n".join(lines)


def python_page() -> str:
    """What is public: the names in ``__all__`` of the package and of ``extend``."""
    lines = ["# Python", "", "What stands here is public, and nothing else.", "", "## recbole_fedkd", ""]
    lines += _documented(recbole_fedkd)
    lines += ["## recbole_fedkd.extend", "", as_markdown(inspect.getdoc(extend) or ""), ""]
    return "\n".join(lines + _documented(extend)) + "\n"


def _documented(module: Any) -> list[str]:
    lines = []
    for name in module.__all__:
        entry = getattr(module, name)
        if callable(entry):
            home = entry.__module__ if hasattr(entry, "__self__") is False else module.__name__
            path = f"{home}.{entry.__name__}" if _found_at(home, entry) else None
            lines += [f"::: {path}", ""] if path else _by_hand(name, entry)
        else:
            lines += [f"### `{name}`", "", f"`{entry!r}`", ""]
    return lines


def _found_at(home: str, entry: Any) -> bool:
    return getattr(importlib.import_module(home), entry.__name__, None) is entry


def _by_hand(name: str, entry: Any) -> list[str]:
    return [f"### {name}", "", code_in_markdown(inspect.getdoc(entry) or ""), ""]
