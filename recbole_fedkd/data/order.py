"""Time order by the file's own numbers, and what a split made of it.

RecBole turns timestamps into 32-bit floating point before it orders by them: seconds of today tie with all others of the same
minute or two, milliseconds with those of a day, and what ties falls into file order. Here rows are ordered before that, by time
as written (:mod:`recbole_fedkd.data.atomic`); rows of equal time stay in the order of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from recbole.data.dataset import Dataset, SequentialDataset

from recbole_fedkd.data.rows import Rows

RECENCY_FIELD = "recency_rank"
"""Generated column: place of an interaction in time among all, int64; of equal times, place in the file."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class HeldOutRows:
    """What there is to say about the rows of a validation or test split.

    Attributes:
        rows: how many.
        tied: rows with the time of another row that was divided with them but lies in another split, so that the order of
            the file decided which of the two is held out; None where the split does not go by time.
        repeated: rows whose pair of user and item is among the training rows.
    """

    rows: int
    tied: int | None
    repeated: int


@dataclass(frozen=True)
class _Rows:
    """All rows of a dataset in time order ``[rows]`` each; in file order where there is no time.

    Attributes:
        users: user id.
        pairs: number of the pair of user and item.
        moments: number of the time, equal for equal times.
        places: place in time of the rows in the order of the dataset's table.
        timed: whether there is a time.
    """

    users: Numbers
    pairs: Numbers
    moments: Numbers
    places: Numbers
    timed: bool


