"""One way to take a percentile, so that a simulation, a trace's report and a benchmark mean the same by p99."""

from __future__ import annotations

from collections.abc import Sequence


def nearest_rank(ranked: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent of the values do not exceed: one that occurred, nothing between two.

    ``ranked`` is sorted and not empty; ``percent`` from 1 to 100.
    """
    return ranked[-(-percent * len(ranked) // 100) - 1]
