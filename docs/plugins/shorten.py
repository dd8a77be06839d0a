"""A stage: what a client says is made no longer than a norm."""

from dataclasses import dataclass, replace

import numpy as np

from recbole_fedkd.extend import Stage, register_stage, setting


@dataclass(frozen=True)
class ShortenSettings:
    """The stage's key."""

    longest: float = setting(1.0, "> 0", "Stage shorten: L2 norm that a client's message has at most.")


@register_stage
class Shorten(Stage):
    """``--stages=[shorten,codecs] --longest=0.5``."""

    name = "shorten"
    settings_type = ShortenSettings

    def encode(self, message):
        """All float arrays of the message by one factor."""
        floats = {name: array for name, array in message.arrays.items() if array.dtype == np.float32}
        norm = np.sqrt(sum(float((array.astype(float) ** 2).sum()) for array in floats.values()))
        factor = np.float32(min(1.0, self.settings.longest / norm)) if norm else np.float32(1)
        return replace(message, arrays={**message.arrays, **{name: array * factor for name, array in floats.items()}})

    def decode(self, message, schema):
        """It stays short."""
        return message
