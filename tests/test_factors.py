"""Item factors from sums: every function against a dense NumPy calculation, and sums over clients against one place."""

import numpy as np
import pytest
import torch
from conftest import needs_numba
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_fedkd.distillation import factors, range_finder
from recbole_fedkd.distillation.factors import Rows
from recbole_fedkd.distillation.features import normal_logits
from recbole_fedkd.engine.fleet.compiled import of_other_rows

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
    basis = range_finder.first_basis(ITEMS, WIDTH, 7)
    np.testing.assert_allclose(basis.T @ basis, np.eye(WIDTH), atol=1e-12)
    np.testing.assert_allclose(range_finder.gram_product(rows, basis), dense.T @ dense @ basis.numpy(), atol=1e-10)


def test_enough_passes_give_the_dense_gram_matrix():
    rows, dense, _ = random_rows()
    bases, products = [range_finder.first_basis(ITEMS, 4, 7)], []
    for _ in range(3):
        products.append(range_finder.gram_product(rows, bases[-1]))
        bases.append(range_finder.next_basis(products[-1], bases))
    # 4 + 4 + 4 directions span all but two of the 14 items; one more block spans everything.
    products.append(range_finder.gram_product(rows, bases[-1]))
    full = columns(products, bases, ITEMS)
    gram = dense.T @ dense
    np.testing.assert_allclose(full @ full.T, gram, atol=1e-8 * np.abs(gram).max())
    values, vectors = np.linalg.eigh(gram)
    leading = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T
    two = columns(products, bases, 2)
    np.testing.assert_allclose(two @ two.T, leading, atol=1e-8 * np.abs(gram).max())


@pytest.mark.parametrize("columns", ["aab", "aba", "a0b", "000", "aabb", "kab", "akk"])
def test_a_direction_that_others_explain_is_none_and_does_not_depend_on_rounding(columns):
    """Signs of nearly equal columns are equal columns: what a decomposition then makes of the second is noise."""
    rng = np.random.default_rng(5)
    known = range_finder.first_basis(ITEMS, 3, 7)
    vectors = {"a": rng.normal(size=ITEMS), "b": rng.normal(size=ITEMS), "0": np.zeros(ITEMS), "k": known[:, 1].numpy()}
    product = torch.from_numpy(np.stack([vectors[name] for name in columns], 1))
    noisy = product * torch.from_numpy(1 + 6e-8 * rng.normal(size=product.shape))
    basis, again = (range_finder.next_basis(each, [known]) for each in (product, noisy))
    torch.testing.assert_close(again, basis, atol=1e-6, rtol=0)
    gram = basis.T @ basis
    torch.testing.assert_close(gram, torch.diag(gram.diagonal().round()), atol=1e-12, rtol=0)
    assert int(gram.diagonal().round().sum()) == len(set(columns) & {"a", "b"})
    assert (known.T @ basis).abs().max() < 1e-12


def columns(products: list[torch.Tensor], bases: list[torch.Tensor], width: int) -> torch.Tensor:
    return torch.cat(products, 1) @ range_finder.nystroem_mixing(products, bases, width)


def test_directions_of_pure_noise_are_given_up_and_those_of_a_pattern_kept():
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(400, ITEMS))
    pattern = noise + 3 * rng.normal(size=(400, 1)) * rng.normal(size=ITEMS)
    for dense, kept in ((noise, 0), (pattern, 1)):
        values, vectors = np.linalg.eigh(dense.T @ dense)
        found = torch.from_numpy(vectors[:, ::-1] * np.sqrt(values[::-1].clip(0))[None])
        counts, variance = torch.full((ITEMS,), 400.0).double(), torch.tensor(1.0).double()
        shares = range_finder.shares_above_noise(found, counts, variance, 400)
        np.testing.assert_allclose(shares.numpy(), (1 - (400 + np.sqrt(400 * ITEMS)) / values[::-1]).clip(0))
        assert (shares > 0.5).sum() == kept and (shares[kept:] < 0.2).all()


