"""Random keys with random odd values: whatever is given is run as it says, or refused in one sentence.

    python benchmarks/fuzz_configs.py --cases 3000 --runs 300 --seed 1

Every case draws a model, one to four of the keys that it knows, and a value for each: a plausible one, or one of another
type, empty, huge, negative, not a number, nested, or a text that only looks like a value; half of the cases come as texts,
as a command line has them. A case passes if the config is built, or ``InputError`` says in one bounded line why not. A
share is also run on a small generated dataset: it ends with a result, ``InputError`` or ``TrainingError``, and every row of
the file is there unless a key that filters was drawn. Prints what broke; the exit code is 1 if anything did.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from recbole_fedkd import quick_start
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.keys import Key
from recbole_fedkd.errors import InputError, TrainingError

USERS, ITEMS, ROWS_PER_USER = 12, 15, 8
MODELS = ("AttnFedKD", "AttnStudent", "MF", "BPR", "NeuMF", "WideDeep", "Pop", "SASRec", "DIN", "EASE", "LightGCN")
HUGE = (2**31, 2**32, 2**63, 10**30, 1e308, -(2**40))
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3.5, 1e-3, -0.1, float("nan"), float("inf"), "", " ", "abc", "1e-3", "yes", "None", "[1, 2",
    "{a: b}", "{", "[]", "[[]]", "a:b", "ü ñ", "../x", "\t", [], [1], [-1], [0.5, 0.5], ["a"], [None], [[1]], [1, "a"], (1, 2),
    {}, {"a": 1}, {"a": {"b": [1]}}, {1: 2}, {"RS": [1]}, list(range(50)), "x" * 300, b"bytes", {1, 2}, 1j,
)  # fmt: skip
PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "eval_args": (
        {"split": {"RS": [8, 1, 1]}}, {"split": {"LS": "valid_and_test"}, "order": "TO"}, {"order": "TO"}, {"mode": "uni5"},
        {"split": {"RS": [0.8, 0.2]}}, {"split": {"RS": [1, 0, 0]}}, {"split": {}}, {"group_by": "none"}, {"mode": "labeled"},
        {"split": {"LS": "valid_only"}}, {"split": {"RS": [0.6, 0.0, 0.4]}}, {"mode": {"valid": "full", "test": "pop3"}},
        {"split": {"RS": [0.01, 0.5, 0.49]}}, {"mode": "uni1000"},
    ),
    "metrics": (["NDCG"], ["MAE", "NDCG"], ["AUC"], ["Nothing"], "Recall", ["GAUC"], ["ItemCoverage"], ["LogLoss"]),
    "valid_metric": ("NDCG@10", "MAE", "AUC", "Hit@3", "mrr@5", "@", "NDCG@"),
    "topk": (5, [1, 3], [100], 0, [15], (2, 4), "[3]"),
    "label_mode": ("rating", "threshold", "implicit", "stars"),
    "strategy": ("afd", "fd", "fedavg", "fedgkd", "fedkd", "local", "central", "sgd"),
    "partition": ("random", "user", "dirichlet:0.5", "dirichlet:1e-9",
                  "quantity:0.1", "attribute:group", "attribute:x", "user:1"),
    "client_num": (1, 3, USERS, USERS + 1, 0, 2.0),
    "clients_per_round": (1, 2, 5, 0.5, 100),
    "engine": ("local", "fleet", "gpu"),
    "codecs": (["int8"], ["fp16", "sign"], ["zip"], "int8", ["low_rank"], ["top_k"]),
    "learner": ("adam", "SGD", "adam_to_sgd", "sparse_adam", "lion"),
    "learning_rate": (0.0, 0.01, 1.0, 1e6, 1e30),
    "train_neg_sample_args": ({"distribution": "uniform"}, {"sample_num": 2}, {"distribution": "popularity"},
                              {"dynamic": True}),
    "load_col": ({"inter": ["user_id", "item_id", "rating", "timestamp"]}, {"inter": ["user_id"]}, {"inter": ["nothing"]}, {}),
    "student_pool": ([{"embedding_size": 4}, {"embedding_size": 8}], [{}], [{"x": 1}], [5]),
    "teacher": ({"embedding_size": 8}, {"x": 1}),
    "learning_rates": ({"*": 0.1}, {"nothing.*": 0.1}, {"*": "fast"}),
    "private_parameters": (["*"], ["nothing"], ["item*"]),
    "preset": ("afd", "fedavg", "fedkd", "none"),
    "threshold": ({"rating": 3}, {"x": 1}, {"rating": "a"}, {}),
    "knowledge": ("label", "item"),
    "backbone": ("cnn", "mlp"),
    "attention": (True, False, "yes"),
    "rm_dup_inter": ("first", "last", "any"),
    "user_inter_num_interval": ("[2,3]", "[0,inf)", "(8,1]", "x"),
    "val_interval": ({"rating": "[3,inf)"}, {"rating": "x"}, {"nothing": "[1,2]"}),
    "unused_col": ({"inter": ["timestamp"]}, {"rating": 1}),
    "alias_of_user_id": (["group"], ["nothing"]),
    "normalize_field": (["rating"], ["nothing"]),
    "feature_fields": (["group"], ["nothing"], []),
    "label_values": ([1, 2, 3, 4, 5], [1], [1, 1]),
    "TIME_FIELD": ("timestamp", "when"),
    "USER_ID_FIELD": ("user_id", "item_id", "who"),
    "benchmark_filename": (["a", "b", "c"], ["train"]),
}  # fmt: skip
OF_TYPE: dict[type, tuple[Any, ...]] = {
    int: (0, 1, 2, 3, 5, 7, 100, -1),
    float: (0.0, 0.1, 0.5, 0.9, 1.0, 2.5, -1.0, 1e-9, 100.0),
    bool: (True, False),
    str: ("abc", "rating", "user_id", "item_id", "label", "CE", "BPR", "relu", "mean"),
    list: (["rating"], ["item_id"], ["group"], [], [2, 4], [3], [0], [0.5]),
    dict: ({"rating": 1}, {"inter": ["rating"]}, {"user": ["user_id", "group"]}, {"item_id": 3}, {"max_norm": 1}),
}
# What starts processes, downloads, writes elsewhere, or takes as long as it says.
LEFT_OUT = {
    "worker", "nproc", "world_size", "ip", "port", "offset", "data_path", "checkpoint_dir", "resume", "result_file", "model",
    "dataset", "config_files", "config_file", "dataset_save_path", "dataloaders_save_path", "save_dataset", "save_dataloaders",
    "plugins", "torch_threads", "fleet_threads", "run_name", "benchmark_filename",
}  # fmt: skip
# Keys that may leave rows out, or that make rows of their own.
FILTERS = {
    "rm_dup_inter", "val_interval", "user_inter_num_interval", "item_inter_num_interval", "USER_ID_FIELD", "ITEM_ID_FIELD",
    "threshold", "load_col", "field_separator", "filter_inter_by_user_or_item", "encoding",
}  # fmt: skip
BASE: dict[str, Any] = {
    "epochs": 1, "train_batch_size": 16, "eval_batch_size": 64, "embedding_size": 4, "show_progress": False, "state": "ERROR",
    "topk": [3], "client_num": 2, "MAX_ITEM_LIST_LENGTH": 5, "n_layers": 1, "n_heads": 1, "inner_size": 4, "hidden_size": 4,
    "attention_heads": 1, "hidden_sizes": [2, 4], "history_length": 3, "mlp_hidden_size": [4, 4],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, and keys as a dictionary or as the texts of a command line."""

    model: str
    keys: dict[str, Any]
    texts: bool

    def given(self) -> dict[str, Any]:
        """Arguments of a config or a run."""
        return {"command_line": {key: str(value) for key, value in self.keys.items()}} if self.texts else {
            "config_dict": self.keys
        }  # fmt: skip


