"""The config keys ``privacy`` and ``attack``: their parts, and what of a config goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recbole_fedkd.errors import InputError
from recbole_fedkd.registry import dictionary, setting

if TYPE_CHECKING:
    from recbole_fedkd.federated.clipping import ClipSettings

OF_MESSAGES = ("sign_flip", "scale", "noise")
"""Attacks on what clients say; the others are on what they learn from."""

LEVELS = {"int8": 127, "int4": 7}
"""Codecs that sum under masks, and their steps from 0 to the bound that stage ``clip`` sets: a scale that everybody knows."""

LEAST = 3
"""Clients of a sum under masks: of two each knows the other's part from the sum and its own; of one the sum is it."""

_WHO = 0xA77A
"""Parts the choice of wrong clients from all other draws of a run."""


@dictionary("privacy")
@dataclass(frozen=True)
class PrivacySettings:
    """Parts of the key ``privacy``: differential privacy of what the server makes of the clients' messages."""

    unit: str = setting(
        "user",
        "one of user|client",
        "Whose presence nobody can tell: a user, which needs partition=user, or a whole client.",
    )
    clip: float | None = setting(None, "> 0", "Largest L2 norm of what one message changes; longer ones are shortened.")
    clips: dict[str, float] = setting(
        {},
        "",
        "Norms of single arrays of knowledge in place of clip, by patterns of their names, such as {histogram: 4, 'product_*': "
        "10}; what is bounded is the norm of all arrays of a message, each in units of its own.",
    )
    clip_quantile: float | None = setting(
        None,
        "in (0, 1)",
        "Adaptive clipping: after every round clip moves towards this quantile of the lengths of the clients' updates, counted "
        "with noise of its own; clip is where it starts. Not set: clip stays.",
    )
    clip_rate: float = setting(0.2, "> 0", "How fast it moves: learning rate of its logarithm.")
    clip_count_noise: float | None = setting(
        None,
        "> 0",
        "Standard deviation of the noise on the count of updates within clip; above half of noise_multiplier. Not set: a "
        "twentieth of the clients of a round, and noise_multiplier at least.",
    )
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

    noise: str = setting(
        "central",
        "one of central|distributed|local",
        "Who adds it. central: the server, to a sum; distributed: every client a share, inside its masks (secure_aggregation), "
        "so that the server gets the sum with noise alone; local: every client all of it, so that each message has it.",
    )

    @property
    def bound(self) -> ClipSettings:
        """What a unit is shortened to."""
        from recbole_fedkd.federated.clipping import ClipSettings  # brings torch, and settings are read without it

        assert self.clip is not None
        return ClipSettings(self.clip, self.clips)

    def bounds_users(self, config: Any) -> bool:
        """Whether users are shortened one by one before their client adds them up."""
        return self.unit == "user" and config["partition"] != "user"

    def weak(self, clients: int, users: int) -> str | None:
        """Why a promise is none over so many clients and users; None: its delta is small enough."""
        units = clients if self.unit == "client" else users
        if self.delta * units < 1:
            return None
        return (
            f"privacy.delta is {self.delta:g}, and there are {units} {self.unit}s: who tells everything of one in {units}, at "
            f"random, keeps a promise of {1 / units:.2g}; set it well below that"
        )

    @staticmethod
    def of(config: Any) -> PrivacySettings | None:
        """The settings of a config, whose parts have been checked one by one; None without any."""
        return PrivacySettings(**config["privacy"]) if config["privacy"] else None


def check_privacy(config: Any) -> None:
    """Raise :class:`InputError` for parts of ``privacy`` that do not go with each other, or with other keys."""
    if config["secure_aggregation"]:
        _check_secure(config)
    parts: Mapping[str, Any] | None = config["privacy"]
    if parts is None:
        return
    settings = PrivacySettings(**parts)
    for pattern, norm in settings.clips.items():
        if isinstance(norm, bool) or not isinstance(norm, int | float) or not norm > 0:
            raise InputError(f"privacy.clips.{pattern} is {norm!r}; it must be a number > 0")
    idle = [name for name in ("clip_rate", "clip_count_noise") if name in parts]
    if idle and settings.clip_quantile is None:
        raise InputError(f"privacy.{idle[0]} is of a clip that moves, and privacy.clip_quantile is not set; set it")
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
    if settings.bounds_users(config) and not _adds_up_users(config):
        raise InputError(
            f"privacy.unit is 'user', but with partition={config['partition']} a client may hold many users, whose part in its "
            "message is not bounded (of knowledge=factors and fold_in, and of sums of Bias, FoldIn and MFEM it would be); set "
            "partition=user, or privacy.unit=client"
        )
    if settings.noise == "distributed" and not config["secure_aggregation"]:
        raise InputError(
            "privacy.noise=distributed gives every message a share of the noise, which hides it behind nothing but masks; set "
            "secure_aggregation=True, or privacy.noise=local"
        )
    if settings.noise == "local" and (settings.noise_multiplier is None or settings.bounds_users(config)):
        raise InputError(
            "privacy.noise=local is added by clients of one unit each, who count no rounds; set privacy.noise_multiplier, and "
            "partition=user or privacy.unit=client"
        )
    if settings.clip_quantile is not None and (settings.noise == "local" or config["secure_aggregation"]):
        why = "privacy.noise=local" if settings.noise == "local" else "secure_aggregation=True"
        raise InputError(
            f"privacy.clip_quantile has the server count who is within a bound that only it knows, and with {why} it sees no "
            "message as it was; unset one of them"
        )
    if settings.noise == "local" and config["secure_aggregation"]:
        raise InputError(
            "privacy.noise=local is for a server that sees messages; under masks noise=distributed is as good for less"
        )


