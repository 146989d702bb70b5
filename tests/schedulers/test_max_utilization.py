"""Who may hold memory: what fits now beside what was promised; a shortage pauses the youngest."""

from __future__ import annotations

import pytest

from llm_engine.schedulers.base import Verdict
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization
from tests.schedulers.books import Books, Places, chunks

# -- making room


def test_room_that_is_there_costs_nobody_anything() -> None:
    books = Books(num_blocks=5)
    books.decoding(8)
    step = books.a_pass()
    assert MaxUtilization().make_room(step, 3)
    assert step.plan.paused_ids == []


def test_the_youngest_goes_first_and_no_more_than_needed() -> None:
    books = Books(num_blocks=6)
    for _ in range(3):
        books.decoding(9)  # two blocks each
    step = books.a_pass()
    assert MaxUtilization().make_room(step, 1)
    assert step.plan.paused_ids == [2]
    assert MaxUtilization().make_room(step, 4)
    assert step.plan.paused_ids == [2, 1]


def test_who_shares_its_blocks_frees_none_and_the_next_must_go_too() -> None:
    books = Books(num_blocks=4)
    books.decoding(9, first=1)
    books.decoding(9, first=2)
    sharer = books.waiting(9, first=1)
    books.kv.add_sequence(sharer.request_id, sharer.block_hashes, 9)
    sharer.slot = 2
    books.table.start_prefill(sharer)
    step = books.a_pass()
    assert MaxUtilization().make_room(step, 1)
    assert step.plan.paused_ids == [2, 1]


def test_who_is_in_flight_or_in_the_plan_stays() -> None:
    books = Books(num_queues=2, num_blocks=8)
    for queue in (0, 0, 1):
        books.decoding(9, queue=queue)
    books.prefilling(9, 8, in_flight=1)
    books.in_flight(1)
    step = books.a_pass()
    step.add_decodes([1], 0)
    assert not MaxUtilization().make_room(step, 5)
    assert step.plan.paused_ids == [0], "1 is in the plan, 2 and 3 are in flight"


def test_the_one_that_asks_may_be_the_youngest() -> None:
    books = Books(num_blocks=2)
    books.decoding(9)
    plan = books.plan()
    assert plan is not None
    assert (plan.paused_ids, list(plan.decode_ids)) == ([0], [])
    assert [request.request_id for request in books.scheduler.ordering.visit(books.a_pass())] == [0]


# -- judging


def test_admitted_while_the_known_tokens_fit() -> None:
    books = Books(num_blocks=5)
    assert MaxUtilization().judge(books.a_pass(), books.waiting(20)) is Verdict.ADMIT
    assert MaxUtilization().judge(books.a_pass(), books.waiting(21)) is Verdict.STOP


def test_what_residents_still_need_for_their_prompts_is_not_given_away() -> None:
    books = Books(num_blocks=6)
    books.prefilling(16, 8)  # holds 2 of 6, is promised 2 more
    assert MaxUtilization().judge(books.a_pass(), books.waiting(8)) is Verdict.ADMIT
    assert MaxUtilization().judge(books.a_pass(), books.waiting(9)) is Verdict.STOP


def test_what_this_pass_admitted_is_promised_the_rest_of_its_prompt_too() -> None:
    books = Books(num_blocks=6)
    first = books.waiting(16)
    step = books.a_pass()
    step.start(first, 8)
    assert MaxUtilization().judge(step, books.waiting(8)) is Verdict.ADMIT
    assert MaxUtilization().judge(step, books.waiting(9)) is Verdict.STOP


def test_a_chunk_in_this_plan_is_not_promised_twice() -> None:
    books = Books(num_blocks=4)
    resident = books.prefilling(12, 4)  # holds 1
    step = books.a_pass()
    step.add_chunk(resident, 8, 2)
    assert MaxUtilization().judge(step, books.waiting(4)) is Verdict.ADMIT
    assert MaxUtilization().judge(step, books.waiting(5)) is Verdict.STOP


def test_a_prefix_that_somebody_holds_costs_nothing() -> None:
    books = Books(num_blocks=6)
    books.decoding(17, first=1)  # holds 4, all of them to be found
    assert MaxUtilization().judge(books.a_pass(), books.waiting(24, first=1)) is Verdict.ADMIT
    assert MaxUtilization().judge(books.a_pass(), books.waiting(24, first=2)) is Verdict.STOP


def test_a_prefix_that_nobody_holds_costs_its_blocks() -> None:
    books = Books(num_blocks=5)
    books.kv.free(books.decoding(17, first=1).request_id)
    assert MaxUtilization().judge(books.a_pass(), books.waiting(21, first=1)) is Verdict.STOP
    assert MaxUtilization().judge(books.a_pass(), books.waiting(20, first=1)) is Verdict.ADMIT


def test_a_window_bounds_what_a_long_prompt_needs() -> None:
    assert MaxUtilization().judge(Books(num_blocks=20).a_pass(), Books().waiting(400)) is Verdict.STOP
    books = Books(num_blocks=20, window=8, max_num_batched_tokens=16)
    assert MaxUtilization().judge(books.a_pass(), books.waiting(400)) is Verdict.ADMIT


def test_no_seat_is_left() -> None:
    books = Books(max_num_seqs=2)
    books.decoding(4)
    books.prefilling(8, 4)
    assert MaxUtilization().judge(books.a_pass(), books.waiting(4)) is Verdict.STOP


def test_a_pass_that_paused_admits_nobody() -> None:
    books = Books(num_blocks=10)
    step = books.a_pass()
    step.pause(books.decoding(9))
    assert MaxUtilization().judge(step, books.waiting(1)) is Verdict.STOP


@pytest.mark.parametrize(("places", "verdict"), [(0, Verdict.SKIP), (1, Verdict.SKIP), (2, Verdict.ADMIT)])
def test_who_lacks_a_resource_is_passed_over(places: int, verdict: Verdict) -> None:
    books = Books(resources=[Places("plenty", 99), Places("rare", places, wanted=2)])
    assert MaxUtilization().judge(books.a_pass(), books.waiting(4)) is verdict


def test_resources_are_promised_once_in_a_pass() -> None:
    books = Books(resources=[Places("rare", 3, wanted=2)])
    books.waiting(4)
    books.waiting(4)
    assert chunks(books.plan()) == {0: 4}
