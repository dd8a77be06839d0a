"""Who gains: clients and users of one row of an experiment against those of another, by how many users and test rows they have.

    python benchmarks/gains.py experiments/results/clients-above-local-ml-100k

Reads what an experiment keeps of users (``users/`` beside ``runs/``); the data is split again to count every user's test rows.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.quick_start import _prepare_data
from recbole_fedkd.report.records import Run, read_run, read_users

BINS = (1, 4, 8, 16, 32, 10**9)
"""Users of a client, or test rows of a user, from one to before the next."""


def test_rows(run: Run) -> pd.Series:
    """How many test rows every user has."""
    kept = {name: run.config[name] for name in ("model", "label_mode", "partition", "eval_args")}
    keys = {**kept, **run.group, "seed": run.seed, "state": "ERROR", "show_progress": False}
    data = _prepare_data(FedKDConfig(config_dict=keys))
    users, counts = np.unique(data.loaders[2].dataset.inter_feat["user_id"].numpy(), return_counts=True)
    return pd.Series(counts, index=users)


def gains(folder: Path, row: str, reference: str) -> dict[str, pd.DataFrame]:
    """Per partition the gain in MAE of every client of every seed, its users and its users' test rows."""
    runs = {file.stem: read_run(file) for file in sorted((folder / "runs").glob("*.jsonl"))}
    files = {stem: folder / "users" / f"{stem}.npz" for stem in runs}
    gained: dict[str, list[pd.DataFrame]] = {}
    counted: dict[int, pd.Series] = {}
    for stem, run in runs.items():
        if run.row != row or not files[stem].exists():
            continue
        other = next(
            name
            for name, compared in runs.items()
            if (compared.row, compared.group, compared.seed) == (reference, run.group, run.seed)
        )
        if run.seed not in counted:
            counted[run.seed] = test_rows(run)
        both = read_users(files[stem], []).join(read_users(files[other], []), rsuffix=" before", how="inner")
        both = both.join(counted[run.seed].rename("rows"))
        of_clients = both.groupby("client").agg({"mae": "mean", "mae before": "mean", "rows": "sum", "client": "size"})
        of_clients = of_clients.rename(columns={"client": "users"})
        of_clients["gain"] = of_clients["mae before"] - of_clients["mae"]
        gained.setdefault(run.group["partition"], []).append(of_clients)
    return {partition: pd.concat(frames) for partition, frames in gained.items()}


def table(clients: pd.DataFrame) -> str:
    """Lines for the reader: by test rows where clients are users, else by users."""
    single = bool((clients["users"] == 1).all())
    by, who = ("rows", "users") if single else ("users", "clients")
    lines = [
        f"| {'test rows' if single else 'users'} of a {who[:-1]} | {who} | with a lower MAE | mean gain | deviation |"
    ]
    lines.append("|---" * 5 + "|")
    for low, high in pairwise(BINS):
        part = clients[(clients[by] >= low) & (clients[by] < high)]
        if len(part):
            to = f"{low} to {high - 1}" if high < BINS[-1] else f"{low} or more"
            gained = (part["gain"] > 0).mean()
            lines.append(
                f"| {to} | {len(part)} | {gained:.0%} | {part['gain'].mean():.3f} | {part['gain'].std():.3f} |"
            )
    gained = clients["gain"] > 0
    lost = clients[~gained].sort_values("gain")
    share = clients["rows"][gained].sum() / clients["rows"].sum()
    lines += ["", f"In all {gained.sum()} of {len(clients)} gain; they hold {share:.0%} of the test rows."]
    if not single:
        losses = (f"{number} users: {-loss:.3f}" for number, loss in zip(lost["users"], lost["gain"], strict=True))
        lines.append(f"Who loses, and how much MAE: {', '.join(losses)}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of an experiment, with runs/ and users/")
    parser.add_argument("--row", default="factors")
    parser.add_argument("--reference", default="local")
    arguments = parser.parse_args()
    for partition, clients in gains(arguments.folder, arguments.row, arguments.reference).items():
        print(f"\n{partition}\n\n{table(clients)}")


if __name__ == "__main__":
    main()
