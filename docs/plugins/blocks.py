"""A partition: users in blocks of one size, in the order of their numbers."""

from dataclasses import dataclass

import numpy as np

from recbole_fedkd.extend import register_partition, setting


@dataclass(frozen=True)
class BlocksSettings:
    """The partition's key."""

    block_size: int = setting(10, ">= 1", "Partition blocks: users of a client.")


@register_partition("blocks", BlocksSettings)
def blocks(user_base, argument, generator, settings):
    """``--partition=blocks --block_size=5``."""
    return np.arange(user_base.users) // settings.block_size
