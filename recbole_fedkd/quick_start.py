"""Run a model: ``run_recbole_fedkd`` with RecBole's signature and result keys, and loading of what it saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_fedkd.compat import log_arguments_placed, pickles_refused, recbole_warnings_silenced

# isort: split
import numpy as np
import pandas as pd
import torch
from recbole.utils import init_seed

from recbole_fedkd.checkpoint.reading import Checkpoint, best_checkpoint, last_and_best, places_beside
from recbole_fedkd.checkpoint.resumed import resumed_config
from recbole_fedkd.checkpoint.state import load_parameters
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.config.fitted import fit_features, fit_rows
from recbole_fedkd.config.given import read_given
from recbole_fedkd.config.plugins import faults_told
from recbole_fedkd.data.creation import create_dataset, samples_made
from recbole_fedkd.data.dataset import user_base_of
from recbole_fedkd.data.features import features_of
from recbole_fedkd.data.fingerprint import Fingerprint
from recbole_fedkd.data.importing import frame_as_dataset
from recbole_fedkd.data.known import check_dataset
from recbole_fedkd.data.partition import check_clients_per_round, held_out_clients, partition_users
from recbole_fedkd.data.preparation import Loaders, data_preparation
from recbole_fedkd.engine.fleet.population import CompactPopulation
from recbole_fedkd.errors import InputError, TrainingError, listed
from recbole_fedkd.evaluation import EvaluationData, evaluation_data, with_candidates
from recbole_fedkd.federation.members import held_out_users, others, poison, wrong_users
from recbole_fedkd.federation.parties import federated_class
from recbole_fedkd.federation.together import build_population, save_federation
from recbole_fedkd.files import check_folders, writable_file, writable_folder, write_json
from recbole_fedkd.limits import check_limits, memory_watched, processor_settings
from recbole_fedkd.logs import board_errors_raised, run_log
from recbole_fedkd.model import (
    building,
    check_data,
    check_labels,
    normalise_single_rows,
)
from recbole_fedkd.record import environment, write_run_record
from recbole_fedkd.result import (
    cold_rows,
    engine_that_ran,
    floats,
    log_result,
    partition_summary,
    spread,
)
from recbole_fedkd.rounds import course, epsilon
from recbole_fedkd.strangers import judge_strangers
from recbole_fedkd.telling import RoundLines, Tell, end_lines, floors, plan, start_lines
from recbole_fedkd.trainer import (
    CheckpointTrainer,
    FedKDTrainer,
    new_run_name,
    trainer_class,
)


@board_errors_raised()
def run_recbole_fedkd(
    model: str | type | None = None,
    dataset: str | pd.DataFrame | None = None,
    config_file_list: list[str] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    saved: bool = True,
    queue: Any = None,
    *,
    command_line: Mapping[str, Any] | None = None,
    on_round: Callable[[int, int, dict[str, Any]], None] | None = None,
    tell: Tell | None = None,
) -> dict[str, Any]:
    """Train a model on a dataset and judge it; the first six arguments are those of RecBole's ``run_recbole``.

    Args:
        model: model name or class.
        dataset: dataset name; or a pandas data frame with a row per interaction, of which a dataset is made that lies in
            ``data_path`` (``dataset/``) beside the others, and without ``saved`` vanishes after the run.
        config_file_list: config files.
        config_dict: keys that win over the files.
        saved: whether to write checkpoints; without them the last epoch is judged, not the best.
        queue: a queue that the result is also put into.
        command_line: keys that win over ``config_dict``, texts or values; ``sys.argv`` is never read here.
        on_round: called after every epoch (one round of a federation) with its number from 1, the number of epochs and
            its record: seconds, loss, bytes and validation metrics.
        tell: takes the lines that a person wants to read, such as ``print``: what is about to run, a line per round, the result
            and its cost. Logging is nobody's but the caller's: RecBole's records go to the run's own file, and to whom the
            caller has told to listen.

    Returns:
        RecBole's ``best_valid_score``, ``valid_score_bigger``, ``best_valid_result`` and ``test_result``, and
        ``communication`` (bytes), ``timing`` (seconds), ``partition``, ``protocols`` (result key to how it was judged),
        ``rounds`` (one record each, counted from 1), ``best_round``, ``engine`` (that ran the clients, None centrally) and
        ``engine_fallback`` (why not the one asked for, else None), ``strangers`` (of ``holdout_clients``, else None: how many
        clients and users, and the same metrics of these), ``floors`` (what ``Bias`` or ``Pop`` reaches; empty without
        ``tell``), ``cold`` (test rows of a user or an item without a training row: how many, and their error; None where rows
        carry no labels), ``spread`` (how much predictions and labels vary), ``epsilon`` (spent under ``privacy``, else None),
        ``user_metrics`` (if the key of that name is True: lists ``user``, in a federation ``client``, and one per metric),
        ``environment``, ``config`` and ``run_folder``.

    Raises:
        InputError: bad input of any kind, in one sentence.
    """
    given = read_given(config_file_list, config_dict, command_line)
    if isinstance(dataset, pd.DataFrame):
        with frame_as_dataset(dataset, given, saved) as (name, folder):
            lies = {**(command_line or {}), "data_path": folder}
            keys = (config_file_list, config_dict, saved, queue)
            return run_recbole_fedkd(model, name, *keys, command_line=lies, on_round=on_round, tell=tell)
    config, checkpoints = _configured(given, model, dataset, config_file_list, config_dict, command_line)
    result_file = writable_file(config["result_file"], "result_file") if config["result_file"] is not None else None
    config.keeps_logs = saved
    if saved:
        check_folders(config)
    with run_log(config), faults_told(config["plugins"] or ()):
        result = _run(config, checkpoints, given, saved, (on_round, tell), result_file)
    if queue is not None:
        queue.put(result)
    return result


@board_errors_raised()
def run_without_logs(config_file_list: list[str], command_line: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`run_recbole_fedkd` for the best checkpoint in ``checkpoint_dir`` and nothing in the working folder."""
    given = read_given(config_file_list, None, command_line)
    config, _ = _configured(given, None, None, config_file_list, None, command_line)
    with faults_told(config["plugins"] or ()):
        return _run(config, None, given, True, (None, None), None)


