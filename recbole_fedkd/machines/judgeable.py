"""What can be judged where the data are, and what a config asks for that cannot; nothing here needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recbole_fedkd.errors import InputError, listed

if TYPE_CHECKING:
    from recbole_fedkd.data.schema import DataSchema

RANKED = ("hit", "mrr", "ndcg", "recall", "precision", "map")
"""Metrics of single users, at every place of a list, that a mean over users is made of."""

PROTOCOLS = {
    "mae": "expected label against the label of every held-out row",
    "nmae": "expected label against the label of every held-out row, over the range of the labels",
    "rmse": "expected label against the label of every held-out row",
    "accuracy": "likeliest label against the label of every held-out row",
    "logloss": "probability of a click against whether there was one, of every held-out row",
    "auc": "probability of a click against whether there was one, of all held-out rows, by histograms of 4096 bins",
    "labelledndcg": "order of every user's own held-out rows by expected label",
    **dict.fromkeys(RANKED, "full sort of all items for every user, relevant: its held-out rows"),
}
"""Metrics that sums over rows or users suffice for, and how each comes about."""


def asked_of(config: Any) -> set[str]:
    """Metrics that a config asks for, by RecBole's names in results."""
    return {name.lower() for name in config.judged_metrics}


def check_judgeable(config: Any, schema: DataSchema | None = None) -> None:
    """Raise :class:`InputError` for a config whose metrics, or whose model, are not judged by sums; ``schema``: if known."""
    metrics = sorted(asked_of(config))
    ranked = [name for name in metrics if name in RANKED]
    if not config.attentive:
        raise InputError(f"model '{config['model']}' is not judged where the data are; models of this package are")
    if config["label_mode"] == "implicit" and (
        values := [name for name in metrics if name in PROTOCOLS.keys() - set(RANKED)]
    ):
        raise InputError(
            f"label_mode is implicit, of which every held-out row is a click, and metrics {listed(values)} judge rows of both "
            f"kinds; set metrics to some of {listed(RANKED)}, use label_mode=rating or threshold, or engine=processes"
        )
    sampled = set(config.modes_of("RANKING").values()) - {"full"}
    if ranked and sampled:
        raise InputError(
            f"eval_args.mode is {listed(sorted(sampled))}, of which candidates are drawn by a user's token, which is in no "
            f"file of a party; rank all items (eval_args.mode=full), or use engine=processes"
        )
    if ranked and schema is not None and schema.context:
        raise InputError(
            f"the model reads {listed([column.name for column in schema.context])} of a row, and parties rank in no context; "
            "leave these columns out, or use engine=processes"
        )
    if holdout := config["holdout_clients"]:
        raise InputError(
            f"holdout_clients is {holdout}, and clients that come when training is over are judged in one place alone; "
            "leave it out, or run it with engine=processes"
        )
    if unknown := [name for name in metrics if name not in PROTOCOLS]:
        raise InputError(
            f"metrics {listed(unknown)} are not sums over rows or users, so parties cannot judge them apart; set metrics to "
            f"some of {listed(PROTOCOLS)}"
        )
