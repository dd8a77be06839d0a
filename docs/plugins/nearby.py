"""A strategy from nothing: clients send the biases of their networks alone, and each is pulled towards the mean of all."""

from dataclasses import dataclass

import torch

from recbole_fedkd.extend import SERVER, ArraySpec, Message, Schema, Strategy, register_strategy, setting


@dataclass(frozen=True)
class NearbySettings:
    pull: float = setting(1.0, ">= 0", "Weight of the squared distance of biases to the mean of all clients'.")


@register_strategy
class Nearby(Strategy):
    name, settings_type = "nearby", NearbySettings

    def initial_state(self, shared):
        return {name: one.detach().clone() for name, one in shared.parameters().items() if name.endswith(".bias")}

    def download(self, state, client, round_index):
        return Message("nearby", round_index, SERVER, {name: one.numpy() for name, one in state.items()})

    def loss(self, step, received, shared):
        own = shared.parameters()
        return step.loss + self.settings.pull * sum((own[name] - received[name]).square().sum() for name in received)

    def upload(self, result, client, round_index):
        biases = self.initial_state(result.shared)
        return Message("nearby", round_index, client, {name: one.numpy() for name, one in biases.items()})

    def upload_schema(self, state):
        return Schema("nearby", {name: ArraySpec(tuple(one.shape), one.numpy().dtype) for name, one in state.items()})

    def aggregate(self, state, uploads):
        return {name: torch.stack([torch.tensor(upload.arrays[name]) for upload in uploads]).mean(0) for name in state}
