"""Looking fields up in machine code is looking them up in torch's steps: vectors, norm, and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

from recbole_fedkd.distillation.losses import touched_squared_norm
from recbole_fedkd.model import lookup
from recbole_fedkd.model.lookup import Tokens, look_up, touched_norm

pytestmark = pytest.mark.without_loops

WIDTH, SAMPLES = 6, 70
ROWS = 9, 5, 7, SAMPLES
WEIGHTS = torch.randn(SAMPLES, 4, WIDTH), torch.randn(SAMPLES, WIDTH)


def _tables(*networks):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*networks, rows, WIDTH, generator=generator) for rows in ROWS]


def _columns(*networks):
    """Ids, a column of one token, and one of up to three, some ids with none."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, ROWS[0], (*networks, SAMPLES), generator=generator)
    one = torch.randint(0, ROWS[1], (*networks, ROWS[0]), generator=generator)
    many = torch.randint(0, ROWS[2], (*networks, ROWS[0], 3), generator=generator)
    many[..., ::3, :] = 0
    return ids, one, many


def _said(tables, dense, ids, one, many):
    """A number that hangs on every vector, on the mean and on the norm."""
    every = torch.arange(SAMPLES)
    read = [Tokens(ids), Tokens(ids, one), Tokens(ids, many, masked=True), Tokens(every)]
    vectors, mean = look_up(tables, read, 3)
    norm = touched_norm([(tables[0], [Tokens(ids), Tokens(ids[:3], one)]), (tables[2], [read[2]])], dense)
    return (vectors * WEIGHTS[0]).sum() + (mean * WEIGHTS[1]).sum() + 3 * norm, vectors, mean


def _both_ways(monkeypatch, said, leaves):
    ways = []
    for compiles in (True, False):
        monkeypatch.setattr(lookup, "has_compiler", lambda compiles=compiles: compiles)
        out = said()
        ways.append((*out, *torch.autograd.grad(out[0].sum(), leaves)))
    return zip(*ways, strict=True)


def test_vectors_norm_and_gradients_are_those_of_torchs_steps(monkeypatch):
    tables, dense = _tables(), [torch.randn(3, 2), torch.randn(4)]
    leaves = [each.requires_grad_() for each in (*tables, *dense)]
    for compiled, expected in _both_ways(monkeypatch, lambda: _said(tables, dense, *_columns()), leaves):
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared_columns", [False, True])
def test_many_networks_at_once_are_each_by_itself(monkeypatch, shared_columns):
    tables, dense = _tables(3), [torch.randn(3, 3, 2), torch.randn(3, 4)]
    leaves = [each.requires_grad_() for each in (*tables, *dense)]
    ids, one, many = _columns(3)
    columns, axes = ((one[0], many[0]), (None, None)) if shared_columns else ((one, many), (0, 0))

    def together():
        return vmap(_said, in_dims=(0, 0, 0, *axes))(tables, dense, ids, *columns)

    def apart():
        own = [columns if shared_columns else (one[place], many[place]) for place in range(3)]
        parts = [_said([t[i] for t in tables], [d[i] for d in dense], ids[i], *own[i]) for i in range(3)]
        return tuple(torch.stack(part) for part in zip(*parts, strict=True))

    for compiled, expected in _both_ways(monkeypatch, together, leaves):
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    alone = apart()
    for compiled, expected in zip(together(), alone, strict=True):
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    of_together = torch.autograd.grad(together()[0].sum(), leaves)
    for compiled, expected in zip(of_together, torch.autograd.grad(alone[0].sum(), leaves), strict=True):
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)


def test_the_norm_counts_a_row_once_however_many_read_it():
    table = torch.randn(6, 2, requires_grad=True)
    norm = touched_norm([(table, [Tokens(torch.tensor([1, 4, 1])), Tokens(torch.tensor([4, 5]))])], [])
    torch.testing.assert_close(norm, table[[1, 4, 5]].square().sum())
    torch.testing.assert_close(norm, touched_squared_norm([(table, torch.tensor([1, 4, 5]))], []))
    norm.backward()
    assert torch.equal(table.grad[[0, 2, 3]], torch.zeros(3, 2))


@pytest.mark.parametrize("norm_of", [
    lambda table, ids: touched_norm([(table, [Tokens(ids)])], []),
    lambda table, ids: touched_squared_norm([(table, ids)], []),
])  # fmt: skip
def test_what_is_not_a_number_in_a_row_that_nobody_reads_is_in_neither_the_norm_nor_a_gradient(norm_of):
    table = torch.tensor([[float("nan"), torch.inf], [1.0, 2.0]], requires_grad=True)
    norm = norm_of(table, torch.tensor([1]))
    norm.backward()
    assert norm.item() == 5.0 and table.grad.tolist() == [[0.0, 0.0], [2.0, 4.0]]


def test_other_numbers_go_through_torch():
    tables = [each.double() for each in _tables()]
    ids, one, many = _columns()
    vectors, _ = look_up(tables[:3], [Tokens(ids), Tokens(ids, one), Tokens(ids, many, masked=True)], 1)
    assert vectors.dtype == torch.float64


@pytest.mark.parametrize("wrong", [-1, 5, 150_000])
@pytest.mark.parametrize("column", [None, torch.tensor([[1], [2], [3], [0], [2]])])
def test_an_id_that_is_none_is_refused_and_reads_no_memory_of_others(wrong, column):
    table, ids = torch.randn(5, 4), torch.tensor([1, wrong])
    with pytest.raises(IndexError, match="out of range"):
        look_up([table], [Tokens(ids, column, False)], 1)


def test_a_token_of_a_column_that_is_none_is_refused():
    with pytest.raises(IndexError, match="out of range"):
        look_up([torch.randn(5, 4)], [Tokens(torch.tensor([1]), torch.tensor([[1], [7]]), False)], 1)
