"""Optimisers."""

from recbole_fedkd.optim.adam_to_sgd import AdamToSGD, trusted

LEARNERS = ("adam_to_sgd", "adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam")
"""What the key ``learner`` takes, in any case; ``sparse_adam`` is built by RecBole, for models that need it."""

__all__ = ["LEARNERS", "AdamToSGD", "trusted"]
