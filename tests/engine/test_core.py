"""Decided moments in the life of the books: who fails with what, who goes on, and what the plan tells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from llm_engine.core.errors import CapacityError, RequestFailedError, SchedulerError
from llm_engine.core.outputs import FinishReason
from llm_engine.core.request import RequestState
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import StepPlan, StepResult
from llm_engine.engine.retirement import UnexpectedResult
from llm_engine.kvcache.resources import BaseResourceManager
from llm_engine.schedulers.base import Scheduler
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.micro_batches.greedy import GreedyMicroBatch
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from tests.engine.core_driver import CoreDriver
from tests.engine.engines import Commanded

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]


# -- what the plans tell


def test_a_life_in_plans() -> None:
    driver = CoreDriver(max_num_batched_tokens=4)
    request = driver.add(PROMPT, 3)
    first = driver.step()
    assert first is not None
    assert (first.chunk_ids, first.chunk_starts, first.chunk_tokens, first.chunk_samples) == ([0], [0], [4], [False])
    assert [start.request_id for start in first.starts] == [0]
    second, third = driver.step(), driver.step()
    assert second is not None
    assert third is not None
    assert not second.starts
    assert second.grown_slots == [0], "a block for the second chunk"
    assert third.chunk_samples == [True]
    assert driver.outcomes[request].tokens == driver.expected(request)[:1]
    decode = driver.step()
    assert decode is not None
    assert (list(decode.decode_ids), list(decode.decode_positions)) == ([0], [9])
    assert list(decode.decode_tokens) == driver.expected(request)[:1]
    driver.run()
    assert driver.outcomes[request].tokens == driver.expected(request)
    driver.add([1], 1)
    last = driver.schedule()
    assert last is not None
    assert last.finished_ids == [0], "the next plan tells who ended"


def test_chunks_of_one_prompt_follow_each_other_into_the_pipeline() -> None:
    driver = CoreDriver(num_queues=3, max_num_batched_tokens=4)
    driver.add(PROMPT, 1)
    starts = [plan.chunk_starts for plan in (driver.schedule(), driver.schedule(), driver.schedule()) if plan]
    assert starts == [[0], [4], [8]]
    assert driver.schedule() is None
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)


def test_decodes_join_the_queue_that_carries_their_last_chunk() -> None:
    driver = CoreDriver(num_queues=2, max_num_batched_tokens=4)
    driver.add([1, 2, 3], 5)
    driver.add([4, 5, 6], 5)
    driver.schedule()
    driver.schedule()
    driver.retire()
    driver.retire()
    assert [list(queue.ids) for queue in driver.core.table.queues] == [[0], [1]]


def test_a_plan_tells_who_was_paused_even_where_the_pass_that_paused_ran_nobody() -> None:
    driver = CoreDriver(num_blocks=4, max_num_seqs=2)
    driver.add([1, 2, 3, 4, 5], 8)
    driver.add([6, 7, 8], 6)
    paused, resumed = [], []
    while (plan := driver.step()) is not None:
        paused += plan.paused_ids
        resumed += plan.resumed_ids
    assert driver.core.num_preemptions == len(paused) > 0
    assert sorted(paused) == sorted(resumed)
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in (0, 1))


def test_pauses_of_several_passes_are_told_by_the_next_plan() -> None:
    scheduler = Commanded(Limits(4, 4, 16, 4))
    driver = CoreDriver(scheduler=scheduler)
    for first in range(3):
        driver.add([first, first + 10], 5)
    driver.step()
    scheduler.to_pause = {0, 2}
    plan = driver.schedule()
    assert plan is not None
    assert (plan.paused_ids, plan.resumed_ids, list(plan.decode_ids)) == ([0, 2], [0, 2], [1])
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in range(3))


def test_a_resumed_request_finds_what_it_had_computed() -> None:
    driver = CoreDriver(num_blocks=20)
    driver.add(PROMPT, 6)
    for _ in range(4):
        driver.step()
    request = driver.requests[0]
    driver.core.pause(request, driver.now)
    driver.core.scheduler.add(request)
    plan = driver.schedule()
    assert plan is not None
    assert plan.resumed_ids == [0]
    assert plan.chunk_starts == [12], "three full blocks of prompt and output"
    assert driver.kv.resumed_prefix_hits == 12
    assert request.num_cached_tokens == 0, "what it found when it was first scheduled"
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)


# -- ends


@pytest.mark.parametrize(
    "moment", ["waiting", "prefill in flight", "between chunks", "decode in flight", "decoding", "paused"]
)
def test_an_abort_at_any_time_ends_it_once_and_frees_everything(moment: str) -> None:
    driver = CoreDriver(max_num_batched_tokens=4)
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
    known = list(driver.outcomes[0].tokens)
    driver.abort(0)
    assert driver.outcomes[0].reason is FinishReason.ABORT
    assert driver.kv.usage == 0
    driver.abort(0)
    driver.run()
    assert driver.outcomes[0].tokens == known, "a late result is dropped"


def test_an_id_that_never_was_is_ignored() -> None:
    driver = CoreDriver()
    driver.abort(77)
    assert not driver.outcomes


def test_a_slot_and_blocks_are_reused_while_the_old_step_is_in_flight() -> None:
    driver = CoreDriver(num_queues=2, num_blocks=4, max_num_seqs=1, caching=False)
    driver.add(PROMPT, 2)
    driver.schedule()
    driver.abort(0)
    driver.add([40, 41, 42, 43, 44], 4)
    assert driver.schedule() is not None
    driver.run()
    assert driver.outcomes[1].tokens == driver.expected(1)


def test_a_stop_id_wins_over_the_length_and_is_told_where_it_was_listed() -> None:
    driver = CoreDriver()
    stop = driver.expected(driver.add(PROMPT, 3))[-1]
    listed = driver.add(PROMPT, 3, stop_ids=[stop], params=SamplingParams(temperature=0, stop_token_ids=[stop]))
    end_of_sequence = driver.add(PROMPT, 9, stop_ids=[stop])
    driver.run()
    ends = {i: driver.outcomes[i].ends[0] for i in driver.outcomes}
    assert (ends[0].finish_reason, ends[0].stop_reason) == (FinishReason.LENGTH, None)
    assert (ends[listed].finish_reason, ends[listed].stop_reason) == (FinishReason.STOP, stop)
    assert (ends[end_of_sequence].finish_reason, ends[end_of_sequence].stop_reason) == (FinishReason.STOP, None)


def test_a_stop_id_before_min_tokens_stops_nobody() -> None:
    driver = CoreDriver()
    first = driver.expected(driver.add(PROMPT, 5))[0]
    driver.add(PROMPT, 5, stop_ids=[first], params=SamplingParams(temperature=0, min_tokens=1, logit_bias={first: 100}))
    driver.run()
    # The sampler forbids it too, so another token came first; afterwards the bias makes it certain.
    assert driver.outcomes[1].tokens[0] != first
    assert driver.outcomes[1].tokens[-1] == first
    assert len(driver.outcomes[1].tokens) == 2


# -- failures


def test_a_failed_step_fails_its_requests_and_nobody_else() -> None:
    driver = CoreDriver(num_queues=2, max_num_batched_tokens=4)
    driver.add([1, 2, 3], 6)
    driver.schedule()
    driver.add([4, 5, 6], 6)
    driver.fail_next = 1
    driver.schedule()
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)
    error = driver.outcomes[1].ends[0].error
    assert isinstance(error, RequestFailedError)
    assert "told to fail" in str(error)


def test_who_built_on_a_failed_step_is_recomputed_and_its_blocks_serve_nobody() -> None:
    driver = CoreDriver(num_queues=3, max_num_batched_tokens=8)
    driver.add(PROMPT, 4)
    driver.fail_next = 1
    driver.schedule()
    driver.add(PROMPT, 4)  # finds the first two blocks, which the failing step was to write
    plan = driver.schedule()
    assert plan is not None
    assert (plan.chunk_ids, plan.chunk_starts) == ([0, 1], [8, 8])
    driver.retire()
    assert driver.outcomes[0].reason is FinishReason.ERROR
    assert driver.requests[1].state is RequestState.PAUSED
    driver.add(PROMPT, 4)
    driver.run()
    for request in (1, 2):
        assert driver.outcomes[request].tokens == driver.expected(request)
    assert driver.requests[1].num_preemptions == 1


def test_what_an_aborted_decode_had_in_flight_serves_nobody_once_its_step_failed() -> None:
    driver = CoreDriver()
    prompt = PROMPT[:7]
    driver.add(prompt, 9)
    driver.step()
    driver.fail_next = 1
    plan = driver.schedule()
    assert plan is not None
    assert list(plan.decode_positions) == [7], "it fills the second block"
    driver.abort(0)
    driver.retire()
    follower = driver.add([*prompt, driver.expected(0)[0], 50], 4)
    driver.run()
    assert driver.requests[follower].num_cached_tokens == 4
    assert driver.outcomes[follower].tokens == driver.expected(follower)


def test_who_leaves_while_it_sits_out_leaves_the_others_their_tokens() -> None:
    scheduler = Commanded(Limits(4, 4, 16, 4))
    driver = CoreDriver(scheduler=scheduler, num_blocks=40)
    for first in range(4):
        driver.add([first, first + 10], 5)
    driver.step()
    scheduler.held.add(1)
    plan = driver.schedule()
    assert plan is not None
    assert list(plan.decode_ids) == [0, 2, 3]
    driver.abort(1)
    assert list(driver.core.table.queues[0].ids) == [0, 3, 2], "as many rows as the plan's, in another order"
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in (0, 2, 3))


def test_a_late_result_of_a_life_before_the_pause_is_not_counted() -> None:
    """A failed step pauses whoever built on it with a later chunk in flight; it is resumed before that returns."""
    driver = CoreDriver(num_queues=3, max_num_batched_tokens=4)
    driver.add([*PROMPT[:4], 60], 2)
    driver.fail_next = 1
    driver.schedule()
    driver.add(PROMPT, 2)  # finds the block of the failing step
    driver.schedule()
    driver.schedule()
    driver.retire()
    assert driver.requests[1].state is RequestState.PAUSED
    driver.schedule()
    assert driver.requests[1].state is RequestState.PREFILLING
    assert driver.requests[1].num_in_flight == 1
    driver.run()
    assert driver.outcomes[1].tokens == driver.expected(1)


def test_a_result_of_an_earlier_epoch_is_dropped_and_one_that_nobody_asked_for_refused() -> None:
    driver = CoreDriver()
    driver.add(PROMPT, 4)
    driver.schedule()
    assert driver.core.retire(StepResult(epoch=-1, step=1, tokens=[1]), 0.0) is None
    for epoch, step, tokens in ((7, 1, [1]), (0, 2, [1]), (0, 1, []), (0, 1, [1, 2])):
        with pytest.raises(UnexpectedResult, match="it answered"):
            driver.core.retire(StepResult(epoch, step, tokens), 0.0)
        driver.check()
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)


@pytest.mark.parametrize("too_long", [PROMPT * 5, PROMPT])
def test_who_can_never_run_fails_with_advice_and_the_next_one_runs(too_long: list[int]) -> None:
    driver = CoreDriver(num_blocks=4)
    driver.add(too_long, 30)
    driver.add([1, 2, 3], 4)
    driver.run()
    error = driver.outcomes[0].ends[0].error
    assert isinstance(error, CapacityError)
    assert "request r0 can never run" in str(error)
    assert "raise num_kv_blocks or lower max_tokens" in str(error)
    assert driver.outcomes[0].tokens == driver.expected(0)[: len(driver.outcomes[0].tokens)]
    assert driver.outcomes[1].tokens == driver.expected(1)


# -- a user's resources


class Gate(BaseResourceManager):
    """Raises where it is told to, for the requests it is told."""

    name = "gate"

    def __init__(self, *, broken: str = "", ids: Iterable[int] = ()) -> None:
        self.broken, self.ids = broken, set(ids)
        self.places = 9

    def _check(self, method: str, *ids: int) -> None:
        if method == self.broken and self.ids & set(ids):
            raise ValueError(f"{method} is broken")

    def needed(self, request: Any) -> int:
        self._check("needed", request.request_id)
        return 1

    def available(self) -> int:
        return self.places

    def prepare_resources(self, plan: StepPlan) -> None:
        self._check("prepare", *plan.chunk_ids, *plan.decode_ids)

    def update_resources(self, plan: StepPlan) -> None:
        self._check("update", *plan.chunk_ids, *plan.decode_ids)

    def free_resources(self, request: Any) -> None:
        self._check("free", request.request_id)


def test_a_resource_that_is_used_up_for_good_fails_the_head_with_advice() -> None:
    gate = Gate()
    gate.places = 0
    driver = CoreDriver(resources=[gate])
    driver.add([1, 2], 2)
    assert driver.schedule() is None
    error = driver.outcomes[0].ends[0].error
    assert isinstance(error, CapacityError)
    assert "resource gate has too little for it; make the resource larger" in str(error)


def test_a_resource_that_is_used_up_for_now_makes_them_wait() -> None:
    gate = Gate()
    gate.places = 1
    driver = CoreDriver(resources=[gate], max_num_batched_tokens=4)
    driver.add([1, 2], 3)
    driver.add([3, 4], 3)
    driver.schedule()
    gate.places = 0
    driver.retire()
    plan = driver.schedule()
    assert plan is not None
    assert plan.num_rows == 1
    gate.places = 1
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in (0, 1))


@pytest.mark.parametrize("method", ["needed", "prepare", "update"])
def test_a_resource_that_raises_fails_only_those_it_raised_for(method: str) -> None:
    driver = CoreDriver(resources=[Gate(broken=method, ids=[1])], max_num_batched_tokens=4)
    for first in range(3):
        driver.add([first, first + 1, first + 2, first + 3], 5)
    driver.step()
    driver.run()
    assert driver.outcomes[0].tokens[:1] == driver.expected(0)[:1]
    error = driver.outcomes[1].ends[0].error
    assert isinstance(error, RequestFailedError)
    assert "gate" in str(error)
    assert f"{method} is broken" in str(error)
    if method == "needed":
        assert driver.outcomes[0].tokens == driver.expected(0)
        assert driver.outcomes[2].tokens == driver.expected(2)


def test_a_resource_that_cannot_be_freed_is_noted_and_the_answer_stands() -> None:
    driver = CoreDriver(resources=[Gate(broken="free", ids=[0])])
    driver.add([1, 2, 3], 3)
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)
    assert [name for name, _ in driver.core.resource_failures] == ["gate"]


def test_a_resource_that_cannot_be_freed_for_a_pause_fails_the_paused() -> None:
    driver = CoreDriver(resources=[Gate(broken="free", ids=[1])], num_blocks=4, max_num_seqs=2)
    driver.add([1, 2, 3, 4, 5], 8)
    driver.add([6, 7, 8], 6)
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)
    assert isinstance(driver.outcomes[1].ends[0].error, RequestFailedError)


# -- schedulers of somebody's own


class Own(Scheduler):
    """The default, except where a test replaces a method."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(FcfsOrdering(), MaxUtilization(), GreedyMicroBatch(), limits)


