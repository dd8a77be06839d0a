"""What a curious server can tell of a client's rows from what it gets to see, and what a release gives away of a canary.

Membership of an item in a client's rows is guessed from the item's own numbers in a message, held against the other clients'
numbers for the same item, so that its popularity tells nothing. The epsilon of a release is bounded from below by one run of
it with canaries (Steinke, Nasr, Jagielski, NeurIPS 2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom, rankdata

from recbole_fedkd.federated.aggregate import Fold, Sums, WeightedMean
from recbole_fedkd.federated.message import Message, Training
from recbole_fedkd.federated.stage import Arrays, applied
from recbole_fedkd.federated.wire import ServerLink
from recbole_fedkd.privacy.noise import LocalNoise, LocalSettings, uniform
from recbole_fedkd.privacy.release import PrivateRelease
from recbole_fedkd.privacy.settings import LEAST

Floats = NDArray[np.float64]
SURE = 0.05
"""Probability with which a bound from below may be wrong."""

MOST_NUMBERS = 20_000
"""Numbers of a message that canaries point to, the first ones."""

_DRAWS = 30  # of messages dealt out by chance


def item_scores(arrays: Mapping[str, NDArray[np.generic]], start: Arrays, items: int) -> dict[str, Floats]:
    """How much a message says of every item ``[items]``, by array: the length of what changed in the item's row.

    Where a row is one number, such as a bias, or two, such as counts of labels 0 and 1, also the last one as it is: positives
    push it up, and sampled negatives, which are most of what is seen, do not.

    Args:
        arrays: of a message, as the server sees it.
        start: what the client started from, of the same names, where it did.
        items: number of items; arrays with another first axis name none.
    """
    scores = {}
    for name, array in arrays.items():
        if array.ndim and array.shape[0] == items and array.dtype.kind in "fiu":
            moved = array.astype(np.float64)
            if name in start:
                moved = moved - start[name].astype(np.float64)
            moved = moved.reshape(items, -1)
            scores[name] = np.sqrt((moved**2).sum(1))
            if moved.shape[1] <= 2:
                scores[f"{name}, of positives"] = moved[:, -1]
    return scores


def membership_auc(scores: Floats, members: NDArray[np.bool_]) -> float | None:
    """Probability that a client with an item scores higher for it than one without; a half: the server knows nothing.

    Args:
        scores: of clients and items ``[clients, items]``.
        members: whether a client has rows of an item ``[clients, items]``.

    Returns:
        The mean over all pairs of a client with an item and one without it, of one item each; equal scores count a half. None
        where there are no such pairs, and so nothing to guess.
    """
    return _auc_of_ranks(rankdata(scores, axis=0), members)


def deviation_by_chance(scores: Floats, members: NDArray[np.bool_]) -> float:
    """Standard deviation of :func:`membership_auc` around a half where messages are dealt out to clients by chance.

    Clients have few items or many, and their messages are one draw: an AUC within two of these is that of a coin, on either
    side of a half.
    """
    ranks, generator = rankdata(scores, axis=0), np.random.default_rng(0)
    drawn = [_auc_of_ranks(ranks, generator.permutation(members)) for _ in range(_DRAWS)]
    return float(np.std([auc for auc in drawn if auc is not None] or [0.0]))


def guessable(members: NDArray[np.bool_]) -> int:
    """Of how many clients and items ``[clients, items]`` membership is a question: those of items that some have, not all."""
    return int((members.any(0) & ~members.all(0)).sum()) * len(members)


def _auc_of_ranks(ranks: Floats, members: NDArray[np.bool_]) -> float | None:
    have = members.sum(0)
    pairs = (have * (len(members) - have)).sum()
    # Of an item that all have, or nobody, both terms are the same.
    won = (ranks * members).sum(0) - have * (have + 1) / 2
    return float(won[(have > 0) & (have < len(members))].sum() / pairs) if pairs else None


def label_table(arrays: Mapping[str, NDArray[np.generic]], labels: int) -> Floats | None:
    """A client's rows as a message counts them, whole, by item and label ``[items, labels]``; None where it does not.

    Where labels are counted over all items the table has one row.
    """
    for name in ("histogram", "weights", "counts"):
        array = arrays.get(name)
        if array is not None and array.shape[-1:] == (labels,):
            table: Floats = np.rint(array.reshape(-1, labels).astype(np.float64))
            return table
    return None


# Canaries


@dataclass(frozen=True)
class CanaryAudit:
    """What canaries tell of a release.

    Attributes:
        canaries: how many there were, each in or out by a fair coin.
        guesses: for how many the auditor has guessed.
        right: how many of the guesses were right.
        epsilon: that the release has at least, but for a probability of :data:`SURE`.
        accounted: that the accountant says it has at most.
    """

    canaries: int
    guesses: int
    right: int
    epsilon: float
    accounted: float


def epsilon_at_least(canaries: int, guesses: int, right: int, delta: float) -> float:
    """The largest epsilon at which so many right guesses would be improbable (Steinke et al. 2023, theorem 5.2).

    It is wrong with a probability of :data:`SURE`.

    Args:
        canaries: each in or out by a fair coin.
        guesses: for how many of them somebody has guessed which.
        right: guesses that were right.
        delta: of the release.
    """
    low, high = 0.0, 50.0
    if _p_value(canaries, guesses, right, low, delta) > SURE:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if _p_value(canaries, guesses, right, middle, delta) < SURE else (low, middle)
    return low


def _p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Probability of so many right guesses or more, at most, of an (epsilon, delta)-private release."""
    share = 1 / (1 + np.exp(-epsilon))
    beta = float(binom.sf(right - 1, guesses, share))
    tails = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, share))
    alpha = float((tails / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, beta + 2 * alpha * delta * canaries)


def audited(
    release: PrivateRelease, fold: Fold, link: ServerLink, canaries: int, rounds: int, seed: int
) -> CanaryAudit:
    """One run of a release with canaries alone, as whoever the accountant speaks of gets to see it.

    A canary is a client whose message goes as far as the clip lets it, in a direction of its own, the same in every round; one
    that is out changes nothing; where clients are drawn in secret, so are canaries, round by round. A guesser who knows all
    directions finds how far what is seen goes along each, and takes those along which it goes most for in, and those along
    which it goes least for out. Seen are the sums that the server lets out; with distributed noise those that it gets; with
    local noise every message by itself.

    Args:
        release: as of the run, of which nothing is changed.
        fold: an empty one of the run's strategy, for its kind.
        link: the server's end of the wire, with the schema of the uploads.
        canaries: how many; no more than half the numbers of a message are taken.
        rounds: in which something is let out.
        seed: of the directions.
    """
    assert link.schema is not None
    shapes = {name: spec.shape for name, spec in link.schema.arrays.items() if np.issubdtype(spec.dtype, np.floating)}
    sizes = [math.prod(shape) for shape in shapes.values()]
    local = release.settings.noise == "local"
    numbers = min(sum(sizes), 2 * canaries if local else MOST_NUMBERS)  # of single messages a guesser needs no more
    canaries = max(2, min(canaries, numbers // 2))
    directions = np.random.default_rng(seed).standard_normal((canaries, numbers))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    inside = uniform(canaries) < 0.5

    settings = replace(release.settings, epsilon=None, clip_quantile=None)  # whatever the run has spent
    own = PrivateRelease(settings, max(1, round(release.rate * canaries)) if release.samples else None)
    own.clients, own.noise_multiplier = canaries, release.noise_multiplier
    clip = np.repeat([own.clip.norm_of(name) for name in shapes], sizes)  # of every number
    if local:
        along, ends = np.zeros(canaries), np.cumsum(sizes)[:-1]
        stage = LocalNoise(LocalSettings(own.clip.clip_norm, own.clip.norms, own.noise_multiplier))
        for number, direction in enumerate(directions):
            arrays = dict(zip(shapes, np.split(direction * inside[number] * clip[:numbers], ends), strict=True))
            for _ in range(rounds):
                encoded = stage.encode(Message("", 0, number, arrays)).arrays
                along[number] += direction @ (np.concatenate(list(encoded.values())) / clip[:numbers])
    else:
        heard = []
        for _ in range(rounds):
            there = inside & (uniform(canaries) < own.rate)
            summed = np.zeros(sum(sizes))
            summed[:numbers] = directions[there].sum(0)
            heard.append(_heard(own, fold, link, shapes, summed * clip, int(there.sum())) / clip)
        along = np.linalg.lstsq(directions.T, np.sum(heard, axis=0)[:numbers], rcond=None)[0]
    order, half = np.argsort(along), canaries // 4
    right = int(inside[order[-half:]].sum() + (~inside[order[:half]]).sum()) if half else 0
    bound = epsilon_at_least(canaries, 2 * half, right, own.settings.delta)
    return CanaryAudit(canaries, 2 * half, right, bound, release.spent_by(rounds))


def _heard(
    own: PrivateRelease,
    fold: Fold,
    link: ServerLink,
    shapes: Mapping[str, tuple[int, ...]],
    summed: Floats,
    answers: int,
) -> Floats:
    """What a round lets out of a sum of changes ``[numbers]``; of a mean a share of it."""
    start: dict[str, Floats] = {
        name: np.asarray(link.reference.get(name, np.zeros(shape)), np.float64) for name, shape in shapes.items()
    }
    parts = np.split(summed, np.cumsum([array.size for array in start.values()])[:-1])
    change = {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    share = max(answers, 1) if isinstance(fold, WeightedMean) else 1
    if own.settings.noise == "distributed":
        statistics, answers = _under_masks(own, fold, start, change)
    else:
        statistics = {name: torch.from_numpy(start[name] + part / share) for name, part in change.items()}
    out = own.of_round(fold, statistics, answers, link)
    assert out is not None
    return np.concatenate([(out[name].double().numpy() - start[name]).ravel() for name in shapes])


def _under_masks(
    own: PrivateRelease, fold: Fold, start: Mapping[str, Floats], change: Mapping[str, Floats]
) -> tuple[dict[str, torch.Tensor], int]:
    """What a server gets of clients that add their noise under masks, and how many they are.

    They are as few as masks hide, one of which says the whole change, so that there is as much noise as is accounted.
    """
    from recbole_fedkd.privacy.secure_sum import SecureSum  # needs an extra, which the run has needed

    empty = partial(WeightedMean, lambda _: 1.0, LEAST) if isinstance(fold, WeightedMean) else Sums
    own.clients, total = LEAST, empty()
    masked = SecureSum(empty, dict.fromkeys(range(LEAST), 1), release=own)
    for number in range(LEAST):
        arrays: Arrays = dict(start) if number else applied(change, start)
        masked.add(Message("", 0, number, arrays, Training(1)))
    summed = masked.into(total)
    return total.finish(), len(summed)
