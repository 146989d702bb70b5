"""Random lives under ``equal-progress``: the right tokens, everybody served, shares that are alike."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.core_driver import CoreDriver
from tests.engine.test_core_properties import check_outcomes, live, lives, shapes


def make_driver(shape: dict[str, Any], num_tokens: int, window: int | None = None) -> CoreDriver:
    """``num_tokens``: what the pool holds, roughly."""
    shape = {name: value for name, value in shape.items() if name != "num_tokens"}
    blocks = max(2, 1 + num_tokens // shape["block_size"])
    parts = {"scheduler_options": {"chunking": "equal-progress"}}
    return CoreDriver(**shape, num_blocks=blocks, window=window, parts=parts)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shapes, st.sampled_from([None, None, 3, 6]), lives)
def test_any_life_ends_right(shape: dict[str, Any], window: int | None, todo: list[Any]) -> None:
    driver = make_driver(shape, shape["num_tokens"], window)
    check_outcomes(driver, live(driver, todo))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(2, 8),
    st.sampled_from([1, 2, 4]),
    st.integers(4, 40),
    st.lists(st.integers(20, 60), min_size=2, max_size=8),
)
def test_prompts_that_run_together_get_about_as_much(seats: int, unit: int, budget: int, lengths: list[int]) -> None:
    """Of those that go on, none has two units more than another: an odd start takes part of one to catch up."""
    shape = {"block_size": 1, "max_num_seqs": seats, "max_num_batched_tokens": budget, "chunk_unit": unit}
    driver = make_driver(shape, 2000)
    for number, length in enumerate(lengths):
        driver.add([number, *range(100, 99 + length)], 3)
    while (plan := driver.schedule()) is not None:
        sizes = [size for size, ends in zip(plan.chunk_tokens, plan.chunk_samples, strict=True) if not ends]
        assert not sizes or max(sizes) - min(sizes) < 2 * unit, sizes
        driver.retire()
    check_outcomes(driver, set())
