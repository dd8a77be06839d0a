"""Where the processor time of a round goes, part by part, and what the machine would need for what it does.

    python benchmarks/parts.py --dataset=ml-100k

Rounds of ``pfedrec`` and of ``afd``, a user a client on ``engine=fleet``, and the final test of ``afd`` over four clients, on
one thread. Each runs once unseen, which says the seconds; once under a profiler, which says whose they are (shares of self
time; compiled loops are their callers'); and once under a counter of torch's operators. Yardsticks are of one core: operations
of products at the speed of ``[512, 512]`` ones, and bytes at that of a copy in memory, which what stays in the cache outruns.
Of compiled loops, which torch does not see, three passes over a sample's numbers count: gathered, multiplied, scattered.
"""

import argparse
import cProfile
import pstats
import re
from collections import Counter
from collections.abc import Callable
from time import process_time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from turns import Others, cost_of

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.quick_start import _prepare, processor_settings

PASSES = 3


class Moved(TorchDispatchMode):
    """Counts the bytes that operators read and write, each tensor once an operator; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        inputs = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        out = [tensor for tensor in tree_leaves(output) if isinstance(tensor, torch.Tensor)]
        if not function.is_view:
            self.bytes += sum(tensor.nbytes for tensor in inputs + out)
        return output


def part_of(file: str, function: str) -> str:
    """What part of the program a function belongs to."""
    if file.endswith("compiled.py") or "/numba/" in file:
        return "compiled loops"
    if room := re.search(r"recbole_fedkd/(\w+)", file):
        return f"Python of {room[1]}"
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


def works(arguments: argparse.Namespace) -> dict[str, tuple[Callable[[], object], int]]:
    """What is measured, and the bytes that its compiled loops cannot do without."""
    measured = {}
    common = {"state": "ERROR", "show_progress": False}
    common |= {"data_path": arguments.data_path} if arguments.data_path else {}
    fleet = {"partition": "user", "engine": "fleet", "fleet_threads": 1, **common}

    def prepared(model: str, **keys: Any) -> Any:
        return _prepare(FedKDConfig(model, arguments.dataset, config_dict=keys))

    for preset, model in (("pfedrec", "PFedRec"), ("afd", "AttnFedKD")):
        trainer, loaders, _ = prepared(model, preset=preset, **fleet)
        samples = sum(trainer.engine.samples.values()) if preset == "pfedrec" else 0
        numbers = iter(range(100))

        def train(trainer: Any = trainer, data: Any = loaders[0], numbers: Any = numbers) -> None:
            trainer._train_once(data, next(numbers), None, False)

        measured[f"a round of {preset}"] = train, PASSES * samples * 32 * 4
    trainer, _, evaluations = prepared("AttnFedKD", preset="afd", client_num=4, **common)
    measured["the final test of four clients"] = lambda: trainer.evaluate(evaluations[1], load_best_model=False), 0
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--only", default="", help="part of the name of what is measured")
    arguments = parser.parse_args()
    others = Others()
    with processor_settings(threads=1):
        products, copies = speeds()
        print(
            f"A core does {products / 1e9:.0f} billion operations of products a second, and copies {copies / 1e9:.1f} GB.\n"
        )
        print("| work | s | products, s | bytes, s | times the larger | whose time |\n|---|---|---|---|---|---|")
        for name, (work, compiled_bytes) in works(arguments).items():
            if arguments.only not in name:
                continue
            work()
            seconds = cost_of(work).processor
            parts = ", ".join(f"{part} {share:.0%}" for part, share in shares(work).items() if share >= 0.03)
            with FlopCounterMode(display=False) as counted, Moved() as moved:
                work()
            of_products, of_bytes = counted.get_total_flops() / products, (moved.bytes + compiled_bytes) / copies
            limit = max(of_products, of_bytes)
            print(
                f"| {name} | {seconds:.2f} | {of_products:.3f} | {of_bytes:.3f} | {seconds / limit:.1f} | {parts} |",
                flush=True,
            )
    busy = ", ".join(f"{name} ({cores} cores)" for name, cores in others.cores().items()) or "nobody"
    print(f"\nBeside it ran: {busy}.")


if __name__ == "__main__":
    main()
