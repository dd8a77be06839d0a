"""Users by what becomes of them: held out, or on a wrong client; neither is judged with the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recbole_fedkd.data.partition import held_out_clients
from recbole_fedkd.data.schema import label_values
from recbole_fedkd.errors import InputError
from recbole_fedkd.privacy.attack import poisoned
from recbole_fedkd.privacy.settings import AttackSettings


def held_out_users(config: Any, client_of_user: Tensor | None) -> Tensor | None:
    """Whose client is held out, bool ``[users]``; None where none is."""
    if client_of_user is None or not config["holdout_clients"]:
        return None
    held_out = held_out_clients(int(client_of_user.max()) + 1, config["holdout_clients"], config["seed"])
    return torch.isin(client_of_user, torch.from_numpy(held_out))


def wrong_users(config: Any, client_of_user: Tensor | None) -> Tensor | None:
    """Whose client is wrong, bool ``[users]``; None where none is. Raises :class:`InputError` where all are."""
    attack = AttackSettings.of(config)
    if client_of_user is None or attack is None:
        return None
    clients = int(client_of_user.max()) + 1
    wrong = attack.wrong(clients, config["seed"])
    if len(wrong) == clients:
        raise InputError(
            f"attack.share is {attack.share:g}, which of {clients} client(s) leaves none that is right, and none to judge; it "
            "must be smaller, or client_num larger"
        )
    return torch.isin(client_of_user, torch.tensor(sorted(wrong)))


def others(*parts: Tensor | None) -> Tensor | None:
    """Users ``[users]`` in none of some parts; None where all are."""
    loaded = [part for part in parts if part is not None]
    return ~torch.stack(loaded).any(0) if loaded else None


def poison(config: Any, dataset: Any, wrong: Tensor | None) -> None:
    """Give wrong clients the training rows that their attack learns from, in place of their own.

    Args:
        config: the run's config.
        dataset: the training split.
        wrong: whose client is wrong, bool ``[users]``; None: nobody's.
    """
    attack = AttackSettings.of(config)
    if attack is None or wrong is None:
        return
    rows, positives = dataset.inter_feat, config["label_mode"] == "implicit"
    names = {"user": dataset.uid_field, "item": dataset.iid_field, "label": dataset.label_field}
    has_labels = not positives and dataset.label_field in rows
    columns = {part: rows[name] for part, name in names.items() if part != "label" or has_labels}
    replaced = poisoned(attack, columns, wrong[columns["user"]], label_values(dataset), config["seed"])
    for part, column in replaced.items():
        rows[names[part]][:] = column
