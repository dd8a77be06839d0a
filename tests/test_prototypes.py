"""Prototypes: means of hidden states over all clients, and the pull towards them."""

import pytest
import torch

from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.knowledge import PrototypeKnowledge, Sizes
from recbole_fedkd.federated.knowledge.prototype import PrototypeSettings
from recbole_fedkd.federated.task import Step

PROTO = {"strategy": "afd", "knowledge": "prototype", "learner": "adam", "learning_rate": 0.03}


@pytest.mark.parametrize("of", ["item", "label"])
def test_a_prototype_is_the_mean_hidden_state_of_all_clients_samples(prepared, of):
    _, trainer, _, _ = prepared(**PROTO, prototype_of=of)
    engine = trainer.engine
    engine.run_round(0)
    hidden, classes = [], []
    for client in engine.clients:
        client.task.network.eval()
        for batch in client.task.clean_batches():
            step = client.task.step(batch, True)
            hidden.append(step.hidden.detach().double())
            classes.append(step.items if of == "item" else step.labels)
    hidden, classes = torch.cat(hidden), torch.cat(classes)
    state = engine.server.state
    for number in range(len(state["known"])):
        assert bool(state["known"][number]) == bool((classes == number).any())
        if state["known"][number]:
            expected = hidden[classes == number].mean(0).float()
            torch.testing.assert_close(state["prototypes"][number], expected, rtol=1e-4, atol=1e-5)


def test_the_pull_by_hand_spares_what_has_no_prototype_and_what_only_fills_up():
    knowledge = PrototypeKnowledge(PrototypeSettings("item", 3.0), Sizes(2, 2, 4, hidden=2))
    hidden = torch.tensor([[1.0, 2.0], [0.0, 0.0], [5.0, 5.0]], requires_grad=True)
    step = Step(torch.zeros(()), 3, items=torch.tensor([1, 3, 1]), hidden=hidden, weights=torch.tensor([1.0, 1.0, 0.0]))
    received = {"prototypes": torch.tensor([[9.0, 9.0], [0.0, 0.0], [9.0, 9.0], [9.0, 9.0]])}
    received["known"] = torch.tensor([False, True, False, False])
    loss = knowledge.penalty(received, step)
    assert float(loss) == pytest.approx(3.0 * (1 + 4) / 2 / 2)
    loss.backward()
    assert hidden.grad.tolist() == [[1.5, 3.0], [0.0, 0.0], [0.0, 0.0]]
    assert knowledge.penalty({}, step) is None


def test_prototypes_without_weight_change_nothing_and_with_it_they_pull(run):
    keys = {"epochs": 3, **PROTO}
    alone, weightless = run(**{**keys, "strategy": "local"}), run(**keys, prototype_weight=0.0)
    assert weightless["test_result"] == alone["test_result"] != run(**keys)["test_result"]


# Of these seeds scores lie apart; of others rounding decides between near ones, and ranks follow it.
@pytest.mark.parametrize(
    "keys", [{"label_mode": "implicit", "seed": 2021}, {"prototype_of": "label", "seed": 2021}], ids=str
)
def test_a_federation_of_prototypes_resumes_exactly_and_the_fleet_does_the_same(run, keys):
    keys = {**PROTO, **keys, "clients_per_round": 3}
    whole, part = run(epochs=3, **keys), run(epochs=1, **keys)
    assert run(epochs=3, resume=part["run_folder"], **keys)["test_result"] == whole["test_result"]
    fleet = run(epochs=3, engine="fleet", **keys)
    assert fleet["engine"] == "fleet" and fleet["communication"] == whole["communication"]
    for name, value in whole["test_result"].items():
        assert fleet["test_result"][name] == pytest.approx(value, abs=2e-3)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"model": "WideDeep", "label_mode": "threshold"}, "hidden states, which model 'WideDeep' does not tell"),
        ({"model": "MF", "label_mode": "implicit"}, "hidden states, which model 'MF' does not tell"),
        ({"student_pool": [{}, {"hidden_sizes": [4, 6]}]}, "student_pool makes of widths"),
        ({"prototype_of": "user"}, "prototype_of is 'user'; it must be one of item, label"),
        ({"prototype_weight": -1.0}, "prototype_weight is -1.0"),
    ],
)
def test_prototypes_of_what_has_none_are_told(run, keys, sentence):
    with pytest.raises(InputError, match=sentence):
        run(**{**PROTO, **keys})
