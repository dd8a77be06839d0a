"""The network teacher: mutual losses by hand, the peer is detached, the teacher never leaves its client."""

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import refused
from torch.nn import functional

from recbole_fedkd.distillation.losses import matching_gap, mutual_loss, weighted_mutual_loss
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.message import Message
from recbole_fedkd.model.pair import TeacherAndStudent

FEDKD = {
    "strategy": "fedkd",
    "teacher": {"embedding_size": 6, "hidden_sizes": [6, 12], "history_length": 7, "attention_heads": 3},
}


def pair_of(prepared, **keys):
    _, trainer, _, _ = prepared(**{**FEDKD, **keys})
    client = trainer.engine.clients[0]
    assert isinstance(client.task.network, TeacherAndStudent)
    return trainer, client


def gradients(module):
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


def test_the_mutual_loss_by_hand():
    logits, peer = torch.tensor([[1.0, -1.0], [0.5, 2.0]]), torch.tensor([[0.0, 0.3], [1.0, -2.0]])
    labels = np.array([0, 1])
    p, q = logits.softmax(-1).numpy(), peer.softmax(-1).numpy()
    own, other = -np.log(p[[0, 1], labels]).mean(), -np.log(q[[0, 1], labels]).mean()
    divergence = (q * np.log(q / p)).sum(1).mean()
    expected = own + (divergence + 0.7) / (own + other)
    assert float(mutual_loss(logits, peer, torch.tensor(labels), torch.tensor(0.7))) == pytest.approx(
        expected, rel=1e-5
    )


def test_the_gap_by_hand_leaves_out_maps_over_other_numbers_of_keys():
    hidden, peer = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    own = {"fields": torch.tensor([[0.5, 0.5]]), "history": torch.ones(1, 3)}
    others = {"fields": torch.tensor([[1.0, 0.0]]), "history": torch.ones(1, 5)}
    assert float(matching_gap(hidden, peer, own, others)) == pytest.approx((1 + 4) / 2 + 0.25)


def test_the_peer_and_the_denominator_are_detached():
    logits, peer = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    mutual_loss(logits, peer, labels, torch.tensor(0.0)).backward()
    assert peer.grad is None
    plain = logits.detach().clone().requires_grad_()
    weight = float(functional.cross_entropy(plain, labels) + functional.cross_entropy(peer, labels))
    divergence = functional.kl_div(
        plain.log_softmax(-1), peer.detach().log_softmax(-1), reduction="batchmean", log_target=True
    )
    (functional.cross_entropy(plain, labels) + divergence / weight).backward()
    torch.testing.assert_close(logits.grad, plain.grad)


def test_each_loss_moves_its_own_network_only(prepared):
    _, client = pair_of(prepared)
    network, batch = client.task.network.eval(), next(client.task.batches())
    student_loss, _, _ = network.mutual_losses(batch.users, batch.items.unsqueeze(1), batch.labels)
    student_loss.backward()
    assert gradients(network.student) and not gradients(network.teacher)
    assert network.projection.weight.grad is not None
    network.zero_grad(set_to_none=True)
    _, teacher_loss, _ = network.mutual_losses(batch.users, batch.items.unsqueeze(1), batch.labels)
    teacher_loss.backward()
    assert gradients(network.teacher) and not gradients(network.student)
    assert network.projection.weight.grad is None


def test_nothing_of_the_teacher_leaves_its_client(prepared):
    trainer, _ = pair_of(prepared, learner="sgd", learning_rate=0.0)
    marker = 0.12345678
    with torch.no_grad():
        for network in trainer.model.networks:
            for parameter in [*network.teacher.parameters(), *network.projection.parameters()]:
                parameter.fill_(marker)
            network.student.get_parameter(network.student.user_rows[0]).fill_(marker)
    engine = trainer.engine
    payloads = []
    for index in range(2):
        for client in engine.clients:
            client.receive(engine.server.send(client.number, index))
            client.train(index)
            payloads.append(client.send(index))
        assert not refused(engine.server, dict(enumerate(payloads[-len(engine.clients) :])), index)
        payloads.append(engine.server.send(0, index + 1))
    names = {name for payload in payloads for name in Message.from_bytes(payload).arrays}
    assert names and all(name.startswith("p:student.") for name in names)
    assert all(struct.pack(code, marker) not in payload for payload in payloads for code in ("<f", ">f"))


