"""A codec: every number as a whole multiple of one step, a byte each."""

from dataclasses import dataclass

import numpy as np

from recbole_fedkd.extend import Codec, register_codec, setting


@dataclass(frozen=True)
class StepsSettings:
    """The codec's key."""

    step_size: float = setting(0.001, "> 0", "Codec steps: the step.")


@register_codec
class Steps(Codec):
    """``--codecs=[steps] --step_size=0.002``; an array that 127 steps do not reach stays as it is."""

    name, settings_type = "steps", StepsSettings
    parts = {"codes": np.int8}

    def encode(self, array, round_index):
        """``codes`` of the same shape."""
        codes = np.rint(array / np.float32(self.settings.step_size))
        return {"codes": codes.astype(np.int8)} if array.size and np.abs(codes).max() <= 127 else None

    def error_bound(self, array):
        """Half a step a number."""
        return np.sqrt(array.size) * self.settings.step_size / 2 * (1 + 1e-4)

    def shape_of(self, parts):
        """As it came."""
        return parts["codes"].shape

    def decode(self, parts):
        """Codes times the step."""
        return parts["codes"].astype(np.float32) * np.float32(self.settings.step_size)