def write_data(folder: Path) -> None:
    """A small dataset with ratings, times and a feature of users, ``fuzz`` in ``folder``."""
    target = folder / "fuzz"
    target.mkdir(parents=True)
    draw = random.Random(5)
    rows = [
        f"u{user}\ti{item}\t{draw.randint(1, 5)}\t{user * 100 + position}"
        for user in range(USERS)
        for position, item in enumerate(draw.sample(range(ITEMS), ROWS_PER_USER))
    ]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (target / "fuzz.inter").write_text("\n".join([header, *rows]) + "\n")
    users = [f"u{user}\t{'ab'[user % 2]}" for user in range(USERS)]
    (target / "fuzz.user").write_text("\n".join(["user_id:token\tgroup:token", *users]) + "\n")


def keys_of(model: str, folder: Path) -> dict[str, Key]:
    """What a model may be given."""
    extra = {"train_neg_sample_args": None} if model == "SASRec" else {}
    return FedKDConfig(model, "fuzz", config_dict={"data_path": str(folder), **extra})._known.keys


def _of_its_type(key: Key | None) -> list[Any]:
    """Values of the type that a key's line names, in and out of its range."""
    if key is None:
        return [0, 1, 2, 0.5]
    if "one of " in key.rule:
        return key.rule.partition("one of ")[2].split("|")
    values = [value for kind in key.types for value in OF_TYPE.get(kind, ())]
    return values or [0, 1, 2, 0.5, True, "abc", [2, 4]]


