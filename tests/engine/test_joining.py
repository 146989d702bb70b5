"""A request is a row of its queue from the push of its last chunk on: its first decode goes ahead of its first token,
and whatever ends, fails or dies in between leaves no trace."""

from __future__ import annotations

import pytest

from llm_engine.core.errors import RequestFailedError
from llm_engine.core.outputs import FinishReason
from llm_engine.core.request import RequestEvent, RequestState
from llm_engine.core.step import StepPlan
from tests.engine.core_driver import CoreDriver, ahead_driver, pushed
from tests.toy_model_engine import expected_tokens

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
FILLS_ITS_BLOCKS = PROMPT[:8]
OTHER = [40, 41, 42]


def joining(driver: CoreDriver, request_id: int) -> tuple[StepPlan, StepPlan]:
    """Pushes its last chunk and its first decode; neither has come back."""
    last, decode = pushed(driver), pushed(driver)
    assert dict(zip(last.chunk_ids, last.chunk_samples, strict=True))[request_id]
    assert request_id in decode.decode_ids
    assert decode.feeds_from == last.step
    assert driver.requests[request_id].state is RequestState.DECODING
    assert driver.outcomes[request_id].tokens == []
    return last, decode


def check_right(driver: CoreDriver, *request_ids: int) -> None:
    for request_id in request_ids:
        assert driver.outcomes[request_id].tokens == driver.expected(request_id)
        assert driver.outcomes[request_id].reason is FinishReason.LENGTH


def check_failed(driver: CoreDriver, request_id: int, known: int = 0) -> None:
    outcome = driver.outcomes[request_id]
    assert isinstance(outcome.ends[0].error, RequestFailedError)
    assert "told to fail" in str(outcome.ends[0].error)
    assert outcome.tokens == driver.expected(request_id)[:known]


# -- what the plan ahead carries


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_the_first_decode_of_each_is_pushed_before_its_first_token_is_known(num_stages: int) -> None:
    driver = ahead_driver(num_queues=num_stages, late_feeds=True, max_num_batched_tokens=8)
    for first in range(num_stages + 1):
        driver.add([first, *PROMPT[1:8]], 6)
    driver.run()
    first_decodes = [
        next(plan for plan in driver.pushed if request_id in plan.decode_ids) for request_id in driver.requests
    ]
    joined = [next(plan for plan in driver.pushed if request_id in plan.sampled_ids) for request_id in driver.requests]
    assert any(decode.feeds_from == last.step for decode, last in zip(first_decodes, joined, strict=True))
    assert [decode.queue for decode in first_decodes] == [last.queue for last in joined]
    check_right(driver, *driver.requests)


def test_a_prompt_that_fills_its_blocks_opens_one_for_its_first_decode() -> None:
    driver = ahead_driver()
    driver.add(FILLS_ITS_BLOCKS, 6)
    _, decode = joining(driver, 0)
    assert (list(decode.decode_positions), decode.grown_slots, len(decode.grown_blocks)) == ([8], [0], 1)
    assert driver.kv.num_held(0) == 3
    assert len(driver.kv.cache) == 2, "the new block has no tokens that anybody knows"
    driver.run()
    check_right(driver, 0)


def test_a_prompt_that_does_not_fill_its_last_block_needs_none() -> None:
    driver = ahead_driver()
    driver.add(FILLS_ITS_BLOCKS[:7], 6)
    _, decode = joining(driver, 0)
    assert (list(decode.decode_positions), decode.grown_blocks) == ([7], [])
    driver.run()
    check_right(driver, 0)


# -- ends


def test_who_may_have_one_token_is_not_in_the_plan_ahead() -> None:
    driver = ahead_driver()
    one, more = driver.add(FILLS_ITS_BLOCKS, 1), driver.add(OTHER, 4)
    last = pushed(driver)
    assert last.chunk_samples == [True, True]
    assert list(pushed(driver).decode_ids) == [more]
    driver.retire()
    assert driver.outcomes[one].reason is FinishReason.LENGTH
    assert one not in driver.kv
    driver.run()
    check_right(driver, one, more)


