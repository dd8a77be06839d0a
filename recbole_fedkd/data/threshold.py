"""The rating from which a row is positive: three quarters up the scale where nobody says it, checked where somebody does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from recbole.data.dataset import Dataset

from recbole_fedkd.errors import InputError

NEARLY_ALL = 0.95
"""A larger share of rows with one label is worth a warning."""

Scale = tuple[float, float]


def label_scale(ratings: NDArray[np.floating], declared: Sequence[float] | None) -> Scale:
    """Lowest and highest label: of ``label_values`` where the config declares them, else of the ratings ``[n]`` found."""
    values = np.asarray(declared if declared else ratings, dtype=np.float64)
    return float(values.min()), float(values.max())


def three_quarters(scale: Scale) -> float:
    """Three quarters of the way up a scale: 4.0 for 1..5, 7.5 for 0..10.

    Rounded to 12 digits: of .1 to .9 it is .7, which is a rating, and not the next number above it, which is none.
    """
    low, high = scale
    return float(f"{low + 0.75 * (high - low):.12g}")


def positive_sentence(field: str, threshold: float, scale: Scale | None) -> str:
    """What a positive row is, for the reader of a number."""
    rule = f"{field} >= {threshold:g}"
    if scale is None or threshold != three_quarters(scale):
        return rule
    return f"{rule}, three quarters of the scale {scale[0]:g}..{scale[1]:g}"


def one_sided(positive: NDArray[np.bool_]) -> str | None:
    """Half a sentence about rows ``[n]`` of which nearly all have one label; None for others."""
    if not len(positive) or 1 - NEARLY_ALL <= (share := float(positive.mean())) <= NEARLY_ALL:
        return None
    kind = "positive" if share > NEARLY_ALL else "negative"
    number = int(positive.sum()) if share > NEARLY_ALL else int((~positive).sum())
    return f"{number} of {len(positive)} rows ({100 * number / len(positive):.3g} %) are {kind}"


class ThresholdLabels(Dataset):
    """Mixin in front of any of RecBole's dataset classes: ``rating_threshold`` is settled, and labels of one kind are told.

    Attributes:
        label_scale: lowest and highest rating of the whole dataset, as :func:`label_scale`; None without ratings.
    """

    label_scale: Scale | None = None

    def _load_data(self, token: str, dataset_path: str) -> None:
        super()._load_data(token, dataset_path)
        if self.config["label_mode"] in ("rating", "threshold"):
            self._settle_threshold()

    def _data_processing(self) -> None:
        super()._data_processing()
        field = self.config["RATING_FIELD"]
        if self.config["label_mode"] is None:
            self._settle_threshold()  # RecBole may have scaled the ratings
        elif self.config["label_mode"] == "rating" and field in self.inter_feat:
            threshold = self.config["rating_threshold"]
            self._check_sides(self.inter_feat[field].to_numpy(), threshold, "rating_threshold", f"{threshold:g}")

    def _settle_threshold(self) -> None:
        """The scale of the ratings, and where nothing is set the threshold that it gives."""
        config, field = self.config, self.config["RATING_FIELD"]
        if field not in self.inter_feat or not len(self.inter_feat) or self.inter_feat[field].dtype.kind not in "fiu":
            return
        self.label_scale = label_scale(self.inter_feat[field].to_numpy(), config["label_values"])
        if config["rating_threshold"] is None:
            config["rating_threshold"] = three_quarters(self.label_scale)
            if config["label_mode"] == "threshold":
                config["threshold"] = {field: config["rating_threshold"]}

    def _set_label_by_threshold(self) -> None:
        asked = self.config["threshold"]
        values = {field: self.inter_feat[field].to_numpy() for field in asked or {} if field in self.inter_feat}
        super()._set_label_by_threshold()
        ours = self.config["label_mode"] == "threshold"
        for field, ratings in values.items():
            low = f"{asked[field]:g}" if ours else str(asked)
            self._check_sides(ratings, asked[field], "rating_threshold" if ours else "threshold", low)

    def _check_sides(self, ratings: NDArray[np.floating], threshold: float, key: str, shown: str) -> None:
        """Warn of ratings that nearly all are on one side of a threshold.

        Raises:
            InputError: all of them are.
        """
        if not len(ratings) or self.config.of_one_party:
            return
        name, positive = self.dataset_name, ratings >= threshold
        low, high = float(ratings.min()), float(ratings.max())
        if low == high:
            raise InputError(
                f"all {len(ratings)} ratings of dataset '{name}' are {low:g}; two labels need at least two ratings, or "
                "label_mode=implicit, which needs none"
            )
        if positive.all() or not positive.any():
            raise InputError(
                f"{key} is {shown}, but {'all' if positive.all() else 'none'} of the {len(ratings)} ratings of dataset "
                f"'{name}', which are {low:g} to {high:g}, reach it, so that there is one label only; set {key} in between, "
                f"such as {three_quarters((low, high)):g}"
            )
        sided = one_sided(positive)
        if sided:
            self.logger.warning(
                f"dataset '{name}': {sided}, as {key} is {shown} and the ratings are {low:g} to {high:g}; is it meant so?"
            )
