"""Privacy: noise on what a server learns, with an account of it."""

from recbole_fedkd.privacy.accountant import epsilon_of, noise_for, rounds_within
from recbole_fedkd.privacy.release import PrivateRelease, check_strategy
from recbole_fedkd.privacy.settings import PrivacySettings

__all__ = ["PrivacySettings", "PrivateRelease", "check_strategy", "epsilon_of", "noise_for", "rounds_within"]