def test_where_all_may_have_one_token_nothing_is_pushed_ahead() -> None:
    driver = ahead_driver()
    for first in range(2):
        driver.add([first, 50], 1)
    pushed(driver)
    assert driver.schedule() is None
    driver.run()
    check_right(driver, 0, 1)
    assert len(driver.pushed) == 1


def test_who_may_have_two_tokens_goes_ahead_once() -> None:
    driver = ahead_driver()
    driver.add(PROMPT, 2)
    joining(driver, 0)
    driver.retire()
    assert driver.schedule() is None
    driver.run()
    check_right(driver, 0)


def test_who_stops_at_its_first_token_leaves_its_first_decode_to_nobody() -> None:
    """Somebody else has its slot and its blocks when that comes back."""
    driver = ahead_driver(max_num_seqs=1, num_blocks=5)
    driver.add(FILLS_ITS_BLOCKS, 9, stop_ids=expected_tokens(FILLS_ITS_BLOCKS, 1))
    last, late = joining(driver, 0)
    follower = driver.add([60, *PROMPT], 4)
    driver.retire()
    assert driver.outcomes[0].reason is FinishReason.STOP
    assert driver.kv.usage == 0.0
    start = pushed(driver).starts[0]
    assert (start.request_id, start.slot) == (follower, last.starts[0].slot)
    assert set(start.block_ids) & {*last.starts[0].block_ids, *late.grown_blocks}
    assert driver.results[0].step == late.step
    driver.retire()
    assert driver.outcomes[0].tokens == driver.expected(0)
    assert len(driver.outcomes[0].deltas) == 1
    driver.run()
    check_right(driver, follower)


@pytest.mark.parametrize("ahead", [False, True])
def test_an_abort_before_the_first_token_gives_everything_back(ahead: bool) -> None:
    driver = ahead_driver(max_num_seqs=2, num_blocks=6, caching=False)
    aborted, other = driver.add(FILLS_ITS_BLOCKS, 9), driver.add(OTHER, 9)
    last = pushed(driver)
    if ahead:
        assert list(pushed(driver).decode_ids) == [aborted, other]
    driver.abort(aborted)
    assert driver.kv.usage == 1 / 5, "what the other holds"
    assert list(driver.core.table.queues[0].ids) == [other]
    follower = driver.add([60, *FILLS_ITS_BLOCKS[1:]], 4)
    driver.retire()
    plan = pushed(driver)
    assert plan.starts[0].request_id == follower
    assert plan.starts[0].slot == last.starts[last.chunk_ids.index(aborted)].slot
    driver.run()
    assert (driver.outcomes[aborted].tokens, driver.outcomes[aborted].reason) == ([], FinishReason.ABORT)
    check_right(driver, other, follower)


# -- memory


def test_where_no_block_is_left_for_the_first_decode_it_waits_for_its_token() -> None:
    """Who ends meanwhile gives one back."""
    driver = ahead_driver(num_blocks=4)
    driver.add(FILLS_ITS_BLOCKS, 4)
    driver.add([40, 41, 42, 43], 1)
    pushed(driver)
    assert driver.kv.num_free_blocks == 0
    assert driver.schedule() is None
    assert driver.requests[0].state is RequestState.DECODING
    driver.retire()
    plan = pushed(driver)
    assert (list(plan.decode_ids), plan.feeds_from, len(plan.grown_blocks)) == ([0], None, 1)
    driver.run()
    assert driver.core.num_preemptions == 0
    check_right(driver, 0, 1)


def test_where_two_want_the_last_block_nobody_gives_way_before_a_token_is_known() -> None:
    driver = ahead_driver(num_blocks=6, caching=False)
    for first in (5, 6):
        driver.add([first, *PROMPT[1:8]], 4)
    pushed(driver)
    assert driver.kv.num_free_blocks == 1
    assert driver.schedule() is None
    assert driver.core.num_preemptions == 0
    driver.retire()
    plan = pushed(driver)
    assert (list(plan.decode_ids), plan.paused_ids) == ([0], [1])
    assert [len(driver.outcomes[i].tokens) for i in (0, 1)] == [1, 1]
    driver.run()
    check_right(driver, 0, 1)


# -- chunks in several queues


