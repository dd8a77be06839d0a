"""The defaults of a model and a preset, from the files alone: what ``--help`` shows, without loading either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recbole_fedkd.config.files import (
    FILES_OF_EVERY_RUN,
    OWN_DEFAULTS,
    PROPERTIES,
    RECBOLE_PROPERTIES,
    files_of_model,
    preset_file,
)
from recbole_fedkd.config.keys import merged_layers
from recbole_fedkd.config.values import read_yaml

# RecBole's models of these folders have a file of their kind.
_FILE_OF_KIND = {"context_aware": "context-aware", "sequential": "sequential", "knowledge_aware": "knowledge_base"}
_FILE_OF_MODEL = {
    "DIN": "sequential_DIN",
    "DIEN": "sequential_DIN",
    "GRU4RecKG": "sequential_embedding_model",
    "KSR": "sequential_embedding_model",
}


def default_values(model: str, preset: str | None = None) -> dict[str, Any]:
    """Every key's default for a model of this package or of RecBole, on a dataset without a file of its own."""
    layers = [_read(file) for file in (*FILES_OF_EVERY_RUN, *_recbole_files(model), *files_of_model(model))]
    values = merged_layers(*layers, OWN_DEFAULTS)
    chosen = _read(preset_file(str(preset or values.get("preset"))))
    mode = chosen.get("label_mode", values.get("label_mode"))
    labels = _read(PROPERTIES / "label_mode" / f"{mode}.yaml") if mode else {}
    return {**values, **labels, **chosen, "label_mode": mode}


def _recbole_files(model: str) -> list[Path]:
    own = RECBOLE_PROPERTIES / "model" / f"{model}.yaml"
    source = next((RECBOLE_PROPERTIES.parent / "model").glob(f"*_recommender/{model.lower()}.py"), None)
    kind = source.parent.name.removesuffix("_recommender") if source else ""
    name = _FILE_OF_MODEL.get(model, _FILE_OF_KIND.get(kind))
    return [own, RECBOLE_PROPERTIES / "quick_start_config" / f"{name}.yaml"]


def _read(file: Path) -> dict[str, Any]:
    return (read_yaml(file, "properties file") or {}) if file.is_file() else {}
