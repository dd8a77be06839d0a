"""Products in registers are those of torch, whatever their sizes, and a column's does not depend on who stands beside it."""

from __future__ import annotations

import pytest
import torch

from recbole_fedkd.model.tiles import WIDTH, blocks, filled_up, packed, product, vectors


@pytest.mark.parametrize("outputs, inputs, columns", [(1, 1, 1), (5, 7, 23), (8, 16, 64), (19, 3, 65), (64, 128, 200)])
def test_a_product_of_any_size_is_torchs(outputs, inputs, columns):
    weight, values = torch.randn(outputs, inputs), torch.randn(inputs, columns)
    torch.testing.assert_close(product(weight, values), weight @ values, rtol=1e-4, atol=1e-5)


def test_of_no_inputs_the_sum_is_zero():
    assert torch.equal(product(torch.zeros(3, 0), torch.zeros(0, 5)), torch.zeros(3, 5))


def test_a_column_is_the_same_bits_alone_and_in_company():
    weight, values = torch.randn(11, 37), torch.randn(37, 3 * WIDTH + 5)
    together = product(weight, values)
    for column in (0, 1, WIDTH - 1, WIDTH, 3 * WIDTH + 4):
        assert torch.equal(product(weight, values[:, column : column + 1])[:, 0], together[:, column])


def test_what_is_not_a_number_stays_so():
    values = torch.tensor([[1.0, float("nan"), float("inf")]])
    assert product(torch.tensor([[2.0]]), values).isfinite().tolist() == [[True, False, False]]


def test_packed_weights_and_blocks_hold_everything_and_zeros_behind():
    rows = vectors()[1]
    weight, bias, values = torch.randn(2, rows + 1, 3), torch.randn(2, rows + 1), torch.randn(4, WIDTH + 1)
    panels, of_columns = packed(weight), blocks(values)
    assert panels.shape == (2, 2, 3, rows) and of_columns.shape == (2, 4, WIDTH)
    assert torch.equal(panels[:, 0].transpose(1, 2), weight[:, :rows])
    assert torch.equal(panels[:, 1, :, 0], weight[:, rows]) and not panels[:, 1, :, 1:].any()
    assert torch.equal(filled_up(bias)[:, : rows + 1], bias) and not filled_up(bias)[:, rows + 1 :].any()
    assert torch.equal(of_columns.transpose(0, 1).flatten(1)[:, : WIDTH + 1], values) and not of_columns[1, :, 1:].any()
