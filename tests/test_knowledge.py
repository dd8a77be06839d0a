"""Item knowledge and the ways to average label knowledge: hand-computed values, leave-one-out, equality with slow versions."""

import math

import numpy as np
import pytest
import torch
from engines import refused
from hypothesis import given
from hypothesis import strategies as st

from recbole_fedkd.distillation import knowledge
from recbole_fedkd.distillation.knowledge import (
    Attentive,
    AttentiveSettings,
    Median,
    TrimmedMean,
    TrimSettings,
    Uniform,
    class_sums,
    item_histograms,
    leave_one_out_teachers,
    log_prior,
    similarity_weights,
)
from recbole_fedkd.errors import InputError
from recbole_fedkd.federated.message import Message

ITEM = {"strategy": "afd", "knowledge": "item"}


def engine_of(prepared, **keys):
    _, trainer, _, _ = prepared(**{**ITEM, **keys})
    return trainer, trainer.engine


# The mathematics


@given(
    aggregation=st.sampled_from([Attentive(AttentiveSettings(1.0)), Median(), TrimmedMean()]),
    own=st.integers(0, 4),
    poison=st.floats(-1e3, 1e3, allow_nan=False),
)
def test_no_aggregation_teaches_a_client_its_own_logits(aggregation, own, poison):
    generator = torch.Generator().manual_seed(2)
    means, counts = torch.randn(5, 3, 3, generator=generator), torch.randint(0, 3, (5, 3), generator=generator)
    before = leave_one_out_teachers(means, counts, aggregation)
    changed = means.clone()
    # The similarity of a client's knowledge to the others' may change whom it listens to, not what they say.
    changed[own] = means[own] * 3.0 + poison if aggregation.name == "attentive" else poison
    after = leave_one_out_teachers(changed, counts, aggregation)
    torch.testing.assert_close(before[0][own], after[0][own])
    assert torch.equal(before[1], after[1])


def test_median_and_trimmed_mean_by_hand():
    means = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0, 7.0]).view(6, 1, 1)
    counts = torch.ones(6, 1, dtype=torch.long)
    counts[5] = 0  # holds no such label
    median, known = leave_one_out_teachers(means, counts, Median())
    assert median.flatten().tolist() == [2.5, 2.5, 2.0, 1.5, 1.5, 2.0]  # the last hears all five
    assert known.all()
    trimmed, _ = leave_one_out_teachers(means, counts, TrimmedMean(TrimSettings(0.25)))
    assert trimmed[0].item() == 2.5  # 1, 2, 3, 100 without an end each
    assert trimmed[5].item() == 2.0
    plain, _ = leave_one_out_teachers(means, counts, TrimmedMean(TrimSettings(0.0)))
    uniform, _ = leave_one_out_teachers(means, counts, Uniform())
    torch.testing.assert_close(plain, uniform)


def test_a_few_wrong_clients_move_the_median_little():
    generator = torch.Generator().manual_seed(0)
    means, counts = torch.randn(9, 2, 2, generator=generator), torch.ones(9, 2, dtype=torch.long)
    wrong = means.clone()
    wrong[7:] = 1e6
    honest = leave_one_out_teachers(means, counts, Median())[0][:7]
    assert (leave_one_out_teachers(wrong, counts, Median())[0][:7] - honest).abs().max() < 3
    assert (leave_one_out_teachers(wrong, counts, Uniform())[0][:7] - honest).abs().max() > 1e5


def test_attentive_aggregation_listens_to_the_similar():
    means = torch.zeros(3, 2, 2)
    means[0] = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])
    means[1] = means[0] * 0.5 + 3.0  # the same opinion; a shift of all logits says nothing
    means[2] = -means[0]
    counts = torch.ones(3, 2, dtype=torch.long)
    weights = similarity_weights(means, counts > 0, 1.0)
    e = math.e
    torch.testing.assert_close(weights[0], torch.tensor([0.0, e / (e + 1 / e), (1 / e) / (e + 1 / e)]).double())
    torch.testing.assert_close(weights.sum(1), torch.ones(3).double())
    teachers, _ = leave_one_out_teachers(means, counts, Attentive(AttentiveSettings(0.01)))
    torch.testing.assert_close(teachers[0], means[1])
    flat, _ = leave_one_out_teachers(means, counts, Attentive(AttentiveSettings(1e9)))
    torch.testing.assert_close(flat, leave_one_out_teachers(means, counts, Uniform())[0])


