"""What a server lets out of a round under differential privacy: a bounded sum over clients, with noise.

A message changes the sum by ``clip`` at most, since the stage ``clip`` shortens it at either end; the server adds Gaussian
noise to the sum before it, or anybody, looks at it (McMahan, Ramage, Talwar, Zhang, ICLR 2018). A mean is that sum over the
number of clients that are expected, never over those that came, which would tell. Who takes part is drawn by independent
coins of the operating system (Poisson sampling): a fixed number out of a public seed hides nobody.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_fedkd.errors import InputError, TrainingError
from recbole_fedkd.federated.aggregate import Fold, MeanOfChangedRows, Sums, WeightedMean
from recbole_fedkd.federated.clipping import ClipSettings
from recbole_fedkd.federated.message import ArraySpec, Message, Training
from recbole_fedkd.federated.server import Release
from recbole_fedkd.federated.strategy import ServerState, Strategy, check_additive
from recbole_fedkd.federated.wire import ServerLink
from recbole_fedkd.privacy.accountant import epsilon_of, noise_for, rounds_within
from recbole_fedkd.privacy.clipping import FollowedClip, next_bound, noise_beside_count, usual_count_noise
from recbole_fedkd.privacy.noise import gaussian, uniform
from recbole_fedkd.privacy.settings import PrivacySettings

Statistics = Mapping[str, Tensor]


class PrivateRelease(Release):
    """Noise on the sums of a run's rounds, and the account of what they have spent.

    Args:
        settings: the parts of the key ``privacy``.
        expected: clients that take part in a round on average; None: all, always.

    Attributes:
        clients: of the federation; how many there are is no secret.
        noise_multiplier: standard deviation of the noise, in units of the clip, that is accounted.
        clip: largest norm of a message now.
        follows: the server's end of a bound that moves; None: it stays.
    """

    def __init__(self, settings: PrivacySettings, expected: int | None = None) -> None:
        assert settings.clip is not None
        self.settings, self.expected = settings, expected
        self.clip: ClipSettings = settings.bound
        self.clients, self.releases = 0, 0
        self.noise_multiplier = settings.noise_multiplier or 0.0
        self.follows: FollowedClip | None = None
        self._used: float | None = None
        self._counted = False  # whether the release under way is in the count
        self._drawn: tuple[int, list[int]] = (-1, [])

    def __str__(self) -> str:
        settings, drawn = self.settings, f", {self.rate:.4g} of them drawn in a round" if self.samples else ""
        moves = f" moving to quantile {settings.clip_quantile:g}" if settings.clip_quantile is not None else ""
        return (
            f"unit {settings.unit}, {settings.noise} noise, clip {self.clip.clip_norm:.4g}{moves}, "
            f"noise_multiplier {self.noise_multiplier:.4g}, delta {settings.delta:g}, {self.clients} clients{drawn}"
        )

    @property
    def samples(self) -> bool:
        """Whether who takes part is drawn, and secret."""
        return self.expected is not None and self.expected < self.clients

    @property
    def rate(self) -> float:
        """Probability of a client to take part in a round."""
        return self.expected / self.clients if self.expected is not None and self.samples else 1.0

    @property
    def epsilon(self) -> float:
        """Spent so far."""
        return self.spent_by(self.releases)

    @property
    def is_spent(self) -> bool:
        """As of :class:`Release`."""
        budget = self.settings.epsilon
        return budget is not None and self.spent_by(self.releases + 1) > budget

    @property
    def shortened_to(self) -> float | None:
        """As of :class:`Release`."""
        return self._used

    @property
    def secret_rate(self) -> float:
        """As ``rate``, for who does not know who takes part. The server does, so that noise against the server itself, which
        clients add, is accounted as if all always took part.
        """
        return self.rate if self.settings.noise == "central" else 1.0

    def spent_by(self, releases: int) -> float:
        """Epsilon of so many rounds."""
        settings = self.settings
        return epsilon_of(self.noise_multiplier, releases, settings.delta, self.secret_rate, settings.accountant)

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on the count of updates within a bound that moves."""
        deviation = self.settings.clip_count_noise
        return (
            deviation if deviation is not None else usual_count_noise(self.rate * self.clients, self.noise_multiplier)
        )

    def deviation_of(self, name: str) -> float:
        """Standard deviation of the noise on the sum of an array over the clients."""
        moves = self.settings.clip_quantile is not None
        noise = noise_beside_count(self.noise_multiplier, self.count_noise) if moves else self.noise_multiplier
        return noise * self.clip.norm_of(name)

    def check_step(self, step: float) -> None:
        """Raise :class:`InputError` for noise that whole numbers of so many units of a message would round to none."""
        bounds = self.clip
        clip = min(bounds.clip_norm, *bounds.norms.values()) if bounds.norms else bounds.clip_norm
        if self.noise_multiplier * clip < step:
            raise InputError(
                f"privacy.clip is {clip:g}, and with noise_multiplier {self.noise_multiplier:g} clients' noise is below a step "
                "of the whole numbers that masks hide, which is none; clip must be at least "
                f"{step / self.noise_multiplier:.2g}"
            )

    def start(self, clients: int, rounds: int) -> int:
        """Before the first round: find the noise, where it follows from the budget.

        Args:
            clients: that train.
            rounds: that are to let something out.

        Returns:
            The number of them that the budget lasts for.

        Raises:
            InputError: not even one; or opacus is needed and not installed.
        """
        self.clients, settings = clients, self.settings
        if settings.noise_multiplier is None and not self.releases:  # a resumed run goes on with the noise that it had
            assert settings.epsilon is not None
            self.noise_multiplier = noise_for(
                settings.epsilon, rounds, settings.delta, self.secret_rate, settings.accountant
            )
        if settings.clip_quantile is not None and self.count_noise <= self.noise_multiplier / 2:
            raise InputError(
                f"privacy.clip_count_noise is {self.count_noise:g}; it must be above half of the noise multiplier, "
                f"{self.noise_multiplier / 2:.4g}, or the count alone spends what the round may"
            )
        if settings.epsilon is None:
            return rounds
        lasts = rounds_within(settings.epsilon, self.spent_by, rounds)
        if not lasts:
            raise InputError(
                f"privacy.epsilon is {settings.epsilon:g}, and with noise_multiplier {self.noise_multiplier:g} a single round "
                f"spends {self.spent_by(1):.4g}; raise one of them"
            )
        return lasts

    def choose(self, clients: Sequence[int], round_index: int) -> list[int] | None:
        """Each by a coin of its own; the same however often a round is asked for, and another one if the round is run again."""
        self.clients = self.clients or len(clients)
        if not self.samples:
            return list(clients)
        if self._drawn[0] != round_index:
            self._drawn = round_index, np.asarray(clients)[uniform(len(clients)) < self.rate].tolist()
        return self._drawn[1]

    def spend(self) -> None:
        """Count a release before anybody hears of it; once, however often it is asked for.

        Raises:
            TrainingError: the budget is spent.
        """
        if self._counted:
            return
        if self.is_spent:
            raise TrainingError(f"privacy.epsilon={self.settings.epsilon:g} is spent; a further round would spend more")
        self.releases, self._counted = self.releases + 1, True
        if self.spends is not None:
            self.spends(self.state_dict())

    def repeated(self) -> None:
        """What clients add up is asked for again, with other noise: if the server has heard it, that is another release."""
        self._counted = False

    def of_round(
        self,
        fold: Fold,
        statistics: Statistics | None,
        answers: int,
        link: ServerLink,
    ) -> Statistics | None:
        """What the uploads of a round come to, with noise.

        Args:
            fold: of the round, a sum or a mean.
            statistics: of those that answered; None: nobody has.
            answers: how many have.
            link: knows what the mean is one of changes of, and which statistics are of what clients say.

        Raises:
            TrainingError: the budget is spent.
        """
        self._drawn = (-1, [])
        start = {name: torch.tensor(value) for name, value in link.reference.items()}
        if statistics is None and not start:
            return None  # nothing was due: a strategy in which a client may be silent has all silent, or none
        self.spend()
        self._counted = False
        arrays = dict(start) if statistics is None else dict(statistics)
        # What clients have added by themselves is not added again.
        share, added = 1.0, float(self.settings.noise == "central")
        if isinstance(fold, WeightedMean):
            share, added = answers / (self.rate * self.clients), added / (self.rate * self.clients)
        specs = link.schema.arrays if link.schema is not None else {}
        released = {
            # What else a fold says, such as who has spoken, is the server's own affair and goes nowhere.
            name: _noised(value, start.get(name), share, added * self.deviation_of(name), specs[name])
            if name in specs
            else value
            for name, value in arrays.items()
        }
        self._move()
        return released

    def _move(self) -> None:
        """Where the bound moves: by how many updates were within it, as far as noise lets tell."""
        quantile = self.settings.clip_quantile
        if self.follows is None or quantile is None:
            return
        self._used = self.clip.clip_norm
        halves = sum(0.5 if within else -0.5 for within in self.follows.within.values())
        share = 0.5 + (halves + float(gaussian((), self.count_noise))) / (self.rate * self.clients)
        # Few clients have much noise, which is not to throw the bound anywhere.
        self._clip_by(next_bound(self.clip.clip_norm, min(max(share, 0.0), 1.0), quantile, self.settings.clip_rate))

    def _clip_by(self, norm: float) -> None:
        self.clip = replace(self.clip, clip_norm=norm)
        if self.follows is not None:
            self.follows.settings, self.follows.within = self.clip, {}

    def state_dict(self) -> dict[str, Any]:
        """What has been let out, with which noise, and how long a message may be now."""
        return {"releases": self.releases, "noise_multiplier": self.noise_multiplier, "clip": self.clip.clip_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.releases, self.noise_multiplier = int(state["releases"]), float(state["noise_multiplier"])
        self._counted = False
        self._clip_by(float(state.get("clip", self.clip.clip_norm)))  # of a bound that stays, older states say nothing


def _noised(value: Tensor, start: Tensor | None, share: float, deviation: float, spec: ArraySpec) -> Tensor:
    """``start`` plus what changed of it, times a share, plus noise; of the type of the value, and where it counts a count."""
    exact = value.double()
    origin = start.double() if start is not None else torch.zeros_like(exact)
    noisy = origin + (exact - origin) * share + torch.from_numpy(gaussian(tuple(value.shape), deviation))
    if np.issubdtype(spec.dtype, np.integer):
        noisy = noisy.round()
    return (noisy.clamp(min=0) if spec.counts else noisy).to(value.dtype)


def check_strategy(strategy: Strategy, state: ServerState, samples: bool, settings: PrivacySettings) -> None:
    """Check that what a client adds to a round is bounded by the clip, and covered by the noise.

    Args:
        strategy: whose sums are to be let out.
        state: that the server starts with.
        samples: whether clients are drawn for a round.
        settings: the parts of the key ``privacy``.

    Raises:
        InputError: a strategy of which that is not so.
    """
    check_additive(strategy, "privacy")
    if settings.clip_quantile is not None and not strategy.shares_parameters:
        raise InputError(
            f"privacy.clip_quantile follows how much networks change from round to round, and strategy '{strategy.name}' sends "
            "knowledge, of which a client has to know the bound; unset it"
        )
    if settings.clips and strategy.shares_parameters:
        raise InputError(
            f"privacy.clips bounds arrays of knowledge by their names, and strategy '{strategy.name}' sends networks, of which "
            "all numbers have one bound; set privacy.clip"
        )
    fold = strategy.empty(state, {0: 1, 1: 1})
    schema = strategy.upload_schema(state)
    if not isinstance(fold, Sums | WeightedMean) or isinstance(fold, MeanOfChangedRows) or schema is None:
        raise InputError(
            f"privacy needs to know what is summed, and strategy '{strategy.name}' says it not by a schema of its uploads, and "
            "by Sums or WeightedMean"
        )
    unmatched = [pattern for pattern in settings.clips if not fnmatch.filter(schema.arrays, pattern)]
    if unmatched:
        raise InputError(
            f"privacy.clips.{unmatched[0]} matches no array that clients send; with strategy '{strategy.name}' there are "
            f"{', '.join(schema.arrays)}"
        )
    if isinstance(fold, WeightedMean):
        weights = {fold.weight_of(Message("", 0, 0, {}, Training(samples))) for samples in (1, 2)}
        if len(weights) > 1:
            raise InputError(
                f"privacy bounds what one client changes, and strategy '{strategy.name}' counts a client by its samples; set "
                "client_weights=uniform"
            )
    if samples and any(spec.optional for spec in schema.arrays.values()):
        raise InputError(
            "privacy with clients_per_round hides who takes part, which a client tells that says more in its first round than "
            f"later, as strategy '{strategy.name}' with this knowledge has it; unset clients_per_round"
        )
