"""An aggregation: clients count by a power of their samples, between ``uniform`` (0) and ``weighted`` (1)."""

from dataclasses import dataclass

from recbole_fedkd.extend import WeightedAggregation, register_aggregation, setting


@dataclass(frozen=True)
class PowersSettings:
    """The aggregation's key."""

    sample_power: float = setting(0.5, "in [0, 1]", "Aggregation powers: the power of the samples.")


@register_aggregation
class Powers(WeightedAggregation):
    """``--strategy=afd --aggregation=powers --sample_power=0.5``."""

    name = "powers"
    settings_type = PowersSettings

    def weights(self, counts):
        """Of samples per client and label; 0 where there are none."""
        return (counts > 0).double() * counts.double() ** self.settings.sample_power