def draw_case(draw: random.Random, folder: Path, known: dict[str, dict[str, Key]], wild: bool) -> Case:
    """A random case; a wild one may hold sizes that no run would survive if they were not refused."""
    model = draw.choice(MODELS)
    if model not in known:
        known[model] = {name: key for name, key in keys_of(model, folder).items() if name not in LEFT_OUT}
    names = sorted(known[model])
    chosen = draw.sample(names, draw.randint(1, 3)) + draw.sample(sorted(PLAUSIBLE), draw.randint(0, 2))
    keys: dict[str, Any] = {"train_neg_sample_args": None} if model == "SASRec" else {}
    for name in chosen:
        likely = PLAUSIBLE.get(name) or _of_its_type(known[model].get(name))
        # One odd value in three keys of a config leaves next to none that runs.
        odd = draw.random() < (0.3 if wild else 0.1)
        keys[name] = draw.choice([*ODD, *(HUGE if wild else ())]) if odd else draw.choice(likely)
    return Case(model, keys, draw.random() < 0.5)


def check_config(case: Case, folder: Path) -> str | None:
    """What is wrong about how a case's config is built or refused; None if nothing is."""
    given = case.given()
    name, keys = next(iter(given.items()))
    try:
        FedKDConfig(case.model, "fuzz", **{name: {"data_path": str(folder), **keys}})
    except InputError as error:
        return _ill_told(error)
    except Exception:
        return traceback.format_exc(limit=-4)
    return None


def check_run(case: Case, folder: Path) -> str | None:
    """What is wrong about how a case's run ends; None if nothing is."""
    given = case.given()
    name, keys = next(iter(given.items()))
    base = {**BASE, "data_path": str(folder)}
    if case.texts:
        base = {key: str(value) for key, value in base.items()}
    rows: list[int] = []
    original = quick_start.create_dataset

    def counted(config: Any) -> Any:
        dataset = original(config)
        rows.append(len(dataset.inter_feat))
        return dataset

    quick_start.create_dataset = counted
    try:
        quick_start.run_recbole_fedkd(
            case.model, "fuzz", saved=False, **{name: {**base, **keys, "epochs": base["epochs"]}}
        )
    except (InputError, TrainingError) as error:
        return _ill_told(error)
    except Exception:
        return traceback.format_exc(limit=-6)
    finally:
        quick_start.create_dataset = original
    if rows != [USERS * ROWS_PER_USER] and not FILTERS & case.keys.keys():
        return f"{rows} rows were loaded, and the file has {USERS * ROWS_PER_USER}"
    return None


def _ill_told(error: Exception) -> str | None:
    sentence = str(error)
    return (
        None if sentence and "\n" not in sentence and len(sentence) <= 2500 else f"not one bounded line: {sentence!r}"
    )


def fuzz(cases: int, runs: int, seed: int, folder: Path) -> list[tuple[Case, str]]:
    """Draw ``cases`` configs and ``runs`` runs; those that broke, and how."""
    write_data(folder)
    draw, known, broken = random.Random(seed), {}, []
    for number in range(cases + runs):
        case = draw_case(draw, folder, known, wild=number < cases)
        problem = check_config(case, folder) if number < cases else check_run(case, folder)
        if problem:
            broken.append((case, problem))
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        broken = fuzz(arguments.cases, arguments.runs, arguments.seed, Path(folder) / "data")
        os.chdir("/")
    for case, problem in broken:
        print(case.model, case.keys, "as texts" if case.texts else "", problem, sep="\n  ", flush=True)
    print(f"{arguments.cases} configs and {arguments.runs} runs, {len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
