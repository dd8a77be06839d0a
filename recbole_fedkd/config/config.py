"""The config of a run: RecBole's, plus this package's properties, minus everything that RecBole swallows."""

from __future__ import annotations

import copy
from typing import Any

from recbole_fedkd import compat  # before RecBole's modules, of which it readies what they import

# isort: split
from recbole.config import Config
from recbole.utils import ModelType

from recbole_fedkd.config.files import RECBOLE_PROPERTIES
from recbole_fedkd.config.given import named
from recbole_fedkd.config.keys import keys_of_model, read_keys
from recbole_fedkd.config.known import keys_in_source
from recbole_fedkd.config.models import find_model
from recbole_fedkd.config.outlines import Outline
from recbole_fedkd.config.plugins import import_plugins, model_of, models_with_keys
from recbole_fedkd.config.strict import StrictConfig
from recbole_fedkd.evaluation import metrics as _metrics  # noqa: F401  (registers the metrics)
from recbole_fedkd.federated import strategy as _strategies  # noqa: F401  (registers them, with what they exchange)
from recbole_fedkd.model import MODELS, AttnFedKD, Bias, corrected, has_fields, names_click_loss, reads_negatives
from recbole_fedkd.model.factorization import FactorizationRecommender
from recbole_fedkd.model.gram import GramRecommender


class FedKDConfig(StrictConfig, Config):
    """The config of a run, with everything loaded that it names; see :class:`StrictConfig` for its arguments.

    Attributes:
        keeps_logs: whether a run of it has a log file and TensorBoard's curves.
        of_one_party: whether the data set is one party's own rows, which need not hold every label.
        fingerprint: what the data set is held against when it is loaded; None unless a checkpoint says so.
    """

    fingerprint: Any = None
    keeps_logs: bool = False
    of_one_party: bool = False

    def compatibility_settings(self) -> None:
        """Replaces RecBole's, which reads names that numpy 2 removed."""
        compat.apply()

    def _get_model_and_dataset(self, model: str | type | None, dataset: str | None) -> tuple[str, type, str]:
        chosen, name = named(self.external_config_dict, model, dataset)
        plugins = import_plugins(self.external_config_dict.get("plugins"))
        self._keys_of_plugins = {key for own in models_with_keys(plugins) for key in keys_of_model(own)}
        own = model_of(plugins, chosen) if isinstance(chosen, str) else corrected(chosen)
        model_class = find_model(str(chosen)) if own is None else own
        self.outline = _outline_of(model_class)
        return chosen if isinstance(chosen, str) else chosen.__name__, model_class, name

    def _init_device(self) -> None:
        if isinstance(self.final_config_dict["gpu_id"], list):
            self.final_config_dict["gpu_id"] = tuple(self.final_config_dict["gpu_id"])
        super()._init_device()

    def made_by(self) -> str:
        """Half a sentence on what a model's scores come from: its training, or of a model without gradients its own keys."""
        if self["MODEL_TYPE"] != ModelType.TRADITIONAL:
            return f"after training with learner {self['learner']}, learning_rate {self['learning_rate']:g}"
        file = RECBOLE_PROPERTIES / "model" / f"{self['model']}.yaml"
        own = read_keys(file) if file.is_file() else ()
        values = ", ".join(f"{name} {self[name]}" for name in own if self[name] is not None)
        return f"as configured: {values}" if values else "on these data"

    def view(self, **changes: Any) -> FedKDConfig:
        """The same config with some keys changed, for a second evaluation protocol."""
        other = copy.copy(self)
        other.final_config_dict = {**self.final_config_dict, **changes}
        return other


def _outline_of(model_class: type) -> Outline:
    """The outline of a model's class, also of one of the user's own."""
    own = issubclass(model_class, tuple(MODELS.values()))
    stock = model_class.__module__.startswith(("recbole.", "recbole_fedkd."))
    of_clicks, input_type = FactorizationRecommender | GramRecommender, getattr(model_class, "input_type", None)
    traits = {
        "population": issubclass(model_class, AttnFedKD),
        "features": getattr(model_class, "embeds_features", False),
        "clicks": issubclass(model_class, of_clicks),
        "ratings": issubclass(model_class, Bias),
    }
    return Outline(
        model_class.__name__,
        model_class.type.name,  # type: ignore[attr-defined]
        None if input_type is None else input_type.name,
        frozenset(trait for trait, there in traits.items() if there),
        getattr(model_class, "sums", None),
        own=own,
        stock=stock,
        fields=has_fields(model_class),
        reads_negatives=reads_negatives(model_class),
        may_click=own or not stock or names_click_loss(model_class),
        mentioned=frozenset(keys_in_source(model_class)),
    )
