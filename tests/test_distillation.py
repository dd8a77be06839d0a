"""The mathematics of distillation: label knowledge, leave-one-out teachers, the joint loss."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_fedkd.distillation.knowledge import (
    Aggregation,
    Uniform,
    Weighted,
    class_sums,
    label_means,
    leave_one_out_teachers,
    teacher_of_others,
)
from recbole_fedkd.distillation.losses import (
    joint_loss,
    label_cross_entropy,
    matching_gap,
    mutual_loss,
    reverse_divergence,
    softened,
    teacher_cross_entropy,
    touched_squared_norm,
)


def test_per_label_means_equal_a_hand_computation():
    logits = torch.tensor([[1.0, 0.0, 2.0], [3.0, 1.0, 0.0], [5.0, 5.0, 5.0]])
    labels = torch.tensor([0, 0, 2])
    sums, counts = class_sums(logits, labels, 3)
    means = label_means(sums, counts)
    np.testing.assert_allclose(means[0].numpy(), [(1 + 3) / 2, (0 + 1) / 2, (2 + 0) / 2])
    np.testing.assert_allclose(means[2].numpy(), [5, 5, 5])
    assert counts.tolist() == [2, 0, 1]


def test_means_do_not_grow_with_the_number_of_batches():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 4, generator=generator), torch.randint(0, 4, (60,), generator=generator)
    whole = label_means(*class_sums(logits, labels, 4))
    parts = [class_sums(logits[part], labels[part], 4) for part in torch.arange(60).split(7)]
    pieced = label_means(sum(part[0] for part in parts), sum(part[1] for part in parts))
    torch.testing.assert_close(whole, pieced)


def test_leave_one_out_teacher_equals_the_average_of_the_others_by_hand():
    means = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 4.0]], [[8.0, 0.0], [0.0, 9.0]]])
    counts = torch.tensor([[1, 2], [3, 0], [4, 5]])
    teachers, known = leave_one_out_teachers(means, counts, Uniform())
    assert known.all()
    torch.testing.assert_close(teachers[0, 0], torch.tensor([(3.0 + 8.0) / 2, 0.0]))
    torch.testing.assert_close(teachers[0, 1], torch.tensor([0.0, 9.0]))  # client 1 holds no label 1
    weighted, _ = leave_one_out_teachers(means, counts, Weighted())
    torch.testing.assert_close(weighted[0, 0], torch.tensor([(3.0 * 3 + 8.0 * 4) / 7, 0.0]))
    torch.testing.assert_close(weighted[1, 1], torch.tensor([0.0, (2.0 * 2 + 9.0 * 5) / 7]))


@given(
    own=st.integers(0, 3),
    aggregation=st.sampled_from([Uniform(), Weighted()]),
    # Sums in double precision hold these without loss. A number that they do not hold, such as 3e-16 beside 0.8, may turn the
    # last bit of a mean that lies halfway between two numbers of single precision.
    poison=st.integers(-(10**12), 10**12).map(lambda number: number / 2**20),
)
def test_a_clients_own_knowledge_never_reaches_its_teacher(own: int, aggregation: Aggregation, poison: float):
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(4, 3, 3, generator=generator)
    counts = torch.randint(0, 3, (4, 3), generator=generator)
    before = leave_one_out_teachers(means, counts, aggregation)
    means[own] = poison
    counts[own] = 1 + counts[own]
    after = leave_one_out_teachers(means, counts, aggregation)
    assert torch.equal(before[0][own], after[0][own])
    assert torch.equal(before[1][own], after[1][own])


@pytest.mark.parametrize("how", [Uniform(), Weighted()])
def test_totals_without_ones_own_part_are_the_others_sum_to_the_last_bit_of_single_precision(how):
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(200, 4, 4, generator=generator) * torch.logspace(-3, 2, 200).view(-1, 1, 1)
    counts = torch.randint(0, 5, (200, 4), generator=generator)
    weights = how.weights(counts)
    sums = weights.unsqueeze(-1) * means.double()
    for own in (0, 7, 199):
        others = torch.arange(200) != own
        expected = (sums[others].sum(0) / weights[others].sum(0).unsqueeze(-1)).float()
        teacher, known = teacher_of_others(sums.sum(0), weights.sum(0), sums[own], weights[own])
        assert torch.equal(teacher.float(), expected) and known.all()


def test_a_label_that_nobody_else_holds_is_unknown_and_gives_no_teacher_term():
    means = torch.full((2, 2, 2), float("nan"))
    means[0] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    counts = torch.tensor([[5, 5], [0, 0]])
    teachers, known = leave_one_out_teachers(means, counts, Uniform())
    assert known.tolist() == [[False, False], [True, True]]
    assert torch.isfinite(teachers).all()
    logits, labels = torch.randn(6, 2, requires_grad=True), torch.tensor([0, 1, 0, 1, 0, 1])
    plain = torch.nn.functional.cross_entropy(logits, labels)
    assert torch.equal(joint_loss(plain, logits, teachers[0][labels], known[0][labels], 0.5, 0.5, 1.0), plain)


def test_an_absent_label_is_not_averaged_as_zeros():
    means = torch.stack([torch.zeros(2, 2), torch.full((2, 2), 6.0), torch.zeros(2, 2)])
    counts = torch.tensor([[1, 1], [1, 1], [0, 1]])
    teachers, _ = leave_one_out_teachers(means, counts, Uniform())
    torch.testing.assert_close(teachers[0, 0], torch.tensor([6.0, 6.0]))
    torch.testing.assert_close(teachers[0, 1], torch.tensor([3.0, 3.0]))


def test_gradients_of_the_two_distillation_terms_are_not_parallel():
    torch.manual_seed(0)
    logits = torch.randn(1, 5, requires_grad=True)
    teacher = torch.randn(1, 5)
    first = torch.autograd.grad(teacher_cross_entropy(softened(logits, 1.0), softened(teacher, 1.0)).sum(), logits)[
        0
    ].flatten()
    second = torch.autograd.grad(reverse_divergence(softened(logits, 1.0), softened(teacher, 1.0)).sum(), logits)[
        0
    ].flatten()
    forward_divergence = (teacher.softmax(-1) * (teacher.log_softmax(-1) - logits.log_softmax(-1))).sum()
    published = torch.autograd.grad(forward_divergence, logits)[0].flatten()
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(first, second, 0) < 0.99
    assert cosine(first, published, 0) == pytest.approx(1.0)  # the published pair is one term twice


def test_joint_loss_equals_its_formula_in_numpy():
    generator = np.random.default_rng(3)
    logits, teacher = generator.normal(size=(4, 3)), generator.normal(size=(3, 3))
    labels, known = np.array([0, 1, 2, 1]), np.array([True, True, False])
    gamma, alpha, tau = 0.7, 0.3, 2.0

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    total = 0.0
    for f, y in zip(logits, labels, strict=True):
        p, p_tau, q = softmax(f), softmax(f / tau), softmax(teacher[y] / tau)
        total += -np.log(p[y])
        if known[y]:
            total += gamma * -(q * np.log(p_tau)).sum() * tau**2
            total += alpha * (p_tau * np.log(p_tau / q)).sum() * tau**2
    student = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    of_label = torch.tensor(teacher)[torch.tensor(labels)], torch.tensor(known)[torch.tensor(labels)]
    loss = joint_loss(student, torch.tensor(logits), *of_label, gamma, alpha, tau)
    assert float(loss) == pytest.approx(total / 4)


def test_reverse_divergence_is_zero_only_for_the_teacher_itself():
    teacher = softened(torch.randn(3, 4), 1.5)
    torch.testing.assert_close(reverse_divergence(teacher, teacher), torch.zeros(3), atol=1e-6, rtol=0)
    assert (reverse_divergence(softened(teacher + torch.randn(3, 4), 1.0), teacher) > 0).all()


def test_embedding_rows_outside_the_batch_are_not_decayed():
    table = torch.randn(5, 2, requires_grad=True)
    dense = torch.randn(3, requires_grad=True)
    norm = touched_squared_norm([(table, torch.tensor([[1, 3], [3, 1]]))], [dense])
    assert float(norm) == pytest.approx(float(table[[1, 3]].pow(2).sum() + dense.pow(2).sum()), rel=1e-5)
    norm.backward()
    assert torch.equal(table.grad[[0, 2, 4]], torch.zeros(3, 2))
    torch.testing.assert_close(table.grad[[1, 3]], 2 * table.detach()[[1, 3]])


@pytest.mark.parametrize("count", [2, 5])
def test_rows_that_only_fill_a_batch_up_change_no_loss(count):
    generator = torch.Generator().manual_seed(3)
    logits, teacher, hidden, peer = (torch.randn(7, count, generator=generator) for _ in range(4))
    labels = torch.randint(0, count, (7,), generator=generator)
    known = torch.tensor([True, False, True, True, True, False, True])
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    full, part = slice(None), slice(5)

    def losses(rows, weights):
        own = label_cross_entropy(logits[rows], labels[rows], weights)
        gap = matching_gap(hidden[rows], peer[rows], {"a": hidden[rows]}, {"a": teacher[rows]}, weights)
        joint = joint_loss(own, logits[rows], teacher[rows], known[rows], 0.3, 0.2, 1.5, weights)
        return torch.stack([own, gap, joint, mutual_loss(logits[rows], teacher[rows], labels[rows], gap, weights)])

    torch.testing.assert_close(losses(full, weights), losses(part, None))
