"""What RecBole's models, and stages, ask of the installation and of keys, said before anything of them is loaded."""

from __future__ import annotations

import importlib.util
from typing import Any

from recbole_fedkd.config.outlines import traits_of_stage
from recbole_fedkd.errors import InputError, listed, shown

# Imported inside functions of RecBole's models and of its knowledge graph.
_PACKAGES = {"NCL": "faiss", "KGAT": "dgl", "KGIN": "torch_scatter", "MCCLK": "torch_scatter", "NNCF": "networkx"}
# Models that read vectors of a knowledge graph, by the names that RecBole wrote into their source.
_VECTORS = {"GRU4RecKG": ["ent_id"], "KSR": ["ent_id", "rel_id"]}


def missing_package(model: str) -> str | None:
    """The package that a model of RecBole needs and that is not installed; None if there is none."""
    package = _PACKAGES.get(model)
    return package if package is not None and importlib.util.find_spec(package) is None else None


def check_columns(config: Any) -> None:
    """Check, before data are read, that a model that reads a knowledge graph is given one.

    Raises:
        InputError: ``load_col`` leaves the graph out, or ``preload_weight`` the vectors.
    """
    model, columns = config["model"], config["load_col"]
    if config["MODEL_TYPE"].name != "KNOWLEDGE" and model not in _VECTORS:
        return
    for suffix, usual in (
        ("kg", ["head_id", "relation_id", "tail_id"]),
        ("link", ["item_id", "entity_id"]),
    ):
        if isinstance(columns, dict) and suffix not in columns:
            raise InputError(
                f"model '{model}' reads a knowledge graph, but load_col names no columns of .{suffix}; add "
                f"'{suffix}': {usual}"
            )
    for name in _VECTORS.get(model, []):
        if name not in (config["preload_weight"] or {}):
            kind = "entities" if name == "ent_id" else "relations"
            raise InputError(
                f"model '{model}' reads vectors of {kind}, which preload_weight must name by '{name}', such as "
                f"{{'{name}': '{name[:3]}_vec'}}; the file with both columns goes into additional_feat_suffix and load_col, "
                f"and alias_of_{'entity' if name == 'ent_id' else 'relation'}_id must list '{name}'"
            )


def check_negatives(config: Any) -> None:
    """Check that rows are sampled in a way that clients have, and that a model that ranks pairs has some.

    Raises:
        InputError: ``train_neg_sample_args`` says otherwise.
    """
    sampling = config["train_neg_sample_args"]
    sampled = sampling["distribution"] != "none"
    if (
        config["strategy"] != "central"
        and sampled
        and (sampling["distribution"] == "popularity" or sampling["dynamic"])
    ):
        raise InputError(
            "train_neg_sample_args: clients sample negatives uniformly; popularity and dynamic are central"
        )
    # With a loss over all items, such as CE, a model reads no sampled ones.
    kind = config["MODEL_INPUT_TYPE"]  # None: of a loss that the model does not know, which is told when it is built
    pairs = kind is not None and kind.name == "PAIRWISE" and config["loss_type"] in (None, "BPR")
    if pairs and not sampled and config.outline.reads_negatives:
        raise InputError(
            f"model '{config['model']}' learns to rank an item above a sampled one, but train_neg_sample_args samples none; "
            "leave it unset, or set {distribution: uniform, sample_num: 1}"
        )


def check_has_clients(config: Any) -> None:
    """Raise :class:`InputError` for a config without clients, where there have to be some."""
    if not config.federated:
        raise InputError(f"strategy is {config['strategy']}, which has no clients; a federation has")


def check_stages(config: Any) -> None:
    """Check that codecs are among the stages, behind those that read numbers.

    Raises:
        InputError: they are not.
    """
    codecs, stages = config["codecs"], config["stages"]
    if not (config.federated and codecs):
        return
    if "codecs" not in stages:
        raise InputError(
            f"codecs is {shown(codecs)}, but stages is {shown(stages)}; name codecs where they belong among them"
        )
    behind = stages[stages.index("codecs") + 1 :]
    if late := [stage for stage in behind if "reads_numbers" in traits_of_stage(stage)]:
        raise InputError(
            f"stages is {shown(stages)}, but behind codecs={shown(codecs)} there are codes, and {listed(late)} reads numbers; "
            f"name {listed(late)} before codecs"
        )
