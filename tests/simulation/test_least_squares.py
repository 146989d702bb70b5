"""Least squares without negative answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.simulation.least_squares import line, nonnegative, robust


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 30), columns=st.integers(1, 8))
def test_the_answer_meets_the_conditions_of_a_minimum(seed: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, right = rng.normal(size=(rows, columns)), rng.normal(size=rows)
    x = nonnegative(matrix, right)
    slope = matrix.T @ (matrix @ x - right)
    # No negative number; where one is positive the slope is flat, where it is zero nothing is gained by raising it.
    assert (x >= 0).all()
    assert np.abs(slope[x > 1e-9]).max(initial=0.0) < 1e-6
    assert slope.min() > -1e-6


def test_positive_factors_are_found_again() -> None:
    matrix = np.random.default_rng(1).uniform(size=(50, 5))
    factors = np.array([3.0, 0.0, 1.0, 0.5, 0.0])
    assert nonnegative(matrix, matrix @ factors) == pytest.approx(factors, abs=1e-8)


def test_wild_samples_do_not_sway() -> None:
    rng = np.random.default_rng(2)
    x = rng.uniform(1, 100, size=400)
    y = 5.0 + 0.2 * x
    y[::10] *= 6.0
    a, b = line(x, y)
    assert (a, b) == (pytest.approx(5.0, rel=0.05), pytest.approx(0.2, rel=0.05))
    matrix = np.column_stack([np.ones(400), x])
    assert robust(matrix, y, np.zeros((0, 2))) == pytest.approx([5.0, 0.2], rel=0.05)


def test_few_samples_give_their_middle() -> None:
    assert line(np.array([]), np.array([])) == (0.0, 0.0)
    assert line(np.array([1.0, 2.0]), np.array([3.0, 5.0])) == (4.0, 0.0)
    assert line(np.full(9, 7.0), np.arange(9.0)) == (4.0, 0.0)
