"""The best items of each user without a score of every item: what some items score foretells what the others can reach.

Users of a model say much the same of a catalogue. All scores of a few of them make a basis; of everybody else the scores of
some items are asked, a place in that basis follows, and with it a forecast of all others. How far it is off is known where
scores are. Items that may still reach a user's list are scored, the most promising first, until no other can: lists hold
scores, never forecasts. A score that is further off than any that was seen, of the sample or of the user, would be missed:
before a model is screened, the lists of some hundred other users are held against those of all their scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from recbole_fedkd.data.rows import PAIRS

SAMPLE, RANK, ASKED = 160, 64, 192
"""Users whose scores are all made, functions in the basis, and items that everybody is asked for."""

BLOCK = 64
"""Items of a block: the most promising of each user are one, and then all that may still reach the list."""

MARGIN, AGAIN = 8.0, 2.0
"""What a forecast may be off at least, in deviations where scores are known; and times the most that was seen of a user."""

LEAST = 0.1
"""Of what forecasts of the sample are off, what those of any user are at least taken to be."""

FEW_USERS, FEW_ITEMS, MANY_ITEMS, SHORT = 4096, 1024, 2**15, 64
"""Fewer users, fewer or more items (a basis takes 8 KB for each), or a longer list, and every score is made."""

AUDITED = 512
"""Users whose lists are made both ways; if one in 170 lists were wrong, one of these would be with a probability of .95."""

WORTH = 0.3
"""The share of scores that may be made at most: one by itself takes two or three times as long as one of a sweep."""

Whole = Callable[[Tensor], Tensor]
"""All scores ``[n, items]`` of users ``[n]``."""

Scored = Callable[[Tensor, Tensor], Tensor]
"""Scores ``[m, k]`` of some items ``[m, k]`` of users in some places ``[m]``, one or many times."""

Some = Callable[[Tensor], Scored]
"""What scores items of users ``[n]``, again and again."""


def is_worth_it(users: int, items: int, length: int) -> bool:
    """Whether lists of a length, of so many users and items, take less by a :class:`Screen`."""
    return users >= FEW_USERS and FEW_ITEMS <= items <= MANY_ITEMS and length <= SHORT


class Basis(NamedTuple):
    """What all scores of a few users say of the items.

    Attributes:
        asked: the items whose scores foretell the others ``[asked]``.
        mean: of every item ``[items]``.
        weights: what a forecast makes of how far the asked are off their means ``[asked, items]``.
        spread: by how much a forecast of an item is off, up to a factor for each user ``[items]``.
        margin: the most by which one of the sample is off, in deviations of its user's; at least :data:`MARGIN`.
    """

    asked: Tensor
    mean: Tensor
    weights: Tensor
    spread: Tensor
    margin: float


def basis_of(scores: Tensor) -> Basis:
    """From all scores of some users ``[sample, items]``; item 0 is padding."""
    exact = scores.double()
    mean = exact.mean(0)
    apart = exact - mean
    values, vectors = torch.linalg.eigh(apart @ apart.T)
    functions = vectors[:, -RANK:].T @ apart
    sizes = values[-RANK:].clamp(min=torch.finfo(torch.float64).tiny).sqrt().unsqueeze(1)
    directions = functions / sizes
    off = (apart - (apart @ directions.T) @ directions).abs()
    spread = off.square().mean(0).sqrt()
    # Items that the sample fits by chance may be as far off as others are.
    spread = (
        spread
        + 0.3 * spread.mean()
        + torch.finfo(torch.float32).eps * exact.abs().max()
        + torch.finfo(torch.float32).tiny
    )
    off /= spread
    unit = off.square().mean(1, keepdim=True).sqrt().clamp(min=LEAST)
    asked = _asked(functions)
    share = 1 / spread[asked]
    weights = torch.linalg.pinv(functions[:, asked].T * share.unsqueeze(1))
    weights = (functions.T @ weights * share).T
    return Basis(
        asked, mean.float(), weights.float().contiguous(), spread.float(), max(MARGIN, float((off / unit).max()))
    )


def _asked(functions: Tensor) -> Tensor:
    """Of functions ``[rank, items]`` the items that tell them apart best, one after the other, and others between them."""
    left, chosen = functions.clone(), []
    left[:, 0] = 0
    for _ in range(RANK):
        item = int(left.square().sum(0).argmax())
        direction = left[:, item] / left[:, item].norm().clamp(min=torch.finfo(torch.float64).tiny)
        left -= direction.unsqueeze(1) * (direction @ left)
        chosen.append(item)
    free = torch.ones(functions.shape[1], dtype=torch.bool)
    free[[0, *chosen]] = False
    others = torch.nonzero(free).flatten()
    first = torch.tensor(chosen).unique()
    places = torch.linspace(0, len(others) - 1, ASKED - len(first)).long()
    return torch.cat([first, others[places]])


class Known:
    """All scores of some users, which are kept once they are made.

    Args:
        whole: makes them.
        users: everybody ``[n]``.
    """

    def __init__(self, whole: Whole, users: Tensor) -> None:
        self.whole, self.kept, self.count = whole, list[Tensor](), 0
        self.row_of = torch.full((int(users.max()) + 1,), -1)

    def made(self, users: Tensor) -> Tensor:
        """All scores of users of whom none are known ``[n, items]``."""
        scores = self.whole(users)
        self.row_of[users] = torch.arange(self.count, self.count + len(users))
        self.kept.append(scores)
        self.count += len(users)
        return scores

    def scores(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Who is known among users ``[n]``, and all scores of those ``[known, items]``."""
        rows = self.row_of[users]
        known = rows >= 0
        self.kept = [torch.cat(self.kept)]
        return known, self.kept[0][rows[known]]


