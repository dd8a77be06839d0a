"""A flame graph of rounds of ``afd`` and final tests: whose the time is, function by function, once all is compiled and read.

    python benchmarks/flame.py docs/performance.svg
    python benchmarks/flame.py shares.txt --format=raw

Four clients on one thread, two rounds a final test, as often as ``--turns`` says. Compiled loops are their callers'. It needs
py-spy, which is no dependency of this package (``pip install py-spy``), and the right to look into a process of one's own.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from time import sleep

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tqdm import tqdm
from turns import cost_of, tell, until_stopped

from recbole_fedkd.compat import keep_freed_memory
from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.quick_start import _prepare, processor_settings

RATE = 500
"""Samples a second."""


def recorder(out: Path, form: str) -> subprocess.Popen[bytes]:
    """py-spy, looking at this process until it is interrupted."""
    if shutil.which("py-spy") is None:
        sys.exit("flame.py: there is no py-spy; it comes with: pip install py-spy")
    command = ["py-spy", "record", "--function", "--format", form, "--rate", str(RATE), "--output", str(out)]
    started = subprocess.Popen([*command, "--pid", str(os.getpid())], stdin=subprocess.DEVNULL)
    sleep(2)  # until it looks
    return started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--format", default="flamegraph", choices=("flamegraph", "raw", "speedscope"))
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    tqdm.monitor_interval = 0  # a bar's own thread would be looked at, too
    keys = {"state": "ERROR", "show_progress": False, "preset": "afd", "client_num": 4}
    keys |= {"data_path": arguments.data_path} if arguments.data_path else {}
    numbers = count()
    with processor_settings(threads=1):
        trainer, loaders, evaluations = _prepare(FedKDConfig("AttnFedKD", arguments.dataset, config_dict=keys))
        keep_freed_memory()

        def rounds_and_test() -> None:
            for _ in range(2):
                trainer._train_once(loaders[0], next(numbers), None, False)
            trainer.evaluate(evaluations[1], load_best_model=False)

        rounds_and_test()
        recording = recorder(arguments.out, arguments.format)
        with until_stopped():
            for turn in range(1, arguments.turns + 1):
                tell(turn, arguments.turns, "rounds and a test", cost_of(rounds_and_test))
        recording.send_signal(signal.SIGINT)
        if recording.wait() != 0:
            sys.exit(f"flame.py: py-spy ended with {recording.returncode}")


if __name__ == "__main__":
    main()