def _run(
    config: FedKDConfig,
    checkpoints: Any,
    given: Mapping[str, Any],
    saved: bool,
    told_to: tuple[Callable[[int, int, dict[str, Any]], None] | None, Tell | None],
    result_file: Path | None,
) -> dict[str, Any]:
    """The run of a config; arguments and result as of :func:`run_recbole_fedkd`."""
    logger, (on_round, tell) = getLogger(), told_to
    logger.info(config)
    if config.unread_keys and tell is None:
        logger.warning(f"model {config['model']} does not read: {listed(config.unread())}")
    with memory_watched(config):
        data = _prepare_data(config)
        trainer = _prepare_trainer(config, data)
    loaders, evaluations = data.loaders, data.evaluations
    logger.info(trainer.model)
    trainer.observers += [on_round] if on_round is not None else []
    show_progress, below = bool(config["show_progress"]), {}
    with _told_how_to_go_on(trainer, saved), processor_settings(config["torch_threads"]), memory_watched(config):
        if tell is not None:
            splits = tuple(loader._dataset for loader in loaders)
            for line in start_lines(config, data.dataset, splits, trainer):
                tell(line)
            metric, bigger = config["valid_metric"].lower(), config["valid_metric_bigger"]
            trainer.observers.append(RoundLines(trainer.epoch_word, metric, bigger, tell))
        if checkpoints is not None:
            trainer.resume_checkpoint(config["resume"], checkpoints)
        if isinstance(trainer, FedKDTrainer):
            logger.info(plan(config, trainer))
            trainer.begin()
            if saved:
                folder = writable_folder(trainer.run_folder, f"run folder '{trainer.run_folder}'")
                save_federation(folder, loaders[0]._dataset, trainer.model.client_of_user)
        best_valid_score, best_valid_result = trainer.fit(
            loaders[0], evaluations[0], saved=saved, show_progress=show_progress
        )
        test_result, of_users = _judged(trainer, evaluations[1], saved)
        judged_rows, strangers = trainer.judged_rows, None
        if data.strangers is not None and isinstance(trainer, FedKDTrainer):
            strangers = judge_strangers(trainer, loaders[0]._dataset, data.strangers, best=saved)
        if tell is not None:
            below = floors(config, trainer, loaders[0]._dataset, evaluations[1])
    result: dict[str, Any] = {
        "best_valid_score": float(best_valid_score) if best_valid_result is not None else None,
        "valid_score_bigger": bool(config["valid_metric_bigger"]),
        "best_valid_result": floats(best_valid_result),
        "test_result": floats(test_result),
        **course(trainer.rounds, trainer.best_epoch),
        **engine_that_ran(trainer),
        "partition": partition_summary(config, trainer, loaders[0]._dataset),
        "strangers": strangers,
        "floors": below,
        "cold": cold_rows(config, judged_rows),
        "spread": spread(config, judged_rows),
        "epsilon": epsilon(trainer.rounds),
        "user_metrics": of_users if config["user_metrics"] else None,
        "environment": environment(),
        "protocols": {name: trainer.protocols[name] for name in test_result or {}},
        "config": config.plain_values(),
        "run_folder": str(trainer.run_folder) if saved else None,
    }
    with _told_how_to_go_on(trainer, saved):
        log_result(config, result)
        if saved:
            keys = {name: value for name, value in given.items() if name != "resume"}
            write_run_record(trainer.run_folder, keys, {**result, "user_metrics": of_users})
        if result_file is not None:
            write_json(result, result_file)
            logger.info(f"Result written to {result_file}")
    if tell is not None:
        tell("\n".join(end_lines(config, result, trainer.epoch_word, getattr(trainer, "budget_is_spent", False))))
    return result


