"""What runs now: all decodes, then prompts in order, within the limits of a micro-batch."""

from __future__ import annotations

import pytest

from llm_engine.core.step import StepPlan
from tests.schedulers.books import Books, Places, chunks


def rows(plan: StepPlan | None) -> tuple[list[int], dict[int, int]]:
    assert plan is not None
    return list(plan.decode_ids), chunks(plan)


def test_nothing_to_do_is_no_plan() -> None:
    assert Books().plan() is None


def test_decodes_then_prompts_in_progress_then_the_waiting() -> None:
    books = Books(max_num_batched_tokens=32)
    books.waiting(5)
    books.prefilling(10, 4)
    books.decoding(7)
    books.prefilling(9, 4)
    books.waiting(6)
    assert rows(books.plan()) == ([2], {1: 6, 3: 5, 0: 5, 4: 6})


def test_decodes_of_other_queues_stay_out_and_a_plan_names_its_queue() -> None:
    books = Books(num_queues=2)
    books.decoding(7, queue=0)
    books.decoding(7, queue=1)
    books.in_flight(0)
    plan = books.plan()
    assert plan is not None
    assert (plan.queue, list(plan.decode_ids)) == (1, [1])


def test_an_idle_queue_without_work_leaves_the_turn_to_the_next() -> None:
    books = Books(num_queues=3)
    books.decoding(7, queue=2)
    plan = books.plan()
    assert plan is not None
    assert plan.queue == 2


def test_the_token_budget_goes_to_decodes_first() -> None:
    books = Books(max_num_batched_tokens=10)
    for _ in range(3):
        books.decoding(6)
    books.waiting(20)
    assert rows(books.plan()) == ([0, 1, 2], {3: 4})  # 7 are left, rounded to a block


def test_chunks_end_on_a_multiple_of_the_unit() -> None:
    books = Books(max_num_batched_tokens=13)
    books.waiting(30)
    assert chunks(books.plan()) == {0: 12}
    books = Books(max_num_batched_tokens=13, chunk_unit=1)
    books.waiting(30)
    assert chunks(books.plan()) == {0: 13}


def test_a_chunk_from_an_odd_start_ends_on_a_multiple_too() -> None:
    books = Books(max_num_batched_tokens=8)
    books.prefilling(30, 6)
    assert chunks(books.plan()) == {0: 6}


def test_the_end_of_a_prompt_is_not_rounded() -> None:
    books = Books(max_num_batched_tokens=8)
    books.prefilling(30, 24)
    assert chunks(books.plan()) == {0: 6}


def test_an_unrounded_chunk_rather_than_none() -> None:
    books = Books(max_num_batched_tokens=3)
    books.waiting(30)
    assert chunks(books.plan()) == {0: 3}


def test_decodes_that_leave_less_than_a_unit_do_not_starve_the_prompts() -> None:
    books = Books(max_num_batched_tokens=5)
    for _ in range(3):
        books.decoding(6)
    books.waiting(30)
    assert rows(books.plan()) == ([0, 1, 2], {3: 2})


def test_a_second_prompt_waits_rather_than_take_an_odd_piece() -> None:
    books = Books(max_num_batched_tokens=8)
    books.waiting(6)
    books.waiting(30)
    books.waiting(1)
    assert chunks(books.plan()) == {0: 6}, "nor does anybody overtake it"


def test_no_chunk_is_longer_than_the_threshold() -> None:
    books = Books(max_num_batched_tokens=32, threshold=8)
    books.waiting(30)
    books.waiting(30)
    assert chunks(books.plan()) == {0: 8, 1: 8}


def test_a_threshold_below_the_unit_is_the_unit() -> None:
    books = Books(max_num_batched_tokens=32, chunk_unit=16, threshold=7)
    books.decoding(6)
    books.prefilling(30, 7)
    books.waiting(30)
    assert chunks(books.plan()) == {1: 7, 2: 7}


def test_a_micro_batch_has_so_many_rows() -> None:
    books = Books(max_micro_batch_seqs=3)
    books.decoding(6)
    books.prefilling(9, 4)
    books.waiting(4)
    books.waiting(4)
    assert rows(books.plan()) == ([0], {1: 5, 2: 4})


def test_so_many_are_resident() -> None:
    books = Books(max_num_seqs=2)
    books.decoding(6)
    books.waiting(4)
    books.waiting(4)
    assert rows(books.plan()) == ([0], {1: 4})


@pytest.mark.parametrize("limit", [{"max_micro_batch_seqs": 2}, {"max_num_batched_tokens": 2}])
def test_a_cohort_larger_than_a_micro_batch_takes_turns(limit: dict[str, int]) -> None:
    books = Books(**limit)  # type: ignore[arg-type]
    for _ in range(5):
        books.decoding(6)
    served = []
    for _ in range(5):
        served.append(rows(books.plan())[0])
        assert rows(books.plan())[0] == served[-1], "nothing was pushed, so it is still their turn"
        books.table.queues[0].advance([i for i in range(5) if i not in served[-1]])
    assert served == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]