def test_students_are_averaged_and_teachers_are_not(prepared):
    trainer, _ = pair_of(prepared)
    trainer.engine.run_round(0)
    first, second = trainer.model.networks[0], trainer.model.networks[1]
    for name, value in first.student.named_parameters():
        if name not in first.student.user_rows:
            assert torch.equal(value, second.student.get_parameter(name)), name
    assert not torch.equal(first.teacher.backbone.layers[0].weight, second.teacher.backbone.layers[0].weight)


def test_the_key_serve_chooses_who_predicts_and_changes_no_byte(run):
    student, teacher = run(epochs=2, **FEDKD), run(epochs=2, serve="teacher", **FEDKD)
    assert [each["loss"] for each in student["rounds"]] == [each["loss"] for each in teacher["rounds"]]
    assert student["test_result"] != teacher["test_result"]
    assert student["communication"] == teacher["communication"]
    larger = run(epochs=2, **{**FEDKD, "teacher": {"embedding_size": 32}})
    assert larger["communication"] == student["communication"]


def test_both_serve_the_mean_of_their_distributions(prepared):
    _, client = pair_of(prepared, serve="both")
    network = client.task.network.eval()
    users, items = torch.tensor([1, 2]), torch.tensor([[3, 4], [5, 6]])
    with torch.no_grad():
        mean = (network.student(users, items).softmax(-1) + network.teacher(users, items).softmax(-1)) / 2
        torch.testing.assert_close(network(users, items).softmax(-1), mean)
        torch.testing.assert_close(network(users, items).exp(), mean)


def test_a_pair_resumes_exactly(run):
    keys = {"preset": "fedkd", "clients_per_round": 2, **FEDKD}
    whole, part = run(epochs=3, **keys), run(epochs=1, **keys)
    resumed = run(epochs=3, resume=part["run_folder"], **keys)
    assert resumed["test_result"] == whole["test_result"]


def test_teacher_and_student_may_differ_in_every_key_of_the_network(prepared):
    teacher = {"embedding_size": 6, "backbone": "mlp", "hidden_sizes": [9], "attention": False, "history_length": 0}
    _, client = pair_of(prepared, teacher=teacher)
    client.train(0)
    assert client.task.network.projection.weight.shape == (9, 8)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"teacher": {"embedding": 3}}, "'teacher.embedding' is unknown; did you mean"),
        ({"teacher": {"embedding_size": 0}}, "teacher.embedding_size is 0; it must be an integer in"),
        ({"serve": "all"}, "serve is 'all'; it must be one of student, teacher, both"),
        ({"model": "WideDeep", "label_mode": "threshold"}, "use --model=AttnFedKD for it"),
    ],
)
def test_a_wrong_pair_is_told(run, keys, sentence):
    with pytest.raises(InputError, match=sentence):
        run(**{**FEDKD, **keys})


# Mutual learning with fixed weights


def test_mutual_learning_by_hand_and_the_peer_is_not_taught_by_it():
    logits, peer = torch.tensor([[1.0, -1.0], [0.5, 2.0]]), torch.tensor([[0.0, 0.3], [1.0, -2.0]], requires_grad=True)
    p, q = logits.softmax(-1).numpy(), peer.detach().softmax(-1).numpy()
    label_loss, divergence = -np.log(p[[0, 1], [0, 1]]).mean(), (q * np.log(q / p)).sum(1).mean()
    logits.requires_grad_()
    loss = weighted_mutual_loss(logits, peer, torch.tensor([0, 1]), 0.3)
    assert float(loss) == pytest.approx(0.3 * label_loss + 0.7 * divergence, rel=1e-5)
    loss.backward()
    assert peer.grad is None and logits.grad is not None


FML = {**FEDKD, "strategy": "fml"}


def test_a_network_that_listens_to_labels_alone_is_averaged_as_if_it_had_no_peer(run):
    keys = {"epochs": 2, "dropout_prob": 0.0, "learner": "adam", "learning_rate": 0.03}
    alone = run(**{**keys, "strategy": "fedavg"})
    deaf = run(**keys, **FML, student_label_weight=1.0)
    assert deaf["test_result"] == alone["test_result"]
    heard = run(**keys, **FML, student_label_weight=0.5)
    assert heard["test_result"] != alone["test_result"]
    assert heard["communication"] == run(**keys, **FEDKD)["communication"]


def test_a_network_that_stays_hears_its_peer_as_far_as_its_weight_says(run):
    keys = {"epochs": 2, "dropout_prob": 0.0, "learner": "adam", "learning_rate": 0.03, "serve": "teacher", **FML}
    deaf = [run(**keys, teacher_label_weight=1.0, student_label_weight=weight) for weight in (1.0, 0.2)]
    heard = run(**keys, teacher_label_weight=0.2, student_label_weight=0.2)
    assert deaf[0]["test_result"] == deaf[1]["test_result"] != heard["test_result"]


