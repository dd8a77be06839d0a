"""The config: keys with their types and ranges, the user's values, and ``FedKDConfig``, which merges them."""

from recbole_fedkd.config.config import FedKDConfig
from recbole_fedkd.config.keys import PROPERTIES, Key, read_keys
from recbole_fedkd.config.models import find_model, recbole_models
from recbole_fedkd.config.values import parse_value, read_yaml

__all__ = ["PROPERTIES", "FedKDConfig", "Key", "find_model", "parse_value", "read_keys", "read_yaml", "recbole_models"]
