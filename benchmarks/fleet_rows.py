"""What ``fleet_fedjax.py`` and ``fleet_pfl.py`` train on: PFedRec's rows and rates, in numpy alone.

PFedRec's maths: one local epoch of SGD, four negatives per positive, items shared and averaged, a score function that stays.
"""

import resource
from collections.abc import Iterator
from time import perf_counter, process_time

import numpy as np

WIDTH, BATCH, NEGATIVES, SCORE_RATE, ITEM_RATE = 32, 256, 4, 0.1, 13456.0


class Rows:
    """The positives of every client, from the file that ``fleet.py`` writes."""

    def __init__(self, file: str) -> None:
        rows = np.load(file)
        self.users, self.items, self.item_count = rows["users"], rows["items"], int(rows["item_count"])
        self.clients = int(self.users.max()) + 1
        self.starts = np.searchsorted(self.users, np.arange(self.clients + 1))
        self.positives = np.zeros((self.clients, self.item_count), dtype=bool)
        self.positives[self.users, self.items] = True
        self.generator = np.random.default_rng(0)

    def epoch(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Items and labels ``[n]`` of each client in random order, with fresh negatives."""
        drawn = self._negatives(np.repeat(self.users, NEGATIVES))
        for client in range(self.clients):
            first, last = self.starts[client], self.starts[client + 1]
            items = np.concatenate([self.items[first:last], drawn[NEGATIVES * first : NEGATIVES * last]])
            labels = np.zeros(len(items), dtype=np.float32)
            labels[: last - first] = 1.0
            order = self.generator.permutation(len(items))
            yield items[order], labels[order]

    def _negatives(self, users: np.ndarray) -> np.ndarray:
        """In bulk: an item that is no training positive of each user."""
        items = np.empty(len(users), dtype=np.int64)
        pending = np.arange(len(users))
        while len(pending):
            drawn = self.generator.integers(1, self.item_count, len(pending))
            items[pending] = drawn
            pending = pending[self.positives[users[pending], drawn]]
        return items


class Stopwatch:
    """Seconds of every round by the clock and of the processor; the first, in which others compile, is not counted."""

    def __init__(self) -> None:
        self.clock: list[float] = []
        self.processor: list[float] = []
        self._since = perf_counter(), process_time()

    def lap(self) -> None:
        """A round has ended."""
        now = perf_counter(), process_time()
        self.clock.append(now[0] - self._since[0])
        self.processor.append(now[1] - self._since[1])
        self._since = now

    def result(self, clients: int) -> dict[str, float]:
        """The fastest round, and the process's peak memory."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        best = {"seconds": min(self.clock[1:]), "processor_seconds": min(self.processor[1:])}
        return {**best, "peak_gb": peak, "clients": clients}
