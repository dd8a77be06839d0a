"""RecBole's ``Trainer`` with safe checkpoints, resume and several protocols.

RecBole writes a checkpoint only when the best epoch improves, pickles the config (and, for DIN, the training set) into
it, and resumes from the best epoch. Here ``best.pth`` and ``last.pth`` are plain dictionaries in a folder of the run's
own, written to a temporary file and renamed, and a resumed run goes on bit for bit after its last epoch.
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from recbole.trainer import PretrainTrainer, Trainer
from recbole.utils import get_local_time, set_color
from torch import Tensor, nn
from torch.optim import Optimizer

from recbole_fedkd.checkpoint.growing import CLIENTS, GrowingFile, read_growing
from recbole_fedkd.checkpoint.large import LargeTensors
from recbole_fedkd.checkpoint.reading import (
    CHECKPOINT_VERSION,
    ROWS,
    Checkpoint,
    best_checkpoint,
    last_and_best,
    read_checkpoint,
    take_away_unsaved,
    write_places,
)
from recbole_fedkd.checkpoint.resumed import check_same_config
from recbole_fedkd.checkpoint.sealed import digest, sealed, write_sealed
from recbole_fedkd.checkpoint.state import check_optimizer, load_parameters, random_state, restore_random, restored
from recbole_fedkd.compat import recbole_warnings_silenced
from recbole_fedkd.data.fingerprint import Fingerprint
from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.evaluation import EvaluationData, Judge, JudgedRows, LabelCollector, merged
from recbole_fedkd.files import BEST, LAST, remove_temporaries, writable_folder, write_bytes
from recbole_fedkd.finite import NotFiniteError, check_trained, learner_of
from recbole_fedkd.limits import refuse_mixed_precision
from recbole_fedkd.logs import own_folders
from recbole_fedkd.model.learner import build_optimizer
from recbole_fedkd.rounds import (
    Epoch,
    EpochRecord,
    NumberedBoard,
    NumberedCurves,
    NumberedLogger,
    add_clients,
    client_line,
    number_of,
    record_of,
    without_clients,
)


def new_run_name(config: Any) -> str:
    """Name of a run; two runs that start in the same second do not share it."""
    return f"{config['model']}-{config['dataset']}-{get_local_time()}-{uuid.uuid4().hex[:8]}"


class CheckpointTrainer(Trainer):
    """RecBole's trainer with plain checkpoints, exact resume, and evaluation by any number of protocols.

    It trains any RecBole model centrally; mixed in front of RecBole's special trainers by :func:`trainer_class`.

    Args:
        config: the run's ``FedKDConfig``.
        model: the model.
    """

    config: Any
    eval_type: Any
    logger: Any
    tensorboard: Any
    wandblogger: Any
    epoch_word = "epoch"

    def __init__(self, config: Any, model: nn.Module) -> None:
        with own_folders(config):
            super().__init__(config, model)
        self.logger = NumberedLogger(self.logger)
        self.tensorboard = NumberedCurves(self.tensorboard)
        self.wandblogger = NumberedBoard(self.wandblogger)
        self.run_folder = Path(config["checkpoint_dir"]) / (config["run_name"] or new_run_name(config))
        self.saved_model_file = str(self.run_folder / BEST)
        self.rounds: list[EpochRecord] = []
        self._judges: dict[str, Judge] = {}
        self._train_data: Any = None
        self._resumed_random: dict[str, Any] | None = None
        self._latest_valid_result: dict[str, float] | None = None
        self._saving = self._has_valid_data = False
        self._resumed_from: tuple[Checkpoint, Checkpoint | None] | None = None
        self._best_digest: str | None = None
        self._of_clients = GrowingFile()
        self._large = LargeTensors(bool(config["clients_per_round"]))  # of clients that sit out nothing changes
        self._fingerprint: Fingerprint | None = None
        self.best_epoch: int | None = None
        self.protocols: dict[str, str] = {}
        self.keeps_users = bool(config["user_metrics"])
        self.user_metrics: dict[str, list[float]] | None = None
        self.judged_rows: JudgedRows | None = None
        self.observers: list[Callable[[int, int, dict[str, Any]], None]] = []
        if self.pretrains:
            self.epochs = config["pretrain_epochs"]
        # RecBole takes min(eval_step, epochs): a run stopped early would evaluate where the whole run does not.
        self.eval_step = config["eval_step"]
        self.eval_collector = self._collector(config)

    def _build_optimizer(self, **kwargs: Any) -> Optimizer:
        if str(self.learner).lower() == "sparse_adam" or kwargs:
            if self.config["learning_rates"]:
                raise InputError(
                    f"learning_rates is set, but the optimiser of model '{self.config['model']}' with learner "
                    f"'{self.learner}' is RecBole's own, which has one learning rate"
                )
            optimizer: Optimizer = super()._build_optimizer(**kwargs)
            return optimizer
        return build_optimizer(self.config, self.model, "AdamToSGD")

    @property
    def pretrains(self) -> bool:
        """Whether this run is a stage of pretraining (S3Rec, RaCT), in which RecBole judges nothing between epochs."""
        return isinstance(self, PretrainTrainer) and self.model.train_stage != "finetune"

    def _collector(self, config: Any, labels: Sequence[float] = (0.0, 1.0)) -> LabelCollector:
        own: Tensor | None = getattr(self.model, "label_values", None)
        values = own if own is not None else torch.tensor(labels)
        return LabelCollector(config, values, self.config.made_by(), self._client_of_user())

    def _check_nan(self, loss: Tensor) -> None:
        if not bool(torch.isfinite(loss)):
            check_trained(float(loss.detach()), {}, learner_of(self.optimizer))

    # Training

    @recbole_warnings_silenced()
    def fit(
        self,
        train_data: Any,
        valid_data: Any = None,
        verbose: bool = True,
        saved: bool = True,
        show_progress: bool = False,
        callback_fn: Callable[[int, float], None] | None = None,
    ) -> tuple[float, dict[str, float] | None]:
        """Train; arguments and result as in RecBole. ``valid_data`` may be an ``EvaluationData``."""
        self._train_data = train_data
        self._fingerprint = getattr(train_data._dataset, "fingerprint", None)
        self._saving, self._has_valid_data = saved, bool(valid_data)
        if saved:
            self._start_run_folder()
        if isinstance(valid_data, EvaluationData):
            valid_data = valid_data.for_validation()
        if self._resumed_random is not None:
            with restored(self.config["resume"]):
                restore_random(self._resumed_random, self._loader_generators())
            self._resumed_random = None
        if self.start_epoch >= self.epochs or (self._has_valid_data and self.cur_step > self.stopping_step):
            self.logger.info("Nothing is left to train: the checkpoint is that of a finished run.")
            return self.best_valid_score, self.best_valid_result

        def after_evaluation(epoch: int, score: float) -> None:
            self._after_epoch(epoch)
            if callback_fn is not None:
                callback_fn(epoch, score)

        with self._kept_files_named():
            result: tuple[float, dict[str, float] | None] = super().fit(
                train_data, valid_data, verbose, saved, show_progress, after_evaluation
            )
        if self._has_valid_data and self._latest_valid_result is None and self.best_valid_result is None:
            # Shorter than eval_step: judged once for the reader, outside of what a resumed run goes on with.
            return self._valid_epoch(valid_data, show_progress)
        return result

    def _train_epoch(
        self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False
    ) -> float | tuple[float, ...]:
        started = perf_counter()
        loss: float | tuple[float, ...] = self._train_once(train_data, epoch_idx, loss_func, show_progress)
        total = float(sum(loss)) if isinstance(loss, tuple) else float(loss or 0.0)
        self.rounds.append(self._record(perf_counter() - started, total))
        judged = self._has_valid_data and not self.pretrains and self.eval_step > 0
        if not judged or (epoch_idx + 1) % self.eval_step:
            self.train_loss_dict[epoch_idx] = total
            if not judged:
                self.best_epoch = epoch_idx  # nothing judges epochs: the latest is the best
            self._after_epoch(epoch_idx)
        return loss

    def _after_epoch(self, epoch: int) -> None:
        if self._saving:
            # One file is the run's state; best.pth follows it, and is read only where the last epoch is not the best.
            improved = self.best_epoch == epoch
            if improved:
                self._best_digest = None
            line = client_line(number_of(epoch), self.rounds[-1])
            if line is not None:
                self._of_clients.append(line, self.run_folder / CLIENTS)
            content = sealed(self._large.taken_out(self._state(epoch), self.run_folder, number_of(epoch)))
            write_bytes(content, self.run_folder / LAST)
            if improved:
                self._best_digest = digest(content)
                write_bytes(content, Path(self.saved_model_file))
                self.logger.info(set_color("Saving current", "blue") + f": {self.saved_model_file}")
            self._large.tidy(self.run_folder, improved)
        for observer in self.observers:
            observer(number_of(epoch), self.epochs, asdict(self.rounds[-1]))

    @contextmanager
    def _kept_files_named(self) -> Iterator[None]:
        """Training that ends in numbers that are not finite says where its last whole epoch is."""
        try:
            yield
        except TrainingError as error:
            if not self._saving or not (self.run_folder / LAST).is_file():
                raise
            raise TrainingError(f"{error}; what was before is kept in '{self.run_folder}'") from error

    def _train_once(self, train_data: Any, epoch_idx: int, loss_func: Any, show_progress: bool) -> Any:
        try:
            loss = super()._train_epoch(train_data, Epoch(epoch_idx), loss_func, show_progress)
            check_trained(0.0, dict(self.model.named_parameters()), learner_of(self.optimizer))
        except NotFiniteError as error:
            raise NotFiniteError(f"epoch {number_of(epoch_idx)}: {error}") from error
        except (RuntimeError, OverflowError) as error:
            reason = str(error)
            if "sparse gradients" in reason or "dense gradients" in reason:
                raise TrainingError(
                    f"learner '{self.config['learner']}' does not go with the gradients of model '{self.config['model']}' "
                    f"({reason}); set another learner"
                ) from error
            refuse_mixed_precision(self.config, error)
            if "overflow" not in reason:  # what torch says of a step too large for its numbers
                raise
            raise NotFiniteError(f"epoch {number_of(epoch_idx)}: {reason} ({learner_of(self.optimizer)})") from error
        return loss

    def _record(self, seconds: float, loss: float) -> EpochRecord:
        return EpochRecord(seconds, loss)

    # Evaluation

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> tuple[float, dict[str, float]]:
        try:
            score, result = super()._valid_epoch(valid_data, show_progress)
            if not np.isfinite(score):
                raise NotFiniteError(f"valid_metric {self.config['valid_metric']} is {score}, which decides nothing")
        except NotFiniteError as error:
            raise NotFiniteError(f"validation after {self.epoch_word} {len(self.rounds)}: {error}") from error
        self._latest_valid_result = dict(result)
        if self.rounds:
            self.rounds[-1].valid = {name: float(value) for name, value in result.items()}
        return float(score), result

    @recbole_warnings_silenced()
    @torch.no_grad()
    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> OrderedDict[str, float] | None:
        """Evaluate by every protocol of an ``EvaluationData``, or by one RecBole loader; else as in RecBole."""
        if not eval_data:
            return None
        if load_best_model:
            pretrained = Path(self.saved_model_file).parent != self.run_folder
            self.load_model(model_file or (self.saved_model_file if pretrained else self.run_folder))
        if not isinstance(eval_data, EvaluationData):
            return self._judge(self.config, self.eval_collector).judged(self.model, eval_data, show_progress)
        result: OrderedDict[str, float] = OrderedDict()
        of_users = []
        rows = None
        for protocol in eval_data:
            judge = self._judges.get(protocol.name)
            if judge is None:
                collector = self._collector(protocol.config, protocol.labels)
                collector.data_collect(eval_data.train_data)
                judge = self._judges[protocol.name] = self._judge(protocol.config, collector)
            part = judge.judged(self.model, protocol.loader, show_progress)
            self.protocols.update(dict.fromkeys(part, protocol.name))
            rows = rows or judge.eval_collector.judged_rows
            result.update(part)
            if self.keeps_users:
                of_users.append(judge.of_users(protocol.loader))
        self.judged_rows = rows
        self.user_metrics = merged(of_users, self._client_of_user()) if of_users else None
        return result

    def _judge(self, config: Any, collector: LabelCollector) -> Judge:
        return Judge(config, collector, self.device, self.wandblogger)

    def _client_of_user(self) -> NDArray[np.int64] | None:
        """Client of every user id, ``[users]``; None without a federation."""
        return None

    def load_model(self, file: str | Path) -> None:
        """Load the parameters of a checkpoint file, or of a run folder's best one, into the model, ready to predict.

        Raises:
            InputError: the checkpoint cannot be read, or does not fit the model.
        """
        checkpoint = best_checkpoint(file)
        load_parameters(self.model, checkpoint.state, checkpoint.file)
        self.model.eval()
        self.logger.info(f"Loading model structure and parameters from {checkpoint.file}")

    # Checkpoints

    def _state(self, epoch: int) -> dict[str, Any]:
        other = {
            name: value
            for name, value in self.model.other_parameter().items()
            if value is None or isinstance(value, Tensor)  # DIN's "parameter" is the training set
        }
        return {
            "format_version": CHECKPOINT_VERSION,
            "config": self.config.plain_values(),
            "epoch": epoch,
            "cur_step": self.cur_step,
            "best_valid_score": float(self.best_valid_score),
            "best_epoch": self.best_epoch,
            "best_digest": self._best_digest,
            "best_valid_result": dict(self.best_valid_result) if self.best_valid_result is not None else None,
            "train_loss": dict(self.train_loss_dict),
            "records": [without_clients(record) for record in self.rounds],
            "clients": self._of_clients.state(),
            "state_dict": self.model.state_dict(),
            "other_parameter": other,
            "training": self._training_state(),
            "random": random_state(self._loader_generators()),
            "data": self._fingerprint.state() if self._fingerprint is not None else None,
        }

    def _training_state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def _restore_training(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        check_optimizer(self.optimizer, self.config["resume"])

    def how_to_go_on(self) -> str:
        """Half a sentence for whoever stopped this run: what goes on, and after which epoch; else nothing is left of it."""
        try:
            finished = read_checkpoint(self.run_folder)["epoch"] + 1
        except InputError:
            take_away_unsaved(self.run_folder)
            log = f"; log: log/{self.config['model']}/{self.config['run_name']}.log" if self.config.keeps_logs else ""
            return f"no {self.epoch_word} was saved, so there is nothing to go on from; start it again{log}"
        return f"--resume={self.run_folder} goes on after {self.epoch_word} {finished}"

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        """RecBole calls this when the best epoch improves: it is written when the epoch is over.

        With -1 it is called for a run that has nothing left to train.
        """
        if epoch >= 0:
            self.best_epoch = epoch

    def save_pretrained_model(self, epoch: int, saved_model_file: str) -> None:
        """Replaces that of RecBole's trainers with a pre-training stage, which pickles the config."""
        writable_folder(Path(saved_model_file).parent, f"folder '{Path(saved_model_file).parent}'")
        write_sealed(self._state(epoch), Path(saved_model_file))
        self.saved_model_file = saved_model_file

    def _start_run_folder(self) -> None:
        """Make the run's folder; a resumed run begins with what it goes on from."""
        writable_folder(self.run_folder, f"run folder '{self.run_folder}'")
        remove_temporaries(self.run_folder)
        if self._fingerprint is not None:
            write_places(self._fingerprint.places(), self.run_folder / ROWS)
        if self._resumed_from is None:
            return
        last, best = self._resumed_from
        self._resumed_from = None
        self._large.go_on(self.run_folder, last.beside, best.beside if best is not None else None)
        if self._of_clients.begun:
            write_bytes(self._of_clients.begun, self.run_folder / CLIENTS)
        # As after an epoch: the state first where it is its own best, and its best one first where it is not.
        if best is not None and best is not last:
            write_bytes(best.content, Path(self.saved_model_file))
        write_bytes(last.content, self.run_folder / LAST)
        if best is last:
            write_bytes(last.content, Path(self.saved_model_file))

    def resume_checkpoint(
        self, resume_file: str | Path, checkpoints: tuple[Checkpoint, Checkpoint | None] | None = None
    ) -> None:
        """Go on after the epoch of a checkpoint, in this run's own folder; the other run's files stay as they are.

        Args:
            resume_file: a checkpoint file or run folder.
            checkpoints: it and the best one that it speaks of, where they have been read already.

        Raises:
            InputError: the checkpoint cannot be read, does not fit, or is that of another config.
        """
        last, best = checkpoints or last_and_best(resume_file)
        state = last.state
        check_same_config(state["config"], self.config.plain_values(), resume_file)
        load_parameters(self.model, state, last.file)
        with restored(last.file):
            self._restore_training(state["training"])
            self.rounds = [record_of(record) for record in state["records"]]
            self._take_clients(last)
        self.start_epoch, self.cur_step = state["epoch"] + 1, state["cur_step"]
        self.best_valid_score, self.best_valid_result = state["best_valid_score"], state["best_valid_result"]
        self.train_loss_dict, self._resumed_random = state["train_loss"], state["random"]
        self.best_epoch = state["best_epoch"]
        self._best_digest = best.digest if best is not None else None
        self._resumed_from = (last, best)
        if Path(resume_file).is_dir():
            remove_temporaries(Path(resume_file))
        self.logger.info(f"Checkpoint loaded. Training goes on with number {number_of(self.start_epoch)}")

    def _take_clients(self, checkpoint: Checkpoint) -> None:
        """What single clients cost in the rounds of a checkpoint, from the file beside it."""
        lines = read_growing(checkpoint.file.with_name(CLIENTS), checkpoint.state["clients"])
        if lines is None:
            self.logger.warning(
                f"beside '{checkpoint.file}' lies no {CLIENTS}: what single clients cost so far is not known"
            )
        self._of_clients = GrowingFile(lines or b"")
        self.rounds = add_clients(self.rounds, self._of_clients.begun)

    def _loader_generators(self) -> list[torch.Generator]:
        """Generators of the training loader and of the loaders inside it (knowledge-aware models have two)."""
        loaders = [self._train_data, *vars(self._train_data).values()] if self._train_data is not None else []
        return [loader.generator for loader in loaders if isinstance(loader, torch.utils.data.DataLoader)]
