"""What a server can tell of its clients' items, message by message: records and tables of docs/results/membership.md.

    python benchmarks/membership.py --clients=200      # measures on ml-100k, and writes what the tables are made of
    python benchmarks/membership.py --clients=0        # tables of what is recorded

Every client is one user. Records lie in experiments/results/membership-ml-100k/records.json.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from recbole_fedkd.data.schema import ClientRows, DataSchema
from recbole_fedkd.federated.stage import Arrays
from recbole_fedkd.files import write_json

Told = tuple[Arrays, dict[int, Arrays], dict[int, ClientRows], DataSchema]

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "experiments" / "results" / "membership-ml-100k" / "records.json"
KEYS = {
    **{"model": "AttnFedKD", "dataset": "ml-100k", "partition": "user", "label_mode": "rating", "attention": False},
    **{"feature_fields": [], "embedding_size": 8, "hidden_sizes": [8], "train_batch_size": 256, "learning_rate": 0.02},
    **{"epochs": 1, "eval_step": 0, "client_weights": "uniform", "show_progress": False, "seed": 2020},
}
FACTORS = {
    **{"strategy": "afd", "knowledge": "factors", "factor_size": 3, "sketch_width": 3, "sketch_passes": 2},
    **{"em_steps": 1, "epochs": 6},
}
MESSAGES = {
    "fedavg": ({"strategy": "fedavg"}, 0.5),
    "fedavg, sign": ({"strategy": "fedavg", "codecs": ["row_sparse", "sign"]}, 0.5),
    "factors": (FACTORS, 5.0),
    "item": ({"strategy": "afd", "knowledge": "item"}, 5.0),
    "label": ({"strategy": "afd", "knowledge": "label", "aggregation": "weighted"}, 20.0),
}
"""Keys of a message, and the clip of its noise."""

SETTINGS = {
    "plain": "plain",
    "masks": "under masks",
    "both": "masks and distributed noise, epsilon 8",
    "local": "local noise",
}
ARRAYS = {
    "p:embeddings.field_item_id.weight": "item embeddings",
    "histogram": "label histogram",
    "sums": "sums of logits",
}


def keys_of(message: str, setting: str) -> dict[str, Any]:
    """Config keys of a cell."""
    keys, clip = MESSAGES[message]
    masks = {"secure_aggregation": True}
    return {
        **KEYS,
        **keys,
        **{
            "plain": {},
            "masks": masks,
            "both": {**masks, "privacy": {"clip": clip, "epsilon": 8.0, "noise": "distributed"}},
            "local": {"privacy": {"clip": clip, "noise_multiplier": 1.0, "noise": "local"}},
        }[setting],
    }


def measured(clients: int) -> dict[str, Any]:
    """Every message in every setting: what was seen, and what canaries say; or the sentence in which it is refused."""
    from recbole_fedkd.auditing import audit_of
    from recbole_fedkd.config import FedKDConfig
    from recbole_fedkd.errors import InputError
    from recbole_fedkd.logs import screen

    records: dict[str, Any] = {}
    for setting in SETTINGS:
        for message in MESSAGES:
            if setting == "local" and message != "fedavg":
                continue
            keys = dict(keys_of(message, setting))
            try:
                with screen(logging.ERROR):
                    config = FedKDConfig(keys.pop("model"), keys.pop("dataset"), config_dict=keys)
                    audit = audit_of(config, message, None if "factors" in message else 1, clients)
            except InputError as error:
                records[f"{message}; {setting}"] = {"refused": str(error)}
                continue
            canaries = asdict(audit.canaries) if audit.canaries is not None else None
            seen = [asdict(message) for message in audit.seen]
            records[f"{message}; {setting}"] = {"clients": audit.clients, "seen": seen, "canaries": canaries}
            print(message, setting, [(message["array"], message["membership"]) for message in seen], flush=True)
    return records


def liked(clients: int) -> float:
    """:func:`liked_auc` of averaging on ml-100k, labels being whether a rating is 4 or more."""
    from recbole_fedkd.config import FedKDConfig

    keys = {**keys_of("fedavg", "plain"), "label_mode": "threshold"}
    config = FedKDConfig(keys.pop("model"), keys.pop("dataset"), config_dict=keys)
    return liked_auc(*told_by_a_round(config, clients))


def told_by_a_round(config: Any, most: int) -> Told:
    """What a server gets in the first round of clients that it could look at.

    Returns:
        The state that they started from, the arrays of each one's message, each one's rows, and the schema.
    """
    from recbole_fedkd.auditing import Tap
    from recbole_fedkd.data.schema import read_schema, rows_of_clients
    from recbole_fedkd.quick_start import _prepare

    trainer, loaders, _ = _prepare(config)
    engine, dataset = trainer.engine, loaders[0]._dataset
    engine.held_out = frozenset(sorted(engine.samples)[most:])
    start = {name: value.clone().numpy() for name, value in engine.server.state.items()}
    tap = Tap(engine.server)
    engine.run_round(0)
    arrays_of, schema = tap.arrays(), read_schema(dataset, len(engine.clients))
    parts = rows_of_clients(dataset, trainer.model.client_of_user, sorted(arrays_of))
    return start, arrays_of, dict(zip(sorted(arrays_of), parts, strict=True)), schema


def liked_auc(
    start: Arrays, arrays_of: Mapping[int, Arrays], rows: Mapping[int, ClientRows], schema: DataSchema
) -> float:
    """How often a server tells an item that a user liked from one that the user did not, by the direction of their changes.

    The score of an item is where its change lies along the direction in which the client's items have moved most; which end of
    it is which is left open, so that an AUC below a half counts as much as one above. The mean over clients.
    """
    aucs = []
    for number, arrays in arrays_of.items():
        (name,) = (name for name in arrays if "item_id" in name)
        items, labels = rows[number].interactions["item_id"].numpy(), schema.label_indices(rows[number]).numpy()
        if labels.min() < labels.max():
            along = np.linalg.svd((arrays[name] - start[name])[items], full_matrices=False)[0][:, 0]
            auc = roc_auc_score(labels, along)
            aucs.append(max(auc, 1 - auc))
    return float(np.mean(aucs))


# Tables


def cell(record: dict[str, Any], position: int) -> str:
    """What a message says in a setting, for the table."""
    if "refused" in record:
        return "refused"
    seen = record["seen"][position]
    if seen["membership"] is None:
        return "nothing to guess"
    if not seen["array"]:
        return "names no item" + (f"; label counts of {seen['labels']:.0%}" if seen["labels"] is not None else "")
    ratings = "" if seen.get("ratings") is None else f", ratings of {seen['ratings']:.0%}"
    auc, exact = f"{seen['membership']:.3f}", f"({seen['exact']:.0%}{ratings})"
    return f"**{auc}** {exact}" if seen["exact"] else f"{auc} ± {seen['chance']:.3f} {exact}"


def tables(records: dict[str, Any]) -> list[str]:
    """Lines of the page: what every message tells, and what canaries say."""
    lines = [f"| message | {' | '.join(SETTINGS.values())} |", "|---" * (len(SETTINGS) + 1) + "|"]
    for message in MESSAGES:
        for position, seen in enumerate(records[f"{message}; plain"]["seen"]):
            columns = [records.get(f"{message}; {setting}") for setting in SETTINGS]
            array = ARRAYS.get(seen["array"], seen["array"].replace("_", " "))
            name = f"`{message}`" + (f": {array}" if array else "")
            lines.append(f"| {name} | {' | '.join(cell(column, position) if column else '' for column in columns)} |")
    lines += ["", "| canaries against the release | show epsilon | accounted |", "|---|---|---|"]
    for name, record in records.items():
        if isinstance(record, dict) and (canaries := record.get("canaries")):
            message, _, setting = name.partition("; ")
            values = f"{canaries['epsilon']:.2f} | {canaries['accounted']:.2f}"
            lines.append(f"| `{message}`, {SETTINGS[setting]} | {values} |")
    return lines


def main() -> None:
    """As the command line has it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200, help="clients that are looked at; 0: measure nothing")
    clients = parser.parse_args().clients
    if clients:
        RECORDS.parent.mkdir(parents=True, exist_ok=True)
        write_json({**measured(clients), "liked": liked(clients)}, RECORDS)
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    print("\n".join(tables(records)))


if __name__ == "__main__":
    main()
