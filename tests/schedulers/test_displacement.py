"""Under max-utilization a newcomer takes the place of residents it outranks: whose, how many, and when not."""

from __future__ import annotations

from typing import Any

import pytest

from llm_engine.schedulers.base import Verdict
from llm_engine.schedulers.orderings.priority import PriorityOrdering
from tests.engine.core_driver import CoreDriver
from tests.schedulers.books import Books, Places, chunks


def prioritized(**settings: Any) -> Books:
    return Books(parts={"ordering": "priority"}, **settings)


def paused_for(books: Books, queue: int = 0) -> list[int]:
    step = books.a_pass(queue)
    books.scheduler.capacity.make_way(step, books.scheduler.ordering)
    return step.plan.paused_ids


@pytest.mark.parametrize(
    ("residents", "newcomer", "paused"),
    [
        pytest.param([5, 7], 1, [1], id="the one who would be visited last"),
        pytest.param([7, 7], 1, [1], id="of two alike the younger"),
        pytest.param([1, 7], 1, [1], id="only whom it outranks"),
        pytest.param([1, 1], 1, [], id="nobody of its own rank"),
        pytest.param([0, 1], 2, [], id="nobody above it"),
    ],
)
def test_a_seat_is_cleared(residents: list[int], newcomer: int, paused: list[int]) -> None:
    books = prioritized(max_num_seqs=2)
    for priority in residents:
        books.decoding(6, priority=priority)
    asked = books.waiting(4, priority=newcomer)
    assert paused_for(books) == paused
    plan = books.plan()
    assert plan is not None
    assert plan.paused_ids == paused
    assert chunks(plan) == ({asked.request_id: 4} if paused else {})
    assert sorted(plan.decode_ids) == [i for i in range(2) if i not in paused]


@pytest.mark.parametrize(
    ("known", "paused"),
    [
        pytest.param(4, [], id="fits without"),
        pytest.param(5, [2], id="a block too large"),
        pytest.param(12, [2], id="just fits without the last one"),
        pytest.param(13, [2, 1], id="two must go"),
        pytest.param(20, [2, 1], id="just fits without two"),
        pytest.param(21, [], id="would not even fit without all it outranks"),
    ],
)
def test_as_many_go_as_it_takes_and_none_where_that_is_not_enough(known: int, paused: list[int]) -> None:
    books = prioritized(num_blocks=7)
    for priority in (0, 5, 5):
        books.decoding(6, priority=priority)  # two blocks each; one is free
    newcomer = books.waiting(known, priority=1)
    plan = books.plan()
    assert plan is not None
    assert plan.paused_ids == paused
    assert chunks(plan) == ({} if known == 21 else {newcomer.request_id: known})


def test_blocks_that_decodes_of_the_plan_are_due_are_not_given_away() -> None:
    books = prioritized(num_blocks=8)
    books.decoding(9, priority=0)  # its next token opens a block
    books.decoding(9, priority=5)  # so would this one's, were it not paused
    newcomer = books.waiting(20, priority=1)  # 5 blocks: 8 less 2 held less 1 due
    plan = books.plan()
    assert plan is not None
    assert (plan.paused_ids, chunks(plan), list(plan.decode_ids)) == ([1], {newcomer.request_id: 20}, [0])
    books = prioritized(num_blocks=7)
    books.decoding(9, priority=0)
    books.decoding(9, priority=5)
    books.waiting(20, priority=1)
    assert paused_for(books) == []


def test_what_was_promised_to_a_prompt_that_is_paused_is_free_again() -> None:
    books = prioritized(num_blocks=5)
    books.prefilling(20, 4, priority=5)
    newcomer = books.waiting(20, priority=1)
    plan = books.plan()
    assert plan is not None
    assert (plan.paused_ids, chunks(plan)) == ([0], {newcomer.request_id: 20})


def test_a_hit_on_the_paused_stays_a_hit() -> None:
    books = prioritized(num_blocks=6)
    books.decoding(17, first=1, priority=5)  # 4 blocks that can be found, and one due
    newcomer = books.waiting(24, first=1, priority=1)
    assert paused_for(books) == [], "2 blocks beside its hit are free, but one of them is due"
    books.decoding(4, priority=5)
    plan = books.plan()
    assert plan is not None
    assert (plan.paused_ids, chunks(plan)) == ([2, 0], {newcomer.request_id: 8})


