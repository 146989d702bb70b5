"""Random lives for the contract: what arrives, in what engine, and what befalls it."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from llm_engine.core.errors import CapacityError, RequestFailedError, RequestShedError
from llm_engine.core.outputs import FinishReason
from llm_engine.core.request import Request, RequestEvent
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from tests.engine.test_core_properties import Places, prompts
from tests.schedulers.triples import ContractDriver, Triple

STOPS = ((), (), (3, 40, 41, 42), tuple(range(0, 97, 4)))
wishes = st.fixed_dictionaries(
    {
        "stop_ids": st.sampled_from(STOPS),
        "salt": st.sampled_from([None, None, None, "salt"]),
        "priority": st.sampled_from([0, 0, -5, 1, 10]),
        "tenant": st.sampled_from([None, "ann", "bob", "a third one"]),
        "within": st.sampled_from([None, None, 3.0, 30.0, 1000.0]),
    }
)
arrivals = st.tuples(st.just("add"), prompts, st.integers(1, 14), wishes)
often = [
    arrivals,
    st.tuples(st.just("schedule"), st.integers(1, 8)),
    st.tuples(st.just("retire"), st.integers(1, 8)),
]
seldom = [
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("fail"), st.integers(1, 2), st.integers(0, 2)),
]
lives = st.lists(st.one_of(*often * 5, *seldom), min_size=10, max_size=60)
mortal_lives = st.lists(
    st.one_of(*often * 4, *seldom, st.tuples(st.just("die")), st.tuples(st.just("come back"))), min_size=10, max_size=60
)
shapes = st.fixed_dictionaries(
    {
        "num_queues": st.integers(1, 8),
        "num_stages": st.integers(1, 4),
        "look_ahead": st.sampled_from([0, 1]),
        "late_feeds": st.booleans(),
        "num_tokens": st.integers(10, 80),
        "block_size": st.sampled_from([1, 2, 4]),
        "max_num_seqs": st.integers(1, 8),
        "max_micro_batch_seqs": st.one_of(st.none(), st.integers(1, 3)),
        "max_num_batched_tokens": st.integers(1, 16),
        "chunk_unit": st.sampled_from([None, 1, 3]),
        "threshold": st.sampled_from([None, None, 1, 3, 7]),
        "caching": st.sampled_from([True, True, False]),
        "window": st.sampled_from([None, None, None, 1, 5, 9]),
        "places": st.sampled_from([None, None, 1, 2, 3]),
    }
)
"""``num_tokens``: what the pool holds, roughly; ``places``: of a user's resource, one for each resident."""


def make_driver(choice: Triple | str, *, num_tokens: int, places: int | None, **shape: Any) -> ContractDriver:
    gates = [] if places is None else [Places(places)]
    blocks = max(2, 1 + num_tokens // shape["block_size"])
    return ContractDriver(choice, **shape, num_blocks=blocks, resources=gates)


def arrive(driver: ContractDriver, prompt: list[int], max_tokens: int, wish: dict[str, Any]) -> int:
    within, knows = wish["within"], getattr(driver.core.scheduler, "ordering", FcfsOrdering).knows
    wish = {name: value for name, value in wish.items() if name != "within"}
    if "priority" not in knows:
        del wish["priority"]
    deadline = None if within is None or "deadline_ms" not in knows else driver.now + within
    return driver.add(prompt, max_tokens, **wish, deadline=deadline)


def live(driver: ContractDriver, todo: list[Any]) -> set[int]:
    """Carry out the actions, then let everything end; returns whom somebody aborted."""
    aborted: set[int] = set()
    for action in todo:
        match action:
            case ("add", prompt, max_tokens, wish):
                arrive(driver, prompt, max_tokens, wish)
            case ("die",) if driver.stages:
                driver.die()
            case ("come back",) if not driver.stages:
                driver.come_back()
            case _:
                driver.carry_out(action, aborted)
    driver.fail_next = 0
    driver.run()
    return aborted


def check_ends(driver: ContractDriver, aborted: set[int]) -> None:
    """Everybody got the right tokens, each once, and ended for a reason that holds."""
    for request_id, outcome in driver.outcomes.items():
        request, expected = driver.requests[request_id], driver.expected(request_id)
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
                _check_error(driver, request)
        events = [event for event, _ in request.events]
        paused, resumed = events.count(RequestEvent.PAUSED), events.count(RequestEvent.RESUMED)
        assert paused == request.num_preemptions
        assert paused - resumed in ((0,) if outcome.reason in (FinishReason.STOP, FinishReason.LENGTH) else (0, 1))
        assert events.count(RequestEvent.FIRST_TOKEN) == (1 if outcome.tokens else 0)


def _check_error(driver: ContractDriver, request: Request) -> None:
    match driver.outcomes[request.request_id].ends[0].error:
        case RequestShedError():
            assert request.deadline is not None
        case RequestFailedError() as error:
            assert "told to fail" in str(error) or "it was in flight when the stages died, twice" in str(error)
        case CapacityError():
            assert not fits_alone(driver, request)
        case error:
            raise AssertionError(f"an error of another kind: {error!r}")


def fits_alone(driver: ContractDriver, request: Request) -> bool:
    """Whether the pool holds it at its longest."""
    peak = driver.kv.peak_blocks(request.max_total_tokens - 1, driver.limits.max_num_batched_tokens)
    return peak <= driver.kv.num_usable_blocks
