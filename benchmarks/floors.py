"""Every default beside ``Bias``, over generated data sets of many kinds.

    python benchmarks/floors.py                             # all data sets up to 30,000 rows, all defaults
    python benchmarks/floors.py --sets=plateau,ten --rows=AttnStudent,factors
    python benchmarks/floors.py --sets=ml-100k,million --out=floors.json

A default loses where its MAE or RMSE is more than ``SLACK`` (of the labels' range, in stars of 1..5: .002) above that of
``Bias`` on the same test rows; it is flat where its predictions vary less than a tenth of the labels' deviation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recbole_fedkd import run_recbole_fedkd

SLACK = 0.002 / 4
"""Of the range of the labels."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "AttnStudent": {"model": "AttnStudent"},
    "AttnTeacher": {"model": "AttnTeacher"},
    "AttnFedKD": {"model": "AttnFedKD"},
    "central": {"preset": "central"},
    "factors": {"preset": "factors"},
    "factors_s": {"preset": "factors_s"},
    "factors_xs": {"preset": "factors_xs"},
    "FoldIn": {"model": "FoldIn"},
    "MFEM": {"model": "MFEM"},
}
"""What somebody gets who names a model, or a preset that is no publication's method; nothing else is set."""

PUBLISHED: dict[str, dict[str, Any]] = {
    name: {"preset": name}
    for name in ("afd", "afd_no_attention", "fd", "fd_attention", "fedavg", "fedgkd", "fedkd", "local")
}
"""Methods as they were published: they may lose to ``Bias``, and the table says so, but none may be flat."""

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


def scale(low: float, high: float, step: float = 1.0) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Labels from ``low`` to ``high`` that are nearest to scores of mean 0."""
    middle, unit = (low + high) / 2, (high - low) / 4

    def labels(scores: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip(np.round((middle + unit * scores) / step) * step, low, high)

    return labels


STARS = scale(1, 5)


def scored(
    generator: np.random.Generator, pairs: Pairs, item: float = 0.7, user: float = 0.6, taste: float = 0.0
) -> NDArray[np.float64]:
    """``N(0, item)[i] + N(0, user)[u] + taste p_u q_i + N(0, .6)`` of pairs."""
    users, items = pairs
    of_items = generator.normal(0, item, items.max() + 1)
    of_users = generator.normal(0, user, users.max() + 1)
    p, q = generator.normal(size=(users.max() + 1, 4)), generator.normal(size=(items.max() + 1, 4))
    liked = (p[users] * q[items]).sum(1) / 2
    scores: NDArray[np.float64] = (
        of_items[items] + of_users[users] + taste * liked + generator.normal(0, 0.6, len(users))
    )
    return scores


def some_of(generator: np.random.Generator, users: int, items: int, rows: int, skew: float = 0.0) -> Pairs:
    """Distinct pairs, items by popularity ``rank^-skew``."""
    share = np.arange(1, items + 1.0) ** -skew
    drawn = generator.choice(items, 3 * rows, p=share / share.sum()), generator.integers(0, users, 3 * rows)
    keys = np.unique(drawn[1] * items + drawn[0])
    keys = generator.permutation(keys)[:rows]
    return keys // items, keys % items


def plateau(generator: np.random.Generator) -> Pairs:
    """Users 0 to 399 rate 25 of 60 items each, 400 to 1399 one each."""
    many = [generator.choice(60, 25, replace=False) for _ in range(400)]
    users = np.concatenate([np.repeat(np.arange(400), 25), np.arange(400, 1400)])
    return users, np.concatenate([*many, generator.integers(0, 60, 1000)])


def rated(
    pairs: Callable[[np.random.Generator], Pairs],
    labels: Callable[[NDArray[np.float64]], NDArray[np.float64]] = STARS,
    shift: float = 0.0,
    **spread: float,
) -> Callable[[np.random.Generator], tuple[Pairs, NDArray[np.float64]]]:
    """A table: pairs, and the labels of their scores plus ``shift``."""

    def make(generator: np.random.Generator) -> tuple[Pairs, NDArray[np.float64]]:
        own = pairs(generator)
        return own, labels(scored(generator, own, **spread) + shift)

    return make


def drawn(users: int, items: int, rows: int, skew: float = 0.0) -> Callable[[np.random.Generator], Pairs]:
    """:func:`some_of` of what is given."""
    return lambda generator: some_of(generator, users, items, rows, skew)


SETS: dict[str, Callable[[np.random.Generator], tuple[Pairs, NDArray[np.float64]]]] = {
    "plateau": rated(plateau),
    "thousand": rated(drawn(80, 50, 1_000)),
    "ten": rated(drawn(500, 300, 20_000), scale(1, 10), taste=0.5),
    "half": rated(drawn(500, 300, 20_000), scale(0.5, 5, 0.5), taste=0.5),
    "few_items": rated(drawn(3_000, 8, 12_000)),
    "few_users": rated(drawn(15, 1_500, 8_000)),
    "skewed": rated(drawn(1_000, 800, 15_000, 1.2), shift=1.3),
    "one_sided": rated(drawn(600, 200, 10_000), shift=2.2),
    "two_labels": rated(drawn(300, 120, 6_000, 0.8), lambda scores: np.where(scores > 0, 5.0, 1.0), taste=0.4),
    "one_each": rated(lambda generator: (np.arange(3_000), generator.integers(0, 40, 3_000))),
    "noise": rated(drawn(400, 200, 8_000), item=0.0, user=0.0),
    "tastes": rated(drawn(600, 200, 30_000), item=0.2, user=0.2, taste=0.8),
    "hundred_thousand": rated(drawn(2_000, 1_000, 100_000, 0.6), taste=0.5),
    "million": rated(drawn(10_000, 3_000, 1_000_000, 0.6), taste=0.5),
}
"""Name to a table of users, items and labels; every draw is of the name's own seed."""

