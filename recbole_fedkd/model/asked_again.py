"""Networks that are asked for scores again and again: what they make of items and of users is made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_fedkd.model.function import array_of
from recbole_fedkd.model.network import NO_CONTEXT, AttentiveNetwork
from recbole_fedkd.model.pair import TeacherAndStudent
from recbole_fedkd.model.ranking import Asked, OfNetworks, OfUsers, rank_some

Scored = Callable[[Tensor, Tensor], Tensor]
"""Scores ``[n, m]`` of some items ``[n, m]`` of users in some places ``[n]``, one or many times."""

Made = tuple[OfNetworks, OfUsers, Tensor]
"""What a network makes of items and users, and the prior of items that it adds to logits; empty: it adds none."""


class AskedAgain:
    """Networks side by side, each with as many users, as far as scores of any items need them.

    Args:
        network: as all of them are; one that ranks, without a context and without what is known of pairs.
        called: calls a function of the network, for all of them at once; what it returns has an axis of networks in front.
    """

    def __init__(self, network: Any, called: Callable[[Callable[..., Any]], Sequence[Made]]) -> None:
        self.network, self.asked = network, list[Asked]()
        self.made = [
            (
                OfNetworks(*(array_of(True, tensor) for tensor in networks)),
                OfUsers(*(array_of(True, tensor.flatten(0, 1)) for tensor in users)),
                prior,
            )
            for networks, users, prior in called(self._made)
        ]

    @classmethod
    def of_one(cls, network: Any, users: Tensor, catalogue: Any = None) -> AskedAgain:
        """One network with its users, by local ids ``[n]``; ``catalogue``: as of ``rank_items``."""

        def called(function: Callable[..., Any]) -> Sequence[Made]:
            return [
                (
                    OfNetworks(*(tensor[None] for tensor in first)),
                    OfUsers(*(tensor[None] for tensor in second)),
                    prior[None],
                )
                for first, second, prior in function(network, {}, users, catalogue)
            ]

        return cls(network, called)

    def _made(
        self, network: Any, parameters: Mapping[str, Tensor], users: Tensor, catalogue: Any = None
    ) -> Sequence[Made]:
        serving = network.serving() if isinstance(network, TeacherAndStudent) else [network]
        catalogues = catalogue if isinstance(catalogue, tuple) else [catalogue] * len(serving)
        return [self._of_one(*pair, users) for pair in zip(serving, catalogues, strict=True)]

    def _of_one(self, network: AttentiveNetwork, known: Any, users: Tensor) -> Made:
        catalogue = network.catalogue() if known is None else known
        asking = network.asking(users, NO_CONTEXT, catalogue)
        self.asked.append(catalogue.asked(asking, network.architecture.labels))
        prior = network.item_prior if network.architecture.item_prior else asking.own.new_empty(0)
        return catalogue.of_networks(), catalogue.of_users(asking), prior

    def logits(self, places: Tensor, items: Tensor) -> Tensor:
        """Raw logits ``[n, m, T]`` of some items ``[n, m]`` of users in some places ``[n]``, those of a network behind those of
        the one before.
        """
        logits = []
        for asked, (networks, users, prior) in zip(self.asked, self.made, strict=True):
            ranked = rank_some(asked.about(items), places, networks, users)[..., : items.shape[1]].transpose(1, 2)
            owners = places // (len(users.constant) // len(networks.table))
            logits.append(ranked + prior[owners.unsqueeze(1), items] if prior.dim() > 2 else ranked)
        served: Tensor = self.network.served(logits) if isinstance(self.network, TeacherAndStudent) else logits[0]
        return served


def scored_by(parts: Sequence[tuple[Tensor, Tensor, AskedAgain]], expected: Callable[[Tensor], Tensor]) -> Scored:
    """What scores users of several networks.

    Args:
        parts: of all users, where they are, who is asked for them, and their places there.
        expected: scores ``[n, m]`` of logits ``[n, m, T]``.
    """
    part_of = torch.empty(sum(len(rows) for rows, _, _ in parts), dtype=torch.long)
    place_of = torch.empty_like(part_of)
    for number, (rows, places, _) in enumerate(parts):
        part_of[rows], place_of[rows] = number, places

    def scored(places: Tensor, items: Tensor) -> Tensor:
        scores = torch.empty(items.shape)
        for number, (_, _, asked) in enumerate(parts):
            rows = torch.nonzero(part_of[places] == number).flatten()
            if len(rows):
                scores[rows] = expected(asked.logits(place_of[places[rows]], items[rows]))
        return scores

    return scored