def own_driver(**methods: Any) -> CoreDriver:
    scheduler = Own(Limits(4, 4, 16, 4))
    for name, method in methods.items():
        setattr(scheduler, name, method)
    return CoreDriver(scheduler=scheduler)


def boom(*_: object) -> None:
    raise ZeroDivisionError("my mistake")


def test_a_scheduler_that_raises_is_named() -> None:
    driver = own_driver(schedule=boom)
    driver.add([1], 2)
    with pytest.raises(
        SchedulerError, match=r"scheduler under-test raised ZeroDivisionError\('my mistake'\)"
    ) as caught:
        driver.schedule()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    driver.check()


@pytest.mark.parametrize("method", ["add", "abort", "update"])
def test_one_that_raises_when_told_something_is_named_at_the_next_look_and_nobody_is_lost(method: str) -> None:
    driver = own_driver(**{method: boom})
    driver.add([1, 2, 3], 1)
    if method != "add":
        driver.step()
        assert driver.outcomes[0].tokens == driver.expected(0)
        assert driver.outcomes[0].reason is FinishReason.LENGTH, "told although the scheduler broke in between"
    with pytest.raises(SchedulerError, match="under-test raised ZeroDivisionError"):
        driver.schedule()


def test_an_impossible_plan_is_refused_and_takes_nothing() -> None:
    driver = own_driver(schedule=lambda *_: StepPlan(queue=0, chunk_ids=[0], chunk_tokens=[99]))
    driver.add([1, 2], 2)
    with pytest.raises(SchedulerError, match="under-test returned an impossible plan: 99 tokens"):
        driver.schedule()
    assert driver.kv.usage == 0
    driver.check()