SHORT = (
    "plateau",
    "thousand",
    "ten",
    "half",
    "few_items",
    "few_users",
    "skewed",
    "one_sided",
    "noise",
    "tastes",
    "two_labels",
    "one_each",
)


def write(name: str, folder: Path) -> None:
    """Atomic file of a generated data set in a folder of its name."""
    (users, items), labels = SETS[name](np.random.default_rng([2020, *name.encode()]))
    (folder / name).mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(1).permutation(len(users))
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"u{users[row]}\ti{items[row]}\t{labels[row]:g}\t{time}" for time, row in enumerate(order.tolist())]
    (folder / name / f"{name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")


def judged(dataset: str, keys: Mapping[str, Any], folder: Path, seed: int) -> dict[str, Any]:
    """MAE, RMSE, the share of the labels' deviation that predictions vary by, and the seconds of a run."""
    own = {} if dataset in ("ml-100k", "ml-1m") else {"data_path": str(folder)}
    fixed = {
        "label_mode": "rating",
        "metrics": ["MAE", "RMSE"],
        "valid_metric": "MAE",
        "seed": seed,
        "show_progress": False,
    }
    result = run_recbole_fedkd(
        dataset=dataset,
        config_dict={**fixed, "state": "WARNING", "checkpoint_dir": str(folder / "saved"), **own, **keys},
    )
    test, varied = result["test_result"], result["spread"]
    return {
        "mae": test["mae"],
        "rmse": test["rmse"],
        "varies": varied["predictions"] / varied["labels"] if varied and varied["labels"] else None,
        "flat": bool(varied and varied["flat"]),
        "rounds": len(result["rounds"]),
        "seconds": result["timing"]["training_seconds"],
    }


def compared(
    sets: Sequence[str], rows: Mapping[str, Mapping[str, Any]], folder: Path, seed: int, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every row on every data set, ``Bias`` first; a line is told of each."""
    results = []
    for dataset in sets:
        if dataset in SETS:
            write(dataset, folder)
        floor: dict[str, Any] = {}
        for name, keys in {"Bias": {"model": "Bias"}, **rows}.items():
            one = {"set": dataset, "row": name, **judged(dataset, keys, folder, seed)}
            floor = floor or one
            one["mae_above"], one["rmse_above"] = one["mae"] - floor["mae"], one["rmse"] - floor["rmse"]
            results.append(one)
            tell(line(one))
    return results


def line(one: Mapping[str, Any]) -> str:
    """A row of the table."""
    remark = "flat" if one["flat"] else ""
    return (
        f"| {one['set']} | {one['row']} | {one['mae']:.4f} | {one['rmse']:.4f} | {one['mae_above']:+.4f} | "
        f"{one['rmse_above']:+.4f} | {one['rounds']} | {one['seconds']:.0f} | {remark} |"
    )


HEAD = "| data | row | MAE | RMSE | MAE above Bias | RMSE above Bias | rounds | seconds | |\n" + "|---" * 9 + "|"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SHORT), help=f"of {', '.join(SETS)}, and ml-100k, ml-1m")
    parser.add_argument("--rows", default=",".join(DEFAULTS), help=f"of {', '.join([*DEFAULTS, *PUBLISHED])}")
    parser.add_argument("--keys", default="{}", help="JSON of further keys for every row")
    parser.add_argument("--seed", type=int, default=2020)
    parser.add_argument("--out", type=Path, help="JSON file of all numbers")
    parsed = parser.parse_args()
    every, extra = {**DEFAULTS, **PUBLISHED}, json.loads(parsed.keys)
    rows = {name: {**every[name], **extra} for name in parsed.rows.split(",")}
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        results = compared(
            parsed.sets.split(","), rows, Path(folder), parsed.seed, lambda text: print(text, flush=True)
        )
    if parsed.out is not None:
        parsed.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