def _adds_up_users(config: Any) -> bool:
    """Whether all that a client says are sums for item factors, to which each of its users adds a part that can be bounded."""
    if config.taught_by_fold_in:
        return not config["label_knowledge"]
    return bool(config.learns_factors or (config["strategy"] == "sums" and config.model_class.sums == "factors"))


def _check_secure(config: Any) -> None:
    if config["strategy"] in ("central", "local"):
        raise InputError(
            f"secure_aggregation is True, but with strategy={config['strategy']} clients send nothing; unset it, or use a "
            "strategy that sums over clients, such as fedavg"
        )
    codecs, privacy = config["codecs"], PrivacySettings.of(config)
    clips = "clip" in config["stages"] or (privacy is not None and not privacy.bounds_users(config))
    left = codecs[codecs[:1] == ["random_k"] :]
    other = next((codec for codec in left if codec not in LEVELS), None) or (left[1] if len(left) > 1 else None)
    if other is not None or (codecs and not (clips and config.shares_parameters)):
        raise InputError(
            f"secure_aggregation=True masks numbers that add up, and those of codec '{other or codecs[0]}' do not here; set "
            "codecs=[] (broadcast_codecs may stay), or for networks random_k, int8 or int4, or int8 or int4 after random_k, "
            "with stages=[clip, codecs], whose clip_norm is a public scale"
        )
    if codecs and config["codec_arrays"]:
        raise InputError(
            "codec_arrays keeps codecs to some arrays, and under masks all arrays are told alike; unset codec_arrays, or "
            "secure_aggregation"
        )
    if left and privacy is not None:
        raise InputError(
            f"codec '{left[0]}' rounds under masks, by which a message gets longer than privacy.clip; take it out of codecs"
        )
    for key in ("clients_per_round", "min_clients"):
        value = config[key]
        if value is not None and value < LEAST:
            raise InputError(
                f"{key} is {value}, and a sum over fewer than {LEAST} clients tells each of two the other's part; "
                f"secure_aggregation=True needs {LEAST}"
            )
    if privacy is not None and config["clients_per_round"]:
        raise InputError(
            "secure_aggregation=True needs three clients in every round, and privacy with clients_per_round may draw fewer; "
            "unset one of them"
        )


@dictionary("attack")
@dataclass(frozen=True)
class AttackSettings:
    """Parts of the key ``attack``."""

    share: float = setting(
        0.1, "in (0, 1)", "Share of the clients that are wrong, at least one, drawn by the run's seed."
    )
    kind: str = setting(
        "label_flip",
        "one of none|label_flip|item_promotion|sign_flip|scale|noise",
        "What they do; none: nothing, which is what the others are compared with.",
    )
    strength: float = setting(
        10.0,
        "> 0",
        "Kind scale: factor of what a client says, of a network of what changed of it; kind noise: its length, in that of the "
        "message.",
    )
    items: int = setting(1, ">= 1", "Kind item_promotion: how many items, the rarest, get the highest label.")

    @staticmethod
    def of(config: Any) -> AttackSettings | None:
        """The settings of a config, whose parts have been checked one by one; None without any."""
        return AttackSettings(**config["attack"]) if config["attack"] is not None else None

    def wrong(self, clients: int, seed: int) -> frozenset[int]:
        """Numbers of the wrong clients among so many."""
        import numpy as np  # a config is read without it

        generator = np.random.default_rng(np.random.SeedSequence([seed, _WHO]))
        count = max(1, round(self.share * clients))
        return frozenset(generator.choice(clients, count, replace=False).tolist())


def check_attack(config: Any) -> None:
    """Raise :class:`InputError` for an attack where there is no client."""
    settings = AttackSettings.of(config)
    if settings is not None and config["strategy"] == "central":
        raise InputError(
            "attack makes clients wrong, and with strategy=central there are none; unset it, or use fedavg"
        )
    if settings is not None and settings.kind in OF_MESSAGES and config["strategy"] == "local":
        raise InputError(
            f"attack.kind={settings.kind} changes what clients send, and with strategy=local they send nothing; use "
            "label_flip or item_promotion, or a strategy that exchanges something"
        )
