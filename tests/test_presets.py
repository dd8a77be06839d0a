"""What every preset comes to, written down: no change of the code may move it beyond rounding.

``python tests/test_presets.py`` writes the numbers anew, for a change that is meant to. They are of commit 51a3662, but where
draws became others: what clients drop in 06a5696 (without dropout every preset came to the same numbers before and after),
and orders and negatives of RecBole's own models (fdin, fwd, fedncf) in the commit that begins "RecBole's own models draw".
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import SMALL, write_dataset

from recbole_fedkd import run_recbole_fedkd
from recbole_fedkd.config.files import PROPERTIES

pytestmark = pytest.mark.without_loops

WRITTEN = Path(__file__).parent / "preset_metrics.json"
PRESETS = [file.stem for file in sorted((PROPERTIES / "preset").glob("*.yaml"))]
KEYS = {"metrics": ["MAE", "NDCG"], "valid_metric": "MAE", "epochs": 2, "state": "ERROR"}
EXCHANGE = {"sketch_passes": 1, "em_steps": 1, "epochs": 6}
MORE = {
    **dict.fromkeys(("factors", "factors_s", "factors_xs", "taught"), EXCHANGE),
    "feddf": {"unlabelled_pairs": 64},
    "fedrec": {"clients_per_round": 8},
}
ROUNDING = {"mae": 0.002, "ndcg@10": 0.02}
"""Of so few users one that changes a place moves NDCG by .01."""


def metrics_of(preset, folder):
    keys = {"data_path": str(folder), **SMALL, **KEYS, "preset": preset, **MORE.get(preset, {})}
    result = run_recbole_fedkd(None, "tiny", config_dict=keys, saved=False)["test_result"]
    return {metric: result[metric] for metric in ROUNDING if metric in result}


def test_every_preset_is_written_down():
    assert sorted(json.loads(WRITTEN.read_text())) == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_comes_to_what_it_came_to(preset, data_path):
    written, now = json.loads(WRITTEN.read_text())[preset], metrics_of(preset, data_path)
    assert set(now) == set(written) and written
    for metric, value in now.items():
        assert value == pytest.approx(written[metric], abs=ROUNDING[metric]), metric


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        data = write_dataset(Path(folder))
        made = {preset: metrics_of(preset, data) for preset in sys.argv[1:] or PRESETS}
    WRITTEN.write_text(json.dumps(made, indent=1) + "\n")
