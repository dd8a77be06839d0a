"""The best items of each user without a score of every item: what some items score foretells what the others can reach.

Users of a model say much the same of a catalogue. All scores of a few of them make a basis; of everybody else the scores of
some items are asked, a place in that basis follows, and with it a forecast of all others. How far it is off is known where
scores are. Items that may still reach a user's list are scored, the most promising first, until no other can: lists hold
scores, never forecasts. A score that is further off than any that was seen, of the sample or of the user, would be missed:
before a model is screened, the lists of some hundred other users are held against those of all their scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE, RANK, ASKED = 160, 64, 192
"""Users whose scores are all made, functions in the basis, and items that everybody is asked for."""

BLOCK = 64
"""Items that are scored at a time at first, then twice as many each time."""

MARGIN, AGAIN = 8.0, 2.0
"""What a forecast may be off at least, in deviations where scores are known; and times the most that was seen of a user."""

LEAST = 0.1
"""Of what forecasts of the sample are off, what those of any user are at least taken to be."""

ROUNDING = 2.4e-7
"""Scores that differ by less, as a share of the largest, may change places by rounding: such users are asked for every item."""

FEW_USERS, FEW_ITEMS, MANY_ITEMS, SHORT = 4096, 1024, 2**15, 64
"""Fewer users, fewer or more items (a basis takes 8 KB for each), or a longer list, and every score is made."""

AUDITED, AT_A_TIME = 512, 64
"""Users whose lists are made both ways, and so many of them at a time; if one in 170 lists were wrong, one of these would
be with a probability of .95."""

WORTH = 0.2
"""The share of scores that may be made at most: one by itself takes a few times as long as one of a sweep."""

Whole = Callable[[Tensor], Tensor]
"""All scores ``[n, items]`` of users ``[n]``."""

Some = Callable[[Tensor, Tensor], Tensor]
"""Scores ``[n, m]`` of some items of each user ``[n, m]``."""


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
    spread = spread + 0.3 * spread.mean() + ROUNDING * exact.abs().max() + torch.finfo(torch.float32).tiny
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


@dataclass(frozen=True)
class Screen:
    """Scores of a model as far as they are needed for the best items of each user.

    Attributes:
        basis: of some users.
        length: of the longest list.
        rounding: by how much a score may differ when it is made among others, as a share of the user's largest.
        whole: all scores of users.
        some: scores of some items of each.
    """

    basis: Basis
    length: int
    rounding: float
    whole: Whole
    some: Some

    @classmethod
    def of(cls, users: Tensor, length: int, whole: Whole, some: Some) -> Screen | None:
        """For the users of a ranking ``[n]``; None: their scores are no numbers."""
        sample = users[torch.linspace(0, len(users) - 1, SAMPLE).long()]
        scores = whole(sample)
        if not scores.isfinite().all():
            return None
        basis = basis_of(scores)
        asked = basis.asked.expand(SAMPLE, -1)
        most = (some(sample, asked) - scores.gather(1, asked)).abs().amax() / scores.abs().amax()
        return cls(basis, length, max(ROUNDING, 2 * float(most)), whole, some)

    def is_right(self, users: Tensor, masked: Tensor) -> bool:
        """Whether the lists of some users are those of all their scores, and took few; arguments as of :meth:`scores`."""
        screened, made = self.scores(users, masked)
        foretold, listed = (
            scores.masked_fill(masked, -torch.inf).topk(self.length, 1) for scores in (screened, self.whole(users))
        )
        real = listed.values > -torch.inf
        return made <= WORTH * masked.numel() and torch.equal(foretold.indices[real], listed.indices[real])

    def scores(self, users: Tensor, masked: Tensor) -> tuple[Tensor, int]:
        """Scores of all items ``[n, items]``, forecasts for those that are no candidates for a list; and how many were made.

        Args:
            users: ``[n]``.
            masked: what is not to be recommended ``[n, items]``.
        """
        asked = self.basis.asked.expand(len(users), -1)
        given = self.some(users, asked)
        forecast = _Forecast(self.basis, given, masked, self.length, self.rounding)
        count, items, made = BLOCK, masked.shape[1], asked.numel()
        while len(forecast.open) and count <= items // 2:
            open_, chosen = forecast.promising(count)
            made += chosen.numel()
            if len(open_):
                forecast.take(open_, chosen, self.some(users[open_], chosen))
            count *= 2
        doubtful = forecast.doubtful()
        doubtful[forecast.open] = True
        swept = torch.nonzero(doubtful).flatten()
        if len(swept):
            forecast.scores[swept] = self.whole(users[swept])
        return forecast.scores, made + len(swept) * items


class _Forecast:
    """Scores of some users, foretold or known.

    Args:
        basis: foretells them.
        given: scores of the items that everybody is asked for ``[n, asked]``.
        masked: ``[n, items]``.
        length: of the longest list.
        rounding: as of :class:`Screen`.

    Attributes:
        scores: ``[n, items]``.
        open: users whose lists are not known yet.
    """

    def __init__(self, basis: Basis, given: Tensor, masked: Tensor, length: int, rounding: float) -> None:
        asked, self.basis = basis.asked, basis
        self.scores = torch.addmm(basis.mean, given - basis.mean[asked], basis.weights)
        off = (given - self.scores[:, asked]) / basis.spread[asked]
        self.unit = (off.square().sum(1) / (len(asked) - RANK)).sqrt().clamp(min=LEAST)
        self.margin = torch.full_like(self.unit, basis.margin)
        self.scores[:, asked] = given
        self.left_out = masked.clone()
        self.left_out[:, asked] = True
        self.rounding = rounding * given.abs().amax(1)
        self.best = given.masked_fill(masked[:, asked], -torch.inf).topk(length + 1, 1).values
        self.finite = given.isfinite().all(1) & self.unit.isfinite()
        self.open = torch.nonzero(self.finite).flatten()

    def promising(self, count: int) -> tuple[Tensor, Tensor]:
        """Users whose lists may take in more ``[m]``, and of each the items that may reach furthest ``[m, count]``."""
        rows = self.open
        reach = (self.margin[rows] * self.unit[rows]).unsqueeze(1) * self.basis.spread
        reach += self.scores[rows]
        most, items = reach.masked_fill_(self.left_out[rows], -torch.inf).topk(count, 1)
        least = self.best[rows, -2] - self.rounding[rows]
        more = (most[:, 0] >= least) & (most[:, 0] > -torch.inf)
        self.open = rows[more]
        return self.open, items[more]

    def take(self, rows: Tensor, items: Tensor, given: Tensor) -> None:
        """Scores of some items of some users are known ``[m, count]``."""
        row = rows.unsqueeze(1)
        off = (given - self.scores[row, items]).abs() / (self.unit[rows].unsqueeze(1) * self.basis.spread[items])
        allowed = ~self.left_out[row, items]
        most = off.masked_fill(~allowed, 0.0).amax(1)
        self.margin[rows] = torch.maximum(self.margin[rows], AGAIN * most)
        self.scores[row, items] = given
        self.left_out[row, items] = True
        known = torch.cat([self.best[rows], given.masked_fill(~allowed, -torch.inf)], 1)
        self.best[rows] = known.topk(self.best.shape[1], 1).values
        self.finite[rows] &= given.isfinite().all(1)

    def doubtful(self) -> Tensor:
        """Users with scores that are none, or two of which may change places by rounding ``[n]``."""
        near = (self.best[:, :-1] - self.best[:, 1:] <= self.rounding.unsqueeze(1)).any(1)
        return near | ~self.finite
