"""Threads: packs of clients at the same time, with the results of one after the other."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Given = TypeVar("Given")
Result = TypeVar("Result")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start() -> None:
    """Both are settings of a thread: what the process has set holds in its main thread alone."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


class SideBySide:
    """Maps functions over threads; torch leaves Python's lock while it computes.

    Args:
        threads: how many calls at a time; with one, the caller's own thread makes them.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "pack", _start) if threads > 1 else None

    def map(self, function: Callable[[Given], Result], given: Iterable[Given]) -> Iterator[Result]:
        """Results in the order of what is given; at most ``2 * threads`` calls are begun before a result is taken.

        Raises:
            Exception: what the function raised first, in that order; what has not begun by then is given up.
        """
        if self._pool is None:
            yield from map(function, given)
            return
        pending: deque[Future[Result]] = deque()
        try:
            for task in given:
                pending.append(self._pool.submit(function, task))
                if len(pending) > 2 * self.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