def test_who_is_in_flight_is_not_paused_for_it() -> None:
    books = prioritized(max_num_seqs=2, num_queues=2)
    books.decoding(6, priority=9, queue=0)
    books.decoding(6, priority=5, queue=1)
    books.in_flight(0)
    books.waiting(4, priority=1)
    assert paused_for(books, queue=1) == [1]
    books.in_flight(1)
    assert paused_for(books, queue=1) == []


@pytest.mark.parametrize(("priority", "short"), [(5, True), (1, False)])
def test_ahead_of_its_tokens_a_queue_comes_home_to_make_way(priority: int, short: bool) -> None:
    books = prioritized(max_num_seqs=1, look_ahead=1)
    books.decoding(6, priority=priority)
    books.in_flight(0)
    books.waiting(4, priority=1)
    step = books.a_pass()
    books.scheduler.capacity.make_way(step, books.scheduler.ordering)
    assert (step.plan.paused_ids, step.is_short) == ([], short)


def test_another_queue_need_not_come_home_for_it() -> None:
    books = prioritized(max_num_seqs=1, look_ahead=1, num_queues=2)
    books.decoding(6, priority=5, queue=0)
    books.in_flight(0)
    books.in_flight(1)
    books.waiting(4, priority=1)
    step = books.a_pass(1)
    books.scheduler.capacity.make_way(step, books.scheduler.ordering)
    assert not step.is_short


def test_nobody_is_paused_for_one_that_would_not_run() -> None:
    books = prioritized(max_num_seqs=2, max_num_batched_tokens=8)
    books.decoding(6, priority=5)
    books.prefilling(40, 8, priority=0)  # takes all the micro-batch has
    books.waiting(4, priority=1)
    assert paused_for(books) == []
    books = prioritized(max_num_seqs=2, max_num_batched_tokens=8)
    books.decoding(6, priority=5)
    books.prefilling(12, 8, priority=0)
    books.waiting(4, priority=1)
    assert paused_for(books) == [0]


def test_a_row_of_the_micro_batch_comes_free_with_the_paused() -> None:
    books = prioritized(max_num_seqs=3, max_micro_batch_seqs=2, num_queues=2)
    for queue in (0, 0, 1):
        books.decoding(6, priority=5 - queue, queue=queue)
    books.waiting(4, priority=1)
    books.in_flight(0)
    assert paused_for(books, queue=1) == [2]


def test_who_waits_for_a_hit_or_lacks_a_resource_is_passed_over() -> None:
    books = prioritized(max_num_seqs=2)
    books.decoding(6, priority=5)
    books.prefilling(20, 8, first=1, priority=0)
    books.waiting(20, first=1, priority=0)
    assert paused_for(books) == []
    second = books.waiting(4, priority=1)
    step = books.a_pass()
    books.scheduler.capacity.make_way(step, books.scheduler.ordering)
    assert (step.plan.paused_ids, step.makes_way_for) == ([0], {second.request_id})
    books = prioritized(max_num_seqs=1, resources=[Places("rare", 0)])
    books.decoding(6, priority=5)
    books.waiting(4, priority=1)
    assert paused_for(books) == []


def test_only_those_are_admitted_in_the_pass_for_whom_it_paused() -> None:
    books = prioritized(max_num_seqs=1)
    books.decoding(6, priority=5)
    first, second = books.waiting(4, priority=1), books.waiting(4, priority=1)
    step = books.a_pass()
    books.scheduler.capacity.make_way(step, books.scheduler.ordering)
    assert (step.plan.paused_ids, step.makes_way_for) == ([0], {first.request_id})
    assert books.scheduler.capacity.judge(step, second) is Verdict.SKIP
    assert books.scheduler.capacity.judge(step, first) is Verdict.ADMIT
    step.start(first, 4)
    assert books.scheduler.capacity.judge(step, second) is Verdict.STOP


