"""Item factors from sums: every function against a dense NumPy calculation, and sums over clients against one place."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_fedkd.distillation import factors
from recbole_fedkd.distillation.factors import Rows

USERS, ITEMS, WIDTH = 30, 14, 3


def random_rows(seed: int = 0, density: float = 0.4) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Rows, the dense matrix ``[users, items]`` and the mask of what was rated."""
    rng = np.random.default_rng(seed)
    mask = rng.random((USERS, ITEMS)) < density
    dense = np.where(mask, rng.normal(size=(USERS, ITEMS)), 0.0)
    users, items = np.nonzero(mask)
    values = torch.from_numpy(dense[users, items])
    return Rows(torch.from_numpy(users), torch.from_numpy(items), values, USERS, ITEMS), dense, mask


def of_client(rows: Rows, members: torch.Tensor) -> Rows:
    own = torch.isin(rows.users, members)
    return Rows(rows.users[own], rows.items[own], rows.values[own], USERS, ITEMS)


def test_biases_are_shrunk_means_of_what_the_other_bias_leaves():
    rows, dense, mask = random_rows()
    item_bias = torch.from_numpy(np.random.default_rng(1).normal(size=ITEMS))
    left = np.where(mask, dense - 0.5 - item_bias.numpy(), 0)
    expected = left.sum(1) / (mask.sum(1) + 4)
    user_bias = factors.user_biases(rows, 0.5, item_bias, 4)
    np.testing.assert_allclose(user_bias.numpy(), expected, atol=1e-12)
    sums = factors.item_residual_sums(rows, 0.5, user_bias)
    np.testing.assert_allclose(sums.numpy(), np.where(mask, dense - 0.5 - expected[:, None], 0).sum(0), atol=1e-12)
    left = factors.residuals(rows, 0.5, user_bias, item_bias)
    full = np.where(mask, dense - 0.5 - expected[:, None] - item_bias.numpy(), 0)
    np.testing.assert_allclose(left.values.numpy(), full[mask], atol=1e-12)


def test_a_pass_is_the_product_with_the_dense_gram_matrix():
    rows, dense, _ = random_rows()
    basis = factors.first_basis(ITEMS, WIDTH, 7)
    np.testing.assert_allclose(basis.T @ basis, np.eye(WIDTH), atol=1e-12)
    np.testing.assert_allclose(factors.gram_product(rows, basis), dense.T @ dense @ basis.numpy(), atol=1e-10)


def test_enough_passes_give_the_dense_gram_matrix():
    rows, dense, _ = random_rows()
    bases, products = [factors.first_basis(ITEMS, 4, 7)], []
    for _ in range(3):
        products.append(factors.gram_product(rows, bases[-1]))
        bases.append(factors.next_basis(products[-1], bases))
    # 4 + 4 + 4 directions span all but two of the 14 items; one more block spans everything.
    products.append(factors.gram_product(rows, bases[-1]))
    full = factors.nystroem_factors(products, bases, ITEMS)
    gram = dense.T @ dense
    np.testing.assert_allclose(full @ full.T, gram, atol=1e-8 * np.abs(gram).max())
    values, vectors = np.linalg.eigh(gram)
    leading = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T
    two = factors.nystroem_factors(products, bases, 2)
    np.testing.assert_allclose(two @ two.T, leading, atol=1e-8 * np.abs(gram).max())


def test_one_item_or_empty_rows_have_factors_too():
    rows = Rows(torch.tensor([0]), torch.tensor([0]), torch.tensor([1.5], dtype=torch.double), 1, 1)
    basis = factors.first_basis(1, 1, 0)
    found = factors.nystroem_factors([factors.gram_product(rows, basis)], [basis], 4)
    np.testing.assert_allclose(found @ found.T, [[2.25]])
    none = Rows(rows.users[:0], rows.items[:0], rows.values[:0], 2, 3)
    basis = factors.first_basis(3, 2, 0)
    assert factors.nystroem_factors([factors.gram_product(none, basis)], [basis], 2).shape == (3, 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 5.0))
