"""Plans made before the tokens of the queue's last one are known: what they carry, and that a wrong guess leaves no
trace."""

from __future__ import annotations

import pytest

from llm_engine.core.config import SchedulerConfig
from llm_engine.core.errors import RequestFailedError, SchedulerError
from llm_engine.core.outputs import FinishReason
from llm_engine.core.request import RequestState
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import StepPlan
from llm_engine.core.views import TableView
from llm_engine.engine.plan_check import check_plan
from llm_engine.kvcache.view import KVView
from llm_engine.schedulers.base import Capacity, MicroBatch, Ordering, Scheduler
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization
from llm_engine.schedulers.chunking import take_prompts
from llm_engine.schedulers.filling import runnable_decodes, take_decodes
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.micro_batches.greedy import GreedyMicroBatch
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from llm_engine.schedulers.registry import make_scheduler
from llm_engine.schedulers.scheduling_pass import SchedulingPass
from tests.engine.core_driver import CoreDriver, ahead_driver, pushed
from tests.toy_model_engine import expected_tokens

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]


def decoding(*prompts: list[int], max_tokens: int = 9, **settings: object) -> CoreDriver:
    """Requests that have had their first token; nothing is in flight."""
    driver = ahead_driver(**settings)
    for prompt in prompts:
        driver.add(prompt, max_tokens)
    while not all(outcome.tokens for outcome in driver.outcomes.values()):
        driver.schedule()
        while driver.results:
            driver.retire()
    assert all(request.state is RequestState.DECODING for request in driver.requests.values())
    return driver


# -- what the plans carry


def test_a_decode_is_in_flight_twice_and_no_more() -> None:
    driver = decoding(PROMPT)
    first, second = pushed(driver), pushed(driver)
    assert (list(first.decode_ids), list(first.decode_positions), first.feeds_from) == ([0], [9], None)
    assert list(first.decode_tokens) == driver.expected(0)[:1]
    assert (list(second.decode_ids), list(second.decode_positions)) == ([0], [10])
    assert (second.feeds_from, list(second.decode_tokens)) == (first.step, [])
    assert driver.schedule() is None
    driver.retire()
    third = pushed(driver)
    assert (list(third.decode_positions), third.feeds_from) == ([11], second.step)
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)


def test_without_look_ahead_no_plan_is_fed() -> None:
    driver = CoreDriver()
    driver.add(PROMPT, 9)
    driver.run()
    assert all(plan.feeds_from is None for plan in driver.pushed)


def test_the_first_decode_is_pushed_ahead_of_the_token_of_the_last_chunk() -> None:
    driver = ahead_driver(max_num_batched_tokens=8)
    driver.add(PROMPT, 5)
    first, last = pushed(driver), pushed(driver)
    assert (first.chunk_starts, last.chunk_starts, last.chunk_samples) == ([0], [8], [True])
    assert driver.schedule() is None, "two of its steps are in flight, chunks or not"
    driver.retire()
    decode = pushed(driver)
    assert (list(decode.decode_ids), list(decode.decode_positions)) == ([0], [9])
    assert (decode.feeds_from, list(decode.decode_tokens)) == (last.step, [])
    assert driver.outcomes[0].tokens == [], "which nobody knows yet"
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)


def test_who_joins_beside_decodes_is_in_the_next_plan_ahead_with_them() -> None:
    driver = ahead_driver(max_num_seqs=2)
    driver.add([1, 2, 3], 9)
    driver.step()
    driver.schedule()
    driver.add([4, 5, 6], 5)
    joined = pushed(driver)
    assert (list(joined.decode_ids), joined.chunk_ids, joined.feeds_from) == ([0], [1], joined.step - 1)
    driver.retire()
    plan = pushed(driver)
    assert (list(plan.decode_ids), list(plan.decode_positions)) == ([0, 1], [5, 3])
    assert plan.feeds_from == joined.step
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in (0, 1))


