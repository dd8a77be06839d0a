"""A client: its users' samples, its network, its optimiser. It hears and says bytes, nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recbole_fedkd.federated.codec import WireCodecs, squared_error
from recbole_fedkd.federated.message import Message, MessageError, decoded
from recbole_fedkd.federated.serving import MovingAverage
from recbole_fedkd.federated.strategy import LocalResult, Strategy, to_tensors, travels_as_update
from recbole_fedkd.federated.task import AttentiveTask, Step, Task
from recbole_fedkd.federated.update import UPDATE, VERSION, Arrays, applied, difference, named, numbered, updated
from recbole_fedkd.finite import check_arrays, check_trained, learner_of

_WORD = 2**64 - 1


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

    def precision(self, device: torch.device) -> torch.autocast:
        """Where a loss is computed.

        bfloat16 has the range of float32, so that no gradient needs to be scaled. Under ``vmap`` a cast weight of one client
        must not be kept for the next call.
        """
        return torch.autocast(device.type, torch.bfloat16, enabled=self.enable_amp, cache_enabled=False)


@dataclass(frozen=True)
class TrainingReport:
    """What local training cost: summed loss over the last epoch's samples, and their number."""

    loss: float
    samples: int


def client_round_seed(seed: int, client: int, round_index: int) -> int:
    """Seed of one client in one round, of 32 bits: the order in which clients run changes nothing."""
    state = 0
    for number in (seed, client + 1, round_index):
        # The output function of SplitMix64 (Steele et al., OOPSLA 2014): numpy's SeedSequence takes ten times as long.
        state = ((state ^ number) + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state >> 32


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


@contextmanager
def own_streams(seed: int, device: torch.device) -> Iterator[None]:
    """Random streams that start at ``seed``; the process gets its own back, so that nobody else's draws depend on clients.

    Dropout draws from torch's stream, RecBole's negative samplers from numpy's and Python's.
    """
    with streams_kept(device):
        # Not `torch.manual_seed`: without a GPU in use that keeps a stack trace of every call, which takes time and memory.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield


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
        codec_error: squared norm of what encoding took from the last upload, and of the upload.
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
        self.codecs = codecs or WireCodecs()
        self.codec_error = (0.0, 0.0)
        self.task = task
        self.build_optimizer = build_optimizer
        self.optimizer = build_optimizer(task.network)
        self.strategy = strategy
        self.settings = settings
        self.device = device
        # With codecs the network travels as what changed of it, and the first one that of the run's seed.
        self.sends_updates = travels_as_update(strategy, self.codecs)
        self.version = 0
        self.residual: dict[str, Tensor] = {}
        self.received: dict[str, Tensor] = strategy.initial_state(task.shared) if self.sends_updates else {}
        self.sent: dict[str, Tensor] = {}
        self.sent_in: int | None = None
        self.average = MovingAverage(task.network, settings.serve_average) if settings.serve_average else None
        self._result: LocalResult | None = None

    def receive(self, payload: bytes) -> None:
        """Take the server's message in; empty bytes leave what was received before."""
        if payload:
            message = decoded(Message.from_bytes(payload), self.codecs.down)
            if self.sends_updates:
                newer = self._newer(message)
                if newer is None:
                    return
                message = newer
            check_arrays(message.arrays, "the server's message")
            arrays = {name: tensor.to(self.device) for name, tensor in to_tensors(message).items()}
            fresh = self.sent_in is not None and message.round == self.sent_in + 1
            self.received = self.strategy.understood(arrays, self.sent, fresh)
            if self.average is not None:
                self.average.restore()
            self.task.shared.install(self.strategy.installed(self.received))

    def _newer(self, message: Message) -> Message | None:
        """The whole network of a message, from an update or as it is; None where the client has that version already."""
        arrays = dict(message.arrays)
        version = int(arrays.pop(VERSION)[0])
        if version == self.version:
            return None
        if message.kind == UPDATE:
            if version != self.version + 1:
                raise MessageError(f"update to version {version} came to a client that holds version {self.version}")
            arrays = updated(arrays, self._reference())
        self.version = version
        return replace(message, arrays=arrays)

    def _reference(self) -> Arrays:
        """The network that the server takes this client's updates to start from."""
        return {name: tensor.cpu().numpy() for name, tensor in self.received.items()}

    def train(self, round_index: int, on_step: Callable[[int], None] | None = None) -> TrainingReport:
        """Train for the round's local epochs.

        Args:
            round_index: from 0; with the run's seed it decides order, dropout and negatives.
            on_step: told the number of samples after each step.

        Returns:
            Loss and samples of the last local epoch.

        Raises:
            NotFiniteError: a loss, or a parameter after training, is not finite.
        """
        if self.average is not None:
            self.average.restore()
        if self.settings.reset_optimizer:
            self.optimizer = self.build_optimizer(self.task.network)
        if self.settings.seed is None:
            return self._train(round_index, on_step)
        seed = client_round_seed(self.settings.seed, self.number, round_index)
        self.task.generator.manual_seed(seed)
        with own_streams(seed, self.device):
            return self._train(round_index, on_step)

    def _train(self, round_index: int, on_step: Callable[[int], None] | None) -> TrainingReport:
        strategy, task, network = self.strategy, self.task, self.task.network
        network.train()
        self._result = LocalResult(len(task), task.shared, first=self.sent_in is None)
        teacher = None
        if strategy.taught_by_received and round_index > 0:  # what comes down first knows nothing
            teacher = {name: value.detach().clone() for name, value in network.named_parameters()}
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        seen = 0
        for epoch in range(self.settings.local_epochs):
            total = torch.zeros_like(total)
            seen = 0
            last = epoch == self.settings.local_epochs - 1
            collect = strategy.exchanges_knowledge and not self.settings.clean_pass and last
            for batch in task.batches():
                with self.settings.precision(self.device):
                    step = task.step(batch, strategy.exchanges_knowledge or strategy.taught_by_received)
                    if teacher is not None:
                        assert isinstance(task, AttentiveTask)
                        step = replace(step, teacher=task.logits_under(teacher, batch))
                    loss = strategy.loss(step, self.received, task.shared)
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
        if strategy.exchanges_knowledge and self.settings.clean_pass:
            self._extract_knowledge()
        return TrainingReport(float(total), seen)

    def serve(self) -> None:
        """At the end of a round: from now on users are served by what the round has left."""
        if self.average is not None:
            self.average.serve()

    def send(self, round_index: int) -> bytes:
        """What the strategy uploads, serialised; empty if nothing."""
        if self._result is None:
            return b""
        message = self.strategy.upload(self._result, self.number, round_index)
        if message is None:
            return b""
        check_arrays(message.arrays, "its message")  # a codec may make a number of what is none
        if self.sends_updates:
            residual = {name: tensor.cpu().numpy() for name, tensor in self.residual.items()}
            reference = self._reference()
            update = applied(difference(message.arrays, reference), residual)
            message = replace(message, arrays=numbered(update, reference))
        wire = replace(message, arrays=self.codecs.up.encode(message.arrays, round_index))
        if self.codecs.up.codecs:
            # What the server will see is what is taken off what it says.
            seen = decoded(wire, self.codecs.up)
            self.codec_error = squared_error(message.arrays, seen.arrays)
            if self.sends_updates and self.settings.error_feedback:
                left = named(difference(message.arrays, seen.arrays), reference)
                self.residual = {name: torch.tensor(left[name]) for name in reference}
            message = seen
        if self.strategy.remembers_sent:
            own = to_tensors(message)
            self.sent = {**self.sent, **{name: tensor.to(self.device) for name, tensor in own.items()}}
        self.sent_in = round_index
        return wire.to_bytes()

    def state_dict(self) -> dict[str, Any]:
        """Optimiser, what was last heard, said and dropped, and the task's generator; the network is saved with the model."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "received": dict(self.received),
            "sent": dict(self.sent),
            "sent_in": self.sent_in,
            "version": self.version,
            "residual": dict(self.residual),
            "average": self.average.state_dict() if self.average is not None else None,
            "generator": self.task.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.received = {name: tensor.to(self.device) for name, tensor in state["received"].items()}
        self.sent = {name: tensor.to(self.device) for name, tensor in state["sent"].items()}
        self.sent_in, self.version = state["sent_in"], state["version"]
        self.residual = dict(state["residual"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.task.generator.set_state(state["generator"])

    def _add_knowledge(self, step: Step) -> None:
        assert self._result is not None
        collected = self._result.collected
        for name, part in self.strategy.knowledge.collect(step.detached()).items():
            collected[name] = collected[name] + part if name in collected else part

    @torch.no_grad()
    def _extract_knowledge(self) -> None:
        """Knowledge in one clean pass: the trained network, without dropout, every sample once (AFD)."""
        self.task.network.eval()
        for batch in self.task.clean_batches():
            self._add_knowledge(self.task.step(batch, True))
