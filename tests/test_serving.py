"""The moving average that serves: its values, and that training does not see it."""

import pytest
import torch
from torch import nn

from recbole_fedkd.federated.serving import MovingAverage


def test_the_average_is_the_mean_first_and_moves_by_the_decay_then():
    network = nn.Linear(1, 1, bias=False)
    average = MovingAverage(network, 0.5)
    served = []
    for latest in (8.0, 4.0, 0.0, 2.0):
        average.restore()
        with torch.no_grad():
            network.weight.fill_(latest)
        average.serve()
        served.append(network.weight.item())
    assert served == [8.0, 6.0, 3.0, 2.5]
    average.restore()
    assert network.weight.item() == 2.0


def test_serving_again_without_training_takes_the_latest_in_and_not_the_average():
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 4.0)
    average = MovingAverage(network, 0.5)
    average.serve()
    average.restore()
    nn.init.constant_(network.weight, 0.0)
    average.serve()
    average.serve()
    assert network.weight.item() == 1.0


KEYS = {"preset": "fedavg", "codecs": ["sign"], "epochs": 4}


@pytest.mark.parametrize("keys", [KEYS, {"preset": "afd"}, {**KEYS, "clients_per_round": 2}], ids=str)
def test_training_does_not_see_the_average_that_serves(prepared, keys):
    rounds = {}
    for decay in (0.0, 0.9):
        _, trainer, _, _ = prepared(**keys, serve_average=decay)
        engine = trainer.engine
        reports = [engine.run_round(index) for index in range(3)]
        rounds[decay] = [(each.loss, each.bytes_up, each.bytes_down) for each in reports]
        if decay:
            served = {name: value.clone() for name, value in engine.clients[0].task.network.named_parameters()}
            engine.clients[0].average.restore()
            latest = dict(engine.clients[0].task.network.named_parameters())
            assert any(not torch.equal(value, latest[name]) for name, value in served.items())
    assert rounds[0.0] == rounds[0.9]


def test_a_run_that_serves_an_average_resumes_exactly(run):
    whole = run(**KEYS, serve_average=0.5)
    part = run(**{**KEYS, "epochs": 2}, serve_average=0.5)
    resumed = run(**KEYS, serve_average=0.5, resume=part["run_folder"])
    assert resumed["test_result"] == whole["test_result"]
    assert [each["loss"] for each in resumed["rounds"]] == [each["loss"] for each in whole["rounds"]]
    assert resumed["test_result"] != run(**KEYS)["test_result"]


def test_every_network_of_the_federation_serves_its_average(prepared):
    _, trainer, _, _ = prepared(preset="fedavg", serve_average=0.5, use_user_id=False)
    trainer.engine.run_round(0)
    first = {name: value.clone() for name, value in trainer.model.networks[0].named_parameters()}
    trainer.engine.run_round(1)
    state = trainer.engine.server.state
    for network in trainer.model.networks:
        for name, value in network.named_parameters():
            torch.testing.assert_close(value, (first[name] + state[f"p:{name}"]) / 2)
