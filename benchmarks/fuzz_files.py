"""Read files that were damaged at random: no traceback, no row lost without a word.

python benchmarks/fuzz_files.py --count=2000 --first=0 [--train]
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fuzzed_files import fuzz_one, summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="number of damaged datasets")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--train", action="store_true", help="train for a round on what can be read")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    outcomes, failed = [], []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for seed in range(options.first, options.first + options.count):
            try:
                outcomes.append(fuzz_one(seed, Path(folder), options.train))
            except Exception:
                failed.append(seed)
                print(f"seed {seed}:", traceback.format_exc(limit=-4), file=sys.stderr)
    print(summary(outcomes))
    print(f"{len(outcomes)} of {options.count} ended as they must; seeds that did not: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