class TimeOrder(Dataset):
    """Mixin in front of any of RecBole's dataset classes, and of ``AtomicFiles``: exact time order in all that RecBole does.

    That is ``order: TO`` of every split, the split by time (``TS``), and the histories that RecBole writes for sequential
    models. Benchmark files keep their own split.

    Attributes:
        keeps_recency: whether the splits keep the column :data:`RECENCY_FIELD`; RecBole's own models are not shown it.
        item_interactions: interactions of every item in all splits together ``[items]``; of the whole dataset alone.
        held_out: of validation and test splits alone.
    """

    inter_feat: Any
    keeps_recency = False
    item_interactions: Numbers | None = None
    held_out: HeldOutRows | None = None
    _all_rows: _Rows | None = None

    def _remap_ID_all(self) -> None:  # noqa: N802 - RecBole's name
        """From here on the table has its rows, and its times as written: what follows may normalise them."""
        super()._remap_ID_all()
        table = self.inter_feat
        users, items = table[self.uid_field].to_numpy(), table[self.iid_field].to_numpy()
        self.item_interactions = np.bincount(items, minlength=self.item_num)
        timed = self.time_field in table
        times = table[self.time_field].to_numpy() if timed else np.zeros(len(table))
        order = np.argsort(times, kind="stable")
        ordered = times[order]
        moments = np.cumsum(np.concatenate([[0], ordered[1:] != ordered[:-1]])) if len(ordered) else order
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order))
        if isinstance(self, SequentialDataset) and self.benchmark_filename_list is None:
            # RecBole's augmentation sorts by user and 32-bit time, and keeps what ties in the order that it finds.
            chronicle = np.lexsort((places, users))
            self.inter_feat = table.iloc[chronicle].reset_index(drop=True)
            places = places[chronicle]
        users, pairs = users[order].astype(np.int64), (users * np.int64(self.item_num) + items)[order]
        self._all_rows = _Rows(users, pairs, moments.astype(np.int64), places, timed)

    def _dataframe_to_interaction(self, data: pd.DataFrame) -> Any:
        """As RecBole's; times that are no feature of a model keep their 64 bits."""
        interaction = Rows(super()._dataframe_to_interaction(data).interaction)
        if self.time_field in data and self.time_field not in self.config["numerical_features"]:
            interaction[self.time_field] = torch.from_numpy(data[self.time_field].to_numpy(copy=True))
        return interaction

    def _change_feat_format(self) -> None:
        """Tables become tensors, and RecBole writes histories; every row then gets its place in time."""
        super()._change_feat_format()
        rows = self._all_rows
        assert rows is not None
        places = rows.places
        if isinstance(self, SequentialDataset) and self.benchmark_filename_list is None:
            users = rows.users[places]
            places = places[1:][users[1:] == users[:-1]]  # a user's first row is only history
        self.inter_feat[RECENCY_FIELD] = torch.from_numpy(places)

    def sort(self, by: Any, ascending: Any = True) -> None:
        """As RecBole's, with the place in time for the time where the rows have one."""
        fields = [by] if isinstance(by, str) else list(by)
        if RECENCY_FIELD in self.inter_feat:
            fields = [RECENCY_FIELD if field == self.time_field else field for field in fields]
        super().sort(fields, ascending)

    def time_based_split(self, ratios: list[float], group_by: str) -> list[Any]:
        """As RecBole's: the latest of all rows are test rows, the latest of each user's others are validation rows.

        RecBole finds the bound among 32-bit times, and divides rows of another order than the times that it looks at unless
        ``order`` is TO. What lies at the bound itself is not held out, in both.
        """
        rows = self._all_rows
        assert rows is not None
        self.sort(by=self.time_field)
        shares = [ratio / sum(ratios) for ratio in ratios]
        moments = rows.moments[self.inter_feat[RECENCY_FIELD].numpy()]
        bound = moments[int((len(moments) - 1) * (100 * (1 - shares[-1]) / 100))]
        held_out = moments > bound
        parts: list[list[int]] = [[], [], []]
        for group in self._grouped_index(self.inter_feat[group_by].numpy()):
            index = np.asarray(group)
            before = index[~held_out[index]].tolist()
            cut = int(len(before) * (shares[0] / (1 - shares[2])))
            for part, own in zip(parts, (before[:cut], before[cut:], index[held_out[index]].tolist()), strict=True):
                part.extend(own)
        self._drop_unused_col()
        return [self.copy(self.inter_feat[part]) for part in parts]

    def build(self) -> list[Any]:
        """Split as RecBole does, in exact time order; the held-out splits know what is to be said of them."""
        splits: list[Any] = super().build()
        rows = self._all_rows
        assert rows is not None
        for split, held_out in zip(splits[1:], self._judge_split(splits), strict=True):
            split.held_out = held_out
        for dataset in [self, *splits]:
            # What all rows have to say is of all users; a client's copy of a split must not know it.
            dataset._all_rows = None
            if not (self.keeps_recency and rows.timed):
                dataset.inter_feat.interaction.pop(RECENCY_FIELD, None)
        for split in splits:
            split.item_interactions = None
        return splits

    def _judge_split(self, splits: list[Any]) -> list[HeldOutRows]:
        """What is to be said of each split but the first."""
        rows = self._all_rows
        assert rows is not None
        places = [split.inter_feat[RECENCY_FIELD].numpy() for split in splits]
        elsewhere = np.ones(len(rows.users), dtype=bool)
        elsewhere[np.concatenate(places[1:])] = False
        training = np.flatnonzero(elsewhere)  # also rows that are only history
        arguments = self.config["eval_args"]
        by_time = self.benchmark_filename_list is None and (arguments["order"] == "TO" or "TS" in arguments["split"])
        whole = "RS" in (arguments["split"] or {}) and str(arguments["group_by"]).lower() == "none"
        groups = np.zeros_like(rows.users) if whole else rows.users
        divided = groups * np.int64(len(rows.moments)) + rows.moments
        held_out = []
        for number, own in enumerate(places[1:], start=1):
            others = np.concatenate(
                [training, *(held for other, held in enumerate(places) if other not in (0, number))]
            )
            tied = int(_among(divided[own], divided[others]).sum()) if by_time else None
            repeated = int(_among(rows.pairs[own], rows.pairs[training]).sum())
            held_out.append(HeldOutRows(len(own), tied, repeated))
        self._warn_of_repetitions(held_out)
        return held_out

    def _warn_of_repetitions(self, held_out: list[HeldOutRows]) -> None:
        sentences = [
            f"{rows.repeated} of {rows.rows} {phase} rows"
            for phase, rows in zip(("validation", "test"), held_out, strict=True)
            if rows.repeated
        ]
        if not sentences:
            return
        key = (
            "rm_dup_inter: first or last keeps one row of each pair, and unset, the default, keeps all"
            if self.benchmark_filename_list is None
            else "files of benchmark_filename are taken as they are, whatever rm_dup_inter says"
        )
        self.logger.warning(
            f"{' and '.join(sentences)} repeat a pair of user and item of the training rows, where a model has met it; {key}"
        )


def _among(few: Numbers, many: Numbers) -> NDArray[np.bool_]:
    """Which of ``few`` are in ``many``."""
    common = many[pd.Series(many).isin(few).to_numpy()]
    return np.isin(few, common)