def test_a_pass_makes_way_for_as_many_as_it_has_room_for() -> None:
    books = prioritized(max_num_seqs=4, max_num_batched_tokens=10)
    for priority in (0, 5, 5, 5):
        books.decoding(6, priority=priority)
    urgent = [books.waiting(4, priority=1) for _ in range(3)]
    plan = books.plan()
    assert plan is not None
    assert plan.paused_ids == [3, 2]
    assert chunks(plan) == {urgent[0].request_id: 4, urgent[1].request_id: 4}
    assert sorted(plan.decode_ids) == [0, 1], "a third would have had no tokens"


def test_what_one_pause_cleared_is_enough_for_two() -> None:
    books = prioritized(num_blocks=6, max_num_seqs=3)
    books.decoding(6, priority=0)
    books.decoding(16, priority=5)  # 4 blocks, none is free
    urgent = [books.waiting(8, priority=1) for _ in range(2)]
    plan = books.plan()
    assert plan is not None
    assert (plan.paused_ids, chunks(plan)) == ([1], {r.request_id: 8 for r in urgent})


def test_of_two_alike_only_the_first_has_a_place_cleared() -> None:
    books = prioritized(max_num_seqs=3)
    for priority in (0, 5, 5):
        books.decoding(6, priority=priority)
    first, _, other = (books.waiting(12, first=token, priority=1) for token in (1, 1, 2))
    plan = books.plan()
    assert plan is not None
    assert (plan.paused_ids, list(chunks(plan))) == ([2, 1], [first.request_id, other.request_id])


def test_the_watermark_holds_for_it_too() -> None:
    for known, paused in ((24, [1]), (25, [])):
        books = Books(num_blocks=10, parts={"ordering": "priority", "scheduler_options": {"watermark": 0.25}})
        books.decoding(6, priority=0)
        books.decoding(6, priority=5)
        books.waiting(known, priority=1)
        assert paused_for(books) == paused


def test_an_ordering_that_displaces_is_asked_again_when_somebody_came_or_went_or_it_thinks_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    books = prioritized(max_num_seqs=2)
    residents = [books.decoding(6, priority=1), books.decoding(6, priority=1)]
    asked = []

    def displaces(ordering: PriorityOrdering, newcomer: Any, resident: Any, changes: Any) -> bool:
        asked.append(resident.request_id)
        return False

    monkeypatch.setattr(PriorityOrdering, "displaces", displaces)
    books.waiting(4, priority=1)
    for _ in range(3):
        assert paused_for(books) == []
    assert asked == [0, 1]
    books.scheduler.capacity.ended(residents[0].request_id)
    assert paused_for(books) == []
    assert asked == [0, 1, 0, 1]
    monkeypatch.setattr(PriorityOrdering, "standing", 1)
    for _ in range(2):
        assert paused_for(books) == []
    assert asked == [0, 1] * 3


def test_whom_one_displaced_comes_back_and_is_not_displaced_by_its_like() -> None:
    driver = CoreDriver(max_num_seqs=1, parts={"ordering": "priority"}, look_ahead=1)
    slow = driver.add([1, 2, 3], 12, priority=5)
    driver.schedule()
    driver.schedule()
    urgent = [driver.add([number, 7], 4, priority=1) for number in (20, 30)]
    driver.run()
    assert [driver.requests[i].num_preemptions for i in (slow, *urgent)] == [1, 0, 0]
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in (slow, *urgent))


def test_what_a_pause_publishes_takes_no_more_than_was_counted() -> None:
    driver = CoreDriver(num_blocks=5, max_num_seqs=2, parts={"ordering": "priority"})
    driver.add([1, 2, 3, 4], 9, priority=5)
    for _ in range(5):
        driver.step()  # two blocks are full, the second is not published yet
    known = driver.requests[0].token_ids[:8]
    urgent = driver.add([*known, 50, 51, 52, 53, 54, 55, 56, 57], 1, priority=1)  # all 4 blocks
    plan = driver.schedule()
    assert plan is not None
    assert (plan.paused_ids, chunks(plan)) == ([0], {urgent: 12})
    driver.run()
    assert driver.outcomes[urgent].tokens == driver.expected(urgent)
