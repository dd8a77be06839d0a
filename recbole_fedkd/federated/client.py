"""A client: its users' samples, its network, its optimiser. It hears and says bytes, nothing else."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch import Tensor, nn
from torch.optim import Optimizer

from recbole_fedkd.federated.aggregate import add_to
from recbole_fedkd.federated.codec import WireCodecs
from recbole_fedkd.federated.dialogue import answer, on_device, understood
from recbole_fedkd.federated.draws import KeyedDraws
from recbole_fedkd.federated.message import Message, Training
from recbole_fedkd.federated.serving import MovingAverage
from recbole_fedkd.federated.strategy import LocalResult, Strategy
from recbole_fedkd.federated.task import AttentiveTask, Step, Task
from recbole_fedkd.federated.wire import ClientLink
from recbole_fedkd.finite import check_trained, learner_of
from recbole_fedkd.model.dropout import dropping_by
from recbole_fedkd.model.shared import forget_cached


@dataclass(frozen=True)
class ClientSettings:
    """The client's keys of the config, see ``properties/overall.yaml``.

    Attributes:
        local_epochs: passes over the samples in a round.
        clean_pass: extract knowledge in a pass after training (no dropout), not from the last epoch's batches.
        reset_optimizer: start every round with a fresh optimiser.
        seed: the run's seed; a client derives one per round from it. None: the client is alone in its federation and draws
            from the run's own streams, as RecBole's training does.
        clip_grad_norm: arguments of torch's ``clip_grad_norm_``, or None to clip nothing.
        error_feedback: add what encoding took from an update to the next one.
        enable_amp: compute losses in mixed precision; parameters, gradients and messages stay in single precision.
        serve_average: decay of the moving average of a client's networks, by which its users are served; 0: the latest serves.
    """

    local_epochs: int
    clean_pass: bool
    reset_optimizer: bool
    seed: int | None
    clip_grad_norm: dict[str, Any] | None
    error_feedback: bool
    enable_amp: bool = False
    serve_average: float = 0.0

    def precision(self, device: torch.device) -> AbstractContextManager[None]:
        """Where a loss is computed.

        bfloat16 has the range of float32, so that no gradient needs to be scaled. Under ``vmap`` a cast weight of one client
        must not be kept for the next call.
        """
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if self.enable_amp else nullcontext()


@contextmanager
def streams_kept(device: torch.device) -> Iterator[None]:
    """The process gets its random streams back as they were: torch's, numpy's and Python's."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


_SPARE: list[np.random.BitGenerator] = []
"""What numpy's stream can draw from for a while: to make one, or to copy its state, takes as long as a small client's step."""


@contextmanager
def own_streams(seed: int, device: torch.device) -> Iterator[None]:
    """Random streams that start at ``seed``; the process gets its own back, so that nobody else's draws depend on clients.

    RecBole's negative samplers draw from numpy's and Python's; from torch's, what a model draws elsewhere than in layers.
    """
    python_state, own = random.getstate(), get_bit_generator()
    spare = _SPARE.pop() if _SPARE else np.random.MT19937()
    set_bit_generator(spare)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # Not `torch.manual_seed`: without a GPU in use that keeps a stack trace of every call, which takes time and memory.
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            yield
    finally:
        set_bit_generator(own)
        random.setstate(python_state)
        _SPARE.append(spare)


