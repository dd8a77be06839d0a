"""The values of a config that a run or a manifest has saved, which may come from anybody."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_fedkd.config.keys import keys_with
from recbole_fedkd.errors import InputError

_FILE_NAME = re.compile(r"(^|_)(path|file|files|dir|folder)$")


def values_to_read(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a config, as far as another that is to be the same reads them."""
    made_again = keys_with("derived") | keys_with("one_run")
    base = {key: value for key, value in saved.items() if key not in made_again}
    base["metrics"] = saved["judged_metrics"]
    if saved["train_neg_sample_args"].get("distribution") == "none":
        # RecBole writes "no sampling" in a form that it does not read.
        base["train_neg_sample_args"] = None
    # RecBole appends the dataset's name to the path when it reads it.
    base["data_path"] = str(Path(saved["data_path"]).parent)
    return base


def check_names_no_file(saved: Mapping[str, Any], given: Mapping[str, Any], source: str | Path) -> None:
    """Raise :class:`InputError` where the checkpoint alone says which file, beside the dataset's own, is to be opened."""
    for key in keys_with("in_dataset"):
        values = saved.get(key) if isinstance(saved.get(key), list) else [saved.get(key)]
        for value in values or []:
            if isinstance(value, str) and (not value or set(value) & set("/\\\0") or value in (".", "..")):
                raise InputError(
                    f"checkpoint '{source}' cannot be used: {key} is {value!r}, which leaves the dataset's folder"
                )
    for key, value in saved.items():
        if key in keys_with("one_run") or key == "data_path" or not value or key in given:
            continue
        if key == "plugins" and isinstance(value, list) and all(name in sys.modules for name in value):
            continue  # already at work in this process
        if key in keys_with("opens") or _FILE_NAME.search(key):
            raise InputError(
                f"checkpoint '{source}' names something to open or to run, {key}={value!r}; if you trust it, name it "
                f"yourself by {key}"
            )
