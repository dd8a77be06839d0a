"""What one user's answer from memory takes: ``load(run).recommend(user, 10)`` of each model, untrained, one user after another.

    python benchmarks/answers.py --dataset=ml-1m --data_path=<folder> AttnStudent AttnFedKD BPR AutoInt DIN

Printed are medians of milliseconds of the clock and of the processor on one thread, after two answers that are not counted.
"""

import argparse
import os
import statistics
import time
from itertools import cycle

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.errors import InputError
from recbole_fedkd.quick_start import _prepare_data, _prepare_model, processor_settings
from recbole_fedkd.recommend import Recommender

READ = {"inter": ["user_id", "item_id", "rating", "timestamp"]}


# What models of RecBole ask for: a label, or no sampled negatives.
ASKED: list[dict[str, object]] = [{}, {"label_mode": "threshold"}, {"train_neg_sample_args": None}]


def recommender(model: str, keys: dict[str, object]) -> Recommender:
    of_model = {} if model.startswith("Attn") else {"load_col": READ}
    for asked in ASKED:
        try:
            config = FedKDConfig(model, keys["dataset"], config_dict={"state": "ERROR", **keys, **of_model, **asked})
            config.final_config_dict["device"] = torch.device("cpu")
            data = _prepare_data(config)
            built, _ = _prepare_model(config, data)
            return Recommender(config, built.eval(), data.dataset, data.loaders[0]._dataset)
        except InputError as error:
            refused = error
    raise refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["AttnStudent", "BPR"])
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path")
    parser.add_argument("--answers", type=int, default=21)
    arguments = parser.parse_args()
    keys = {"dataset": arguments.dataset} | ({"data_path": arguments.data_path} if arguments.data_path else {})
    with processor_settings(threads=1):
        for model in arguments.models:
            answering = recommender(model, keys)
            users, clock, processor = cycle(answering.users[:50]), [], []
            for _ in range(arguments.answers + 2):
                start = time.perf_counter(), time.process_time()
                answering.recommend(next(users), 10)
                clock.append(1000 * (time.perf_counter() - start[0]))
                processor.append(1000 * (time.process_time() - start[1]))
            print(
                f"{model:14} {statistics.median(clock[2:]):8.1f} ms, processor {statistics.median(processor[2:]):8.1f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
