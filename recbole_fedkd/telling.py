"""What a run says to the person in front of it: what it is about to do, how it goes, what came out and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from shlex import quote
from typing import Any

from recbole.evaluator import metric_types
from recbole.utils import EvaluatorType

from recbole_fedkd.data.dataset import FedKDDataset
from recbole_fedkd.data.schema import label_values
from recbole_fedkd.errors import listed
from recbole_fedkd.evaluation import EvaluationData
from recbole_fedkd.model import Bias
from recbole_fedkd.model.compiled import tell_of_compiling
from recbole_fedkd.privacy.settings import PrivacySettings
from recbole_fedkd.result import flat_sentence, floats, result_table
from recbole_fedkd.trainer import CheckpointTrainer, FedKDTrainer

Tell = Callable[[str], None]

LARGEST_FLOOR = 3_000_000
"""Training rows up to which a floor takes seconds."""


def start_lines(config: Any, dataset: Any, splits: tuple[Any, Any, Any], trainer: CheckpointTrainer) -> list[str]:
    """Data, split, method, and what is not read: a few lines before the first round."""
    users, items, rows = dataset.user_num - 1, dataset.item_num - 1, len(dataset.inter_feat)
    training, validation, test = (len(split) for split in splits)
    labels = ""
    if config["label_mode"] is not None:
        values = label_values(dataset)
        kind = {"rating": "ratings", "threshold": f"rating >= {config['rating_threshold']}", "implicit": "interactions"}
        span = (
            f" {', '.join(f'{value:g}' for value in values)}"
            if config["label_mode"] == "rating" and len(values) < 12
            else ""
        )
        labels = f", labels: {kind[config['label_mode']]}{span}"
    lines = [
        f"data     {config['dataset']}: {users:,} users, {items:,} items, {rows:,} interactions{labels}",
        f"split    {training:,} training, {validation:,} validation and {test:,} test rows ({split_words(config)})",
    ]
    if isinstance(trainer, FedKDTrainer):
        lines.append(f"method   {config['model']}: {plan(config, trainer)}")
    else:
        lines.append(
            f"method   {config['model']} on all data, up to {_counted(trainer.epochs, 'epoch')}, {config.made_by()}"
        )
    if config.unread_keys:
        lines.append(f"not read {listed(config.unread())}")
    return lines


def split_words(config: Any) -> str:
    """How rows are held out."""
    arguments = config["eval_args"]
    if config["benchmark_filename"]:
        return "files of the dataset"
    ((kind, held_out),) = list(arguments["split"].items())[:1]
    order = "the latest" if arguments["order"] == "TO" else "at random"
    if kind == "LS":
        return f"leave-one-out, {order}"
    shares = "/".join(f"{100 * share / sum(held_out):g}" for share in held_out)
    return f"{shares} %, {order}{', by user' if arguments['group_by'] == 'user' else ''}"


def plan(config: Any, trainer: FedKDTrainer) -> str:
    """One line on the federation that is about to run."""
    assert trainer.engine is not None
    sizes = list(trainer.engine.samples.values())
    share = "" if config["clients_per_round"] is None else f", {config['clients_per_round']} of them in a round"
    exchange = trainer.engine.server.strategy.exchange_rounds
    cut = (
        f"; the exchange takes {exchange} rounds and training begins after it: set epochs to more than that, or fewer "
        "sketch_passes and em_steps"
        if exchange >= trainer.epochs
        else ""
    )
    return (
        f"strategy {config['strategy']} on engine {trainer.engine.name}: {len(sizes)} clients{share} (partition "
        f"{config['partition']}) with {min(sizes)} to {max(sizes)} samples, up to {_counted(trainer.epochs, 'round')} of "
        f"{_counted(config['local_epochs'], 'local epoch')}{cut}"
    )


class RoundLines:
    """A line for every round: loss, validation, bytes, and how much time is left at most.

    Args:
        word: ``round`` or ``epoch``.
        metric: the validation metric, as results name it.
        bigger: whether more of it is better.
        tell: takes each line.
    """

    def __init__(self, word: str, metric: str, bigger: bool, tell: Tell) -> None:
        self.word, self.metric, self.bigger, self.tell = word, metric, bigger, tell
        self.best: float | None = None
        self.before: float = time.perf_counter()
        self.taken: list[float] = []
        tell_of_compiling(tell)

    def __call__(self, number: int, rounds: int, record: Mapping[str, Any]) -> None:
        """Tell one round; arguments as of ``on_round``."""
        now = time.perf_counter()
        self.taken.append(now - self.before)
        self.before = now
        value = (record["valid"] or {}).get(self.metric)
        better = value is not None and (self.best is None or (value > self.best if self.bigger else value < self.best))
        self.best = value if better else self.best
        parts = [f"{self.word} {number:>{len(str(rounds))}}/{rounds}", f"loss {record['loss']:.4f}"]
        if value is not None:
            parts.append(f"{self.metric} {value:.4f}{' *' if better else '  '}")
        moved = (record["bytes_down"] or 0) + (record["bytes_up"] or 0)
        if moved:
            parts.append(f"{moved:,} bytes")
        if record.get("epsilon") is not None:
            parts.append(f"epsilon {record['epsilon']:.4g}")
        left = (rounds - number) * sum(self.taken[-5:]) / len(self.taken[-5:])
        parts.append(f"{self.taken[-1]:.1f} s" + (f", at most {duration(left)} left" if number < rounds else ""))
        self.tell("  ".join(parts))


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def end_lines(config: Any, result: Mapping[str, Any], word: str, budget_is_spent: bool = False) -> list[str]:
    """The result with its protocols, its floors and what it cost, and what may be done next."""
    lines = ["", table(result), "", f"cost     {cost(result, word)}"]
    strangers = result["strangers"]
    if strangers is not None:
        lines += ["", f"strangers ({strangers['clients']} clients, {strangers['users']} users):"]
        lines.append(result_table(strangers["test_result"], result["protocols"]))
    if result["spread"] is not None and result["spread"]["flat"]:
        lines.append(f"warning  {flat_sentence(result['spread'])}")
    privacy = PrivacySettings.of(config)
    if privacy is not None and result["epsilon"] is not None:
        end = "; its budget is spent, no further round is possible" if budget_is_spent else ""
        lines.append(f"privacy  epsilon {result['epsilon']:.4g} at delta {privacy.delta:g}{end}")
    folder = result["run_folder"]
    if folder is not None:
        code = " " + quote(f"--plugins={','.join(config['plugins'])}") if config["plugins"] else ""
        # More epochs do nothing for a run that has stopped early.
        stopped = len(result["rounds"]) < config["epochs"] and config["stopping_step"]
        more = f"stopping_step={2 * config['stopping_step']}" if stopped else f"epochs={2 * config['epochs']}"
        lines += [
            f"folder   {folder}, log: log/{config['model']}/{config['run_name']}.log",
            f"next     recbole-fedkd recommend {quote(str(folder))} --users=all -k 10 --exclude-seen{code}",
        ]
        if not budget_is_spent and not hasattr(config.model_class, "sums"):  # which has nothing more to train
            lines.append(f"         recbole-fedkd {quote(f'--resume={folder}')} --{more}{code}")
    return lines


def table(result: Mapping[str, Any]) -> str:
    """The test result, with its floors beside it."""
    return result_table(result["test_result"] or {}, result["protocols"], result["floors"])


def cost(result: Mapping[str, Any], word: str) -> str:
    """Rounds, bytes and seconds of a run."""
    timing, communication, best = result["timing"], result["communication"], result["best_round"]
    parts = [_counted(timing["rounds"], word) + (f", the best {best}" if best is not None else "")]
    if communication["total_bytes"]:
        until = sum((record["bytes_down"] or 0) + (record["bytes_up"] or 0) for record in result["rounds"][:best])
        parts.append(f"{communication['bytes_up']:,} bytes up, {communication['bytes_down']:,} down")
        parts += [f"{until:,} until the best"] if best is not None else []
    parts.append(f"{timing['training_seconds']:.1f} s of training, {timing['seconds_per_round']:.2f} per {word}")
    return "; ".join(parts)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' if number != 1 else ''}"


def floors(config: Any, trainer: CheckpointTrainer, training: Any, test: EvaluationData) -> dict[str, dict[str, float]]:
    """What a model of a few sums reaches on the same test rows, where that is cheap.

    ``Bias`` where rows have ratings; else ``Pop``, by the ranking metrics alone: its counts are no labels.
    """
    if not test or len(training) > LARGEST_FLOOR or config["model"] in ("Bias", "Pop"):
        return {}
    rated = isinstance(training, FedKDDataset) and config["label_mode"] in ("rating", "threshold")
    kind: Any = Bias
    if not rated:  # RecBole's Pop lies in a package that imports sklearn
        from recbole_fedkd.model.without_gradients import Pop

        kind = Pop
    floor = kind(config, training).to(config["device"]).eval()
    judged = test if rated else ranking_alone(test)
    kept = trainer.model, trainer.protocols, trainer.user_metrics, trainer.judged_rows, trainer.keeps_users
    trainer.model, trainer.protocols, trainer.keeps_users = floor, {}, False
    try:
        metrics = floats(trainer.evaluate(judged, load_best_model=False))
    finally:
        trainer.model, trainer.protocols, trainer.user_metrics, trainer.judged_rows, trainer.keeps_users = kept
    return {type(floor).__name__: metrics} if metrics else {}


def ranking_alone(test: EvaluationData) -> EvaluationData:
    """The protocols that rank."""

    def ranks(protocol: Any) -> bool:
        return all(metric_types[name.lower()] == EvaluatorType.RANKING for name in protocol.config["metrics"])

    return EvaluationData(test.phase, [protocol for protocol in test if ranks(protocol)], test.train_data, test.ranking)