def test_similarity_counts_common_labels_only():
    means = torch.randn(3, 3, 3)
    present = torch.tensor([[True, True, False], [True, False, True], [False, True, True]])
    weights = similarity_weights(means, present, 0.5)
    other = means.clone()
    other[0, 2], other[1, 1] = 1e3, -1e3  # absent: never read
    torch.testing.assert_close(similarity_weights(other, present, 0.5), weights)


def test_items_are_summed_and_counted_by_hand():
    logits = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    items, labels = torch.tensor([2, 0, 2]), torch.tensor([1, 0, 1])
    sums, counts = class_sums(logits, items, 4)
    assert sums.tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]
    assert counts.tolist() == [1, 0, 2, 0]
    assert item_histograms(items, labels, 4, 2).tolist() == [[1, 0], [0, 0], [0, 2], [0, 0]]


def test_the_log_prior_by_hand_and_for_an_item_that_nobody_has_seen():
    histograms = torch.tensor([[0, 0], [6, 2], [0, 6]])
    prior = log_prior(histograms, 4.0)
    shares = np.array([7, 9]) / 16
    np.testing.assert_allclose(prior[0], np.log(shares), rtol=1e-5)
    np.testing.assert_allclose(prior[1], np.log((np.array([6, 2]) + 4 * shares) / 12), rtol=1e-5)
    torch.testing.assert_close(prior.exp().sum(1), torch.ones(3))


# The exchange


def test_a_client_gets_what_the_others_know_of_each_item(prepared):
    _, engine = engine_of(prepared, prior_strength=5.0)
    engine.run_round(0)
    known = [
        {name: torch.tensor(value) for name, value in Message.from_bytes(client.send(0)).arrays.items()}
        for client in engine.clients
    ]
    first = [dict(client.link.sent) for client in engine.clients]
    engine.run_round(1)
    for number, client in enumerate(engine.clients):
        others = [each for k, each in enumerate(known) if k != number]
        seen = sum(each["seen"] for each in others)
        mean = sum(each["sums"].double() for each in others) / seen.clamp(min=1).unsqueeze(-1)
        assert torch.equal(client.received["known"], seen > 0)
        torch.testing.assert_close(client.received["teacher"][seen > 0].double(), mean[seen > 0], atol=1e-4, rtol=1e-4)
        histogram = sum(each["histogram"] for k, each in enumerate(first) if k != number)
        torch.testing.assert_close(client.task.network.item_prior, log_prior(histogram, 5.0))
        own = client.task.samples
        expected = item_histograms(own.items, own.labels, 41, 5)
        assert torch.equal(first[number]["histogram"].long(), expected)


@pytest.mark.parametrize(
    ("use", "up", "down"),
    [
        ("distil", [{"sums", "seen"}] * 3, [set(), {"sums", "seen"}, {"sums", "seen"}]),
        ("prior", [{"histogram"}, set(), set()], [set(), {"histogram"}, set()]),
        (
            "both",
            [{"sums", "seen", "histogram"}, {"sums", "seen"}, {"sums", "seen"}],
            [set(), {"sums", "seen", "histogram"}, {"sums", "seen"}],
        ),
    ],
)
def test_histograms_are_sent_once_and_sums_every_round(prepared, use, up, down):
    _, engine = engine_of(prepared, knowledge_use=use)
    for index in range(3):
        payload = engine.server.send(0, index)
        assert (set(Message.from_bytes(payload).arrays) if payload else set()) == down[index]
        engine.clients[0].receive(payload)
        uploads = []
        for client in engine.clients:
            client.train(index)
            uploads.append(client.send(index))
        assert (set(Message.from_bytes(uploads[0]).arrays) if uploads[0] else set()) == up[index]
        assert not refused(engine.server, dict(enumerate(uploads)), index)


def test_all_clients_of_a_version_hear_one_message_and_those_behind_another(prepared):
    _, engine = engine_of(prepared, knowledge_use="both", client_num=6, clients_per_round=2)
    engine.run_round(0)
    engine.run_round(1)
    said = {number: engine.server.send(number, 2) for number in range(6)}
    versions = engine.server.state["held"].tolist()
    assert len(set(versions)) > 1
    for one, other in zip(said, list(said)[1:], strict=False):
        assert (said[one] is said[other]) == (versions[one] == versions[other])


