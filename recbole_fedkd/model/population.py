"""``AttnFedKD``: all clients' students, seen by RecBole as one model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recbole_fedkd.model.network import AttentiveNetwork
from recbole_fedkd.model.student import LabelledRecommender, read_architecture, read_tables


class AttnFedKD(LabelledRecommender):
    """One student per client; every user is served by the network of the client the user lives on.

    Each network holds the tables, histories and user embedding rows of its own users only. All start from the same
    weights but for the user rows, which nobody else has. It is trained by ``FedKDTrainer``, not by ``calculate_loss``.

    Args:
        config: the run's config.
        dataset: the training split, a ``FedKDDataset`` whose ``client_of_user`` (``[users]``, padding user 0: -1) is set.
    """

    client_of_user: Tensor
    local_id: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        users, items, history = read_tables(config, dataset)
        architecture = read_architecture(config, len(self.label_values))
        client_of_user = torch.as_tensor(dataset.client_of_user)
        local_id = torch.zeros_like(client_of_user)
        self.networks = nn.ModuleList()
        for client in range(int(client_of_user.max()) + 1):
            members = torch.nonzero(client_of_user == client).flatten()
            local_id[members] = torch.arange(1, len(members) + 1)
            own_history = history.select(members) if history is not None else None
            network = AttentiveNetwork(architecture, users.select(members), items, own_history)
            if client > 0:
                _copy_shared(self.networks[0], network)
            self.networks.append(network)
        self.register_buffer("client_of_user", client_of_user, persistent=False)
        self.register_buffer("local_id", local_id, persistent=False)

    def logits(self, users: Tensor, items: Tensor) -> Tensor:
        """Route each user to the network of its client; see :meth:`LabelledRecommender.logits`."""
        owners = self.client_of_user[users]
        out = torch.empty(*items.shape, len(self.label_values), device=items.device)
        for client in owners.unique().tolist():
            rows = torch.nonzero(owners == client).flatten()
            out[rows] = self.networks[client](self.local_id[users[rows]], items[rows])
        return out


@torch.no_grad()
def _copy_shared(source: nn.Module, target: nn.Module) -> None:
    """Copy every weight whose shape does not depend on the users."""
    weights = dict(source.named_parameters())
    for name, weight in target.named_parameters():
        if name != target.user_rows:
            weight.copy_(weights[name])