class Mover(Scheduler):
    """The greedy preset, and it moves whom it is told to."""

    to_move: tuple[list[int], int, int] | None = None

    def schedule(self, now: float, table: TableView, kv: KVView) -> StepPlan | None:
        if self.to_move is None:
            return super().schedule(now, table, kv)
        (ids, source, target), self.to_move = self.to_move, None
        return StepPlan(source, moved_ids=ids, moved_queues=[target] * len(ids))


def mover(max_micro_batch_seqs: int = 4) -> Mover:
    limits = Limits(4, max_micro_batch_seqs, 4, 4)
    return Mover(FcfsOrdering(), MaxUtilization(), GreedyMicroBatch(), limits)


def test_behind_a_plan_that_samples_nothing_all_tokens_are_known() -> None:
    scheduler = mover()
    driver = decoding([1, 2, 3, 4], scheduler=scheduler, num_queues=2, num_stages=1, max_num_batched_tokens=4)
    driver.add(PROMPT, 4)
    assert (pushed(driver).queue, driver.pushed[-1].chunk_samples) == (1, [False])
    scheduler.to_move = ([0], 0, 1)
    while driver.pushed[-1].queue != 1 or not driver.pushed[-1].decode_ids:
        pushed(driver)
    plan = driver.pushed[-1]
    assert [flight.plan.step for flight in driver.core.in_flight if flight.plan.queue == 1] == [2, plan.step]
    assert (list(plan.decode_ids), plan.feeds_from) == ([0], None), "only the other's prompt is in flight"
    assert list(plan.decode_tokens) == driver.expected(0)[:1]
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in (0, 1))


def test_who_moved_into_a_queue_in_flight_goes_ahead_with_it() -> None:
    scheduler = mover()
    driver = decoding(*([first] * 4 for first in range(3)), scheduler=scheduler, num_queues=3, num_stages=2,
                      max_num_batched_tokens=4, late_feeds=True, num_blocks=40)  # fmt: skip
    assert [list(queue.ids) for queue in driver.core.table.queues] == [[0], [1], [2]]
    for _ in range(3):
        pushed(driver)
    driver.retire()
    scheduler.to_move = ([0], 0, 1)
    plan = pushed(driver)
    assert (plan.queue, list(plan.decode_ids), list(plan.decode_positions)) == (1, [1, 0], [5, 5])
    assert plan.feeds_from == plan.step - 2, "the step that carried the other alone"
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in range(3))


def test_one_micro_batch_more_than_there_are_queues() -> None:
    """More would only make newcomers wait behind more; and each queue gets its turn."""
    driver = decoding(*([first] * 4 for first in range(3)), num_queues=3, num_stages=1, max_num_batched_tokens=4)
    plans = [pushed(driver) for _ in range(4)]
    assert [plan.queue for plan in plans] == [0, 1, 2, 0]
    assert driver.schedule() is None
    for queue in (1, 2, 0, 1):
        driver.retire()
        plan = pushed(driver)
        assert (plan.queue, driver.schedule()) == (queue, None)
        assert plan.feeds_from is not None
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in range(3))


def test_several_stages_look_ahead_when_enough_micro_batches_stand_before() -> None:
    driver = ahead_driver(num_queues=2, num_stages=3, late_feeds=True)
    driver.add([1, 2, 3], 9)
    driver.run()
    assert all(plan.feeds_from is None for plan in driver.pushed), "two others are wanted and there is one queue more"
    driver = ahead_driver(num_queues=3, num_stages=3, late_feeds=True, max_num_batched_tokens=4)
    for first in range(3):
        driver.add([first, first + 1, first + 2, first + 3], 12)
    driver.run()
    assert any(plan.feeds_from is not None for plan in driver.pushed)
    assert all(plan.feeds_from is None or plan.step - plan.feeds_from >= 3 for plan in driver.pushed)
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in range(3))


# -- ends


