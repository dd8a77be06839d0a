"""Is the difference between two rows of the quality table more than noise? Paired over the same held-out rows.

    python experiments/paired_difference.py --out=results/quality --one=afd --other=local --seeds 2020 2021 2022

For every seed the two trained models predict the same test rows; printed are the mean differences of accuracy and absolute
error (one minus other), with the standard error of the mean over all rows of all seeds.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch

from recbole_fedkd import load_data_and_model


def predictions(file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether the class is right and the absolute error, per test row, and the rows' ``user * items + item`` for pairing."""
    result = json.loads(file.read_text())
    folder = (file.parent / result["run_folder"]).resolve()
    loaded = load_data_and_model(folder / "best.pth")
    model = next(part for part in loaded if isinstance(part, torch.nn.Module)).eval()
    test = loaded[-1].protocols[0].loader._dataset
    rows = test.inter_feat
    with torch.no_grad():
        parts = [
            model.predict_distribution(rows[np.arange(start, min(start + 8192, len(rows)))])
            for start in range(0, len(rows), 8192)
        ]
    distribution = torch.cat(parts)
    stars = rows["rating"]
    right = (model.label_values[distribution.argmax(1)] == stars).double()
    error = (distribution @ model.label_values - stars).abs().double()
    pairs = rows["user_id"] * test.item_num + rows["item_id"]
    return right.numpy(), error.numpy(), pairs.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/quality"), help="folder of the result files")
    parser.add_argument("--one", default="afd")
    parser.add_argument("--other", default="local")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2020, 2021, 2022])
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    os.chdir(out)
    right, error = [], []
    for seed in arguments.seeds:
        one = predictions(out / f"{arguments.one}-{seed}.json")
        other = predictions(out / f"{arguments.other}-{seed}.json")
        assert np.array_equal(one[2], other[2]), "the two runs were judged on different rows"
        right.append(one[0] - other[0])
        error.append(one[1] - other[1])
    for name, differences in (("accuracy", np.concatenate(right)), ("absolute error", np.concatenate(error))):
        standard_error = differences.std(ddof=1) / np.sqrt(len(differences))
        print(
            f"{arguments.one} - {arguments.other}, {name}: {differences.mean():+.5f}, standard error {standard_error:.5f}"
        )


if __name__ == "__main__":
    main()
