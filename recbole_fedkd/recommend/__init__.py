"""What a trained model is for: recommendations, scores and similar items, in the dataset's own tokens."""

from recbole_fedkd import compat as _compat  # noqa: F401  (before RecBole's modules, of which it readies what they import)

# isort: split
from recbole_fedkd.recommend.recommender import Recommender, load

__all__ = ["Recommender", "load"]
