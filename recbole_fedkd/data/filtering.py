"""RecBole's filters, which say how many interactions they take and why; none drops a row that nobody asked it to drop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recbole.data.dataset import Dataset
from recbole.utils import FeatureType

from recbole_fedkd.errors import InputError, listed, nearest, shown

_SIDES = {"user": ("uid_field", "users"), "item": ("iid_field", "items")}
_INTERVAL = re.compile(r"[\[(]\s*[^,;\[\]()]+,\s*[^,;\[\]()]+[\])]")


class CountedFilters(Dataset):
    """Mixin in front of RecBole's dataset classes: whatever takes interactions away says how many.

    Interactions of users or items that the ``.user`` or ``.item`` file lacks stay, with empty features, unless the config
    key ``filter_inter_by_user_or_item`` asks to drop them; users of the ``.user`` file without any interaction are left out.
    """

    inter_feat: Any

    @contextmanager
    def _counted(self, key: str, loud: bool = False) -> Iterator[None]:
        """Say how many interactions a step takes; refuse if it takes all."""
        before = len(self.inter_feat)
        yield
        after = len(self.inter_feat)
        if after == 0:
            raise InputError(f"{key}: none of the {before} interactions of dataset '{self.dataset_name}' is left")
        if after < before:
            say = self.logger.warning if loud else self.logger.info
            say(f"{key}: {before - after} of {before} interactions are dropped, {after} are left")

    def _remove_duplication(self) -> None:
        """As RecBole's, but rows of equal time stay in the order of the file, which its sort does not promise."""
        keep = self.config["rm_dup_inter"]
        with self._counted(f"rm_dup_inter={keep}"):
            if keep is None or self.time_field not in self.inter_feat:
                super()._remove_duplication()
                return
            rows = self.inter_feat.sort_values(by=self.time_field, kind="stable")
            self.inter_feat = rows.drop_duplicates(subset=[self.uid_field, self.iid_field], keep=keep)

    def _filter_by_field_value(self) -> None:
        """As RecBole's, with tokens compared as texts; users or items without a row or a value do not pass either."""
        for field, allowed in (self.config["val_interval"] or {}).items():
            self._check_loaded("val_interval", field)
            with self._counted(f"val_interval={{'{field}': {shown(allowed)}}}"):
                self._filter_field(field, allowed)

    def _filter_field(self, field: str, allowed: Any) -> None:
        """Keep the rows of a file whose value is allowed; of users and items, keep the interactions with it."""
        kind = self.field2type[field]
        if kind in (FeatureType.FLOAT_SEQ, FeatureType.TOKEN_SEQ):
            raise InputError(f"val_interval names '{field}', which holds sequences; it filters float and token columns")
        if kind == FeatureType.FLOAT and not all(_INTERVAL.fullmatch(part.strip()) for part in str(allowed).split(";")):
            raise InputError(
                f"val_interval of '{field}' is {shown(allowed)}; it must be an interval such as '[3,5]' or '(0,inf)'"
            )
        if kind == FeatureType.TOKEN and not isinstance(allowed, list | tuple | set):
            raise InputError(f"val_interval of '{field}' is {shown(allowed)}; it must be a list of tokens")
        for feat in self.field2feats(field):
            if kind == FeatureType.FLOAT:
                kept = self._within_intervals(feat[field].to_numpy(), self._parse_intervals_str(allowed))
            else:
                kept = feat[field].isin([str(token) for token in allowed]).to_numpy()
            feat.drop(feat.index[~kept], inplace=True)
        for side, (id_field, _) in _SIDES.items():
            feat = getattr(self, f"{side}_feat")
            if feat is not None and field in feat:
                name = getattr(self, id_field)
                self.inter_feat.drop(self.inter_feat.index[~self.inter_feat[name].isin(feat[name])], inplace=True)

    def _filter_inter_by_user_or_item(self) -> None:
        with self._counted("filter_inter_by_user_or_item=True"):
            super()._filter_inter_by_user_or_item()

    def _filter_by_inter_num(self) -> None:
        keys = ("user_inter_num_interval", "item_inter_num_interval")
        with self._counted(", ".join(f"{key}={self.config[key]}" for key in keys)):
            super()._filter_by_inter_num()

    def _filter_link(self) -> None:
        """Of RecBole's knowledge-aware datasets: only items that the knowledge graph has stay."""
        with self._counted(
            f"items that '{self.dataset_name}.link' does not link to '{self.dataset_name}.kg'", loud=True
        ):
            super()._filter_link()

    def _init_alias(self) -> None:
        for kind in ("user", "item", "entity", "relation"):
            for field in self.config[f"alias_of_{kind}_id"] or []:
                self._check_loaded(f"alias_of_{kind}_id", field)
        super()._init_alias()

    def _check_loaded(self, key: str, field: Any) -> None:
        """Raise :class:`InputError` where a key names a column that is not loaded."""
        if field not in self.field2type:
            loaded = listed(self.field2type, 30)
            hint = nearest(str(field), self.field2type)
            raise InputError(f"{key} names '{field}', but the loaded columns are {loaded}{hint}")

    def _remap_ID_all(self) -> None:  # noqa: N802 (RecBole's name)
        for side, (id_field, plural) in _SIDES.items():
            if getattr(self, f"{side}_feat") is not None:
                self._compare_with_interactions(side, getattr(self, id_field), plural)
        super()._remap_ID_all()

    def _compare_with_interactions(self, side: str, field: str, plural: str) -> None:
        """Say which users or items have no features, and which no interactions."""
        feat = getattr(self, f"{side}_feat")
        file = f"'{self.dataset_name}.{side}'"
        of_rows = self.inter_feat[field].drop_duplicates()
        unknown = ~of_rows.isin(feat[field])
        if unknown.all():
            raise InputError(
                f"{file} has none of the {len(of_rows)} {plural} of '{self.dataset_name}.inter': the first {field} is "
                f"{shown(feat[field].iloc[0])} there and {shown(of_rows.iloc[0])} here; it must be written alike in both"
            )
        if unknown.any():
            rows, first = int(self.inter_feat[field].isin(of_rows[unknown]).sum()), shown(of_rows[unknown].iloc[0])
            self.logger.warning(
                f"{file} has no row of {int(unknown.sum())} of {len(of_rows)} {plural}, such as {first}: "
                f"their {rows} interactions stay, with empty features; filter_inter_by_user_or_item=True would drop them"
            )
        idle = ~feat[field].isin(of_rows)
        if not idle.any():
            return
        if side == "item":
            # They are part of the catalogue: candidates of a full ranking, as in RecBole.
            self.logger.info(
                f"{int(idle.sum())} of {len(feat)} items of {file} have no interaction; ranking includes them"
            )
        elif list(self.alias["user_id"]) == [field]:
            # Nothing is learnt from them or judged on them, and a weight matrix with their rows would start elsewhere.
            self.logger.info(f"{int(idle.sum())} of {len(feat)} users of {file} have no interaction and are left out")
            self.user_feat = feat[~idle].reset_index(drop=True)
