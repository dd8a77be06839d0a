"""The config key ``privacy``: its parts, and what of a config goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recbole_fedkd.errors import InputError
from recbole_fedkd.registry import setting


@dataclass(frozen=True)
class PrivacySettings:
    """Parts of the key ``privacy``: differential privacy of what the server makes of the clients' messages."""

    unit: str = setting(
        "user",
        "one of user|client",
        "Whose presence nobody can tell: a user, which needs partition=user, or a whole client.",
    )
    clip: float | None = setting(None, "> 0", "Largest L2 norm of what one message changes; longer ones are shortened.")
    noise_multiplier: float | None = setting(
        None,
        "> 0",
        "Standard deviation of the noise on a sum of messages, in units of clip; not set: found by epsilon.",
    )
    delta: float = setting(1e-5, "in (0, 1)", "Probability with which the promise may fail.")
    epsilon: float | None = setting(
        None,
        "> 0",
        "Budget: the run ends before a round that would spend more. Not set: no end, what is spent is told.",
    )
    accountant: str = setting("prv", "one of prv|rdp", "Who counts where clients are sampled, of opacus.")

    @staticmethod
    def of(config: Any) -> PrivacySettings | None:
        """The settings of a config, whose parts have been checked one by one; None without any."""
        return PrivacySettings(**config["privacy"]) if config["privacy"] else None


def check_privacy(config: Any) -> None:
    """Raise :class:`InputError` for parts of ``privacy`` that do not go with each other, or with other keys."""
    if config["secure_aggregation"]:
        _check_secure(config)
    given: Mapping[str, Any] | None = config["privacy"]
    if given is None:
        return
    settings = PrivacySettings(**given)
    if settings.clip is None:
        raise InputError(
            "privacy.clip is not set; it must be a number > 0, the largest L2 norm of what a message changes"
        )
    if settings.noise_multiplier is None and settings.epsilon is None:
        raise InputError("privacy has neither noise_multiplier nor epsilon; it needs one of them, or both")
    if config["strategy"] in ("central", "local"):
        raise InputError(
            f"privacy puts noise on what clients send, and with strategy={config['strategy']} they send nothing; unset it, or "
            "use a strategy that sums over clients, such as fedavg"
        )
    if settings.unit == "user" and config["partition"] != "user":
        raise InputError(
            f"privacy.unit is 'user', but with partition={config['partition']} a client may hold many users, whose part in its "
            "message is not bounded; set partition=user, or privacy.unit=client"
        )


def _check_secure(config: Any) -> None:
    if config["strategy"] in ("central", "local"):
        raise InputError(
            f"secure_aggregation is True, but with strategy={config['strategy']} clients send nothing; unset it, or use a "
            "strategy that sums over clients, such as fedavg"
        )
    if config["engine"] not in ("local", "fleet"):
        raise InputError(
            f"secure_aggregation runs in one process so far, and engine is {config['engine']}; use engine=local, which "
            "measures it"
        )
