"""A strategy: federated averaging whose server goes a part of the way to the clients' mean."""

from dataclasses import dataclass

from recbole_fedkd.extend import AveragingSettings, FederatedAveraging, register_strategy, setting


@dataclass(frozen=True)
class DampedSettings(AveragingSettings):
    """The keys of federated averaging, and one more."""

    damping: float = setting(0.5, "in (0, 1]", "Share of the way to the clients' mean that the server goes.")


@register_strategy
class Damped(FederatedAveraging):
    """``--strategy=damped --damping=0.7``."""

    name = "damped"
    settings_type = DampedSettings

    def step(self, state, statistics):
        """The server's next network, given the mean of the clients'."""
        mean = super().step(state, statistics)
        return {name: state[name] + self.settings.damping * (mean[name] - state[name]) for name in mean}
