"""Training by rounds: one epoch of RecBole's is one communication round of a federation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recbole.trainer import TraditionalTrainer, Trainer
from recbole.utils import get_trainer, set_color
from tqdm import tqdm

from recbole_fedkd.checkpoint.reading import Checkpoint
from recbole_fedkd.checkpoint.resumed import check_unspent, mark_spent
from recbole_fedkd.checkpoint.state import restored
from recbole_fedkd.data.partition import held_out_clients
from recbole_fedkd.engine import FleetEngine, LocalEngine, RoundReport
from recbole_fedkd.errors import InputError, listed
from recbole_fedkd.federated.server import Release
from recbole_fedkd.federation.together import Population, build_engine
from recbole_fedkd.limits import refuse_mixed_precision
from recbole_fedkd.machines.processes import ProcessesEngine, obstacle
from recbole_fedkd.rounds import EpochRecord, number_of, round_record
from recbole_fedkd.trainer.checkpointed import CheckpointTrainer

MOSTLY_LOST = 0.5
"""Share of the length of what clients say once that codecs take from it, from which on a run says so."""


class FedKDTrainer(CheckpointTrainer):
    """Trains a population: one epoch is one communication round.

    Args:
        config: the run's ``FedKDConfig``.
        model: the population.

    Attributes:
        engine: runs the rounds; built by :meth:`prepare`.
        idle_clients: clients without a training sample. They take part in no round; their users are served by the
            initial network, or by the server's where the strategy shares one.
        strangers: clients that are held out; they come when training is over (``strangers.py``).
        fallback: why another engine than the one asked for runs the rounds; None where it does.
    """

    model: Population
    epoch_word = "round"

    def __init__(self, config: Any, model: Population) -> None:
        self._homes = model.client_of_user
        super().__init__(config, model)
        self.engine: LocalEngine | FleetEngine | ProcessesEngine | None = None
        self.idle_clients: list[int] = []
        self.strangers: list[int] = []
        self.fallback: str | None = None
        self._resumed_training: dict[str, Any] | None = None
        self._report, self._begun = RoundReport(0.0), False

    def _build_optimizer(self, **kwargs: Any) -> Any:
        """None: every client has an optimiser of its own."""
        return None

    def prepare(self, train_data: Any) -> LocalEngine | FleetEngine | ProcessesEngine:
        """Give every client its users' samples, its network and its optimiser; the engine that runs them.

        Args:
            train_data: the training loader.

        Raises:
            InputError: a strategy that distils, over a model without a click probability to distil.
        """
        config = self.config
        engine: LocalEngine | FleetEngine | ProcessesEngine = build_engine(config, self.model, train_data._dataset)
        clients = int(self.model.client_of_user.max()) + 1
        if config["engine"] in ("processes", "flower") and isinstance(engine, LocalEngine):
            self.fallback = obstacle(config, clients)
            if self.fallback is None:
                engine = ProcessesEngine(config, self.model, train_data._dataset, engine)
        # Not before: what no engine runs has been refused by now.
        if self.fallback is not None:
            self.logger.warning(f"engine {config['engine']} cannot run this, engine local does: {self.fallback}")
        self.strangers = held_out_clients(clients, config["holdout_clients"], config["seed"]).tolist()
        engine.held_out = frozenset(self.strangers)
        if not engine.samples:
            raise InputError(
                f"holdout_clients={config['holdout_clients']} keeps every client that has a training sample out of training"
            )
        idle_setting = engine.server.strategy.without_effect(
            len(engine.samples), min(len(engine.samples), config["clients_per_round"] or len(engine.samples))
        )
        if idle_setting is not None:
            self.logger.warning(idle_setting)
        if hasattr(config.model_class, "sums"):
            # As many rounds as the exchange takes, and none of them is better than the last.
            self.epochs = self.eval_step = 1 + engine.server.strategy.exchange_rounds
        self.idle_clients = [number for number, size in engine.sizes.items() if not size]
        if self.idle_clients:
            served = "the server's" if engine.server.strategy.serves_aggregate else "the initial"
            self.logger.warning(
                f"{len(self.idle_clients)} client(s) hold no training sample ({listed(self.idle_clients)}): they take part in "
                f"no round, their users are served by {served} network"
            )
        return engine

    def begin(self) -> None:
        """Between :meth:`prepare` and the first round, once: take in what a checkpoint holds, and see how long a budget lasts.

        Raises:
            InputError: ``privacy`` or ``secure_aggregation`` allow no round, or the checkpoint is of another run.
        """
        assert self.engine is not None
        if self._begun:
            return
        self._begun = True
        if self._resumed_training is not None:
            with restored(self.config["resume"]):
                self.engine.load_state_dict(self._resumed_training)
            self._resumed_training = None
            if (release := self.engine.server.release) is not None and self._resumed_from is not None:
                release.spends = partial(self._mark_spent, release, self._resumed_from[0])
        self.epochs = self.engine.rounds_of_budget(self.epochs)

    @property
    def budget_is_spent(self) -> bool:
        """Whether no further round is possible under ``privacy``; after an exchange in stages nothing more is let out."""
        if self.engine is None or self.engine.server.release is None:
            return False
        release, exchange = self.engine.server.release, self.engine.server.strategy.exchange_rounds
        return release.is_spent and (not exchange or release.releases < exchange)

    def fit(self, train_data: Any, *args: Any, **kwargs: Any) -> tuple[float, dict[str, float] | None]:
        """Train by rounds; arguments and result as in RecBole."""
        if self.engine is None:
            self.engine = self.prepare(train_data)
        self.begin()
        try:
            return super().fit(train_data, *args, **kwargs)
        finally:
            self.engine.close()

    def resume_checkpoint(
        self, resume_file: str | Path, checkpoints: tuple[Checkpoint, Checkpoint | None] | None = None
    ) -> None:
        """As of any trainer; raises :class:`InputError` also where ``privacy`` has spent more than the checkpoint knows."""
        super().resume_checkpoint(resume_file, checkpoints)
        if self.config["privacy"] and self._resumed_from is not None:
            check_unspent(self._resumed_from[0], resume_file)

    def _mark_spent(self, release: Release, source: Checkpoint, _state: dict[str, Any]) -> None:
        """With the first release: nobody else goes on with the checkpoint."""
        release.spends = None
        mark_spent(source, self.run_folder if self._saving else None)

    def _train_once(self, train_data: Any, epoch_idx: int, loss_func: Any, show_progress: bool) -> float:
        assert self.engine is not None
        samples = self.engine.samples
        if epoch_idx <= self.engine.server.strategy.exchange_rounds:
            self.cur_step = 0  # patience is with training, which begins after the exchange
        chosen = self.engine.server.choose(self.engine.trained, epoch_idx)
        bar = tqdm(
            total=sum(samples[number] for number in chosen) * self.config["local_epochs"],
            ncols=100,
            desc=set_color(f"Round {number_of(epoch_idx):>5}", "pink"),
            unit="sample",
            unit_scale=True,
            disable=not show_progress,
        )
        moved = 0

        def on_step(count: int) -> None:
            bar.update(count)

        def on_bytes(count: int) -> None:
            nonlocal moved
            moved += count
            bar.set_postfix_str(f"{moved} B")

        with bar:
            try:
                report = self.engine.run_round(epoch_idx, on_step, on_bytes)
            except RuntimeError as error:
                refuse_mixed_precision(self.config, error)
                raise
            left = np.mean([record.seconds for record in self.rounds] or [bar.format_dict["elapsed"]])
            left *= self.epochs - epoch_idx - 1
            bar.set_postfix_str(f"loss {report.loss:.4f}, {moved} B, <= {left:.0f} s left")
        self._report = report
        if report.missing:
            left_out = f"{len(report.missing)} of {len(chosen)} clients left out"
            secret = self._release is not None and self._release.samples
            self.logger.warning(f"round {number_of(epoch_idx)}: {left_out}{'' if secret else f': {report.reasons}'}")
        if epoch_idx < self.engine.server.strategy.exchange_rounds and report.codec_error > MOSTLY_LOST:
            self.logger.warning(
                f"round {number_of(epoch_idx)}: codecs took {report.codec_error:.0%} of what clients said, by its length, and "
                "nobody says it again, so that what is made of it may be far off; int8 and int4 take less, and codec_arrays "
                "keeps a codec from some arrays, such as {sign: '[!h]*'}"
            )
        self.tensorboard.add_scalar("Bytes/Round", report.total_bytes, epoch_idx)
        return report.loss

    def _client_of_user(self) -> NDArray[np.int64] | None:
        # Anything with `predict` may be judged in the population's place, strangers are.
        return self._homes.cpu().numpy() if hasattr(self.model, "client_of_user") else None

    def _record(self, seconds: float, loss: float) -> EpochRecord:
        record = round_record(seconds, self._report, self._release)
        if record.epsilon is not None:
            self.logger.info(f"round {number_of(len(self.rounds))}: privacy has spent epsilon {record.epsilon:.4g}")
            self.tensorboard.add_scalar("Privacy/Epsilon", record.epsilon, len(self.rounds))
        return record

    @property
    def _release(self) -> Release | None:
        return self.engine.server.release if self.engine is not None else None

    def _training_state(self) -> dict[str, Any]:
        assert self.engine is not None
        return self.engine.state_dict()

    def _restore_training(self, state: dict[str, Any]) -> None:
        # The clients exist only once fit has the training data.
        self._resumed_training = state


def trainer_class(config: Any) -> type[CheckpointTrainer]:
    """Trainer of a config's model: ours for the federation, RecBole's with our checkpoints for everything else."""
    if config["strategy"] != "central":
        return FedKDTrainer
    recbole_trainer = get_trainer(config["MODEL_TYPE"], config["model"])
    if hasattr(config.model_class, "sums"):
        recbole_trainer = TraditionalTrainer  # one epoch, whatever the config says: there is nothing to train
    if recbole_trainer is Trainer:
        return CheckpointTrainer
    if not issubclass(recbole_trainer, Trainer):
        raise InputError(
            f"model '{config['model']}' needs RecBole's {recbole_trainer.__name__}, which is not supported"
        )
    return type(recbole_trainer.__name__, (CheckpointTrainer, recbole_trainer), {})
