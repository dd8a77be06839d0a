"""Tables of users and items to atomic files: every column but the id is a feature, a number, a text or several texts."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_fedkd.data.importing import id_column, tokens_of, write_texts
from recbole_fedkd.data.roles import FIELDS
from recbole_fedkd.errors import InputError

_KINDS = {"float": "number", "token": "text", "token_seq": "texts"}


@dataclass
class SideTable:
    """A table of users or items as an atomic file has it.

    Attributes:
        role: ``user`` or ``item``.
        table: the id first, then features, all texts.
        types: column to RecBole's type.
        notes: what there is to say of it.
    """

    role: str
    table: pd.DataFrame
    types: dict[str, str]
    notes: list[str]

    def __str__(self) -> str:
        """A look at it, a few lines."""
        columns = [f"{name} ({_KINDS[self.types[name]]})" for name in self.table.columns[1:]]
        return "\n".join([f"{self.role}s: {len(self.table)}, with {', '.join(columns)}", *self.notes])

    def write(self, folder: Path, name: str) -> Path:
        """Write ``<folder>/<name>/<name>.user`` or ``.item`` whole or not at all."""
        target = folder / name / f"{name}.{self.role}"
        return write_texts(self.table, [f"{column}:{self.types[column]}" for column in self.table.columns], target)


def side_table(frame: pd.DataFrame, role: str, column: str | None, known: Collection[str], what: str) -> SideTable:
    """Read a table with a row per user or item.

    Args:
        frame: any data frame.
        role: ``user`` or ``item``.
        column: the column of ids in the interactions, which is taken where this table has it too.
        known: ids of the interactions.
        what: what an error calls the table.

    Raises:
        InputError: no column of ids, no other column, or no id that the interactions have.
    """
    names = [str(name) for name in frame.columns]
    frame = frame.set_axis(names, axis=1)
    id_name = column if column in names else id_column(names, role, what)
    ids, features = tokens_of(frame[id_name]), [name for name in names if name != id_name]
    if not features:
        raise InputError(f"{what} has no column beside '{id_name}'; a file of {role}s holds features")
    named = {name: re.sub(r"[\W]+", "_", re.sub(r":\w+$", "", name)).strip("_") or f"column_{position}"
             for position, name in enumerate(features)}  # fmt: skip
    taken = [*FIELDS.values(), *named.values()]
    wrong = next((name for name in features if taken.count(named[name]) > 1), None)
    if wrong is not None:
        raise InputError(
            f"{what} has a column '{wrong}', which would be called '{named[wrong]}' as another is; rename it"
        )
    usable = (ids != "") & (ids != "[PAD]") & ~ids.duplicated()
    shared = int(ids[usable].isin(set(known)).sum())
    if not shared:
        raise InputError(
            f"{what} has no {role} of the interactions in column '{id_name}', such as '{next(iter(known))[:60]}'"
        )
    table, types = pd.DataFrame({FIELDS[role]: ids}), {FIELDS[role]: "token"}
    for name in features:
        table[named[name]], types[named[name]] = _feature(frame[name])
    notes = [f"{len(known) - shared} {role}s of the interactions are not in {what}"] if shared < len(known) else []
    dropped = int((~usable).sum())
    notes += [f"dropped {dropped} rows of {what}: no {role}, or one that was there before"] if dropped else []
    return SideTable(role, table[usable].reset_index(drop=True), types, notes)


def _feature(column: pd.Series) -> tuple[pd.Series, str]:
    """A column's texts and RecBole's type of it; ``a|b`` are several texts."""
    texts = tokens_of(column)
    filled = texts[texts != ""]
    codes = filled.str.fullmatch(r"0\d+").any()  # 01234 is a place, not a number
    if len(filled) and not codes and np.isfinite(pd.to_numeric(filled, errors="coerce")).all():
        return texts, "float"
    if filled.str.contains("|", regex=False).any():
        several = texts.str.split("|").map(
            lambda parts: " ".join("_".join(part.split()) for part in parts if part.strip())
        )
        return several, "token_seq"
    return texts, "token"