def test_a_stop_learnt_late_leaves_no_trace() -> None:
    """The step ahead stands on the stop token, whose position opened a block for it; what it samples reaches nobody."""
    driver = ahead_driver()
    driver.add(PROMPT, 9, stop_ids=[expected_tokens(PROMPT, 9)[3]])
    while driver.outcomes[0].reason is None:
        driver.schedule()
        driver.schedule()
        driver.retire()
    late = driver.pushed[-1]
    assert (list(late.decode_ids), list(late.decode_positions)) == ([0], [12])
    assert late.grown_blocks
    assert len(driver.results) == 1, "it is still in flight"
    assert driver.kv.usage == 0.0
    assert len(driver.kv.cache) == 3, "what its known tokens fill"
    driver.retire()
    assert driver.outcomes[0].tokens == driver.expected(0)
    assert [len(delta.token_ids) for delta in driver.outcomes[0].deltas] == [1, 1, 1, 1]
    driver.check_all_given_back()
    follower = driver.add([*PROMPT, *driver.expected(0)], 5)
    driver.run()
    assert driver.requests[follower].num_cached_tokens == 12
    assert driver.outcomes[follower].tokens == driver.expected(follower)


def test_a_block_that_a_stop_token_fills_is_found_only_where_a_step_computes_it() -> None:
    """With a step ahead it is computed, and may serve others; without one it must not be found."""
    stop = expected_tokens(PROMPT[:6], 2)[1]
    for look_ahead, cached in ((1, 8), (0, 4)):
        driver = CoreDriver(look_ahead=look_ahead)
        driver.add(PROMPT[:6], 9, stop_ids=[stop])
        driver.run()
        assert driver.requests[0].num_tokens == 8
        follower = driver.add([*driver.requests[0].token_ids, 50], 3)
        driver.run()
        assert driver.requests[follower].num_cached_tokens == cached
        assert driver.outcomes[follower].tokens == driver.expected(follower)


def test_a_row_that_ends_with_the_step_in_flight_is_left_out_and_the_others_go_ahead() -> None:
    driver = ahead_driver()
    for first, count in enumerate([3, 6, 4]):
        driver.add([first, first + 1], count)
    driver.step()
    ahead = [(list(p.decode_ids), p.feeds_from is not None) for p in (pushed(driver), pushed(driver))]
    assert ahead == [([0, 1, 2], False), ([0, 1, 2], True)]
    driver.retire()
    assert list(pushed(driver).decode_ids) == [1, 2]
    driver.retire()
    assert list(pushed(driver).decode_ids) == [1]
    driver.run()
    for request in range(3):
        assert driver.outcomes[request].reason is FinishReason.LENGTH
        assert driver.outcomes[request].tokens == driver.expected(request)


def test_all_ending_at_once_leave_nothing_to_push_ahead() -> None:
    driver = decoding([1, 2], [3, 4], max_tokens=2)
    pushed(driver)
    assert driver.schedule() is None
    driver.run()
    assert [driver.outcomes[i].reason for i in (0, 1)] == [FinishReason.LENGTH] * 2


@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_an_abort_in_flight_gives_everything_back_and_the_next_plan_may_take_it(num_in_flight: int) -> None:
    driver = decoding(PROMPT, num_blocks=5, max_num_seqs=1, caching=False)
    for _ in range(num_in_flight):
        pushed(driver)
    known = list(driver.outcomes[0].tokens)
    slot = driver.requests[0].slot
    driver.abort(0)
    assert driver.kv.usage == 0.0
    follower = driver.add([40, 41, 42, 43, 44, 45, 46, 47, 48], 4)
    driver.retire()
    assert pushed(driver).starts[0].slot == slot
    driver.run()
    assert driver.outcomes[0].tokens == known
    assert driver.outcomes[follower].tokens == driver.expected(follower)


# -- memory


def test_where_memory_is_short_nothing_is_pushed_ahead_and_nobody_is_stuck() -> None:
    """Both rows want a block for the step ahead and one is left: the plan waits for the tokens, then one row pauses."""
    driver = decoding([1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16, 17], num_blocks=6, caching=False, max_tokens=6)
    assert driver.kv.num_free_blocks == 1
    plan = pushed(driver)
    assert (list(plan.decode_positions), plan.grown_blocks) == ([7, 7], [])
    assert driver.schedule() is None, "two rows open a block at position 8"
    assert driver.core.num_preemptions == 0, "nobody was put out for a guess"
    driver.retire()
    plan = pushed(driver)
    assert plan.paused_ids == [1], "nothing is in flight, so the youngest makes room"
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in (0, 1))