def _judged(trainer: CheckpointTrainer, evaluation: EvaluationData, saved: bool) -> tuple[Any, Any]:
    """Test metrics, and those of single users: the record of a federation knows its clients by them."""
    wanted = trainer.keeps_users
    trainer.keeps_users = wanted or (saved and isinstance(trainer, FedKDTrainer))
    result = trainer.evaluate(evaluation, load_best_model=saved, show_progress=bool(trainer.config["show_progress"]))
    trainer.keeps_users = wanted
    return result, trainer.user_metrics


def _configured(
    given: Mapping[str, Any],
    model: str | type | None,
    dataset: str | None,
    config_file_list: list[str] | None,
    config_dict: Mapping[str, Any] | None,
    command_line: Mapping[str, Any] | None,
) -> tuple[FedKDConfig, Any]:
    """The config of a run, and the checkpoints that it goes on with; None of a new one."""
    keys, checkpoints = (model, dataset, config_file_list, config_dict, command_line), None
    if not given.get("resume"):
        config = FedKDConfig(*keys)
    else:
        source = str(given["resume"])
        checkpoints = last_and_best(source)
        config = resumed_config(checkpoints[0], *keys, source)
        config.fingerprint = _known_data(checkpoints[0])
    check_dataset(config["dataset"], Path(config["data_path"]))
    config["run_name"] = new_run_name(config)
    return config, checkpoints


@contextmanager
def _told_how_to_go_on(trainer: CheckpointTrainer, saved: bool) -> Iterator[None]:
    """Whoever stops a run, or has no room on the disk for it, reads in a note to the exception how it goes on.

    Raises:
        TrainingError: for an error of the operating system, such as a full disk.
    """
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        getLogger().info("The run has ended before its time", exc_info=error)
        note = trainer.how_to_go_on() if saved else "without checkpoints, it can only be started again"
        if isinstance(error, OSError):
            where = f" ('{error.filename}')" if error.filename else ""
            stopped_by = TrainingError(f"the run cannot go on: {error.strerror or error}{where}")
            stopped_by.add_note(note)
            raise stopped_by from error
        stopped = isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, OSError)
        if stopped or note.startswith("--resume") or not isinstance(error, InputError):
            error.add_note(note)
        raise


def load_data_and_model(
    model_file: str | Path,
    config_dict: Mapping[str, Any] | None = None,
    model: type | None = None,
    device: torch.device | None = None,
) -> tuple[FedKDConfig, Any, Any, Any, EvaluationData, EvaluationData]:
    """Rebuild config, data and trained model from a checkpoint, with the six results of RecBole's function of this name.

    Args:
        model_file: a checkpoint file, or a run folder, which stands for its best checkpoint.
        config_dict: keys to change, such as ``data_path``.
        model: class of a model of your own; not needed if the key ``plugins`` names its module.
        device: where the model computes; default: what ``gpu_id`` says.

    Returns:
        Config, model (ready to predict), dataset, training loader, and validation and test data for the trainer's
        ``evaluate`` and for RecBole's ``full_sort_scores`` and ``full_sort_topk``. No file is written.

    Raises:
        InputError: the checkpoint cannot be used, or the data are not those that it was made from.
    """
    checkpoint = best_checkpoint(model_file)
    config = resumed_config(checkpoint, model, None, None, config_dict, None, model_file)
    config.fingerprint = _known_data(checkpoint)
    config.final_config_dict["device"] = device or config["device"]
    data = _prepare_data(config)
    loaded, _ = _prepare_model(config, data)
    if isinstance(loaded, CompactPopulation):
        build_trainer(config, loaded).prepare(data.loaders[0])  # the strategy says what a client keeps for itself
    load_parameters(loaded, checkpoint.state, checkpoint.file)
    loaded.eval()
    return config, loaded, data.dataset, data.loaders[0], *data.evaluations


def _known_data(checkpoint: Checkpoint) -> Fingerprint:
    """What the data of a checkpoint are held against.

    Raises:
        InputError: it has no fingerprint of them, as where the run's caller made the data.
    """
    known = checkpoint.state["data"]
    if known is None:
        raise InputError(
            f"checkpoint '{checkpoint.file}' does not know its data, which were not read from files; build the model on the "
            "same data, and hand the checkpoint to its trainer's resume_checkpoint or load_model"
        )
    return Fingerprint(known, partial(places_beside, checkpoint.file), str(checkpoint.file))


