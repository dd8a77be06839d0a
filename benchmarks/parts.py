"""Where the processor time of a round goes, part by part, and what the machine would need for what it does.

    python benchmarks/parts.py --dataset=ml-100k

Rounds of ``pfedrec`` and of ``afd``, a user a client on ``engine=fleet``, and the final test of ``afd`` over four clients, on
one thread. Each runs once unseen and then a few times, which says the seconds; once under a profiler, which says whose they are
(shares of self time; compiled loops are their callers', told by module); and once with torch in place of compiled loops, which
a counter of operations cannot see: of ``afd`` four clients in turn, since it miscounts convolutions side by side. Yardsticks
are of one core: operations of products at the speed of ``[512, 512]`` ones, which compiled loops outrun, and of ``pfedrec``,
which multiplies no matrices, the bytes that it cannot do without at the speed of a copy: three passes over a sample's numbers,
gathered, multiplied, scattered.
"""

import argparse
import cProfile
import os
import pstats
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from statistics import median
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode
from turns import Others, cost_of, in_words, tell, until_stopped

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.model.compiled import has_compiler
from recbole_fedkd.quick_start import _prepare, processor_settings

Work = Callable[[], object]
PASSES = 3


@contextmanager
def by_torch() -> Iterator[None]:
    """Compiled loops are left out: what they do, torch does."""
    with patch.dict(os.environ, {"NUMBA_DISABLE_JIT": "1"}):
        has_compiler.cache_clear()
        yield
    has_compiler.cache_clear()


def part_of(file: str, function: str) -> str:
    """What part of the program a function belongs to."""
    if file.endswith("fleet/compiled.py"):
        return "loops of the fleet"
    if room := re.search(r"recbole_fedkd/(model/\w+|\w+)", file):
        return f"{room[1]} and its loops" if "/" in room[1] else f"Python of {room[1]}"
    if file == "~":
        return "torch's operators" if "torch" in function or "run_backward" in function else "Python's own functions"
    return "torch's Python" if "/torch/" in file else "other Python"


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Part to its share of self time, the largest first."""
    profile = cProfile.Profile(process_time)
    profile.runcall(work)
    spent: Counter[str] = Counter()
    for (file, _, function), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        spent[part_of(file, function)] += own
    return {part: own / spent.total() for part, own in spent.most_common()}


def speeds() -> tuple[float, float]:
    """Operations of products and copied bytes (read and written) a second, the best of several."""
    square, long = torch.rand(512, 512), torch.rand(2**24)
    target = torch.empty_like(long)
    product = min(cost_of(lambda: [square @ square for _ in range(20)]).processor for _ in range(5))
    copy = min(cost_of(lambda: [target.copy_(long) for _ in range(5)]).processor for _ in range(5))
    return 20 * 2 * 512**3 / product, 5 * 2 * long.nbytes / copy


def works(arguments: argparse.Namespace) -> dict[str, tuple[Work, Work, int]]:
    """What is measured, what is counted in its place, and the bytes that it cannot do without if it multiplies no matrices."""
    common = {"state": "ERROR", "show_progress": False}
    common |= {"data_path": arguments.data_path} if arguments.data_path else {}
    fleet = {"partition": "user", "engine": "fleet", "fleet_threads": 1}
    numbers = count()

    def prepared(model: str, **keys: Any) -> Any:
        return _prepare(FedKDConfig(model, arguments.dataset, config_dict={**common, **keys}))

    def round_of(trainer: Any, loaders: Any, _: Any) -> Work:
        return lambda: trainer._train_once(loaders[0], next(numbers), None, False)

    factors = prepared("PFedRec", preset="pfedrec", **fleet)
    samples = sum(factors[0].engine.samples.values())
    four = prepared("AttnFedKD", preset="afd", client_num=4)
    of_factors, of_student = round_of(*factors), round_of(*prepared("AttnFedKD", preset="afd", **fleet))
    trainer, _, evaluations = four

    def test() -> None:
        trainer.evaluate(evaluations[1], load_best_model=False)

    return {
        "a round of pfedrec": (of_factors, lambda: None, PASSES * samples * 32 * 4),
        "a round of afd": (of_student, round_of(*four), 0),
        "the final test of four clients": (test, test, 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--only", default="", help="part of the name of what is measured")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    others = Others()
    with until_stopped(), processor_settings(threads=1):
        products, copies = speeds()
        print(
            f"A core does {products / 1e9:.0f} billion operations of products a second, and copies {copies / 1e9:.1f} GB.\n"
        )
        print("| work | s | its products, s | its bytes, s | times that | whose time |\n|---|---|---|---|---|---|")
        for name, (work, same, own_bytes) in works(arguments).items():
            if arguments.only not in name:
                continue
            work()
            seconds = []
            for turn in range(1, arguments.turns + 1):
                cost = cost_of(work)
                tell(turn, arguments.turns, name, cost)
                seconds.append(cost.processor)
            parts = ", ".join(f"{part} {share:.0%}" for part, share in shares(work).items() if share >= 0.03)
            with by_torch(), FlopCounterMode(display=False) as counted:
                same()
            of_products, of_bytes = counted.get_total_flops() / products, own_bytes / copies
            limit, middle = max(of_products, of_bytes), median(seconds)
            print(
                f"| {name} | {middle:.2f} ({min(seconds):.2f}..{max(seconds):.2f}) | {of_products:.3f} | {of_bytes:.3f} "
                f"| {middle / limit:.1f} | {parts} |",
                flush=True,
            )
    print(f"\nBeside it ran: {in_words(others.cores())}.")


if __name__ == "__main__":
    main()