def test_one_item_or_empty_rows_have_factors_too():
    rows = Rows(torch.tensor([0]), torch.tensor([0]), torch.tensor([1.5], dtype=torch.double), 1, 1)
    basis = range_finder.first_basis(1, 1, 0)
    found = columns([range_finder.gram_product(rows, basis)], [basis], 4)
    np.testing.assert_allclose(found @ found.T, [[2.25]])
    none = Rows(rows.users[:0], rows.items[:0], rows.values[:0], 2, 3)
    basis = range_finder.first_basis(3, 2, 0)
    assert columns([range_finder.gram_product(none, basis)], [basis], 2).shape == (3, 0)


def uncertain(rng: np.random.Generator) -> tuple[factors.Uncertainty, np.ndarray]:
    """An uncertainty of item vectors, and the dense covariances ``[items, k, k]`` that it stands for."""
    root, scales = rng.normal(size=(WIDTH, 2)), rng.random((ITEMS, 2))
    return factors.Uncertainty(torch.from_numpy(root), torch.from_numpy(scales)), np.einsum(
        "ar,ir,br->iab", root, scales, root
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 5.0))
def test_the_fold_in_is_a_dense_posterior_and_leaving_a_row_out_is_exact(seed, noise):
    rows, dense, mask = random_rows(seed)
    rng = np.random.default_rng(seed)
    v = rng.normal(size=(ITEMS, WIDTH))
    uncertainty, spread = uncertain(rng)
    fold = factors.FoldedUsers(rows, torch.from_numpy(v), noise, uncertainty)

    def of(user: int, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        second = np.einsum("ia,ib->ab", v[items], v[items]) + spread[items].sum(0)
        covariance = np.linalg.inv(np.eye(WIDTH) + second / noise)
        return covariance @ v[items].T @ dense[user, items] / noise, covariance

    def predicted(user: int, items: np.ndarray, item: int) -> tuple[float, float]:
        mean, covariance = of(user, items)
        variance = v[item] @ covariance @ v[item] + np.trace(spread[item] @ (covariance + np.outer(mean, mean)))
        return v[item] @ mean, variance / noise

    for user in range(0, USERS, 7):
        mean, covariance = of(user, np.flatnonzero(mask[user]))
        np.testing.assert_allclose(fold.posterior.covariance[user], covariance, atol=1e-9)
        np.testing.assert_allclose(fold.posterior.mean[user], mean, atol=1e-9)
        found = fold.of_pairs(torch.tensor([user]), torch.tensor([3]))
        np.testing.assert_allclose(torch.cat(found), predicted(user, np.flatnonzero(mask[user]), 3), atol=1e-8)
    row = int(seed % max(1, len(rows.items)))
    user, item = int(rows.users[row]), int(rows.items[row])
    others = mask[user].copy()
    others[item] = False
    without = torch.stack(fold.of_rows(), 1)[row]
    np.testing.assert_allclose(without, predicted(user, np.flatnonzero(others), item), atol=1e-8)


@needs_numba
@pytest.mark.parametrize("count", [0, 1, 64, 150])
@pytest.mark.parametrize("sure", [True, False])
def test_machine_code_leaves_rows_out_as_a_library_of_matrices_does(count, sure):
    rows, _, _ = random_rows(count)
    rows = Rows(rows.users[:count], rows.items[:count], rows.values[:count], USERS, ITEMS)
    rng = np.random.default_rng(count)
    fold = factors.FoldedUsers(
        rows, torch.from_numpy(rng.normal(size=(ITEMS, WIDTH))), 0.7, None if sure else uncertain(rng)[0]
    )
    assert len(rows.values) == count
    torch.testing.assert_close(of_other_rows(fold), fold.of_rows(), rtol=1e-9, atol=1e-12)


def test_the_gradient_of_an_em_step_is_the_dense_one():
    rows, dense, mask = random_rows()
    rng = np.random.default_rng(2)
    v = np.concatenate([rng.normal(size=(ITEMS, WIDTH - 1)), np.full((ITEMS, 1), 0.5)], 1)
    fold = factors.FoldedUsers(rows, torch.from_numpy(v), 0.8)
    gradient, curvature = factors.em_statistics(fold)
    mean, covariance = fold.posterior.mean.numpy(), fold.posterior.covariance.numpy()
    expected = np.zeros((WIDTH, WIDTH))
    for item in range(ITEMS):
        of_item = np.zeros(WIDTH)
        for user in np.flatnonzero(mask[:, item]):
            # d/dv and d/db of E[(x - v p - b)^2] / -2 at b = 0, with p the user's vector, whose last entry is not v's to move.
            left = dense[user, item] - v[item] @ mean[user]
            of_item += np.append((mean[user] * left - covariance[user] @ v[item])[:-1], left)
            second = covariance[user] + np.outer(mean[user], mean[user])
            second[-1], second[:, -1] = np.append(mean[user, :-1], 1), np.append(mean[user, :-1], 1)
            expected += second
        np.testing.assert_allclose(gradient[item], of_item, atol=1e-10)
    np.testing.assert_allclose(curvature, expected, atol=1e-9)


def test_one_decomposition_solves_for_every_item():
    rng = np.random.default_rng(3)
    mean = rng.normal(size=(WIDTH, WIDTH))
    mean, precision = mean @ mean.T, rng.random(WIDTH) + 0.5
    counts, right = np.array([0.0, 1.0, 50.0]), rng.normal(size=(3, WIDTH))
    curvature = factors.Curvature.of(torch.from_numpy(mean), torch.from_numpy(precision))
    found = curvature.solved(torch.from_numpy(counts), torch.from_numpy(right))
    uncertainty = curvature.uncertainty(torch.from_numpy(counts), 0.7)
    for item in range(3):
        inverse = np.linalg.inv(counts[item] * mean + np.diag(precision))
        np.testing.assert_allclose(found[item], inverse @ right[item], atol=1e-10)
        covariance = (uncertainty.root * uncertainty.scales[item]) @ uncertainty.root.T
        inverse[-1], inverse[:, -1] = 0, 0
        np.testing.assert_allclose(covariance, 0.7 * inverse, atol=1e-10)


@pytest.mark.parametrize("statistic", ["items", "gram", "em"])
def test_sums_over_clients_are_those_of_one_place(statistic):
    rows, _, _ = random_rows()
    basis = range_finder.first_basis(ITEMS, WIDTH, 3)

    def of(part: Rows) -> torch.Tensor:
        if statistic == "items":
            return factors.item_residual_sums(part, 0.1, torch.zeros(USERS, dtype=torch.double))
        if statistic == "gram":
            return range_finder.gram_product(part, basis)
        return factors.em_statistics(factors.FoldedUsers(part, basis, 0.8))[0]

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


@pytest.mark.parametrize("middle", [-30000.0, 2.7, 30000.0])
def test_logits_around_a_middle_far_off_are_as_exact_as_around_one_among_the_labels(middle):
    values, spread = torch.tensor([0.5, 1.0, 2.0, 4.0, 5.0]), torch.tensor(200.0)
    around = torch.tensor([middle])
    found = normal_logits(values, around, spread).log_softmax(1)
    exact = (-((values.double() - around.double()) ** 2) / (2 * spread.double() ** 2)).log_softmax(0)
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-5, atol=1e-6)


def test_with_two_labels_the_mean_is_the_probability_and_nothing_is_certain():
    values = torch.tensor([0.0, 1.0])
    mean = torch.tensor([-0.5, 0.0, 0.3, 0.99, 1.7], dtype=torch.double)
    found = factors.distribution_of_mean(mean, 0.4, values)[:, 1]
    np.testing.assert_allclose(found, [0.01, 0.01, 0.3, 0.99, 0.99], atol=2e-3)


def test_items_of_a_user_in_a_row_are_predicted_as_pairs_by_themselves():
    generator = torch.Generator().manual_seed(3)
    users, items = torch.randint(3, (60,), generator=generator), torch.randint(40, (60,), generator=generator)
    values = torch.randn(60, generator=generator, dtype=torch.double)
    vectors = torch.randn(40, 4, generator=generator, dtype=torch.double)
    fold = factors.FoldedUsers(factors.Rows(users, items, values, 3, 40), vectors, 0.7)
    asked, everything = torch.arange(3).repeat_interleave(40), torch.arange(40).repeat(3)
    together = fold.of_pairs(asked, everything)
    order = torch.randperm(120, generator=generator)
    alone = fold.of_pairs(asked[order], everything[order])
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[order], other, rtol=1e-12, atol=1e-12)
