"""Rows of numbers in compiled code: each instruction is what numpy says of the same numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import needs_numba

numba = pytest.importorskip("numba")

from recbole_fedkd.model.compiled import LANES, ROWS  # noqa: E402
from recbole_fedkd.model.vectors import (  # noqa: E402
    element,
    everywhere,
    exponential,
    inverse,
    larger,
    largest,
    load,
    load_rows,
    power_of_two,
    rows_of,
    spread,
    store,
    store_rows,
    sum_of,
    totals,
    turn,
)

pytestmark = needs_numba


@pytest.fixture
def numbers() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, LANES, LANES)).astype(np.float32)


def made(function: Callable[..., None], *arguments: Any, rows: int = ROWS) -> np.ndarray:
    """What a compiled function fills."""
    out = np.zeros((rows, LANES), np.float32)
    numba.njit(function)(*arguments, out)
    return out


def test_rows_lie_where_places_of_all_numbers_say(numbers):
    def move(numbers, out):
        store_rows(load_rows(numbers, 3 * LANES, 2 * LANES), out, 0, LANES)

    def moved_one(numbers, out):
        store(load(numbers, LANES * LANES + 5), out, 0)

    np.testing.assert_array_equal(made(move, numbers), numbers[0, 3 : 3 + 2 * ROWS : 2])
    np.testing.assert_array_equal(made(moved_one, numbers, rows=1)[0], numbers[1].reshape(-1)[5 : 5 + LANES])


def test_one_row_is_combined_with_each_of_many(numbers):
    def combine(numbers, out):
        one, many = load(numbers, 0), load_rows(numbers, LANES, LANES)
        store_rows(one - larger(many * one, one + many), out, 0, LANES)

    one, many = numbers[0, 0], numbers[0, 1 : 1 + ROWS]
    np.testing.assert_allclose(made(combine, numbers), one - np.maximum(many * one, one + many), rtol=1e-5, atol=1e-6)


def test_numbers_fill_rows(numbers):
    def fill(numbers, out):
        store_rows(spread(numbers, 2, 3) + everywhere(element(numbers, LANES)), out, 0, LANES)

    firsts = numbers[0].reshape(-1)[2 : 2 + 3 * ROWS : 3]
    np.testing.assert_allclose(made(fill, numbers), np.repeat(firsts[:, None], LANES, 1) + numbers[0, 1, 0], rtol=1e-6)


def test_rows_are_summed_up_across_and_down(numbers):
    def across(numbers, out):
        rows = load_rows(numbers, 0, LANES)
        store_rows(rows_of(largest(rows)) + rows_of(totals(rows)), out, 0, LANES)

    def down(numbers, out):
        store(sum_of(load_rows(numbers, 0, LANES)), out, 0)

    rows = numbers[0, :ROWS]
    expected = np.repeat((rows.max(1) + rows.sum(1))[:, None], LANES, 1)
    np.testing.assert_allclose(made(across, numbers), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(made(down, numbers, rows=1)[0], rows.sum(0), rtol=1e-5, atol=1e-6)


def test_powers_are_those_of_e_and_nothing_is_left_of_what_is_hidden():
    def power(numbers, out):
        store(exponential(load(numbers, 0)), out, 0)

    numbers = np.array(
        [0, -1e-7, -0.3, -0.35, -1, -2.5, -10, -30, -80, -87, -89, -1e3, -1e30, -np.inf, np.nan, -7], np.float32
    )
    found = made(power, numbers, rows=1)[0]
    np.testing.assert_allclose(found[:10], np.exp(numbers[:10].astype(float)), rtol=5e-6)
    assert not found[10:13].any() and found[13] == 0 and np.isnan(found[14])


def test_powers_of_two_reach_beyond_one_and_nothing_is_left_of_what_is_hidden():
    def power(numbers, out):
        store(power_of_two(load(numbers, 0)), out, 0)

    numbers = np.array(
        [0, 1e-7, 0.5, -0.5, -0.49, 3, 60, 126.4, -60, -126.4, -127, -1e3, -1e30, -np.inf, np.nan, -7.3], np.float32
    )
    found = made(power, numbers, rows=1)[0]
    np.testing.assert_allclose(found[:10], np.exp2(numbers[:10].astype(float)), rtol=5e-6)
    assert not found[10:14].any() and np.isnan(found[14])


def test_there_is_an_inverse_of_zero_and_none_of_what_is_not_a_number():
    def invert(numbers, out):
        store(inverse(load(numbers, 0)), out, 0)

    numbers = np.array([0, 2, -4, np.nan] * 4, np.float32)
    np.testing.assert_array_equal(made(invert, numbers, rows=1)[0], np.array([0, 0.5, -0.25, np.nan] * 4, np.float32))


def test_what_is_not_a_number_stays_where_the_larger_is_sought():
    def seek(numbers, out):
        store(larger(load(numbers, 0), everywhere(np.float32(1.0))), out, 0)

    numbers = np.array([np.nan, 0, 1, 2] * 4, np.float32)
    np.testing.assert_array_equal(made(seek, numbers, rows=1)[0], np.array([np.nan, 1, 1, 2] * 4, np.float32))


def test_rows_become_columns(numbers):
    def turned(numbers, out):
        turn(numbers, LANES * LANES, LANES, out, 0, LANES)

    np.testing.assert_array_equal(made(turned, numbers, rows=LANES), numbers[1].T)
