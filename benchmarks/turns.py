"""Measuring side by side: works take turns, so that a change of speed meets all, and ratios are told with their spread.

Whoever waits is told of every work as it ends, on standard error; Ctrl-C ends the measurement with what was measured.
"""

import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import psutil


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock, and of the processor in all threads of this process."""

    clock: float
    processor: float


def cost_of(work: Callable[[], object]) -> Cost:
    """What one call costs."""
    before, started = _processor(), perf_counter()
    work()
    return Cost(perf_counter() - started, _processor() - before)


def tell(turn: int, turns: int, work: str, cost: Cost) -> None:
    """Say what a work took in a turn; turns below the first are not counted."""
    counted = f"turn {turn} of {turns}" if turn > 0 else "not counted"
    print(
        f"{counted}: {work}, {cost.processor:.2f} s of the processor, {cost.clock:.2f} s", file=sys.stderr, flush=True
    )


@contextmanager
def until_stopped() -> Iterator[None]:
    """Whoever stops the block by Ctrl-C goes on behind it, with what was measured."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; what was measured until now:", file=sys.stderr, flush=True)


def whole_turns(costs: Mapping[str, list[Cost]]) -> dict[str, list[Cost]]:
    """The turns in which every work was measured; ends the program where there is none, which has nothing to tell."""
    least = min((len(taken) for taken in costs.values()), default=0)
    if not least:
        sys.exit("no turn was measured to its end")
    return {name: taken[:least] for name, taken in costs.items()}


def used_by_children() -> float:
    """Seconds of the processor of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def take_turns(works: Mapping[str, Callable[[], object]], turns: int, warm: int = 1) -> dict[str, list[Cost]]:
    """Costs of every work in each counted turn that was not stopped; the first ``warm`` turns are not counted."""
    costs: dict[str, list[Cost]] = {name: [] for name in works}
    with until_stopped():
        for turn in range(1 - warm, turns + 1):
            for name, work in works.items():
                costs[name].append(cost_of(work))
                tell(turn, turns, name, costs[name][-1])
    return whole_turns({name: of_turns[warm:] for name, of_turns in costs.items()})


def ratios(costs: Mapping[str, list[Cost]], reference: str) -> dict[str, dict[str, list[float]]]:
    """Per work, ``clock`` and ``processor`` against the reference of the same turn: ``[least, median, most]``."""
    ratios_of = {}
    for name, own_costs in costs.items():
        of_turns = {
            kind: [
                getattr(own, kind) / getattr(other, kind)
                for own, other in zip(own_costs, costs[reference], strict=True)
            ]
            for kind in ("clock", "processor")
        }
        ratios_of[name] = {kind: [min(values), median(values), max(values)] for kind, values in of_turns.items()}
    return ratios_of


ENDED = "what ended since"


class Others:
    """Who else used the processor while a measurement ran: names and cores, of those that used a tenth of one or more.

    The machine says how much was used in all. What neither this process and its children nor anybody who is still there
    has used is of processes that ended in between, whose names nobody knows any more.
    """

    def __init__(self) -> None:
        self.started, self.in_all, self.before = perf_counter(), _used_by_all() - _used_here(), _used_by_others()

    def cores(self) -> dict[str, float]:
        """Name to cores, on average since the beginning."""
        seconds, in_all = perf_counter() - self.started, _used_by_all() - _used_here() - self.in_all
        cores: dict[str, float] = {}
        for key, (name, used) in _used_by_others().items():
            cores[name] = cores.get(name, 0.0) + (used - self.before.get(key, (name, 0.0))[1]) / seconds
        cores[ENDED] = in_all / seconds - sum(cores.values())
        return {name: round(share, 2) for name, share in cores.items() if share >= 0.1}


def in_words(cores: Mapping[str, float]) -> str:
    """Who else ran, in words."""
    return ", ".join(f"{name} ({share} cores)" for name, share in cores.items()) or "nobody"


def _used_by_all() -> float:
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq"))


def _used_here() -> float:
    """Seconds of this process and of its children, those that have ended and those that have not."""
    used = _processor() + used_by_children()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ends while it is asked
            times = child.cpu_times()
            used += times.user + times.system
    return used


def _used_by_others() -> dict[int, tuple[str, float]]:
    own = psutil.Process()
    mine = {own.pid, *(child.pid for child in own.children(recursive=True))}
    used = {}
    for process in psutil.process_iter(["name", "cpu_times"]):
        times = process.info["cpu_times"]
        if process.pid not in mine and times is not None:
            used[process.pid] = (process.info["name"], times.user + times.system)
    return used


def table(costs: Mapping[str, list[Cost]], reference: str, others: Mapping[str, float]) -> str:
    """Lines for the reader: the median seconds of each work, and the ratios with their spread."""
    lines = [f"| work | s of the processor | s | of {reference}, processor | clock |", "|---|---|---|---|---|"]
    for name, spread in ratios(costs, reference).items():
        seconds = [median(getattr(cost, kind) for cost in costs[name]) for kind in ("processor", "clock")]
        cells = [
            f"{middle:.2f} ({least:.2f}..{most:.2f})" for least, middle, most in (spread["processor"], spread["clock"])
        ]
        lines.append(f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} | {cells[0]} | {cells[1]} |")
    return "\n".join(
        [*lines, "", f"Beside it ran: {in_words(others)}. Median of {len(costs[reference])} turns (least..most)."]
    )
