"""Least squares whose answer has no negative number in it, and which a few wild samples cannot sway."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def nonnegative(matrix: Array, right: Array) -> Array:
    """The ``x >= 0`` with the least ``|matrix x - right|``.

    Lawson and Hanson's active set (Solving Least Squares Problems, chapter 23): columns join one at a time, the one
    that promises most first; where the free solution of those would be negative, the way there ends at the first zero.
    """
    size = matrix.shape[1]
    products, target = matrix.T @ matrix, matrix.T @ right
    x, free = np.zeros(size), np.zeros(size, dtype=bool)
    tolerance = 1e-10 * max(float(np.abs(target).max(initial=0.0)), 1e-300)
    for _ in range(10 * size):
        gradient = np.where(free, -np.inf, target - products @ x)
        best = int(gradient.argmax())
        if gradient[best] <= tolerance:
            break
        free[best] = True
        while True:
            wanted = np.zeros(size)
            wanted[free] = np.linalg.lstsq(products[np.ix_(free, free)], target[free], rcond=None)[0]
            if wanted[free].min() > 0.0:
                x = wanted
                break
            stops = free & (wanted <= 0.0)
            share = float((x[stops] / np.maximum(x[stops] - wanted[stops], 1e-300)).min())
            x += share * (wanted - x)
            free &= x > 1e-15 * max(float(x.max()), 1e-300)
            x[~free] = 0.0
            if not free.any():
                break
    return x


def column_sizes(matrix: Array, right: Array) -> Array:
    """How much each column matters to the relative errors of rows: the root of its mean square, rows scaled to
    ``right``."""
    rows = matrix / np.maximum(right, 1e-9)[:, None]
    sizes: Array = np.sqrt((rows * rows).mean(axis=0))
    return sizes


def robust(matrix: Array, right: Array, ridge: Array, *, rounds: int = 8, width: float = 0.08) -> Array:
    """``nonnegative`` over rows that are each scaled to ``right``, so that errors are relative, in Huber's sense: a row
    that is off by more than ``width`` counts as if it pulled no harder than that.

    ``ridge`` are rows that should come out as zero, each worth as much as all samples together.
    """
    # Columns of one size, or the tolerance would be another for each.
    size = column_sizes(matrix, right)
    size[size == 0.0] = 1.0
    rows = matrix / np.maximum(right, 1e-9)[:, None] / size
    below = ridge / size * np.sqrt(len(rows))
    weights, x = np.ones(len(rows)), np.zeros(matrix.shape[1])
    for _ in range(rounds):
        root = np.sqrt(weights)
        x = nonnegative(np.vstack([rows * root[:, None], below]), np.concatenate([root, np.zeros(len(below))]))
        error = np.abs(rows @ x - 1.0)
        weights = np.minimum(1.0, width / np.maximum(error, 1e-12))
    found: Array = x / size
    return found


def line(x: Array, y: Array) -> tuple[float, float]:
    """``y = a + b x`` with neither negative, through the middle of the samples; zeros where there are none."""
    if not len(x):
        return 0.0, 0.0
    if len(x) < 4 or float(np.ptp(x)) == 0.0:
        return float(np.median(y)), 0.0
    matrix = np.column_stack([np.ones(len(x)), x])
    a, b = robust(matrix, y, np.zeros((0, 2)), width=0.3)
    return float(a), float(b)