def test_a_client_chosen_late_gets_the_histograms_it_missed(prepared):
    _, engine = engine_of(prepared, knowledge_use="prior", client_num=6, clients_per_round=2)
    for index in range(25):
        engine.run_round(index)
    total = sum(client.link.sent["histogram"] for client in engine.clients)
    assert torch.equal(engine.server.state["histogram"], total)
    for index in range(25, 50):
        engine.run_round(index)
    for client in engine.clients:
        torch.testing.assert_close(
            client.task.network.item_prior, log_prior(total - client.link.sent["histogram"], 10.0)
        )


def test_totals_under_noise_that_are_less_than_a_clients_own_leave_a_prior_of_finite_numbers(prepared):
    """A histogram of -1 samples has no logarithm; what is left of it is nothing, and the prior that of all items."""
    _, engine = engine_of(prepared, knowledge_use="prior")
    knowledge = engine.server.strategy.knowledge
    own = {"histogram": torch.tensor([[3, 0], [0, 2]])}
    told = knowledge.understood({"histogram": torch.tensor([[0, 0], [5, 2]])}, own, True)["item_prior"]
    torch.testing.assert_close(told, log_prior(torch.tensor([[0, 0], [5, 0]]), knowledge.settings.prior_strength))
    assert told.isfinite().all()


def test_the_prior_is_added_to_the_logits_and_is_not_learned(prepared):
    trainer, engine = engine_of(prepared, knowledge_use="prior")
    network = engine.clients[0].task.network.eval()
    users, items = torch.tensor([1, 2]), torch.tensor([[3, 4], [5, 6]])
    before = network(users, items)
    prior = torch.randn(41, 5)
    network.item_prior.copy_(prior)
    torch.testing.assert_close(network(users, items), before + prior[items])
    assert "item_prior" not in dict(network.named_parameters())
    assert any(name.endswith("item_prior") for name in trainer.model.state_dict())


@pytest.mark.parametrize("use", ["distil", "prior", "both"])
def test_item_knowledge_resumes_exactly(run, use):
    keys = {**ITEM, "knowledge_use": use, "clients_per_round": 2}
    whole = run(epochs=4, **keys)
    part = run(epochs=2, **keys)
    resumed = run(epochs=4, resume=part["run_folder"], **keys)
    assert resumed["test_result"] == whole["test_result"]
    assert resumed["communication"] == whole["communication"]


def test_item_knowledge_is_distilled_over_a_click_model_but_is_no_prior_of_it(run):
    keys = {"label_mode": "threshold", "epochs": 2, "metrics": ["AUC"], **ITEM}
    with pytest.raises(InputError, match="WideDeep' takes knowledge_use=distil"):
        run("WideDeep", **keys)
    assert run("WideDeep", knowledge_use="distil", **keys)["communication"]["total_bytes"] > 41 * 2 * 4


@pytest.mark.parametrize("aggregation", ["attentive", "median", "trimmed_mean"])
def test_every_aggregation_runs_by_config(run, aggregation):
    result = run(strategy="afd", aggregation=aggregation, epochs=2, client_num=5)
    assert result["config"]["aggregation"] == aggregation
    assert np.isfinite(list(result["test_result"].values())).all()


def means_in_order_slowly(means, counts, trim):
    """Every client's others taken by a loop, ordered anew for each."""
    found = torch.zeros_like(means, dtype=torch.float64)
    for client in range(len(means)):
        for label in range(means.shape[1]):
            others = [each for each in range(len(means)) if each != client and counts[each, label] > 0]
            cut = min(int(len(others) * trim), max(len(others) - 1, 0) // 2)
            if others:
                ordered = means[others, label].double().sort(0).values
                found[client, label] = ordered[cut : len(others) - cut].mean(0)
    return found


@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([0.0, 0.1, 0.3, 0.5]), st.integers(0, 999), st.booleans())
def test_ordered_means_are_those_of_a_slow_loop(clients, labels, trim, seed, few_at_a_time):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(clients, labels, labels, generator=generator).round(decimals=1)
    counts = torch.randint(0, 3, (clients, labels), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knowledge, "_AT_A_TIME", 20 if few_at_a_time else 2**22)
        found = knowledge._ordered_means(means, counts > 0, trim)
    torch.testing.assert_close(found, means_in_order_slowly(means, counts, trim))