def test_a_plan_for_more_blocks_than_are_free_is_refused() -> None:
    driver = own_driver(schedule=lambda *_: StepPlan(queue=0, chunk_ids=[0], chunk_tokens=[16]))
    driver.kv.add_sequence(-1, (), 1)
    driver.kv.grow(-1, 4 * (driver.kv.num_usable_blocks - 2))
    driver.add(list(range(20)), 2)
    with pytest.raises(SchedulerError, match="request r0 needs 4 blocks and 2 are free"):
        driver.core.schedule(0.0)


def test_a_scheduler_that_forgets_somebody_does_not_leave_them_waiting() -> None:
    driver = own_driver(schedule=lambda *_: None)
    driver.add([1, 2], 2)
    assert driver.schedule() is None
    assert isinstance(driver.outcomes[0].ends[0].error, CapacityError)


def test_a_scheduler_that_forgets_a_resident_does_not_leave_it_waiting() -> None:
    driver = CoreDriver()
    driver.add([1, 2], 5)
    driver.step()
    driver.core.scheduler.schedule = lambda *_: None  # type: ignore[method-assign]
    assert driver.schedule() is None
    error = driver.outcomes[0].ends[0].error
    assert isinstance(error, CapacityError)
    assert "scheduler under-test runs nobody" in str(error)
    driver.check_all_given_back()


def test_who_asks_for_more_than_is_left_behind_the_hit_gets_what_is_left() -> None:
    driver = own_driver()
    driver.add(PROMPT, 1)
    driver.run()
    greedy_plan = StepPlan(queue=0, chunk_ids=[1], chunk_tokens=[9])
    driver.core.scheduler.schedule = lambda *_: greedy_plan  # type: ignore[method-assign]
    driver.add(PROMPT, 1)
    plan = driver.schedule()
    assert plan is not None
    assert (plan.chunk_starts, plan.chunk_tokens, plan.chunk_samples) == ([8], [1], [True])