def build_trainer(config: FedKDConfig, model: Any) -> CheckpointTrainer:
    """The trainer of a model, such as one that :func:`load_data_and_model` returned."""
    return trainer_class(config)(config, model)


@dataclass(frozen=True)
class _Data:
    """A config's data, split and dealt out.

    Attributes:
        dataset: all of it.
        loaders: of training, validation and test rows.
        evaluations: protocols of validation and test.
        client_of_user: client of every user id, ``[users]``, -1 for padding; None without a federation.
        strangers: protocols of the test rows of clients that are held out; None where none is.
    """

    dataset: Any
    loaders: Loaders
    evaluations: tuple[EvaluationData, EvaluationData]
    client_of_user: torch.Tensor | None
    strangers: EvaluationData | None = None


@recbole_warnings_silenced()
@pickles_refused()
def _prepare_data(config: FedKDConfig) -> _Data:
    """The data of a config; RecBole's order of seeding, on which its splits depend."""
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    getLogger().info(dataset)
    fit_rows(config, len(dataset.inter_feat))
    features = features_of(config, dataset)
    fit_features(config, bool(features.context))
    if features:
        getLogger().info(features)
    loaders = _split(config, dataset)
    train_dataset = loaders[0]._dataset
    check_labels(config, train_dataset)
    check_limits(config, train_dataset)
    check_data(config, train_dataset)
    client_of_user = _client_of_user(config, train_dataset) if config.federated else None
    apart, wrong = held_out_users(config, client_of_user), wrong_users(config, client_of_user)
    judged = others(apart, wrong)
    with samples_made(config, dataset):
        evaluations = (
            evaluation_data(config, dataset, loaders, "valid", features.context, judged),
            evaluation_data(config, dataset, loaders, "test", features.context, judged),
        )
        strangers = None
        if apart is not None:
            strangers = evaluation_data(config, dataset, loaders, "test", features.context, apart)
    poison(config, train_dataset, wrong)
    return _Data(dataset, loaders, evaluations, client_of_user, strangers)


@recbole_warnings_silenced()
@pickles_refused()
def _prepare_model(config: FedKDConfig, data: _Data) -> tuple[torch.nn.Module, str | None]:
    """The model of a config, untrained, a network or the population of a federation; and why another engine runs it."""
    train_dataset, client_of_user = data.loaders[0]._dataset, data.client_of_user
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    if client_of_user is None:
        return _central_model(config, train_dataset), None
    return build_population(config, train_dataset, client_of_user)


def _prepare_trainer(config: FedKDConfig, data: _Data) -> CheckpointTrainer:
    """Trainer of a config with its model."""
    model, fallback = _prepare_model(config, data)
    trainer = build_trainer(config, model)
    if isinstance(trainer, FedKDTrainer):
        trainer.fallback = fallback
        trainer.engine = trainer.prepare(data.loaders[0])
    return trainer


def _prepare(config: FedKDConfig) -> tuple[CheckpointTrainer, Loaders, tuple[EvaluationData, EvaluationData]]:
    """Trainer of a config with its model, loaders and protocols."""
    data = _prepare_data(config)
    return _prepare_trainer(config, data), data.loaders, data.evaluations


def _client_of_user(config: FedKDConfig, train_dataset: Any) -> torch.Tensor:
    """Client of every user id ``[users]``; -1 of the padding."""
    clients = partition_users(config["partition"], user_base_of(train_dataset), config["seed"], config)
    count = int(clients.max()) + 1
    check_clients_per_round(config, count - len(held_out_clients(count, config["holdout_clients"], config["seed"])))
    return torch.from_numpy(np.concatenate([[-1], clients]))


def _central_model(config: FedKDConfig, train_dataset: Any) -> torch.nn.Module:
    """One model on all data, on its device."""
    with building(config), log_arguments_placed():
        model: torch.nn.Module = federated_class(config)(config, train_dataset).to(config["device"])
    normalise_single_rows(model)
    return model


def _split(config: FedKDConfig, dataset: Any) -> tuple[Any, Any, Any]:
    """Loaders of the splits of a dataset, held against those of a checkpoint where the run goes on with one."""
    with samples_made(config, dataset):
        loaders: tuple[Any, Any, Any] = with_candidates(config, dataset, data_preparation(config, dataset))
    splits = zip(("train", "valid", "test"), (loader._dataset.inter_feat for loader in loaders), strict=True)
    dataset.fingerprint.take_splits(splits, (dataset.uid_field, dataset.iid_field))
    return loaders


__all__ = ["build_trainer", "check_dataset", "create_dataset", "load_data_and_model", "run_recbole_fedkd"]
