"""Gradients that are written out equal autograd's, and are used where they are those of what is trained alone."""

import pytest
import torch
from conftest import SMALL, write_dataset
from torch import nn
from torch.func import functional_call

from recbole_fedkd.config import FedKDConfig
from recbole_fedkd.engine.fleet import by_hand, messages, moments, moving, samples, store
from recbole_fedkd.engine.fleet import training as fleet_training
from recbole_fedkd.engine.fleet.by_hand import scores_of_many
from recbole_fedkd.engine.fleet.optimizers import BatchedSGD
from recbole_fedkd.model.compiled import has_compiler
from recbole_fedkd.model.factorization import FactorizationNetwork, RowSums, ScoreFunctionNetwork, dense
from recbole_fedkd.quick_start import _prepare

pytestmark = pytest.mark.without_loops

CLIENTS, USERS, ITEMS, SAMPLES, WIDTH = 3, 4, 6, 9, 5
NETWORKS = {
    "vectors": lambda: FactorizationNetwork(USERS, ITEMS, WIDTH, biases=False),
    "vectors and biases": lambda: FactorizationNetwork(USERS, ITEMS, WIDTH, biases=True),
    "score function": lambda: ScoreFunctionNetwork(ITEMS, WIDTH),
}


@pytest.mark.parametrize("one_user", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_by_hand_are_those_of_autograd(kind, one_user):
    networks = [NETWORKS[kind]().double() for _ in range(CLIENTS)]
    for network in networks:
        for weight in network.parameters():
            nn.init.normal_(weight)
    users = torch.randint(USERS, (CLIENTS, 1 if one_user else SAMPLES))
    items, errors = torch.randint(ITEMS, (CLIENTS, SAMPLES)), torch.randn(CLIENTS, SAMPLES).double()
    names = [name for name, _ in networks[0].named_parameters()]
    packed = {name: torch.stack([dict(each.named_parameters())[name].detach() for each in networks]) for name in names}
    scores, gradients = scores_of_many(networks[0].factors, packed, users, items)
    found = gradients(errors)
    assert found.keys() == set(names)
    for slot, network in enumerate(networks):
        own = {name: packed[name][slot].clone().requires_grad_() for name in names}
        of_users = users[slot].expand(SAMPLES)
        expected = functional_call(network, own, (of_users, items[slot].unsqueeze(1)))[:, 0, 1]
        torch.testing.assert_close(scores[slot], expected.detach())
        (expected * errors[slot]).sum().backward()
        for name in names:
            torch.testing.assert_close(dense(found[name])[slot].view_as(own[name]), own[name].grad, msg=name)


@pytest.mark.parametrize("rates", [None, [torch.tensor([0.5, 2.0, 0.0])]], ids=["one rate", "a rate a column"])
def test_sgd_changes_the_rows_that_have_a_gradient_as_if_all_had(rates):
    tables = torch.randn(2, 4, 3)
    gradient = RowSums(torch.tensor([[1, 1, 3], [0, 2, 1]]), torch.randn(2, 3, 3), 4)
    one, other = tables.clone(), tables.clone()
    optimizer = BatchedSGD(0.3)
    optimizer.step([one], [gradient], [], torch.zeros(2, 0), rates)
    optimizer.step([other], [dense(gradient)], [], torch.zeros(2, 0), rates)
    torch.testing.assert_close(one, other)


SHORTEST = "compiled" if has_compiler() else "by hand"
CASES = {
    "plain": ({}, SHORTEST),
    "a rate for the items": ({"learning_rates": {"item_embedding.*": 20.0}}, SHORTEST),
    "two epochs": ({"local_epochs": 2}, SHORTEST),
    "nothing exchanged": ({"strategy": "local"}, SHORTEST),
    "no compiler": ({}, "by hand"),
    "clipped": ({"clip_grad_norm": {"max_norm": 0.01}}, "by hand"),
    "adam": ({"learner": "adam"}, "by hand"),
    "proximal": ({"proximal_weight": 0.5}, "autograd"),
    "regularised": ({"reg_weight": 0.1}, "autograd"),
    "taught by what came down": ({"strategy": "fedgkd", "gamma": 0.5}, "autograd"),
    "knowledge": ({"strategy": "afd"}, "autograd"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", ["MF", "PFedRec"])
@pytest.mark.parametrize("partition", ["user", "random"])
def test_clients_take_the_shortest_way_that_minimises_the_same_and_train_as_on_the_local_engine(
    tmp_path, monkeypatch, model, case, partition
):
    keys, way = CASES[case]
    folder, ways = write_dataset(tmp_path, users=9, items=12, rows=6), set()
    derived, steps = fleet_training.derived_by_hand, by_hand.steps_of_many
    monkeypatch.setattr(fleet_training, "derived_by_hand", lambda *given: (ways.add("by hand"), derived(*given))[1])
    monkeypatch.setattr(by_hand, "steps_of_many", lambda *given: (ways.add("compiled"), steps(*given))[1])
    if case == "no compiler":
        for module in (by_hand, messages, moments, moving, samples, store):
            monkeypatch.setattr(module, "has_compiler", lambda: False)
    engines = []
    for engine in ("local", "fleet"):
        config = {"data_path": str(folder), **SMALL, "strategy": "fedavg", "partition": partition, "client_num": 3}
        config |= {"label_mode": "implicit", "learner": "sgd", "learning_rate": 0.3, "train_batch_size": 8, **keys}
        trainer, _, _ = _prepare(FedKDConfig(model, "tiny", config_dict={**config, "engine": engine}))
        engines.append(trainer.engine)
        assert trainer.engine.name == engine
    for index in range(2):
        one, other = (engine.run_round(index) for engine in engines)
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
    assert ways == {way} - {"autograd"}
    for name, value in engines[0].server.state.items():
        torch.testing.assert_close(engines[1].server.state[name], value, rtol=1e-3, atol=1e-5)