def in_two_queues(driver: CoreDriver) -> tuple[StepPlan, StepPlan]:
    """The two chunks of a prompt, in flight in two queues."""
    driver.add(PROMPT, 6)
    first, last = pushed(driver), pushed(driver)
    assert [(plan.queue, plan.chunk_starts, plan.chunk_samples) for plan in (first, last)] == [
        (0, [0], [False]),
        (1, [8], [True]),
    ]
    request = driver.requests[0]
    assert (request.queue, request.num_in_flight) == (1, 2)
    assert driver.core.table.is_in_flight(request)
    return first, last


@pytest.mark.parametrize("late_feeds", [False, True])
def test_it_joins_the_queue_of_its_last_chunk_while_an_earlier_one_is_in_flight_in_another(late_feeds: bool) -> None:
    driver = ahead_driver(num_queues=2, num_stages=2, late_feeds=late_feeds, max_num_batched_tokens=8)
    _, last = in_two_queues(driver)
    other = driver.add(OTHER, 6)
    between = pushed(driver)
    assert (between.queue, between.chunk_ids) == (0, [other])
    driver.retire()
    decode = pushed(driver)
    assert (decode.queue, list(decode.decode_ids), list(decode.decode_positions)) == (1, [0], [9])
    assert decode.feeds_from == last.step
    driver.run()
    check_right(driver, 0, other)


@pytest.mark.parametrize("fails", ["first chunk", "last chunk"])
def test_where_the_step_of_one_of_its_chunks_fails_it_fails_once(fails: str) -> None:
    """With the other chunk and the first decode in flight."""
    driver = ahead_driver(num_queues=2, num_stages=1, max_num_batched_tokens=8)
    driver.add(PROMPT, 6)
    driver.fail_next = fails == "first chunk"
    first = pushed(driver)
    driver.fail_next = fails == "last chunk"
    last, decode = pushed(driver), pushed(driver)
    assert [plan.queue for plan in (first, last, decode)] == [0, 1, 1]
    assert decode.feeds_from == last.step
    while not driver.outcomes[0].ends:
        driver.retire()
    check_failed(driver, 0)
    assert len(driver.results) == (2 if fails == "first chunk" else 1)
    assert driver.kv.usage == 0.0
    assert not any(map(len, driver.core.table.queues))
    follower = driver.add(PROMPT, 6)
    driver.run()
    assert driver.requests[follower].num_cached_tokens == (0 if fails == "first chunk" else 8)
    check_right(driver, follower)


# -- failures


def test_where_the_step_of_its_last_chunk_fails_who_built_on_it_is_computed_anew() -> None:
    """The plan ahead carries its first decode, a prompt that found its blocks, and one that is a stranger to it."""
    driver = ahead_driver(max_num_batched_tokens=20)
    driver.fail_next = 1
    failing = driver.add(FILLS_ITS_BLOCKS, 6)
    last = pushed(driver)
    builder, stranger = driver.add(PROMPT, 6), driver.add(OTHER, 6)
    ahead = pushed(driver)
    assert (list(ahead.decode_ids), ahead.feeds_from) == ([failing], last.step)
    assert (ahead.chunk_ids, ahead.chunk_starts) == ([builder, stranger], [8, 0])
    assert driver.results[-1].tokens[1] != driver.expected(builder)[0], "it read what was never written"
    driver.retire()
    check_failed(driver, failing)
    assert driver.requests[builder].state is RequestState.PAUSED
    assert list(driver.core.table.queues[0].ids) == [stranger]
    driver.retire()
    assert [driver.outcomes[i].tokens for i in (builder, stranger)] == [[], driver.expected(stranger)[:1]]
    driver.run()
    check_failed(driver, failing)
    check_right(driver, builder, stranger)


@pytest.mark.parametrize("max_tokens", [1, 2, 6])
def test_a_last_chunk_of_a_life_before_the_pause_gives_no_token_and_is_no_end(max_tokens: int) -> None:
    """Paused by a failed step and started anew in the same queue, behind the step that carried it before; that one's
    token is wrong, and would be its last where it may have only one."""
    driver = ahead_driver(max_num_batched_tokens=20)
    driver.fail_next = 1
    failing = driver.add(FILLS_ITS_BLOCKS, 6)
    pushed(driver)
    builder = driver.add(PROMPT, max_tokens)
    former = pushed(driver)
    assert former.sampled_ids == [failing, builder]
    wrong = driver.results[-1].tokens[1]
    assert wrong != driver.expected(builder)[0]
    driver.retire()
    again = pushed(driver)
    assert (again.queue, again.resumed_ids, again.sampled_ids) == (former.queue, [builder], [builder])
    request = driver.requests[builder]
    assert (request.state, request.start_step) == (RequestState.DECODING, again.step)
    assert [result.step for result in driver.results] == [former.step, again.step]
    driver.retire()
    assert request.token_ids == PROMPT
    assert driver.outcomes[builder].deltas == []
    driver.run()
    check_right(driver, builder)
    assert [event for event, _ in request.events].count(RequestEvent.FIRST_TOKEN) == 1