class Client:
    """One client of the federation.

    Args:
        number: from 0.
        task: the client's own network and samples; of the network only ``task.shared`` may be sent.
        build_optimizer: makes the optimiser of the network's parameters.
        strategy: the local objective and what is sent.
        settings: how to train.
        device: where the network lives.
        codecs: how messages are encoded, the same on both sides.

    Attributes:
        link: the client's end of the wire.
        received: what the strategy made of the server's last message.
    """

    def __init__(
        self,
        number: int,
        task: Task,
        build_optimizer: Callable[[nn.Module], Optimizer],
        strategy: Strategy,
        settings: ClientSettings,
        device: torch.device,
        codecs: WireCodecs | None = None,
    ) -> None:
        self.number = number
        self.task = task
        self.build_optimizer = build_optimizer
        self.optimizer = build_optimizer(task.network)
        self.strategy = strategy
        self.settings = settings
        self.device = device
        network = strategy.initial_state(task.shared)
        self.link = ClientLink(number, strategy, codecs or WireCodecs(), settings.error_feedback, network)
        # With codecs the first network that travels is what changed of the run's seed's.
        self.received: dict[str, Tensor] = network if self.link.updates is not None else {}
        self.average = MovingAverage(task.network, settings.serve_average) if settings.serve_average else None
        self._result: LocalResult | None = None
        self._training = Training()
        self._taken_in: bytes | None = None

    def receive(self, payload: bytes) -> None:
        """Take the server's message in; empty bytes, and what was taken in since it last trained, leave all as it is.

        What serves its users after a round is often what the next one begins with.
        """
        if payload is self._taken_in:
            return
        message = self.link.read(payload) if payload else None
        if message is not None:
            self._take_in(message)
        self._taken_in = payload

    def _take_in(self, message: Message) -> None:
        self.received = understood(self.link, self.received, message, self.device)
        if self.average is not None:
            self.average.restore()
        self.task.shared.install(self.strategy.installed(self.received))
        self.strategy.taken_in(self.task, self.received, on_device(self.link.sent, self.device))
        if not self.strategy.keeps:
            self.received = {}

    def train(self, round_index: int, on_step: Callable[[int], None] | None = None) -> Training:
        """Train for the round's local epochs.

        Args:
            round_index: from 0; with the run's seed it decides order, dropout and negatives.
            on_step: told the number of samples after each step.

        Returns:
            Loss and samples of the last local epoch.

        Raises:
            NotFiniteError: a loss, or a parameter after training, is not finite.
        """
        self._taken_in = None
        if self.average is not None:
            self.average.restore()
        if self.settings.reset_optimizer:
            self.optimizer = self.build_optimizer(self.task.network)
        if self.settings.seed is None:
            return self._train(round_index, on_step)
        self.task.draws = draws = KeyedDraws(self.settings.seed, [self.number], round_index)
        (seed,) = draws.seeds
        self.task.generator.manual_seed(seed)
        with own_streams(seed, self.device), dropping_by(self.task.network, draws.dropout.of_one):
            return self._train(round_index, on_step)

    def _train(self, round_index: int, on_step: Callable[[int], None] | None) -> Training:
        strategy, task, network = self.strategy, self.task, self.task.network
        network.train()
        self._result = LocalResult(task.shared, first=self.link.sent_in is None)
        teacher = None
        if strategy.taught_by_received and round_index > 0:  # what comes down first knows nothing
            teacher = {name: value.detach().clone() for name, value in network.named_parameters()}
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        seen = 0
        learns = task.learns and strategy.learns(self.received)
        for epoch in range(self.settings.local_epochs if learns else 0):
            total = torch.zeros_like(total)
            seen = 0
            last = epoch == self.settings.local_epochs - 1
            collect = strategy.collects and not self.settings.clean_pass and last
            for batch in task.batches():
                with self.settings.precision(self.device):
                    step = task.step(batch, strategy.exchanges_knowledge or strategy.taught_by_received)
                    if teacher is not None:
                        assert isinstance(task, AttentiveTask)
                        step = replace(step, teacher=task.logits_under(teacher, batch))
                    loss = strategy.objective(step, self.received, task.shared)
                self.optimizer.zero_grad()
                loss.backward()
                if self.settings.clip_grad_norm:
                    nn.utils.clip_grad_norm_(network.parameters(), **self.settings.clip_grad_norm)
                self.optimizer.step()
                total += loss.detach() * step.size
                seen += step.size
                if collect:
                    self._add_knowledge(step)
                if on_step is not None:
                    on_step(step.size)
            check_trained(float(total), dict(network.named_parameters()), learner_of(self.optimizer))
        if not learns:
            total, seen = self._measured(total), len(task)
        if strategy.collects and self.settings.clean_pass:
            self._extract_knowledge()
        self._result.collected.update(strategy.statistics(task, self.received))
        self._training = Training(len(task), seen, float(total))
        return self._training

    def serve(self) -> None:
        """At the end of a round: from now on users are served by what the round has left."""
        if self.average is not None:
            self.average.serve()

    def send(self, round_index: int) -> bytes:
        """What the strategy uploads, serialised; empty if nothing."""
        if self._result is None:
            return b""
        message = answer(self.link, self._result, self._training, round_index)
        return self.link.encoded(message).to_bytes() if message is not None else b""

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The client as it is, for :meth:`restore`."""
        network = {name: value.clone() for name, value in self.task.network.state_dict().items()}
        return network, copy.deepcopy(self.state_dict())

    def restore(self, snapshot: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        """Be as at the time of a snapshot again, which stays as it is: an optimiser changes in place what it is given."""
        network, state = snapshot
        self.task.network.load_state_dict(network)
        forget_cached(self.task.network)
        self.load_state_dict(copy.deepcopy(state))

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, what was last heard and said, and the task's generator; the network is saved with the model."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "received": dict(self.received),
            "link": self.link.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "generator": self.task.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._taken_in = None
        self.optimizer.load_state_dict(state["optimizer"])
        self.received = on_device(state["received"], self.device)
        self.link.load_state_dict(state["link"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.task.generator.set_state(state["generator"])
        self.strategy.taken_in(self.task, self.received, on_device(self.link.sent, self.device))

    def _add_knowledge(self, step: Step) -> None:
        assert self._result is not None
        add_to(self._result.collected, self.strategy.knowledge.collect(step.detached()))

    @torch.no_grad()
    def _measured(self, total: Tensor) -> Tensor:
        """Summed loss of a network that is not trained in this round, added to ``total``."""
        self.task.network.eval()
        for batch in self.task.clean_batches():
            step = self.task.step(batch, False)
            total = total + step.loss * step.size
        return total

    @torch.no_grad()
    def _extract_knowledge(self) -> None:
        """Knowledge in one clean pass: the trained network, without dropout, every sample once (AFD)."""
        self.task.network.eval()
        for batch in self.task.clean_batches():
            self._add_knowledge(self.task.step(batch, True))
