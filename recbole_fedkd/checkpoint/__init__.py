"""Checkpoints: sealed files, what they must hold, which file is a run's state, and the config of a resumed run.

Nothing in a checkpoint is trusted: it is read without running code, checked against its digest and its form, and names no
file to open.
"""

from recbole_fedkd.checkpoint.growing import CLIENTS, GrowingFile, read_growing
from recbole_fedkd.checkpoint.large import LARGE_FILES, LargeTensors
from recbole_fedkd.checkpoint.reading import (
    BEST,
    CHECKPOINT_VERSION,
    LAST,
    ROWS,
    Checkpoint,
    best_checkpoint,
    last_and_best,
    open_checkpoint,
    places_beside,
    read_checkpoint,
    take_away_unsaved,
    write_places,
)
from recbole_fedkd.checkpoint.resumed import (
    check_names_no_file,
    check_same_config,
    check_unspent,
    mark_spent,
    resumable_keys,
    resumed_config,
    values_to_read,
)
from recbole_fedkd.checkpoint.sealed import digest, read_sealed, sealed, write_sealed
from recbole_fedkd.checkpoint.state import check_optimizer, load_parameters, random_state, restore_random, restored

__all__ = [
    "BEST",
    "CHECKPOINT_VERSION",
    "CLIENTS",
    "LARGE_FILES",
    "LAST",
    "ROWS",
    "Checkpoint",
    "GrowingFile",
    "LargeTensors",
    "best_checkpoint",
    "check_names_no_file",
    "check_optimizer",
    "check_same_config",
    "check_unspent",
    "digest",
    "last_and_best",
    "load_parameters",
    "mark_spent",
    "open_checkpoint",
    "places_beside",
    "random_state",
    "read_checkpoint",
    "read_growing",
    "read_sealed",
    "restore_random",
    "restored",
    "resumable_keys",
    "resumed_config",
    "sealed",
    "take_away_unsaved",
    "values_to_read",
    "write_places",
    "write_sealed",
]
