"""Products in registers are numpy's, whatever their sizes, and a column's does not depend on what stands beside it."""

import numpy as np
import pytest
import torch
from conftest import needs_numba

numba = pytest.importorskip("numba")

from recbole_fedkd.model import products  # noqa: E402
from recbole_fedkd.model.compiled import LANES  # noqa: E402
from recbole_fedkd.model.products import NO_LEAST, view  # noqa: E402
from recbole_fedkd.model.ranking import WIDTH, blocks, column_product  # noqa: E402

pytestmark = needs_numba


@numba.njit
def product(out, start, left, right, least):
    products.product(out, start, left, right, least)


@numba.njit
def transposed_product(out, start, left, right, least):
    products.transposed_product(out, start, left, right, least)


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("depth", [0, 1, 13])
@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("columns", [LANES, 3 * LANES, 4 * LANES, 7 * LANES])
@pytest.mark.parametrize("least", [NO_LEAST, np.float32(0.0)])
def test_a_product_of_any_size_is_numpys(rows, columns, depth, least):
    left, right, out = drawn(rows, depth), drawn(depth, columns), drawn(rows, columns)
    for start in (drawn(rows, columns), drawn(rows)):
        expected = np.maximum(least, (start if start.ndim == 2 else start[:, None]) + left @ right)
        product(out, start, left, right, least)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
        transposed_product(out, start, np.ascontiguousarray(left.T), right, least)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_rows_may_overlap_and_those_of_a_start_may_be_one():
    @numba.njit
    def filled(out, start, table, right):
        product(out, view(start, 0, len(out), LANES, 0), view(table, 1, len(out), 6, 2), right, NO_LEAST)

    table, right, start, out = drawn(9, 2), drawn(6, LANES), drawn(1, LANES), np.zeros((6, LANES), np.float32)
    filled(out, start, table, right)
    neighbours = np.concatenate([table[1:7], table[2:8], table[3:]], 1)
    np.testing.assert_allclose(out, start + neighbours @ right, rtol=1e-5, atol=1e-5)


def test_a_column_is_the_same_bits_alone_and_in_company():
    weight, values = torch.randn(11, 37), torch.randn(37, 3 * WIDTH + 5)
    together = column_product(weight, values)
    torch.testing.assert_close(together, weight @ values, rtol=1e-4, atol=1e-5)
    for column in (0, 1, WIDTH - 1, WIDTH, 3 * WIDTH + 4):
        assert torch.equal(column_product(weight, values[:, column : column + 1])[:, 0], together[:, column])


def test_what_is_not_a_number_stays_so():
    values = torch.tensor([[1.0, float("nan"), float("inf")]])
    assert column_product(torch.tensor([[2.0]]), values).isfinite().tolist() == [[True, False, False]]
    out = drawn(1, LANES)
    product(out, drawn(1), np.full((1, 1), np.nan, np.float32), drawn(1, LANES), np.float32(0.0))
    assert np.isnan(out).all()


def test_blocks_hold_everything_and_zeros_behind():
    values = torch.randn(4, WIDTH + 1)
    of_columns = blocks(values)
    assert of_columns.shape == (2, 4, WIDTH) and not of_columns[1, :, 1:].any()
    assert torch.equal(of_columns.transpose(0, 1).flatten(1)[:, : WIDTH + 1], values)
