"""Data files that were damaged at random, and what must hold of every one: a sentence, or all rows of the file."""

from __future__ import annotations

import random
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from slow_reader import BAD_NUMBERS, ODD_TOKENS, Refused, Table, read_slowly

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.data.columns import order_counts
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.quick_start import _prepare, create_dataset

IDS = ("user_id", "item_id")
_MARK = b"\xef\xbb\xbf"
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("BPR", {}),
    ("BPR", {"eval_args": {"order": "TO", "split": {"LS": "valid_and_test"}, "group_by": "user", "mode": "full"}}),
    ("Pop", {}),
    ("WideDeep", {"label_mode": "threshold"}),
    ("SASRec", {"train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 5}),
    ("MF", {"strategy": "fedavg", "partition": "user"}),
    ("AttnFedKD", {"embedding_size": 4, "hidden_sizes": [4, 8], "attention_heads": 2, "history_length": 3}),
    ("AttnStudent", {"embedding_size": 4, "hidden_sizes": [4, 8], "attention_heads": 2, "label_mode": "implicit"}),
]


def sound_files(dice: random.Random) -> dict[str, bytes]:
    """A small dataset without a fault: interactions, and features of users and items."""
    users, items = [f"u{n}" for n in range(12)], [f"i{n}" for n in range(15)]
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float\tplace:token\ttags:token_seq"]
    for user in users:
        for item in dice.sample(items, 8):
            tags = " ".join(dice.sample("abc", dice.randint(0, 2)))
            time = 1_600_000_000 + dice.randrange(10**6)
            lines.append(f"{user}\t{item}\t{dice.randint(1, 5)}\t{time}\t{dice.choice('xyz')}\t{tags}")
    of_users = ["user_id:token\tage:token", *(f"{user}\t{dice.randint(1, 4)}" for user in users)]
    of_items = ["item_id:token\tyear:float\tgenre:token_seq", *(f"{item}\t{dice.randint(1, 9)}\ta b" for item in items)]
    files = {"inter": lines, "user": of_users, "item": of_items}
    return {suffix: ("\n".join(each) + "\n").encode() for suffix, each in files.items()}


def damaged(content: bytes, dice: random.Random) -> bytes:
    """A file after one of the accidents that befall files."""
    lines = content.split(b"\n")
    place, row = dice.randrange(len(content) or 1), dice.randrange(len(lines))
    fields = lines[row].split(b"\t")
    field = dice.randrange(len(fields))
    odd = dice.choice([*ODD_TOKENS, *BAD_NUMBERS, "", " ", "\t", '"', "[PAD]", "\0", "x" * 5000, ":", "::"]).encode()

    def with_row(new: bytes) -> bytes:
        return b"\n".join([*lines[:row], new, *lines[row + 1 :]])

    accidents = [
        lambda: content[:place],
        lambda: content[:place] + content[place + dice.randint(1, 60) :],
        lambda: content[:place] + bytes([dice.randrange(256)]) + content[place + 1 :],
        lambda: content[:place] + bytes(dice.randrange(256) for _ in range(5)) + content[place:],
        lambda: content[:place] + dice.choice([b"\t", b"\n", b"\r", b" ", b'"', b",", b"\0", _MARK]) + content[place:],
        lambda: content[:place] + content[place // 2 : place] + content[place:],
        lambda: content + content,
        lambda: content + content[content.index(b"\n") + 1 :] if b"\n" in content else content,
        lambda: with_row(b"\t".join([*fields[:field], odd, *fields[field + 1 :]])),
        lambda: with_row(b"\t".join([*fields[:field], odd, *fields[field + 1 :]])),
        lambda: with_row(b"\t".join(fields[:field] + fields[field + 1 :])),
        lambda: with_row(b"\t".join([*fields, odd])),
        lambda: with_row(b""),
        lambda: with_row(lines[0]),
        lambda: b"\n".join(lines[:row] + lines[row + 1 :]),
        lambda: b"\n".join(dice.sample(lines, len(lines))),
        lambda: b"\n".join([lines[0], *dice.sample(lines[1:], len(lines) - 1)]),
        lambda: content.replace(b"\t", dice.choice([b",", b";", b" ", b"::", b"\t\t"])),
        lambda: content.replace(b"\n", dice.choice([b"\r\n", b"\r", b"\n\n", b"\r\r\n"])),
        lambda: content.replace(b":float", dice.choice([b":token", b":float_seq", b":int", b""]), 1),
        lambda: content.replace(b":token", dice.choice([b":float", b":token_seq", b":str", b""]), 1),
        lambda: content.replace(b"_id", b"Id", 1),
        lambda: _MARK + content,
        lambda: content.decode("utf-8", "replace").encode(dice.choice(["utf-16", "utf-32", "latin-1"]), "replace"),
        lambda: dice.choice([b"", b"\n", b"\n\n", b"\0" * 100, b"PK\x03\x04", lines[0], lines[0] + b"\n"]),
        lambda: b"\t".join(fields) + b"\n" + content,
    ]  # fmt: skip
    return dice.choice(accidents)()


def fuzz_one(seed: int, folder: Path, train: bool = False) -> str:
    """Damage files, read them and make a model of them; optionally train it for a round.

    Returns:
        ``read``, or the sentence that refuses the files.

    Raises:
        AssertionError: rows that a slow reader finds are not there, or others are, or a fault of the file was not seen.
        Exception: whatever is raised that is no sentence.
    """
    dice = random.Random(seed)
    files = sound_files(dice)
    for _ in range(dice.choice([1, 1, 1, 2])):
        hit = dice.choice(["inter", "inter", "user", "item"])
        files[hit] = damaged(files[hit], dice)
    for suffix in dice.choice([(), (), ("user",), ("item",), ("user", "item")]):
        files.pop(suffix)
    run = dice.randrange(len(RUNS))
    target = folder / f"data{seed}" / "x"
    target.mkdir(parents=True)
    for suffix, content in files.items():
        (target / f"x.{suffix}").write_bytes(content)
    config = _config(run).view(data_path=str(target))
    patchy = set() if order_counts(config) else {"timestamp"}
    wanted: Table | None
    try:
        wanted = read_slowly(files["inter"], {"rating"} | {"timestamp"} - patchy, set(IDS), patchy)
    except (Refused, UnicodeDecodeError):
        wanted = None
    try:
        dataset = create_dataset(config)
    except InputError as error:
        sentence = str(error)
        assert "\n" not in sentence and len(sentence) < 2000, sentence
        assert wanted is None or not _blames_a_row(sentence), f"a sound row is refused: {sentence}"
        return sentence
    assert wanted is not None, "a fault of the file was not seen"
    rows = zip(*(dataset.field2id_token[field][dataset.inter_feat[field].to_numpy()] for field in IDS), strict=True)
    places = [wanted.names.index(field) for field in IDS]
    found, wanted_rows = list(rows), [tuple(row[place] for place in places) for row in wanted.rows]
    if config["model"] == "SASRec":  # has its rows by user and time
        found, wanted_rows = sorted(found), sorted(wanted_rows)
    assert found == wanted_rows, "other rows than the file's"
    try:
        trainer, loaders, evaluations = _prepare(_config(run).view(data_path=str(target)))
        if train:
            trainer.fit(loaders[0], evaluations[0], saved=False, show_progress=False)
    except (InputError, TrainingError) as error:
        return str(error)
    if config["model"] != "SASRec":  # RecBole makes prefixes of its rows
        assert sum(len(loader._dataset.inter_feat) for loader in loaders) == len(wanted.rows), "the splits lack rows"
    return "read"


@cache
def _config(run: int) -> FedKDConfig:
    """The config of a run, but for its files; making one takes longer than everything else."""
    model, keys = RUNS[run]
    common = {"load_col": None, "data_path": "nowhere", "show_progress": False, "state": "ERROR", "epochs": 1}
    return FedKDConfig(model, "x", config_dict={**common, **keys})


def _blames_a_row(sentence: str) -> bool:
    """Whether a sentence is about a row of the interactions, beyond what the slow reader knows of."""
    return (
        "x.inter', line " in sentence
        and "line 1" not in sentence.split(":", maxsplit=1)[0]
        and "64 bits" not in sentence
    )


def summary(outcomes: list[str]) -> str:
    """How many files were read, and why the others were not."""
    plain = (re.sub(r"'[^']*'|\\d+|[0-9a-f]{2}( [0-9a-f]{2})+", "_", each)[:70] for each in outcomes)
    kinds = Counter(plain)
    return "\n".join(f"{number:6} {kind}" for kind, number in kinds.most_common())