def test_a_prompt_whose_last_chunk_is_in_flight_is_left_alone() -> None:
    books = Books(num_queues=2)
    books.joining(8, queue=1)
    books.in_flight(1)
    assert books.plan() is None


def test_the_first_decode_goes_ahead_of_the_last_chunks_token_unless_that_is_the_only_one() -> None:
    books = Books(look_ahead=1)
    books.joining(8)
    books.joining(8, max_tokens=1)
    books.joining(8, max_tokens=2)
    books.in_flight(0)
    assert rows(books.plan()) == ([0, 2], {})


def test_the_next_chunk_may_follow_while_the_last_is_in_flight() -> None:
    books = Books(num_queues=2, max_num_batched_tokens=8)
    books.prefilling(20, 8, in_flight=1)
    assert chunks(books.plan()) == {0: 8}


def test_a_prefix_hit_is_not_computed_again() -> None:
    books = Books()
    books.decoding(17, first=1)
    books.waiting(22, first=1)
    assert rows(books.plan()) == ([0], {1: 6})


def test_at_least_one_token_is_computed() -> None:
    books = Books()
    books.decoding(17, first=1)
    books.waiting(16, first=1)
    assert chunks(books.plan()) == {1: 4}


# -- when memory runs short


def test_a_decode_that_needs_a_block_pauses_the_youngest() -> None:
    books = Books(num_blocks=5)
    books.decoding(9)  # its next position opens a block
    books.decoding(6)
    books.decoding(2)
    plan = books.plan()
    assert plan is not None
    assert (list(plan.decode_ids), plan.paused_ids) == ([0, 1], [2])


def test_a_paused_row_no_longer_needs_its_block() -> None:
    books = Books(num_blocks=4)
    books.decoding(9)
    books.decoding(9)
    plan = books.plan()
    assert plan is not None
    assert (list(plan.decode_ids), plan.paused_ids) == ([0], [1])


def test_where_nobody_is_left_to_pause_rows_without_a_block_sit_out() -> None:
    books = Books(num_queues=2, num_blocks=5)
    books.decoding(9, queue=0)
    books.decoding(6, queue=0)
    capacity = books.scheduler.capacity
    capacity.make_room = lambda step, num_blocks: False  # type: ignore[method-assign]
    books.joining(4, queue=1)
    books.in_flight(1)
    plan = books.plan()
    assert plan is not None
    assert (list(plan.decode_ids), plan.paused_ids) == ([1], [])


def test_in_a_window_a_decode_pays_only_its_net_growth() -> None:
    books = Books(num_blocks=4, window=8)
    request = books.decoding(17)
    assert books.kv.num_held(request.request_id) == 4
    plan = books.plan()
    assert plan is not None
    assert (list(plan.decode_ids), plan.paused_ids) == ([0], []), "the block it opens replaces one the window passed"


def test_a_prompt_that_needs_a_block_may_pause_a_younger_resident() -> None:
    books = Books(num_blocks=4, max_num_batched_tokens=8)
    books.prefilling(16, 8)
    books.prefilling(16, 8)
    plan = books.plan()
    assert plan is not None
    assert (chunks(plan), plan.paused_ids) == ({0: 8}, [1])


def test_a_prompt_that_finds_no_room_pauses_itself_and_somebody_else_may_run() -> None:
    books = Books(num_queues=2, num_blocks=5)
    books.decoding(12, queue=0)
    books.prefilling(16, 8)
    books.in_flight(0)
    plan = books.plan()
    assert plan is not None
    assert (plan.num_rows, plan.paused_ids) == (0, [1])


def test_the_head_of_the_line_is_not_overtaken_for_memory() -> None:
    books = Books(num_blocks=4)
    books.decoding(7)
    books.waiting(20)
    books.waiting(2)
    assert rows(books.plan()) == ([0], {})


def test_who_lacks_a_resource_is_overtaken() -> None:
    books = Books(resources=[Places("even numbers only", 0)])
    books.resources.managers[0].needed = lambda request: request.request_id % 2  # type: ignore[method-assign]
    for _ in range(4):
        books.waiting(2)
    assert chunks(books.plan()) == {0: 2, 2: 2}


def test_the_same_books_give_the_same_plan() -> None:
    def make() -> Books:
        books = Books(num_blocks=12, max_num_batched_tokens=12)
        for known in (9, 6, 5, 13):
            books.decoding(known)
        books.prefilling(13, 4)
        for known in (9, 3, 17):
            books.waiting(known)
        return books

    assert make().plan() == make().plan()
