"""Random atomic files, and a reader of them that is slow, plain and has nothing in common with the package's."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass

ODD_TOKENS = [
    "NA", "null", "None", "nan", "NaN", "N/A", "inf", "True", "'", '"', '"Heroes', 'Villains"', '""', "a\\b", "#1", "u 1",
    " u1", "u1 ", "001", "1", "1.0", "-1", "9223372036854775807", "18446744073709551616", "Jürgen", "日本", "é", "e\u0301",
    "a,b", "a;b", "a\u2028b", "a\x0bb", "a\x85b", "\u00a0x", "0", "-0", "1e5", "user_id", "token", "a:b", "%s", "{0}", "\\N",
    "\\t", "x" * 300,
]  # fmt: skip
MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "None", "n/a",
    "null",
}  # fmt: skip
FAULTS = [
    "none", "none", "none", "none", "empty user", "empty item", "blank user", "empty rating", "bad rating", "empty time",
    "tab", "cut", "header again", "untyped header again", "nul", "padding", "doubled", "no type", "wrong type",
    "same column", "empty line", "no rows", "infinite", "huge",
]  # fmt: skip
BAD_NUMBERS = [
    "five", "3,5", "1.000,5", "1_000", "0x10", "--1", "1 2", "½", "nan", "NA", "null", "None", "inf", "-inf", "1e308",
    "3.5e38",
]  # fmt: skip


class Refused(Exception):
    """The file is not one that can be read; the line at fault, or None where it is the file."""

    def __init__(self, line: int | None):
        super().__init__(line)
        self.line = line


@dataclass
class Table:
    """Columns and rows of a file: exact texts, or None where a token is empty; numbers, nan where there is none."""

    names: list[str]
    rows: list[list[object]]


def read_slowly(content: bytes, numbers: set[str], ids: set[str], patchy: Collection[str] = ()) -> Table:
    """Read an interaction file character by character.

    Args:
        content: the file.
        numbers: columns in which every row needs a number, whatever their type is.
        ids: columns in which every row needs a token, whatever their type is.
        patchy: columns of numbers, whatever their type is, that rows may lack.
    """
    separator = "\t"
    text = content.decode("utf-8").removeprefix("\ufeff")
    lines, current, place = [], "", 0
    while place < len(text):
        if text[place] in "\r\n":
            lines.append(current)
            current = ""
            place += 2 if text[place : place + 2] == "\r\n" else 1
        else:
            current += text[place]
            place += 1
    if current:
        lines.append(current)
    if not lines or not lines[0]:
        raise Refused(1)
    names, kinds = [], []
    for part in lines[0].split(separator):
        name, *kind = part.split(":")
        if len(kind) != 1 or kind[0] not in ("token", "float", "token_seq", "float_seq") or not name or name in names:
            raise Refused(1)
        if kind[0].endswith("_seq") and name in {*ids, *numbers, *patchy}:
            raise Refused(1)
        names.append(name)
        kinds.append("token" if name in ids else "float" if name in {*numbers, *patchy} else kind[0])
    rows, raw = [], []
    for number, line in enumerate(lines[1:], start=2):
        if line == "":
            continue
        fields = [""]
        for character in line:
            if character == separator:
                fields.append("")
            else:
                fields[-1] += character
        if line in (lines[0], separator.join(names)) or "\0" in line or len(fields) != len(names):
            raise Refused(number)
        raw.append((number, fields))
    # Faults of lines come before those of values, and those of one column before those of the next.
    for column, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        rows.append([_value(fields[column], kind, name in ids, name in numbers, number) for number, fields in raw])
    if not raw:
        raise Refused(None)
    texts = ["\t".join(fields) for _, fields in raw]
    if len(texts) > 1 and len({texts.count(each) for each in texts}) == 1 and texts.count(texts[0]) > 1:
        raise Refused(None)
    return Table(names, [list(row) for row in zip(*rows, strict=True)])


def _value(text: str, kind: str, is_id: bool, is_number: bool, line: int) -> object:
    if kind == "token":
        if text == "[PAD]" or (is_id and not text.strip()):
            raise Refused(line)
        return text or None
    if kind == "token_seq":
        if "[PAD]" in text.split(" "):
            raise Refused(line)
        return [part for part in text.split(" ") if part]
    texts = [part for part in text.split(" ") if part] if kind == "float_seq" else [text]
    values = []
    for each in texts:
        try:
            value = math.nan if each.strip() in MISSING else int(each) if each.isdigit() and is_number else float(each)
        except ValueError:
            raise Refused(line) from None
        if "_" in each or math.isinf(value) or abs(value) > 3.4028234663852886e38:
            raise Refused(line)
        if math.isnan(value) and (is_number or kind == "float_seq"):
            raise Refused(line)
        values.append(value)
    return values if kind == "float_seq" else values[0]


def random_file(seed: int, fault: str | None = None) -> tuple[bytes, str]:
    """An interaction file with odd tokens, types, orders and ends of lines, and the one fault that it may have.

    Returns:
        The bytes, and the fault's name.
    """
    dice = random.Random(seed)
    fault = fault or dice.choice(FAULTS)
    users = dice.sample(ODD_TOKENS, dice.randint(2, 8))
    items = dice.sample(ODD_TOKENS, dice.randint(3, 12))
    columns = {
        "user_id": lambda: dice.choice(users),
        "item_id": lambda: dice.choice(items),
        "rating": lambda: dice.choice(["1", "2.0", "3.5", " 4", "5", "1e0", "-1", "+2"]),
        "timestamp": lambda: str(_time(dice, scale)),
        "place": lambda: dice.choice(["", *ODD_TOKENS]),
        "tags": lambda: " ".join(dice.sample(ODD_TOKENS[:10], dice.randint(0, 3))),
        "weights": lambda: " ".join(str(dice.random()) for _ in range(dice.randint(0, 3))),
        "price": lambda: dice.choice(["", "nan", "NA", "1", "2.5"]),
    }
    scale = dice.choice([1, 1000, 10**9])
    kinds = {
        "user_id": "token",
        "item_id": "token",
        "rating": dice.choice(["float", "token"]),
        "timestamp": dice.choice(["float", "token"]),
        "place": "token",
        "tags": "token_seq",
        "weights": "float_seq",
        "price": "float",
    }
    names = [*list(kinds)[:4], *dice.sample(list(kinds)[4:], dice.randint(0, 4))]
    dice.shuffle(names)
    rows = [{name: columns[name]() for name in names} for _ in range(dice.randint(8, 40))]
    if "price" in names:
        rows[0]["price"] = "1"
    spoilt = dice.choice(rows)
    values = {
        "empty user": ("user_id", ""),
        "empty item": ("item_id", ""),
        "blank user": ("user_id", "  "),
        "empty rating": ("rating", ""),
        "bad rating": ("rating", dice.choice(BAD_NUMBERS)),
        "empty time": ("timestamp", ""),
        "infinite": ("timestamp", "inf"),
        "huge": ("rating", "1e39"),
        "tab": ("item_id", "a\tb"),
        "nul": ("item_id", "a\0"),
        "padding": (dice.choice(["user_id", "item_id"]), "[PAD]"),
    }
    if fault in values:
        name, text = values[fault]
        spoilt[name] = text
    head = [f"{name}:{kinds[name]}" for name in names]
    if fault == "no type":
        head = names
    if fault == "wrong type":
        head[dice.randrange(len(head))] = (
            f"{dice.choice(names)}:{dice.choice(['tokn', 'int', 'str', '', 'float:float'])}"
        )
    if fault == "same column":
        head[-1] = head[0]
    lines = ["\t".join(row[name] for name in names) for row in rows]
    if fault == "header again":
        lines.insert(dice.randrange(len(lines) + 1), "\t".join(head))
    if fault == "untyped header again":
        lines.insert(dice.randrange(len(lines) + 1), "\t".join(names))
    if fault == "doubled":
        lines = list(dict.fromkeys(lines)) * 2
    if fault == "empty line":
        lines.insert(dice.randrange(len(lines) + 1), "")
    if fault == "no rows":
        lines = []
    end = dice.choice(["\n", "\n", "\r\n", "\r"])
    text = end.join(["\t".join(head), *lines]) + dice.choice(["", end, end * 2])
    if fault == "cut":
        last = lines[-1]
        text = end.join(["\t".join(head), *lines[:-1], last[: last.rfind("\t")]])
    return (dice.choice(["", "\ufeff"]) + text).encode("utf-8"), fault


def _time(dice: random.Random, scale: int) -> int:
    return 1_600_000_000 * scale + dice.randrange(10**6)
