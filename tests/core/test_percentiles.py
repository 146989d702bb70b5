from __future__ import annotations

import pytest

from llm_engine.core.percentiles import nearest_rank


@pytest.mark.parametrize(
    ("values", "percent", "found"),
    [
        ([7.0], 1, 7.0),
        ([7.0], 99, 7.0),
        ([1.0, 2.0], 50, 1.0),
        ([1.0, 2.0], 51, 2.0),
        ([1.0, 2.0, 3.0], 50, 2.0),
        (list(range(1, 101)), 99, 99),
        (list(range(1, 102)), 99, 100),
        (list(range(1, 11)), 90, 9),
        (list(range(1, 11)), 99, 10),
        (list(range(1, 11)), 100, 10),
    ],
)
def test_the_smallest_value_that_so_many_do_not_exceed(values: list[float], percent: int, found: float) -> None:
    assert nearest_rank(values, percent) == found