class DecodesAlone(MicroBatch):
    """Prompts wait until no decode is left."""

    def form(self, step: SchedulingPass, waiting: Ordering, capacity: Capacity) -> None:
        take_decodes(step, runnable_decodes(step), capacity)
        if not len(step.queue):
            take_prompts(step, waiting, capacity, "fcfs")


def test_nobody_is_paused_for_a_step_ahead() -> None:
    """The prompt half computed could make room for the decode's block, and does once the decode's token is known."""
    scheduler = Scheduler(FcfsOrdering(), MaxUtilization(), DecodesAlone(), Limits(4, 4, 8, 4))
    driver = ahead_driver(scheduler=scheduler, num_blocks=4, caching=False, max_num_batched_tokens=8)
    driver.add([1, 2, 3, 4], 6)
    driver.add(PROMPT[:8], 2)
    both = pushed(driver)
    assert (both.chunk_ids, both.chunk_tokens) == ([1, 0], [4, 4])
    while driver.schedule() is None or driver.pushed[-1].decode_positions != [7]:
        driver.retire()
    assert driver.results
    assert driver.schedule() is None, "position 8 opens a block"
    while driver.results:
        assert driver.core.num_preemptions == 0
        driver.retire()
    plan = pushed(driver)
    assert (list(plan.decode_ids), plan.paused_ids) == ([0], [1])
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in (0, 1))


def test_one_queue_short_of_memory_does_not_keep_another_from_going_ahead() -> None:
    driver = decoding([1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15], num_queues=2, num_stages=1, num_blocks=5,
                      caching=False, max_num_batched_tokens=7, max_tokens=3)  # fmt: skip
    assert [list(queue.ids) for queue in driver.core.table.queues] == [[0], [1]]
    assert [list(pushed(driver).decode_ids), list(pushed(driver).decode_ids)] == [[0], [1]]
    assert driver.kv.num_free_blocks == 0
    ahead = pushed(driver)
    assert (list(ahead.decode_ids), list(ahead.decode_positions)) == ([1], [6]), "the first wants a block"
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in (0, 1))


def test_a_cohort_larger_than_a_micro_batch_takes_turns_ahead_too() -> None:
    """Where a row was not in the step that is fed from, its token is known, and the stages know it as well."""
    scheduler = mover(max_micro_batch_seqs=2)
    driver = decoding(*([first, first + 1] for first in range(4)), scheduler=scheduler, num_queues=2, num_stages=1,
                      max_micro_batch_seqs=2, max_num_batched_tokens=4)  # fmt: skip
    scheduler.to_move = ([2, 3], 1, 0)
    plans = [pushed(driver), pushed(driver)]
    for _ in range(2):
        driver.retire()
        plans.append(pushed(driver))
    assert [list(plan.decode_ids) for plan in plans] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert [plan.feeds_from for plan in plans] == [None, *(plan.step for plan in plans[:3])]
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in range(4))


def test_a_window_is_respected_by_the_step_in_flight_when_the_one_ahead_lets_a_block_go() -> None:
    driver = ahead_driver(window=3, num_blocks=5, block_size=2, max_num_seqs=1, max_num_batched_tokens=4)
    driver.add(PROMPT, 14)
    driver.run()
    assert driver.outcomes[0].tokens == driver.expected(0)
    assert sum(plan.feeds_from is not None for plan in driver.pushed) >= 10


# -- failures


