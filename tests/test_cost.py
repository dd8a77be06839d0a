"""What a federation costs on a network, against sums by hand."""

from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL

from recbole_fedkd.command_line import main
from recbole_fedkd.cost import of_run, probe
from recbole_fedkd.errors import InputError
from recbole_fedkd.network import Network, dealt_as_recorded, network_of


def arrays(*values):
    return (np.array(each, dtype=float) for each in values)


def test_a_round_is_as_long_as_its_slowest_client():
    network = Network(uplink=8, downlink=16, latency=500, slowdown=2)
    # The first: 1 s each way on the line, 2 s down, 3 s up, 2 x 4 s of training.
    assert network.seconds(*arrays([4e6, 0], [3e6, 0], [4, 6])) == pytest.approx(2 * 0.5 + 2 + 3 + 8)
    assert network.seconds(*arrays([4e6, 0], [3e6, 0], [4, 60])) == pytest.approx(2 * 0.5 + 120)
    assert network.seconds(*arrays([], [], [])) == 0


@pytest.mark.parametrize(("spread", "shape"), [("lognormal", 0.5), ("pareto", 3.0)])
def test_stragglers_have_mean_one_and_make_rounds_of_many_clients_longer(spread, shape):
    network = Network(spread=spread, shape=shape)
    one, many = (network.seconds(*arrays([0] * n, [0] * n, [10] * n)) for n in (1, 50))
    assert one == pytest.approx(10.08, rel=0.1)
    assert many > 1.5 * one
    assert many == network.seconds(*arrays([0] * 50, [0] * 50, [10] * 50))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"uplink": "fast"}, "uplink is 'fast'; it must be a number >= 1e-06"),
        ({"downlink": "0"}, "downlink is '0'"),
        ({"latency": "-1"}, "latency is '-1'; it must be a number >= 0"),
        ({"slowdown": "nan"}, "slowdown is 'nan'"),
        ({"uplink": "inf"}, "uplink is 'inf'"),
        ({"stragglers": "some"}, "must be none, lognormal:<sigma> or pareto:<index>"),
        ({"stragglers": "pareto:1"}, "stragglers is '1'; it must be a number >= 1.5"),
        ({"stragglers": "lognormal:60"}, "stragglers is '60'; it must be a number >= 0 and <= 1.5"),
    ],
)
def test_a_network_that_cannot_be_is_refused_in_a_sentence(keys, sentence):
    with pytest.raises(InputError, match=sentence):
        network_of(keys)


KEYS = {"strategy": "fedavg", "codecs": ["int8"], "epochs": 4, "stopping_step": 20}


FACTORS = {"knowledge": "factors", "sketch_passes": 1, "em_steps": 1}


@pytest.mark.parametrize(
    "keys",
    [
        KEYS,
        {"knowledge": "item", "epochs": 5, "stopping_step": 20},
        {**FACTORS, "epochs": 9, "stopping_step": 20},
        {"strategy": "sums", "model": "FoldIn"},
    ],
)
def test_bytes_are_those_of_the_run_before_and_after_it(run, data_path, keys):
    """Also where something is said once, where a few rounds exchange something and those after them nothing, or none come."""
    keys = {"model": "AttnFedKD", **keys}
    result = run(**keys)
    rounds = len(result["rounds"])
    expected = probe(keys.pop("model"), "tiny", [], {"data_path": str(data_path), **SMALL, **keys})
    recorded = of_run(Path(result["run_folder"]))
    for found in (expected, recorded):
        assert sum(each[0].sum() for each in found.rounds) == pytest.approx(result["communication"]["bytes_down"])
        assert sum(each[1].sum() for each in found.rounds) == pytest.approx(result["communication"]["bytes_up"])
        assert [each.shape for each in found.rounds] == [(3, 3)] * rounds
    told = recorded.table(Network())
    assert f"until the best round, {result['best_round']} (" in told
    assert f"{result['communication']['total_bytes']:,} B" in told


def test_a_round_of_a_record_is_dealt_out_to_its_clients():
    partition = {"client_num": 2, "clients": [{"samples": 30}, {"samples": 10}]}
    (found,) = dealt_as_recorded([(8.0, 4.0, 2.0)], partition, None)
    assert found.tolist() == [[4, 4], [2, 2], [1.5, 0.5]]
    (drawn,) = dealt_as_recorded([(8.0, 4.0, 2.0)], partition, 1)
    assert drawn.tolist() == [[8], [4], [2]]
    (unknown,) = dealt_as_recorded([(8.0, 4.0, 2.0)], {"client_num": 2, "clients": []}, None)
    assert unknown.tolist() == [[4, 4], [2, 2], [1, 1]]
    (side_by_side,) = dealt_as_recorded([(8.0, 4.0, 2.0)], partition, None, "processes")
    assert side_by_side.tolist() == [[4, 4], [2, 2], [2, 2]]
    assert dealt_as_recorded([(8.0, 4.0, 2.0)], None, None) == []


def test_the_command_says_what_it_cannot_use(capsys, tmp_path):
    assert main(["cost", str(tmp_path)]) == 2
    assert "name the folder of a finished run" in capsys.readouterr().err
    (tmp_path / "record.jsonl").write_text("{}")
    assert main(["cost", str(tmp_path)]) == 2
    assert "is not the record of a run of a federation" in capsys.readouterr().err
    assert main(["cost", "--model=BPR", "--dataset=ml-100k", "--uplink=3"]) == 2
    assert "has no clients" in capsys.readouterr().err