@dataclass(frozen=True)
class Screen:
    """Scores of a model as far as they are needed for the best items of each user.

    Attributes:
        basis: of some users.
        length: of the longest list.
        known: all scores of those, and of whoever is asked for them.
        some: what scores some items of each.
    """

    basis: Basis
    length: int
    known: Known
    some: Some

    @classmethod
    def of(cls, users: Tensor, length: int, whole: Whole, some: Some) -> Screen | None:
        """For the users of a ranking ``[n]``; None: scores are no numbers, or others when they are made among others."""
        sample, known = users[torch.linspace(0, len(users) - 1, SAMPLE).long()], Known(whole, users)
        scores = known.made(sample)
        if not scores.isfinite().all():
            return None
        basis = basis_of(scores)
        # Were they other bits, rounding could turn a list.
        same = all(
            torch.equal(
                some(sample[rows])(torch.arange(len(rows)), basis.asked.expand(len(rows), -1)),
                scores[rows][:, basis.asked],
            )
            for rows in _at_once(SAMPLE, scores.shape[1])
        )
        return cls(basis, length, known, some) if same else None

    def audited(self, users: Tensor) -> Tensor:
        """Of all users :data:`AUDITED` whose scores are not known ``[n]``."""
        others = users[self.known.row_of[users] < 0]
        return others[torch.linspace(0, len(others) - 1, AUDITED).long().unique()]

    def is_right(self, audited: Iterable[tuple[Tensor, Tensor]]) -> bool:
        """Whether lists are those of all scores, and took few; ``audited``: parts of users, as :meth:`scores` is given them."""
        parts, made = list(audited), 0
        worth = WORTH * sum(masked.numel() for _, masked in parts)
        for users, masked in parts:
            screened, count = self.foretold(users, masked)
            made += count
            if made > worth:
                return False
            foretold, listed = (
                scores.masked_fill(masked, -torch.inf).topk(self.length, 1)
                for scores in (screened, self.known.made(users))
            )
            real = listed.values > -torch.inf
            if not torch.equal(foretold.indices[real], listed.indices[real]):
                return False
        return True

    def scores(self, users: Tensor, masked: Tensor) -> Tensor:
        """Scores of all items ``[n, items]``, forecasts for those that are no candidates for a list.

        Args:
            users: ``[n]``.
            masked: what is not to be recommended ``[n, items]``.
        """
        known, of_known = self.known.scores(users)
        scores = of_known.new_empty(masked.shape)
        scores[known] = of_known
        others = torch.nonzero(~known).flatten()
        for places in _at_once(len(others), masked.shape[1]):
            rows = others[places]
            scores[rows], _ = self.foretold(users[rows], masked[rows])
        return scores

    def foretold(self, users: Tensor, masked: Tensor) -> tuple[Tensor, int]:
        """As :meth:`scores`, whoever is known, and how many scores were made."""
        scored, everybody = self.some(users), torch.arange(len(users))
        given = scored(everybody, self.basis.asked.expand(len(users), -1))
        forecast, made = _Forecast(self.basis, given, masked, self.length), given.numel()
        rows, chosen = forecast.promising(everybody)
        while len(rows):
            given, count = _in_blocks(scored, rows, chosen)
            forecast.take(rows, chosen, given)
            made += count
            rows, chosen = forecast.within_reach(rows)
        swept = torch.nonzero(forecast.doubtful()).flatten()
        if len(swept):
            forecast.scores[swept] = scored(swept, torch.arange(masked.shape[1]).expand(len(swept), -1))
        return forecast.scores, made + len(swept) * masked.shape[1]