# Students of several sizes

POOL = [
    {"embedding_size": 2, "hidden_sizes": [2, 4]},
    {},
    {"embedding_size": 8, "backbone": "mlp", "history_length": 3},
]


def test_students_of_the_pool_are_dealt_out_in_turn_and_start_alike(prepared):
    _, trainer, _, _ = prepared(strategy="afd", client_num=7, student_pool=POOL)
    networks = trainer.model.networks
    assert [network.architecture.embedding_size for network in networks] == [2, 4, 8, 2, 4, 8, 2]
    for client in range(3, 7):
        for name, value in networks[client].named_parameters():
            if name not in networks[client].user_rows:
                assert torch.equal(value, networks[client % 3].get_parameter(name))


@pytest.mark.parametrize("knowledge", [{}, {"knowledge": "item"}])
def test_clients_of_different_sizes_teach_each_other(run, knowledge):
    keys = {"strategy": "afd", "client_num": 6, "student_pool": POOL, "epochs": 3, **knowledge}
    whole, part = run(**keys), run(**{**keys, "epochs": 1})
    assert whole["communication"]["total_bytes"] > 0
    assert run(**keys, resume=part["run_folder"])["test_result"] == whole["test_result"]
    assert run(**{**keys, "strategy": "local"})["test_result"] != whole["test_result"]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"strategy": "fedavg"}, "strategy 'fedavg' cannot average; use a strategy that distils, or local"),
        ({"strategy": "fedkd"}, "strategy 'fedkd' cannot average"),
        ({"student_pool": [{"hidden": [3]}]}, r"'student_pool\[0\].hidden' is unknown; did you mean 'hidden_sizes'"),
        (
            {"student_pool": [{}, {"attention_heads": 0}]},
            r"student_pool\[1\].attention_heads is 0; it must be an integer in",
        ),
        ({"student_pool": ["small"]}, r"student_pool\[0\] is 'small'; it must be a dict of embedding_size"),
    ],
)
def test_a_wrong_pool_is_told(run, keys, sentence):
    with pytest.raises(InputError, match=sentence):
        run(**{"strategy": "afd", "student_pool": POOL, **keys})


# The server's network as a teacher


def test_the_received_network_teaches_without_dropout_and_without_a_gradient_of_its_own(prepared):
    _, trainer, _, _ = prepared(strategy="fedgkd", gamma=0.5, alpha=0.0, dropout_prob=0.5)
    engine = trainer.engine
    engine.run_round(0)
    client = engine.clients[0]
    client.receive(engine.server.send(0, 1))
    network = client.task.network
    batch = next(client.task.clean_batches())
    state = {name: value.detach().clone() for name, value in network.named_parameters()}
    with torch.no_grad():
        expected = network.eval()(batch.users, batch.items.unsqueeze(1)).squeeze(1)
    network.train()
    taught = client.task.logits_under(state, batch)
    assert torch.equal(taught, expected) and network.training and not taught.requires_grad
    step = client.task.step(batch, True)
    loss = client.strategy.loss(replace(step, teacher=taught), client.received, client.task.shared)
    entropy = -(taught.softmax(-1) * step.logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss, step.loss + 0.5 * entropy)


def test_without_weight_a_taught_federation_is_federated_averaging_and_with_it_it_is_not(run):
    keys = {"epochs": 3, "alpha": 0.0, "codecs": ["int8"]}
    plain = run(strategy="fedavg", **keys)
    weightless, taught = (run(strategy="fedgkd", gamma=gamma, **keys) for gamma in (0.0, 0.5))
    assert weightless["test_result"] == plain["test_result"] != taught["test_result"]
    assert taught["communication"]["total_bytes"] == plain["communication"]["total_bytes"]
    assert taught["rounds"][0]["loss"] == plain["rounds"][0]["loss"]  # the first network teaches nothing


def test_a_taught_federation_resumes_exactly(run):
    keys = {"preset": "fedgkd", "clients_per_round": 2}
    whole, part = run(epochs=3, **keys), run(epochs=1, **keys)
    assert run(epochs=3, resume=part["run_folder"], **keys)["test_result"] == whole["test_result"]


def test_only_the_attentive_student_is_taught_by_the_servers(run):
    with pytest.raises(InputError, match="teaches an AttnStudent by the server's; use --model=AttnFedKD"):
        run("WideDeep", strategy="fedgkd", label_mode="threshold")