@pytest.mark.parametrize("failing_stage", [0, 1, 2])
def test_a_failed_step_with_one_ahead_of_it_fails_its_rows_once(failing_stage: int) -> None:
    """The step ahead computes with tokens that never came; the newcomer it carries is served."""
    driver = decoding(PROMPT, num_queues=3, num_stages=3, late_feeds=True, max_num_batched_tokens=10)
    for first in (60, 70):
        driver.add([first, first + 1], 9)
        driver.schedule()
    while driver.results:
        driver.retire()
    driver.failing_stage = failing_stage
    driver.fail_next = 1
    failing = pushed(driver)
    pushed(driver)
    pushed(driver)
    newcomer = driver.add([80, 81, 82, 83, 84], 5)
    ahead = pushed(driver)
    assert (ahead.feeds_from, ahead.chunk_ids) == (failing.step, [newcomer])
    assert list(ahead.decode_ids) == list(failing.decode_ids)
    known = len(driver.outcomes[failing.decode_ids[0]].tokens)
    driver.run()
    for request_id, outcome in driver.outcomes.items():
        if request_id in failing.decode_ids:
            assert isinstance(outcome.ends[0].error, RequestFailedError)
            assert outcome.tokens == driver.expected(request_id)[:known]
        else:
            assert outcome.tokens == driver.expected(request_id)


def test_a_failed_step_ahead_fails_who_still_lives() -> None:
    driver = ahead_driver()
    driver.add([1, 2, 3], 9)
    driver.add([4, 5, 6], 9, stop_ids=[expected_tokens([4, 5, 6], 2)[1]])
    driver.step()
    pushed(driver)
    driver.fail_next = 1
    assert list(pushed(driver).decode_ids) == [0, 1]
    driver.run()
    assert isinstance(driver.outcomes[0].ends[0].error, RequestFailedError)
    assert driver.outcomes[0].tokens == driver.expected(0)[:2]
    assert driver.outcomes[1].reason is FinishReason.STOP, "it had ended before"
    assert driver.outcomes[1].tokens == driver.expected(1)


def test_a_token_of_a_life_before_the_pause_is_fed_after_the_new_start_and_read_by_nobody() -> None:
    """The builder's chunk stands on what a failed step was to write, so its token is wrong. The ring brings it to the
    first stage when the builder has started anew in the same slot."""
    driver = ahead_driver(num_queues=2, num_stages=2, late_feeds=True, max_num_batched_tokens=9, num_blocks=40)
    driver.add([90], 1)
    driver.schedule()
    driver.failing_stage, driver.fail_next = 1, 1
    driver.add(PROMPT[:8], 9)
    pushed(driver)
    driver.retire()
    builder = driver.add(PROMPT, 9)
    former = pushed(driver)
    assert (former.chunk_starts, former.chunk_samples, former.starts[0].slot) == ([8], [True], 0)
    assert driver.results[-1].tokens != driver.expected(builder)[:1]
    driver.retire()
    assert driver.requests[builder].state is RequestState.PAUSED
    again = pushed(driver)
    assert (again.resumed_ids, again.starts[0].slot) == ([builder], 0)
    assert [step for step, _ in driver.ring][-2:] == [former.step, again.step], "neither has reached the first stage"
    driver.add([60, 61], 9)  # so that somebody stands between the builder's steps, and they go ahead
    driver.run()
    assert any(plan.feeds_from is not None and builder in plan.decode_ids for plan in driver.pushed)
    assert driver.outcomes[builder].tokens == driver.expected(builder)


@pytest.mark.parametrize("num_failing", [1, 2])
def test_who_is_paused_with_two_steps_in_flight_is_recomputed_from_what_it_was_told(num_failing: int) -> None:
    """A failed step takes back what was published behind it, and whoever published is recomputed: the one case in
    which a decode in flight is paused. That a step of its former life fails as well does not concern it any more."""
    driver = ahead_driver(num_queues=3, num_stages=2, late_feeds=True, max_num_batched_tokens=7, num_blocks=40)
    failing = driver.add([31, 32, 33, 34, 35, 36, 37], 2)
    paused, other = driver.add(PROMPT[:7], 9), driver.add([41, 42, 43, 44, 45, 46, 47], 9)
    assert [pushed(driver).chunk_ids for _ in range(3)] == [[failing], [paused], [other]]
    while driver.results:
        driver.retire()
    driver.fail_next = num_failing
    assert [list(pushed(driver).decode_ids) for _ in range(3)] == [[failing], [paused], [other]]
    publishing = pushed(driver)
    assert (list(publishing.decode_ids), list(publishing.decode_positions)) == ([paused], [8])
    known = len(driver.outcomes[paused].tokens)
    driver.retire()
    assert driver.requests[paused].state is RequestState.PAUSED
    resumed = pushed(driver)
    assert resumed.resumed_ids == [paused]
    while driver.results[0].step < resumed.step:
        driver.retire()
    assert len(driver.outcomes[paused].tokens) == known, "nothing of the former life is told"
    driver.run()
    for request_id in (paused, other):
        assert driver.outcomes[request_id].tokens == driver.expected(request_id)
    assert isinstance(driver.outcomes[failing].ends[0].error, RequestFailedError)