def test_the_fold_in_is_a_dense_ridge_regression_and_leaving_a_row_out_is_exact(seed, noise):
    rows, dense, mask = random_rows(seed)
    vectors = torch.from_numpy(np.random.default_rng(seed).normal(size=(ITEMS, WIDTH)))
    posterior = factors.fold_in(rows, vectors, noise)
    without, leverage = factors.leave_one_out(rows, posterior, vectors, noise)
    v = vectors.numpy()
    for user in range(USERS):
        own = v[mask[user]]
        covariance = np.linalg.inv(np.eye(WIDTH) + own.T @ own / noise)
        mean = covariance @ own.T @ dense[user, mask[user]] / noise
        np.testing.assert_allclose(posterior.covariance[user], covariance, atol=1e-9)
        np.testing.assert_allclose(posterior.mean[user], mean, atol=1e-9)
    row = int(seed % max(1, len(rows.items)))
    if len(rows.items):
        user, item = int(rows.users[row]), int(rows.items[row])
        others = mask[user].copy()
        others[item] = False
        own = v[others]
        mean = np.linalg.solve(np.eye(WIDTH) + own.T @ own / noise, own.T @ dense[user, others] / noise)
        np.testing.assert_allclose(without[row], v[item] @ mean, atol=1e-8)
        assert 0 <= leverage[row] < 1


def test_an_em_step_is_the_dense_one():
    rows, dense, mask = random_rows()
    vectors = torch.from_numpy(np.random.default_rng(2).normal(size=(ITEMS, WIDTH)))
    posterior = factors.fold_in(rows, vectors, 0.8)
    second, cross = factors.em_statistics(rows, posterior)
    found = factors.em_vectors(second, cross, 6.0)
    mean, covariance = posterior.mean.numpy(), posterior.covariance.numpy()
    for item in range(ITEMS):
        raters = np.flatnonzero(mask[:, item])
        a = sum((covariance[u] + np.outer(mean[u], mean[u]) for u in raters), np.zeros((WIDTH, WIDTH)))
        h = sum((mean[u] * dense[u, item] for u in raters), np.zeros(WIDTH))
        np.testing.assert_allclose(found[item], np.linalg.solve(a + 6 * np.eye(WIDTH), h), atol=1e-10)


@pytest.mark.parametrize("statistic", ["items", "gram", "em"])
def test_sums_over_clients_are_those_of_one_place(statistic):
    rows, _, _ = random_rows()
    basis = factors.first_basis(ITEMS, WIDTH, 3)

    def of(part: Rows) -> torch.Tensor:
        if statistic == "items":
            return factors.item_residual_sums(part, 0.1, torch.zeros(USERS, dtype=torch.double))
        if statistic == "gram":
            return factors.gram_product(part, basis)
        return factors.em_statistics(part, factors.fold_in(part, basis, 0.8))[0]

    clients = torch.arange(USERS).chunk(4)
    together = sum(of(of_client(rows, members)) for members in clients)
    torch.testing.assert_close(together, of(rows), atol=1e-10, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.55, 4.95), min_size=1, max_size=8), st.floats(0.2, 3.0))
def test_a_distribution_has_the_mean_it_was_asked_for(means, spread):
    values = torch.tensor([0.5, 1.0, 2.0, 4.0, 5.0], dtype=torch.double)
    mean = torch.tensor(means, dtype=torch.double)
    found = factors.distribution_of_mean(mean, spread, values)
    torch.testing.assert_close(found.sum(1), torch.ones_like(mean))
    torch.testing.assert_close(found @ values, mean, atol=2e-3, rtol=0)


def test_with_two_labels_the_mean_is_the_probability_and_nothing_is_certain():
    values = torch.tensor([0.0, 1.0])
    mean = torch.tensor([-0.5, 0.0, 0.3, 0.99, 1.7], dtype=torch.double)
    found = factors.distribution_of_mean(mean, 0.4, values)[:, 1]
    np.testing.assert_allclose(found, [0.01, 0.01, 0.3, 0.99, 0.99], atol=2e-3)
