"""Random lives of an ``EngineCore``: whatever arrives, ends, fails or comes back late, the books stay right.

After every action the books are checked against each other; at the end every request ended exactly once with the right
tokens, and nothing is held. The toy model reads its whole KV pool, so a wrong block or a block of a failed step shows.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.errors import CapacityError, RequestFailedError
from llm_engine.core.outputs import FinishReason
from llm_engine.core.request import RequestEvent
from llm_engine.kvcache.resources import BaseResourceManager
from tests.engine.core_driver import CoreDriver

FAMILIES = ([5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [5, 6, 7, 8, 20, 21, 22, 23, 24], [90, 91, 92, 93] * 4)
"""Prompts start like one of these: two of them share a first block."""

prompts = st.builds(
    lambda family, keep, tail: FAMILIES[family][:keep] + tail,
    st.integers(0, 2), st.integers(1, 12), st.lists(st.integers(0, 96), max_size=6),
)  # fmt: skip
arrivals = st.tuples(
    st.just("add"), prompts, st.integers(1, 14), st.sampled_from([(), (3, 40, 41, 42), tuple(range(0, 97, 4))]),
    st.sampled_from([None, None, None, "salt"]),
)  # fmt: skip
failures = st.tuples(st.just("fail"), st.integers(1, 2), st.integers(0, 2))
often = [
    arrivals,
    st.tuples(st.just("schedule"), st.integers(1, 3)),
    st.tuples(st.just("retire"), st.integers(1, 3)),
]
seldom = [st.tuples(st.just("abort"), st.integers(0, 20)), failures]
lives = st.lists(st.one_of(*often * 5, *seldom), min_size=10, max_size=60)
shapes = st.fixed_dictionaries(
    {
        "preset": st.sampled_from(["greedy", "balanced"]),
        "num_queues": st.integers(1, 4),
        "num_stages": st.integers(1, 4),
        "look_ahead": st.sampled_from([0, 1, 1]),
        "late_feeds": st.booleans(),
        "num_tokens": st.integers(10, 60),
        "block_size": st.sampled_from([1, 2, 4]),
        "max_num_seqs": st.integers(1, 6),
        "max_micro_batch_seqs": st.one_of(st.none(), st.integers(1, 3)),
        "max_num_batched_tokens": st.integers(1, 16),
        "chunk_unit": st.sampled_from([None, 1, 3]),
        "threshold": st.sampled_from([None, None, 1, 3, 7]),
        "caching": st.booleans(),
    }
)


class Places(BaseResourceManager):
    """A user's resource, as its documentation shows it."""

    name = "places"

    def __init__(self, count: int) -> None:
        self.count = count
        self.held: set[int] = set()

    def needed(self, request: Any) -> int:
        return 0 if request.request_id in self.held else 1

    def available(self) -> int:
        return self.count - len(self.held)

    def prepare_resources(self, plan: Any) -> None:
        self.held.update(start.request_id for start in plan.starts)
        assert len(self.held) <= self.count

    def free_resources(self, request: Any) -> None:
        self.held.discard(request.request_id)


def make_driver(*, num_tokens: int, **shape: Any) -> CoreDriver:
    """``num_tokens``: what the pool holds, roughly."""
    return CoreDriver(**shape, num_blocks=max(2, 1 + num_tokens // shape["block_size"]))


def live(driver: CoreDriver, todo: list[Any]) -> set[int]:
    """Carry out the actions, then let everything end; returns whom somebody aborted."""
    aborted: set[int] = set()
    for action in todo:
        match action:
            case ("add", prompt, max_tokens, stop_ids, salt):
                driver.add(prompt, max_tokens, stop_ids=stop_ids, salt=salt)
            case _:
                driver.carry_out(action, aborted)
    driver.fail_next = 0
    driver.run()
    return aborted


def check_outcomes(driver: CoreDriver, aborted: set[int]) -> None:
    for request_id, outcome in driver.outcomes.items():
        request, expected, error = driver.requests[request_id], driver.expected(request_id), outcome.ends[0].error
        assert outcome.tokens == expected[: len(outcome.tokens)], request_id
        assert (outcome.reason is FinishReason.ABORT) == (request_id in aborted)
        match outcome.reason:
            case FinishReason.LENGTH:
                assert len(outcome.tokens) == request.max_total_tokens - request.num_prompt_tokens
                assert outcome.tokens == expected
            case FinishReason.STOP:
                assert outcome.tokens == expected
                assert outcome.tokens[-1] in request.stop_ids
            case FinishReason.ERROR:
                assert isinstance(error, RequestFailedError | CapacityError)
                if isinstance(error, CapacityError):
                    usable, chunk = driver.kv.num_usable_blocks, driver.limits.max_num_batched_tokens
                    assert driver.kv.peak_blocks(request.max_total_tokens - 1, chunk) > usable
                else:
                    assert "told to fail" in str(error)
        events = [event for event, _ in request.events]
        paused, resumed = events.count(RequestEvent.PAUSED), events.count(RequestEvent.RESUMED)
        assert paused == request.num_preemptions
        assert paused - resumed in ((0,) if outcome.reason in (FinishReason.STOP, FinishReason.LENGTH) else (0, 1))
        assert events.count(RequestEvent.FIRST_TOKEN) == (1 if outcome.tokens else 0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shapes, lives)
def test_any_life_ends_right(shape: dict[str, Any], todo: list[Any]) -> None:
    driver = make_driver(**shape)
    check_outcomes(driver, live(driver, todo))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, st.integers(1, 9), lives)
def test_any_life_with_a_sliding_window_ends_right(shape: dict[str, Any], window: int, todo: list[Any]) -> None:
    driver = make_driver(**shape, window=window)
    check_outcomes(driver, live(driver, todo))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.integers(1, 3), lives)
def test_any_life_under_a_users_resource_ends_right(shape: dict[str, Any], places: int, todo: list[Any]) -> None:
    gate = Places(places)
    driver = make_driver(**shape, resources=[gate])
    check_outcomes(driver, live(driver, todo))
    assert not gate.held


@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.lists(st.tuples(prompts, st.integers(1, 10)), min_size=2, max_size=8))
def test_everybody_gets_the_right_tokens_from_a_tight_pool(shape: dict[str, Any], asked: list[Any]) -> None:
    """The pool holds the largest request alone and no more, so the others must take turns."""
    shape = {**shape, "max_num_batched_tokens": max(shape["max_num_batched_tokens"], 2)}
    size = shape["block_size"]
    shape["num_tokens"] = size * max(-(-(len(prompt) + count - 1) // size) for prompt, count in asked)
    driver = make_driver(**shape)
    for prompt, count in asked:
        driver.add(prompt, count)
    driver.run()
    assert all(outcome.reason is FinishReason.LENGTH for outcome in driver.outcomes.values())
    check_outcomes(driver, set())
