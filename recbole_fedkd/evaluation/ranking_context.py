"""Ranking in context: a full sort scores items for a user, and a model that reads the context of a row needs one.

RecBole hands such a model the user's columns alone, and the model dies on the first column that it misses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_fedkd.data.rows import rows_in_time


def rank_in_context(loader: Any, columns: Sequence[str]) -> None:
    """Have a full-sort loader rank the items for each user in the context of the first of the user's judged rows.

    What a context is (the hour, the device) is known when items are ranked; the first row is the earliest where rows have a
    time, else the first in the order of the split. Loaders of other kinds rank every row in its own context already, and
    are left alone.

    Args:
        loader: a RecBole evaluation loader; changed in place, its dataset is not.
        columns: names of the context columns; none: nothing is done.
    """
    if not columns or not isinstance(loader, FullSortEvalDataLoader) or loader.is_sequential:
        return
    rows = loader._dataset
    users, first = first_rows(rows)
    context = {}
    for name in columns:
        column = rows.inter_feat[name]
        context[name] = column.new_zeros(rows.user_num, *column.shape[1:])
        context[name][users] = column[first]
    # RecBole's full_sort_scores and full_sort_topk ask the loader's dataset for the columns of a user.
    loader._dataset = _joining(rows, context)
    loader.user_df = loader._dataset.join(Interaction({rows.uid_field: loader.uid_list}))


def first_rows(dataset: Any) -> tuple[Tensor, Tensor]:
    """The users who have rows ``[n]``, and the number of each one's earliest row ``[n]``; of equally early ones the first."""
    users = dataset.inter_feat[dataset.uid_field]
    order = rows_in_time(dataset)
    order = order[torch.argsort(users[order], stable=True)]
    present, counts = torch.unique_consecutive(users[order], return_counts=True)
    return present, order[counts.cumsum(0) - counts]


def _joining(dataset: Any, context: dict[str, Tensor]) -> Any:
    """The dataset with ``context [users, ...]`` among the columns of a user; rows have their own."""
    joining = dataset.copy(dataset.inter_feat)

    def join(columns: Any) -> Any:
        of_users = dataset.uid_field in columns and dataset.iid_field not in columns
        joined = dataset.join(columns)
        if of_users:
            joined.update(Interaction({name: values[joined[dataset.uid_field]] for name, values in context.items()}))
        return joined

    joining.join = join
    return joining
