"""Records of experiments as a grid would write them, and readers of the reports that are made of them."""

import csv
import json
import math
from html.parser import HTMLParser

import numpy as np

from recbole_fedkd.report.contents import Table
from recbole_fedkd.report.experiment import read_experiment

NAN = math.nan
GROUP = {"dataset": "ml-100k", "partition": "random"}
PARTITION = {
    "scheme": "random",
    "client_num": 3,
    "label_values": [1.0, 2.0],
    "clients": [
        {"users": 2, "samples": 30, "labels": [10, 20]},
        {"users": 2, "samples": 12, "labels": [6, 6]},
        {"users": 1, "samples": 0, "labels": []},
    ],
}


class Records:
    """Writes the records of an experiment, as a grid would."""

    def __init__(self, folder, **plan):
        self.folder = folder
        self.cells = []
        self.plan = {"name": "grid", "experiment": {}, "reference": None, **plan}
        for name in ("runs", "users", "failures"):
            (folder / name).mkdir(parents=True)

    def run(self, row, seed, test, valid=(0.9, 0.8), seconds=1.0, moved=100, group=GROUP, finished=True, **more):
        cell = f"{len(self.cells):02d}-{seed}"
        self.cells.append({"cell": cell, "row": row, "group": group, "seed": seed})
        strategy = more.pop("strategy", "afd")
        head = {
            "kind": "run",
            "version": more.pop("version", 2),
            "cell": cell,
            "row": row,
            "group": group,
            "seed": seed,
            "keys": more.pop("keys", {"strategy": strategy}),
            "config": {"strategy": strategy, "student_pool": more.pop("student_pool", None), **more.pop("config", {})},
            "environment": {"python": "3.11", "torch": "2"},
            "partition": None if strategy == "central" else more.pop("partition", PARTITION),
        }
        lines = [head]
        first = 0 if head["version"] == 1 else 1
        for number, score in enumerate(valid, start=first):
            lines.append(
                {
                    "kind": "round",
                    "round": number,
                    "seconds": seconds,
                    "loss": 1.0,
                    "bytes_down": moved // 2,
                    "bytes_up": moved - moved // 2,
                    "valid": None if score is None else {"mae": score},
                }
            )
        result = {
            "kind": "result",
            "test": test,
            "best_valid": {"mae": min(score for score in valid if score is not None)},
            "best_round": more.pop("best_round", len(valid) - 1 + first),
            "valid_metric": "MAE",
            "valid_score_bigger": False,
            "protocols": more.pop("protocols", dict.fromkeys(test, "held-out test rows")),
            "communication": {"total_bytes": moved * len(valid)},
            "timing": {"rounds": len(valid), "training_seconds": seconds * len(valid)},
            "engine": more.pop("engine", None),
            **more.pop("extras", {}),
        }
        if finished:
            lines.append(result)
        users = more.pop("users", None)
        assert not more
        (self.folder / "runs" / f"{cell}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if users is not None:
            np.savez(self.folder / "users" / f"{cell}.npz", **users)
        return cell

    def failure(self, row, seed, error, group=GROUP):
        cell = f"{len(self.cells):02d}-{seed}"
        self.cells.append({"cell": cell, "row": row, "group": group, "seed": seed})
        record = {**self.cells[-1], "error": error}
        (self.folder / "failures" / f"{cell}.json").write_text(json.dumps(record))

    def done(self):
        content = {**self.plan, "cells": self.cells}
        (self.folder / "experiment.json").write_text(json.dumps(content))
        return self.folder

    def read(self):
        return read_experiment(self.done())


class Page(HTMLParser):
    """The tags of a page, in order, and the text of its cells."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.texts = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def cells(table):
    return [[f"[{cell.text}]" if cell.strong else cell.text for cell in row] for row in table.rows]


def tables(blocks):
    return [block for block in blocks if isinstance(block, Table)]


def words(blocks):
    """Headings, paragraphs and lists in one text."""
    return "\n".join("\n".join(getattr(block, "items", None) or [getattr(block, "text", "")]) for block in blocks)


def csv_lines(text):
    return list(csv.DictReader(text.splitlines()))


def users_of(values, seed=0):
    """Per-user records; users in an order of the seed's own."""
    order = np.random.default_rng(seed).permutation(len(values))
    return {"user": np.arange(len(values))[order], "mae": np.array(values, dtype=np.float32)[order]}


# Of users 0, 1, ... in the tests of clients.
CLIENTS = [0, 0, 1, 1, 2]


def of_clients(values, clients=CLIENTS, seed=0, metric="mae"):
    """Per-user records with the users' clients; users in an order of the seed's own."""
    order = np.random.default_rng(seed).permutation(len(values))
    return {
        "user": np.arange(len(values))[order],
        "client": np.array(clients)[order],
        metric: np.array(values, dtype=np.float32)[order],
    }


def scaled(folder, **scale):
    """Two seeds; bytes until the best round are moved times two, but that of fedavg is its first of two."""
    records = Records(folder, experiment={"scale": scale}, reference="local")
    for seed, low, high in ((1, 0.9, 0.5), (2, 0.8, 0.6)):
        records.run("local", seed, {"mae": low, "auc": 0.5}, moved=0)
        records.run("central", seed, {"mae": high, "auc": 0.5}, moved=0, strategy="central")
    for seed, mae, moved in ((1, 0.8, 10), (2, 0.6, 30)):
        records.run("afd", seed, {"mae": mae, "auc": 0.5}, moved=moved)
    for seed, mae in ((1, 0.4), (2, 0.9)):
        records.run("fedavg", seed, {"mae": mae, "auc": 0.5}, moved=200, best_round=1)
    records.run("wasteful", 2, {"mae": 0.9, "auc": 0.5}, moved=400)
    return records


SCALE = {"floor": "local", "ceiling": "central", "bytes": "fedavg"}


def full_experiment(folder, slower=1.0):
    """Rows of every kind, with names that HTML, Markdown and matplotlib would all read as something else."""
    records = Records(folder, reference="local | <b>none</b>")
    generator = np.random.default_rng(7)
    kinds = [
        ("central", "central", 0),
        ("local | <b>none</b>", "local", 0),
        ("afd *T=3* $x_1", "afd", 2000),
        ("_fd_ & \"more\" <script>alert('x')</script>", "fd", 400),
    ]
    crowd = {
        **PARTITION,
        "clients": [{"users": 1, "samples": 5 + i, "labels": [i % 4, 5 + i - i % 4]} for i in range(50)],
    }
    for group, partition in ((GROUP, PARTITION), ({**GROUP, "partition": "user"}, crowd)):
        for name, strategy, moved in kinds:
            for seed in (1, 2, 3):
                noise = generator.normal(0, 0.01, 6)
                valid = [0.7 + 0.3 / (number + 1) + noise[number] for number in range(4)]
                users = {"user": np.arange(40), "mae": generator.normal(0.7, 0.1, 40).astype(np.float32)}
                more = {} if strategy == "central" else {"partition": partition}
                test = {"mae": 0.7 + noise[4], "ndcg@10": 0.1 + noise[5]}
                records.run(
                    name,
                    seed,
                    test,
                    valid,
                    slower * seed,
                    moved,
                    group,
                    strategy=strategy,
                    users=users,
                    **more,
                )
    records.failure("afd *T=3* $x_1", 4, "InputError: a | b <c>")
    return records.done()
