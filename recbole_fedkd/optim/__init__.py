"""Optimisers."""

from recbole_fedkd.optim.adam_to_sgd import AdamToSGD

__all__ = ["AdamToSGD"]
