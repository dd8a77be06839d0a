"""Distillation on the server: the mean moves towards what all networks say, of pairs that are nobody's."""

import pytest
import torch
from torch.nn import functional

from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.strategy.ensemble_distillation import _said

FEDDF = {"strategy": "feddf", "learner": "adam", "learning_rate": 0.03, "unlabelled_pairs": 300}


def test_the_mean_moves_towards_what_all_networks_say(prepared):
    _, trainer, _, _ = prepared(**FEDDF, server_epochs=20)
    server = trainer.engine.server
    strategy, task = server.strategy, server.strategy.unlabelled
    generator = torch.Generator().manual_seed(1)
    networks = [
        {name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in server.state.items()}
        for _ in range(3)
    ]
    mean = {name: torch.stack([network[name] for network in networks]).mean(0) for name in server.state}
    ensemble = torch.stack([_said(task, network, "cpu") for network in networks]).mean(0).softmax(-1)

    def far(state):
        return float(functional.kl_div(_said(task, state, "cpu").log_softmax(-1), ensemble, reduction="batchmean"))

    taught = strategy.distilled(mean, networks, 0)
    assert taught.keys() == mean.keys() and all(taught[name].shape == value.shape for name, value in mean.items())
    assert far(taught) < 0.7 * far(mean)
    assert all(torch.equal(strategy.distilled(mean, networks, 0)[name], value) for name, value in taught.items())


def test_the_servers_pairs_are_nobodys_and_hold_items_that_are_known(prepared):
    _, trainer, _, _ = prepared(**FEDDF)
    task = trainer.engine.server.strategy.unlabelled
    assert 300 <= len(task) < 600 and 0 < int(task.samples.items.min()) <= int(task.samples.items.max())
    assert int(task.samples.items.max()) < trainer.model.item_num
    assert all(client.strategy.unlabelled is None for client in trainer.engine.clients)
    assert not any(
        torch.equal(task.network.history_items[1:3], client.task.network.history_items[1:3])
        for client in trainer.engine.clients
    )


def test_without_a_pass_on_the_server_it_is_federated_averaging_of_as_many_bytes(run):
    keys = {**FEDDF, "epochs": 2}
    averaged = run(**{key: value for key, value in keys.items() if key != "unlabelled_pairs"} | {"strategy": "fedavg"})
    idle, taught = run(**keys, server_epochs=0), run(**keys)
    assert idle["test_result"] == averaged["test_result"] != taught["test_result"]
    assert taught["communication"] == averaged["communication"]


@pytest.mark.parametrize(
    "keys",
    [
        {"label_mode": "implicit"},
        {"label_mode": "threshold", "history_length": 0, "clients_per_round": 2},
        {"codecs": ["int8"], "private_parameters": ["backbone.layers.10.*"]},
        {"server_optimizer": "fedadam", "server_learning_rate": 0.01, "unlabelled_pairs": 1},
    ],
    ids=str,
)
def test_it_goes_with_other_keys_and_resumes_exactly(run, keys):
    keys = {**FEDDF, **keys}
    whole, part = run(epochs=2, **keys), run(epochs=1, **keys)
    assert run(epochs=2, resume=part["run_folder"], **keys)["test_result"] == whole["test_result"]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"model": "WideDeep", "label_mode": "threshold"}, "use --model=AttnFedKD"),
        ({"model": "MF", "label_mode": "implicit"}, "use --model=AttnFedKD"),
        ({"secure_aggregation": True}, "strategy=feddf needs every client's own"),
        ({"privacy": {"unit": "client", "clip": 1.0, "epsilon": 8.0}}, "strategy=feddf"),
        ({"student_pool": [{}, {"embedding_size": 4}]}, "strategy 'feddf' cannot average"),
        ({"server_epochs": -1}, "server_epochs is -1"),
    ],
)
def test_what_it_does_not_go_with_is_told(run, keys, sentence):
    with pytest.raises(InputError, match=sentence):
        run(**{**FEDDF, **keys})
