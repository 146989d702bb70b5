"""The books when their stages die and come back: who fails, who is computed again, and nothing of the dead is used.

The toy model reads its whole KV pool and new stages begin with an empty one, so a block, a prefix hit or a token fed
from before the death would change every token from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.config import SchedulerConfig
from llm_engine.core.errors import RequestFailedError
from llm_engine.core.outputs import FinishReason, RequestOutput
from llm_engine.core.request import RequestEvent, RequestState
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.engine.collector import RequestCollector
from llm_engine.kvcache.resources import ResourceManager
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.registry import PRESETS, make_scheduler
from tests.engine.core_driver import CoreDriver
from tests.engine.engines import Commanded
from tests.engine.test_core_properties import Places, arrivals, check_outcomes, failures, shapes
from tests.schedulers.books import order

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
MOMENTS = ("waiting", "prefill in flight", "between chunks", "decode in flight", "decoding", "paused")


def driver_at(moment: str, **shape: Any) -> CoreDriver:
    """One request, brought to the moment."""
    driver = CoreDriver(max_num_batched_tokens=4, **shape)
    request = driver.requests[driver.add(PROMPT, 8)]
    if moment != "waiting":
        driver.schedule()
    if moment not in ("waiting", "prefill in flight"):
        driver.retire()
    if moment in ("decode in flight", "decoding", "paused"):
        for _ in range(3):
            driver.step()
        assert request.state is RequestState.DECODING
    if moment == "decode in flight":
        driver.schedule()
    if moment == "paused":
        driver.core.pause(request, driver.now)
        driver.core.scheduler.add(request)
    return driver


# -- one death


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_request_goes_on_from_its_known_tokens(moment: str) -> None:
    driver = driver_at(moment)
    known, told = list(driver.requests[0].token_ids), len(driver.outcomes[0].deltas)
    driver.die()
    assert driver.requests[0].token_ids == known
    assert len(driver.outcomes[0].deltas) == told, "a stream sees nothing of it"
    driver.come_back()
    plan = driver.schedule()
    assert plan is not None
    assert (plan.chunk_starts, plan.epoch) == ([0], 1), "all of it anew: nothing is found in the cache"
    assert [start.token_ids for start in plan.starts] == [known]
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)


@pytest.mark.parametrize("moment", MOMENTS)
def test_without_replay_a_resident_fails_with_the_cause_and_nobody_else(moment: str) -> None:
    driver = driver_at(moment)
    resident = driver.requests[0].is_resident
    driver.add([1, 2, 3], 2)
    driver.die("stage 1 died: exit code -9", replay=False)
    assert [bool(driver.outcomes[i].ends) for i in (0, 1)] == [resident, False]
    if resident:
        error = driver.outcomes[0].ends[0].error
        assert isinstance(error, RequestFailedError)
        assert "stage 1 died: exit code -9" in str(error)
    driver.run()
    assert driver.outcomes[1].tokens == driver.expected(1)
    assert driver.core.num_replays == 0


def test_replays_and_pauses_are_counted_apart() -> None:
    driver = driver_at("decoding")
    driver.add([1, 2, 3], 2)
    driver.die()
    assert (driver.core.num_replays, driver.core.num_preemptions) == (1, 0)
    driver.run()
    assert driver.kv.prefix_queries == len(PROMPT) + 3, "what is computed again does not count as looking for a prefix"


def test_whoever_arrived_first_is_replayed_first() -> None:
    driver = CoreDriver(num_queues=2, max_num_seqs=3, max_num_batched_tokens=4)
    for first in (1, 2, 3, 4):
        driver.add([first] * 3, 6)
    for _ in range(6):
        driver.step()
    assert driver.core.table.num_resident == 3
    driver.die()
    assert order(driver.core.scheduler.ordering) == [0, 1, 2, 3]
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in range(4))


def test_arrivals_and_aborts_while_the_stages_are_away() -> None:
    driver = driver_at("decode in flight")
    driver.add([1, 2, 3], 2)
    driver.die()
    driver.add([4, 5, 6], 2)
    driver.abort(0)
    driver.abort(1)
    assert [driver.outcomes[i].reason for i in range(3)] == [FinishReason.ABORT, FinishReason.ABORT, None]
    driver.run()
    assert driver.outcomes[2].tokens == driver.expected(2)


@pytest.mark.parametrize("retired", [0, 1])
def test_plans_made_ahead_of_their_tokens_are_lost_as_well(retired: int) -> None:
    driver = CoreDriver(look_ahead=1)
    driver.add(PROMPT, 8)
    driver.step()
    assert [plan.feeds_from for plan in (driver.schedule(), driver.schedule()) if plan] == [None, 2]
    for _ in range(retired):
        driver.retire()
    known = list(driver.requests[0].token_ids)
    driver.die()
    assert driver.requests[0].token_ids == known
    driver.come_back()
    plan = driver.schedule()
    assert plan is not None
    assert (plan.feeds_from, plan.chunk_tokens) == (None, [len(known)])
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)


def test_new_stages_hear_nothing_of_the_dead() -> None:
    driver = CoreDriver(scheduler=(scheduler := Commanded(Limits(4, 4, 16, 4))))
    for first in range(3):
        driver.add([first, first + 10], 5)
    driver.step()
    scheduler.to_pause = {0}
    driver.abort(1)
    driver.die()
    driver.come_back()
    plan = driver.schedule()
    assert plan is not None
    assert (plan.finished_ids, plan.paused_ids, plan.resumed_ids) == ([], [], [0, 2])


def test_no_gap_between_tokens_is_counted_from_before_a_death() -> None:
    """A decode that moves to a queue which was last heard of before the death."""
    driver = CoreDriver(num_queues=2)
    for prompt in ([1, 2, 3], [4, 5, 6]):
        driver.add(prompt, 8)
        driver.schedule()
    driver.retire()
    driver.retire()
    driver.abort(1)
    driver.die()
    driver.come_back()
    driver.step()
    request = driver.requests[0]
    assert request.queue is not None
    driver.core.table.move(request, 1 - request.queue)
    driver.schedule()
    retired = driver.core.retire(driver.results.popleft(), driver.now + 0.5)
    assert retired is not None
    assert (retired.requests, retired.since_last) == ([request], None)


# -- deaths in a row


def test_a_request_in_flight_at_two_deaths_fails_and_both_are_named() -> None:
    driver = driver_at("decode in flight")
    bystander = driver.add([1, 2], 3)
    driver.die("stage 0 died: exit code -9\nat the first place")
    driver.come_back()
    driver.schedule()
    driver.die("stage 1 died: it hung")
    error = driver.outcomes[0].ends[0].error
    assert isinstance(error, RequestFailedError)
    assert "stage 0 died: exit code -9; stage 1 died: it hung" in str(error)
    assert "first place" not in str(error)
    driver.run()
    assert driver.outcomes[bystander].tokens == driver.expected(bystander)


def test_deaths_that_did_not_find_it_in_flight_do_no_harm() -> None:
    driver = driver_at("decoding")
    for _ in range(3):
        driver.die()
        driver.come_back()
        for _ in range(4):
            driver.step()
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)


def test_a_death_while_the_stages_are_away_finds_nobody() -> None:
    driver = driver_at("decode in flight")
    driver.die()
    driver.die()
    assert driver.core.epoch == 2
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)


def test_one_paused_by_a_failed_step_was_in_flight_too() -> None:
    """It shared a block of the failed step, and its own step is still under way when the stages die: it may be why."""
    driver = CoreDriver(num_queues=2, max_num_batched_tokens=8)
    driver.fail_next = 1
    driver.add([5, 6, 7, 8, 1, 2, 3], 2)
    driver.schedule()
    driver.add([5, 6, 7, 8, 9, 9], 2)
    driver.schedule()
    driver.retire()
    assert driver.outcomes[0].reason is FinishReason.ERROR
    assert driver.requests[1].state is RequestState.PAUSED
    driver.die("the first death")
    assert not driver.outcomes[1].ends
    driver.come_back()
    driver.schedule()
    driver.die("the second death")
    assert "the first death; the second death" in str(driver.outcomes[1].ends[0].error)
    driver.run()


# -- what a caller gets


def answer(driver: CoreDriver, request_id: int) -> RequestOutput:
    collector = RequestCollector([driver.requests[request_id]], None, None, lambda ids, why: None, streaming=False)
    for delta in driver.outcomes[request_id].deltas:
        collector.take(delta)
    return collector.result()


@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("death_after", range(12))
def test_logprobs_and_sampled_tokens_are_those_of_an_undisturbed_run(death_after: int, look_ahead: int) -> None:
    params = [
        SamplingParams(temperature=0.9, max_tokens=6, logprobs=2, prompt_logprobs=1),
        SamplingParams(temperature=1.0, top_p=0.9, max_tokens=6, logprobs=0, frequency_penalty=0.5),
        SamplingParams(temperature=0.0, max_tokens=6),
    ]

    def run(death: int | None) -> list[RequestOutput]:
        driver = CoreDriver(num_queues=2, look_ahead=look_ahead, max_num_batched_tokens=5)
        for number, one in enumerate(params):
            driver.add([*PROMPT, number], 6, params=one)
        for step in range(12):
            if step == death:
                driver.die()
                driver.come_back()
            driver.schedule()
            driver.schedule()
            if driver.results:
                driver.retire()
        driver.run()
        return [answer(driver, request_id) for request_id in range(len(params))]

    for disturbed, calm in zip(run(death_after), run(None), strict=True):
        assert disturbed.outputs[0].token_ids == calm.outputs[0].token_ids
        assert disturbed.outputs[0].logprobs == calm.outputs[0].logprobs
        assert disturbed.outputs[0].cumulative_logprob == calm.outputs[0].cumulative_logprob
        assert disturbed.prompt_logprobs == calm.prompt_logprobs


# -- random lives

deaths = st.tuples(
    st.just("die"), st.sampled_from([True, True, True, False]), st.booleans(), st.sampled_from([True, True, False])
)
"""(replay, whether all that can be pushed is in flight, whether new stages come at once)"""
advances = st.tuples(st.just("advance"), st.integers(1, 6))
"""So many results, with all in flight that can be."""
returns = st.tuples(st.just("come back"))
deadly_lives = st.lists(
    st.one_of(
        *[arrivals, advances] * 4,
        *[st.tuples(st.just("schedule"), st.integers(1, 4)), st.tuples(st.just("retire"), st.integers(1, 3))] * 2,
        deaths,
        returns,
        st.tuples(st.just("abort"), st.integers(0, 20)),
        failures,
    ),
    min_size=10,
    max_size=70,
)
deadly_shapes = st.tuples(shapes, st.integers(1, 4), st.sampled_from(sorted(PRESETS))).map(
    lambda parts: {**parts[0], "num_queues": parts[1], "preset": parts[2]}
)


def deadly_driver(*, preset: str, num_tokens: int, resources: Sequence[Any] = (), **shape: Any) -> CoreDriver:
    """``num_tokens``: what the pool holds, roughly."""
    rows, size = shape["max_micro_batch_seqs"] or shape["max_num_seqs"], shape["block_size"]
    limits = Limits(
        shape["max_num_seqs"], rows, shape["max_num_batched_tokens"], shape["chunk_unit"] or size, shape["threshold"]
    )
    scheduler = make_scheduler(SchedulerConfig(scheduler=preset), limits, ResourceManager(resources))
    return CoreDriver(**shape, num_blocks=max(2, 1 + num_tokens // size), scheduler=scheduler, resources=resources)


def live(driver: CoreDriver, todo: list[Any]) -> set[int]:
    """Carry out the actions, checking at each death who is told and what; returns whom somebody aborted."""
    aborted: set[int] = set()
    for action in todo:
        match action:
            case ("add", prompt, max_tokens, stop_ids, salt):
                driver.add(prompt, max_tokens, stop_ids=stop_ids, salt=salt)
            case ("advance", count):
                for _ in range(count):
                    while driver.schedule() is not None:
                        pass
                    if driver.results:
                        driver.retire()
            case ("die", replay, busy, returns_at_once):
                while busy and driver.schedule() is not None:
                    pass
                die(driver, replay)
                if returns_at_once:
                    driver.come_back()
            case ("come back",) if not driver.stages:
                driver.come_back()
            case _:
                driver.carry_out(action, aborted)
    driver.fail_next = 0
    driver.run()
    return aborted


def die(driver: CoreDriver, replay: bool) -> None:
    core, cause = driver.core, f"death {driver.core.epoch} was told to fail"
    in_flight = {i for flight in core.in_flight for i in (*flight.plan.decode_ids, *flight.plan.chunk_ids)}
    twice = {i for i in in_flight if i in core.table and core.table[i].death_causes}
    before = {i for i, outcome in driver.outcomes.items() if outcome.ends}
    doomed = twice if replay else twice | {r.request_id for r in core.table.residents()}
    waiting = [r.request_id for r in core.table.requests.values() if r.state is RequestState.WAITING]
    driver.die(cause, replay=replay)
    assert {i for i, outcome in driver.outcomes.items() if outcome.ends} - before == doomed
    for request_id in doomed:
        assert cause in str(driver.outcomes[request_id].ends[0].error)
    assert all(core.table[i].state is RequestState.WAITING and not core.table[i].death_causes for i in waiting)


def check_never_resident_unasked(driver: CoreDriver) -> None:
    for request in driver.requests.values():
        held = [event for event, _ in request.events if event in (RequestEvent.SCHEDULED, RequestEvent.RESUMED)]
        assert RequestEvent.SCHEDULED not in held[1:]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(deadly_shapes, deadly_lives)
def test_any_life_with_deaths_ends_right(shape: dict[str, Any], todo: list[Any]) -> None:
    driver = deadly_driver(**shape)
    check_outcomes(driver, live(driver, todo))
    check_never_resident_unasked(driver)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(deadly_shapes, st.integers(1, 9), deadly_lives)
def test_any_life_with_deaths_and_a_sliding_window_ends_right(
    shape: dict[str, Any], window: int, todo: list[Any]
) -> None:
    driver = deadly_driver(**shape, window=window)
    check_outcomes(driver, live(driver, todo))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(deadly_shapes, st.integers(1, 3), deadly_lives)
def test_any_life_with_deaths_under_a_users_resource_ends_right(
    shape: dict[str, Any], places: int, todo: list[Any]
) -> None:
    gate = Places(places)
    driver = deadly_driver(**shape, resources=[gate])
    check_outcomes(driver, live(driver, todo))
    assert not gate.held
