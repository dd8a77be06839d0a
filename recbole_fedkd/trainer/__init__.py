"""Trainers: RecBole's ``Trainer`` with safe checkpoints; ``FedKDTrainer`` trains by rounds."""

from recbole_fedkd import compat as _compat  # noqa: F401  (before RecBole's modules, of which it readies what they import)

# isort: split
from recbole_fedkd.trainer.by_rounds import FedKDTrainer, trainer_class
from recbole_fedkd.trainer.checkpointed import CheckpointTrainer, new_run_name

__all__ = ["CheckpointTrainer", "FedKDTrainer", "new_run_name", "trainer_class"]
