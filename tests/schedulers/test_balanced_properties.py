"""Random lives under ``balanced``: whatever steps cost and however queues are filled, the tokens are right, everybody
is served in turn, and the same life takes the same course."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.step import StepPlan, StepResult
from tests.engine.core_driver import CoreDriver
from tests.engine.test_core_properties import check_outcomes, live, lives, prompts

costs = st.fixed_dictionaries(
    {
        "base": st.sampled_from([1e-3, 0.1]),
        "per_token": st.sampled_from([1e-6, 1e-3, 0.1]),
        "link": st.sampled_from([0.0, 0.05, 2.0]),
        "slower": st.sampled_from([1.0, 5.0]),
    }
)
shapes = st.fixed_dictionaries(
    {
        "num_queues": st.integers(1, 6),
        "num_stages": st.integers(1, 6),
        "look_ahead": st.sampled_from([0, 1]),
        "block_size": st.sampled_from([1, 2, 4]),
        "max_num_seqs": st.integers(1, 8),
        "max_micro_batch_seqs": st.one_of(st.none(), st.integers(1, 3)),
        "max_num_batched_tokens": st.integers(1, 16),
        "chunk_unit": st.sampled_from([None, 1, 3]),
        "threshold": st.sampled_from([None, None, 1, 3, 7]),
    }
)


class TimedDriver(CoreDriver):
    """Results tell busy spans as stages and links of these costs would have had them, one step after the other."""

    def __init__(self, *, base: float, per_token: float, link: float, slower: float, **shape: Any) -> None:
        super().__init__(**shape, preset="balanced")
        self._costs = base, per_token, link, slower
        self._free = [0.0] * self.core.table.num_stages

    def _compute(self, plan: StepPlan) -> StepResult:
        result = super()._compute(plan)
        base, per_token, link, slower = self._costs
        at, result.busy = self.now, []
        for stage, free in enumerate(self._free):
            began = max(at, free)
            last = stage == len(self._free) - 1
            ended = self._free[stage] = began + (base + per_token * plan.num_tokens) * (slower if last else 1.0)
            result.busy.append((began, ended))
            at = ended + link
        return result


def make_driver(shape: dict[str, Any], cost: dict[str, Any], num_tokens: int) -> TimedDriver:
    """``num_tokens``: what the pool holds, roughly."""
    return TimedDriver(**shape, **cost, num_blocks=max(2, 1 + num_tokens // shape["block_size"]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shapes, costs, st.integers(10, 60), lives)
def test_any_life_ends_right_whatever_steps_cost(
    shape: dict[str, Any], cost: dict[str, Any], num_tokens: int, todo: list[Any]
) -> None:
    driver = make_driver(shape, cost, num_tokens)
    check_outcomes(driver, live(driver, todo))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, costs, st.integers(10, 200), lives)
def test_the_same_life_takes_the_same_course(
    shape: dict[str, Any], cost: dict[str, Any], num_tokens: int, todo: list[Any]
) -> None:
    first, second = (make_driver(shape, cost, num_tokens) for _ in range(2))
    for driver in (first, second):
        live(driver, todo)
    assert first.pushed == second.pushed


@settings(max_examples=80, deadline=None, derandomize=True)
@given(shapes, costs, st.lists(st.tuples(prompts, st.integers(1, 14)), min_size=1, max_size=14), st.integers(0, 3))
def test_every_decode_comes_round(shape: dict[str, Any], cost: dict[str, Any], asked: list[Any], lag: int) -> None:
    """With memory for all: between two of its steps no more are pushed than two rounds of everybody take."""
    driver = make_driver(shape, cost, 2000)
    for prompt, count in asked:
        driver.add(prompt, count)
    while not driver.core.is_idle:
        while driver.schedule() is not None:
            pass
        for _ in range(max(1, len(driver.results) - lag)):
            if driver.results:
                driver.retire()
    limits = driver.limits
    rows = min(limits.max_micro_batch_seqs, limits.max_num_batched_tokens)
    round_ = shape["num_queues"] * (-(-limits.max_num_seqs // rows)) + limits.max_num_seqs
    last: dict[int, int] = {}
    for number, plan in enumerate(driver.pushed):
        for request_id in plan.decode_ids:
            assert number - last.get(request_id, number) <= 2 * round_, request_id
            last[request_id] = number
    check_outcomes(driver, set())