# -- policies that do and do not know of it


class EveryRow(MicroBatch):
    """Somebody's policy: all rows of the queue, then one waiting prompt, with no thought of looking ahead."""

    def form(self, step: SchedulingPass, waiting: Ordering, capacity: Capacity) -> None:
        step.add_decodes(step.queue.ids[:], len(step.queue.due_for_block()))
        for request in waiting.visit(step):
            step.start(request, request.num_tokens)
            return


def test_a_policy_that_knows_nothing_of_looking_ahead_ends_nobody() -> None:
    limits = Limits(4, 4, 64, 4)
    scheduler = Scheduler(FcfsOrdering(), MaxUtilization(), EveryRow(), limits)
    driver = ahead_driver(scheduler=scheduler, max_num_batched_tokens=64, num_blocks=60)
    for first, count in enumerate([3, 6, 4]):
        driver.add([first, first + 1, first + 2], count)
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in range(3))
    assert any(plan.feeds_from is not None for plan in driver.pushed)


def test_a_plan_ahead_is_checked_like_any_other() -> None:
    driver = ahead_driver()
    driver.add([1, 2], 3)
    driver.add([3, 4], 9)
    driver.step()
    pushed(driver)
    table, limits = driver.core.table, driver.limits

    def check(plan: StepPlan) -> None:
        check_plan(plan, table, limits, "mine")

    check(StepPlan(0, decode_ids=[0, 1]))
    pushed(driver)
    with pytest.raises(SchedulerError, match="queue 0 is in flight"):
        check(StepPlan(0, decode_ids=[1]))
    driver.retire()
    check(StepPlan(0, decode_ids=[1]))
    with pytest.raises(SchedulerError, match=r"decodes requests \[0\], which end with the step in flight"):
        check(StepPlan(0, decode_ids=[0, 1]))
    with pytest.raises(SchedulerError, match="pauses request 1, which is in flight"):
        check(StepPlan(0, decode_ids=[], paused_ids=[1]))
    with pytest.raises(SchedulerError, match="moves decodes out of queue 0, which is in flight"):
        check(StepPlan(0, moved_ids=[1], moved_queues=[1]))


# -- sampling goes by what was fed


EDITED = SamplingParams(
    temperature=1.3, top_k=20, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.7, min_tokens=4,
    logit_bias={7: 2.0}, bad_words=[],
)  # fmt: skip


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_sampling_reads_what_was_fed(stages: int) -> None:
    """Penalties count each token that was sampled in the step before, noise goes by position."""

    def tokens_under(look_ahead: int) -> tuple[list[list[int]], list[StepPlan]]:
        driver = CoreDriver(num_queues=stages, look_ahead=look_ahead, late_feeds=True, max_num_batched_tokens=4)
        for first in range(4):
            driver.add([first, first + 1, first + 2, first + 3], 12, params=EDITED, stop_ids=[first, 50, 51])
            driver.requests[first].seed = 77 + first
            driver.requests[first].bad_words_ids = [[3], [40, 41]]
        driver.run()
        return [driver.outcomes[i].tokens for i in range(4)], driver.pushed

    plain, _ = tokens_under(0)
    ahead, plans = tokens_under(1)
    assert ahead == plain
    assert sum(plan.feeds_from is not None for plan in plans) >= 8


def test_the_default_scheduler_looks_ahead() -> None:
    limits = Limits(4, 4, 16, 4)
    driver = ahead_driver(scheduler=make_scheduler(SchedulerConfig(), limits))
    driver.add([1, 2], 8)
    driver.run()
    assert any(plan.feeds_from is not None for plan in driver.pushed)