def _at_once(users: int, items: int) -> Iterable[Tensor]:
    """Places of so many users that what is kept of them takes no more than a batch of scores usually does."""
    return torch.arange(users).split(max(1, PAIRS // items)) if users else ()


def _in_blocks(scored: Scored, rows: Tensor, items: Tensor) -> tuple[Tensor, int]:
    """Scores of some items of each user ``[m, k]``, where 0 is none, and how many were made: blocks of nothing are not."""
    blocks = functional.pad(items, (0, -items.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    held = blocks.any(2)
    given = torch.zeros(blocks.shape)
    given[held] = scored(rows.unsqueeze(1).expand_as(held)[held], blocks[held])
    return given.flatten(1)[:, : items.shape[1]], int(held.sum()) * BLOCK


class _Forecast:
    """Scores of some users, foretold or known.

    Args:
        basis: foretells them.
        given: scores of the items that everybody is asked for ``[n, asked]``.
        masked: ``[n, items]``.
        length: of the longest list.

    Attributes:
        scores: ``[n, items]``.
    """

    def __init__(self, basis: Basis, given: Tensor, masked: Tensor, length: int) -> None:
        asked, self.basis = basis.asked, basis
        self.scores = torch.addmm(basis.mean, given - basis.mean[asked], basis.weights)
        off = (given - self.scores[:, asked]) / basis.spread[asked]
        self.unit = (off.square().sum(1) / (len(asked) - RANK)).sqrt().clamp(min=LEAST)
        self.margin = torch.full_like(self.unit, basis.margin)
        self.scores[:, asked] = given
        self.left_out = masked.clone()
        self.left_out[:, asked] = True
        self.best = given.masked_fill(masked[:, asked], -torch.inf).topk(length + 1, 1).values
        self.unknown = ~(given.isfinite().all(1) & self.unit.isfinite())

    def _reach(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of users who are known, what scores of their items may be at most ``[m, items]``, and who they are ``[m]``."""
        rows = rows[~self.unknown[rows]]
        reach = (self.margin[rows] * self.unit[rows]).unsqueeze(1) * self.basis.spread
        reach += self.scores[rows]
        return reach.masked_fill_(self.left_out[rows], -torch.inf), rows

    def promising(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of some users those whose lists may take in more ``[m]``, and the items that may reach furthest ``[m, BLOCK]``."""
        reach, rows = self._reach(rows)
        most, items = reach.topk(BLOCK, 1)
        open_ = (most[:, 0] >= self.best[rows, -2]) & (most[:, 0] > -torch.inf)
        return rows[open_], items[open_]

    def within_reach(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of some users those whose lists may take in more ``[m]``, and all items that may ``[m, k]``, filled up with 0.

        Who may take in half of the items counts as unknown.
        """
        reach, rows = self._reach(rows)
        candidates = (reach >= self.best[rows, -2:-1]) & (reach > -torch.inf)
        counts = candidates.sum(1)
        many = counts > reach.shape[1] // 2
        self.unknown[rows[many]] = True
        open_ = (counts > 0) & ~many
        row, item = candidates[open_].nonzero(as_tuple=True)
        counts = counts[open_]
        items = row.new_zeros(len(counts), int(counts.max()) if len(counts) else 0)
        items[row, torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]] = item
        return rows[open_], items

    def take(self, rows: Tensor, items: Tensor, given: Tensor) -> None:
        """Scores of some items of some users are known ``[m, k]``."""
        row = rows.unsqueeze(1)
        allowed = ~self.left_out[row, items]
        off = (given - self.scores[row, items]).abs() / (self.unit[rows].unsqueeze(1) * self.basis.spread[items])
        most = off.masked_fill(~allowed, 0.0).amax(1)
        self.margin[rows] = torch.maximum(self.margin[rows], AGAIN * most)
        self.scores[row, items] = given
        self.left_out[row, items] = True
        known = torch.cat([self.best[rows], given.masked_fill(~allowed, -torch.inf)], 1)
        self.best[rows] = known.topk(self.best.shape[1], 1).values
        self.unknown[rows] |= ~given.isfinite().all(1)

    def doubtful(self) -> Tensor:
        """Users who are unknown, or who have two scores that tie, which topk orders by all others ``[n]``."""
        ties = (self.best[:, :-1] == self.best[:, 1:]) & (self.best[:, 1:] > -torch.inf)
        return self.unknown | ties.any(1)
