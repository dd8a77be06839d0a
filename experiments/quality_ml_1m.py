"""Measure the README's quality table: central, local, fd and afd on ml-1m with rating labels, three seeds.

    python experiments/quality_ml_1m.py --data_path=<folder of ml-1m> --out=results/quality --workers=2

A finished run is never repeated: its result file is there. The table is made from the result files alone.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    "central": ["--model=AttnStudent"],
    "local": ["--model=AttnFedKD", "--preset=local"],
    "fd": ["--model=AttnFedKD", "--preset=afd", "--strategy=fd"],
    "fd+cnn": ["--model=AttnFedKD", "--preset=fd"],
    "afd": ["--model=AttnFedKD", "--preset=afd"],
}
METRICS = ["accuracy", "mae", "rmse", "nmae", "auc", "logloss", "labelledndcg@10"]


def measure(row: str, seed: int, arguments: argparse.Namespace) -> None:
    file = (arguments.out / f"{row}-{seed}.json").resolve()
    if file.is_file():
        return
    command = [sys.executable, str(ROOT / "run_recbole_fedkd.py"), *ROWS[row], "--dataset=ml-1m"]
    command += [f"--data_path={arguments.data_path.resolve()}", f"--seed={seed}", f"--result_file={file}"]
    command += ["--metrics=['Accuracy','MAE','RMSE','NMAE','AUC','LogLoss','LabelledNDCG']", "--show_progress=False"]
    command += [f"--epochs={arguments.epochs}"]
    with file.with_suffix(".log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, stdout=log, stderr=log, cwd=arguments.out, env=environment, check=False)
    print(f"{row}, seed {seed}: {'done' if ended.returncode == 0 else f'failed, see {log.name}'}", flush=True)


def table(arguments: argparse.Namespace) -> str:
    lines = ["| row | runs | " + " | ".join(METRICS) + " | rounds | bytes |", "|---|---|" + "---|" * (len(METRICS) + 2)]
    for row in arguments.rows:
        files = [arguments.out / f"{row}-{seed}.json" for seed in arguments.seeds]
        results = [json.loads(file.read_text()) for file in files if file.is_file()]
        if not results:
            continue
        cells = []
        for metric in METRICS:
            values = [result["test_result"][metric] for result in results]
            spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.4f}{spread}")
        cells.append(f"{mean(result['timing']['rounds'] for result in results):.0f}")
        cells.append(f"{mean(result['communication']['total_bytes'] for result in results):.0f}")
        lines.append(f"| `{row}` | {len(results)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="folder that holds the folder ml-1m")
    parser.add_argument("--out", type=Path, default=Path("results/quality"), help="folder of the result files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2020, 2021, 2022])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.workers) as pool:
        runs = [pool.submit(measure, row, seed, arguments) for seed in arguments.seeds for row in arguments.rows]
        for run in runs:
            run.result()
    print(table(arguments))


if __name__ == "__main__":
    main()