def test_that_a_step_of_a_life_before_the_pause_fails_does_not_concern_it() -> None:
    driver = ahead_driver(max_num_batched_tokens=20)
    driver.fail_next = 2
    failing = driver.add(FILLS_ITS_BLOCKS, 6)
    pushed(driver)
    builder = driver.add(PROMPT, 1)
    former = pushed(driver)
    driver.retire()
    assert pushed(driver).resumed_ids == [builder]
    assert driver.results[0].step == former.step
    assert driver.results[0].error is not None
    driver.retire()
    assert driver.outcomes[builder].deltas == []
    driver.run()
    check_failed(driver, failing)
    check_right(driver, builder)


@pytest.mark.parametrize("max_tokens", [3, 6])
def test_a_decode_of_a_life_before_the_pause_gives_no_token_and_is_no_end(max_tokens: int) -> None:
    """As above, by its decode row: a step of the other queue fails, and it published a block behind that."""
    driver = ahead_driver(num_queues=2, num_stages=1, num_blocks=40)
    failing = driver.add([31, 32, 33, 34, 35, 36, 37], 9)
    pushed(driver)
    paused = driver.add(PROMPT[:7], max_tokens)
    assert pushed(driver).queue == 1
    for _ in range(2):
        driver.retire()
    for _ in range(2):
        pushed(driver)
    for _ in range(2):
        driver.retire()
    driver.fail_next = 1
    assert list(pushed(driver).decode_ids) == [failing]
    former = pushed(driver)
    assert (former.queue, list(former.decode_ids), list(former.decode_positions)) == (1, [paused], [8])
    assert (driver.core.in_flight[-1].ending == [paused]) == (max_tokens == 3)
    assert list(pushed(driver).decode_ids) == [failing]
    driver.retire()
    again = pushed(driver)
    assert (again.queue, again.resumed_ids, again.sampled_ids) == (1, [paused], [paused])
    assert driver.results[0].step == former.step
    driver.retire()
    assert driver.outcomes[paused].tokens == driver.expected(paused)[:2]
    assert driver.outcomes[paused].reason is None
    driver.run()
    check_failed(driver, failing, known=2)
    check_right(driver, paused)


@pytest.mark.parametrize("num_retired", [0, 1])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_stages_lost_before_its_first_token_are_made_up_for(num_stages: int, num_retired: int) -> None:
    """With its last chunk and its first decode in flight; and when the chunk's token has just come."""
    driver = ahead_driver(num_queues=num_stages, late_feeds=True, max_num_batched_tokens=8)
    driver.add(FILLS_ITS_BLOCKS, 6)
    last = pushed(driver)
    for first in range(1, num_stages):
        driver.add([60 + first, 61, 62], 6)
        pushed(driver)
    decode = pushed(driver)
    assert (list(decode.decode_ids), decode.feeds_from) == ([0], last.step)
    for _ in range(num_retired):
        driver.retire()
    driver.die()
    assert [request.state for request in driver.requests.values()] == [RequestState.PAUSED] * num_stages
    assert driver.outcomes[0].tokens == driver.expected(0)[:num_retired]
    assert driver.core.num_replays == num_stages
    driver.come_back()
    again = pushed(driver)
    assert (again.starts[0].token_ids, again.chunk_samples) == (
        [*FILLS_ITS_BLOCKS, *driver.expected(0)[:num_retired]],
        [not num_retired],
    )
    driver.run()
    check_right(driver, *driver.requests)
    assert [event for event, _ in driver.requests[0].events].count(RequestEvent.FIRST_TOKEN) == 1
