"""Balanced micro-batches over books set up by hand: who decodes where, how many tokens, that nothing stands still."""

from __future__ import annotations

from typing import Any

import pytest

from llm_engine.core.step import StepPlan, StepResult
from tests.schedulers.books import Books, chunks

WIDE: dict[str, Any] = {
    "num_blocks": 4000,
    "max_num_seqs": 300,
    "max_micro_batch_seqs": 300,
    "max_num_batched_tokens": 1000,
}


def balanced(num_stages: int = 4, num_queues: int | None = None, **settings: Any) -> Books:
    return Books(
        scheduler="balanced", num_stages=num_stages, num_queues=num_queues or num_stages, **{**WIDE, **settings}
    )


def fill(books: Books, *lengths: int) -> None:
    """So many decodes in each queue, in turn."""
    for queue, length in enumerate(lengths):
        for _ in range(length):
            books.decoding(6, queue=queue)


def carry_out(books: Books, plan: StepPlan | None) -> StepPlan:
    """What the engine does to the books for a plan of decodes: moves, then flight."""
    assert plan is not None
    for request_id, target in zip(plan.moved_ids, plan.moved_queues, strict=True):
        books.table.move(books.table[request_id], target)
    if plan.num_rows:
        books.pushed(plan)
    return plan


def costs(books: Books, *, base: float, per_token: float, link: float = 0.0, slower: float = 1.0) -> None:
    """Steps have come back that cost so much; the last stage takes ``slower`` times as long."""
    stages = books.table.num_stages
    for tokens in (1, 4, 16, 64, 256, 1024):
        plan = StepPlan(0, chunk_ids=[1], chunk_tokens=[tokens], chunk_starts=[0], chunk_samples=[False])
        at, spans = 1000.0 * tokens, []
        for stage in range(stages):
            end = at + (base + tokens * per_token) * (slower if stage == stages - 1 else 1.0)
            spans.append((at, end))
            at = end + link
        books.table.timing.observe(plan, StepResult(0, 0, [], busy=spans))


# -- who decodes where


@pytest.mark.parametrize("lengths", [(100, 20, 80, 56), (256, 0, 0, 0), (7, 13, 2, 10), (1, 1, 1, 200)])
def test_lopsided_queues_are_even_after_each_has_come_home_once(lengths: tuple[int, ...]) -> None:
    books = balanced()
    fill(books, *lengths)
    for _ in range(4):
        plan = carry_out(books, books.plan())
        while not plan.num_rows:
            plan = carry_out(books, books.plan())
    found = [len(queue) for queue in books.table.queues]
    assert sum(found) == sum(lengths)
    assert max(found) - min(found) <= 1 + sum(lengths) // 4 // 32 * 4


def test_what_is_above_the_share_goes_to_the_shortest() -> None:
    books = balanced()
    fill(books, 9, 1, 4, 2)
    plan = books.plan()
    assert plan is not None
    assert len(plan.decode_ids) == 4
    assert dict(zip(plan.moved_ids, plan.moved_queues, strict=True)) == {4: 1, 5: 1, 6: 1, 7: 3, 8: 3}


def test_a_queue_with_its_share_keeps_its_rows() -> None:
    books = balanced()
    fill(books, 4, 3, 4, 4)
    plan = books.plan()
    assert plan is not None
    assert (len(plan.decode_ids), plan.moved_ids) == (4, [])


def test_a_row_or_two_more_than_many_are_not_worth_a_move() -> None:
    books = balanced()
    fill(books, 65, 64, 64, 63)
    plan = books.plan()
    assert plan is not None
    assert (len(plan.decode_ids), plan.moved_ids) == (65, [])


def test_prompts_that_join_a_queue_count_as_its_own() -> None:
    books = balanced()
    fill(books, 8, 0, 0, 0)
    for queue in (1, 2, 3):
        for _ in range(5):
            books.joining(6, queue=queue)
        books.in_flight(queue)
    plan = books.plan()
    assert plan is not None
    assert plan.moved_ids in ([7], [6, 7], []), "the others have nearly their share"
    assert len(plan.decode_ids) >= 6


def test_rows_move_into_queues_in_flight_too() -> None:
    books = balanced()
    fill(books, 8, 0, 0, 0)
    books.in_flight(1)
    plan = books.plan()
    assert plan is not None
    assert sorted(plan.moved_queues) == [1, 1, 2, 2, 3, 3]


def test_a_queue_above_its_share_is_not_pushed_ahead() -> None:
    books = balanced(num_stages=2, look_ahead=1)
    fill(books, 8, 2)
    for queue in (0, 1):
        books.in_flight(queue)
    assert books.plan() is None
    books = balanced(num_stages=2, look_ahead=1)
    fill(books, 5, 5)
    for queue in (0, 1):
        books.in_flight(queue)
    plan = books.plan()
    assert plan is not None
    assert plan.queue == 0, "pushed longest ago"


def test_one_micro_batch_more_than_queues_in_use_is_pushed_ahead_and_no_second() -> None:
    books = balanced(num_stages=2, look_ahead=1)
    fill(books, 5, 5)
    for queue in (0, 1, 0):
        assert books.plan() is not None
        books.in_flight(queue)
    assert books.plan() is None


def test_rows_of_a_queue_out_of_use_go_to_the_others() -> None:
    books = balanced(num_stages=2, num_queues=4)
    fill(books, 2, 2, 0, 4)
    plan = books.plan()
    while plan is not None and plan.queue != 3:
        carry_out(books, plan)
        plan = books.plan()
    assert plan is not None
    assert plan.num_rows == 0
    assert sorted(plan.moved_queues) == [0, 0, 1, 1]
    carry_out(books, plan)
    assert [len(queue) for queue in books.table.queues] == [4, 4, 0, 0]


def test_a_row_that_is_paused_does_not_move() -> None:
    books = balanced(num_blocks=9, num_stages=2)
    for known in (9, 9, 9, 6):
        books.decoding(known)  # the first three need a block, and one is free
    plan = books.plan()
    assert plan is not None
    assert plan.paused_ids
    assert not set(plan.paused_ids) & set(plan.moved_ids)


# -- nothing stands still


@pytest.mark.parametrize("queue", range(8))
def test_one_decode_on_four_stages_runs(queue: int) -> None:
    books = balanced(num_stages=4, num_queues=8)
    books.decoding(6, queue=queue)
    plan = carry_out(books, books.plan())
    if not plan.num_rows:
        plan = carry_out(books, books.plan())
    assert list(plan.decode_ids) == [0]


def test_one_short_prompt_runs_whole() -> None:
    books = balanced()
    books.waiting(30)
    assert chunks(books.plan()) == {0: 30}


def test_nothing_to_do_is_no_plan() -> None:
    assert balanced().plan() is None


@pytest.mark.parametrize("num_decodes", [1, 2, 3])
def test_a_burst_beside_few_decodes_does_not_wait_until_they_come_home(num_decodes: int) -> None:
    """So few decodes are worth no more queues than they are; the other stages have nothing to do."""
    books = balanced(num_queues=8, look_ahead=1)
    costs(books, base=10e-3, per_token=1e-4)
    fill(books, num_decodes)
    while (plan := books.plan()) is not None:
        carry_out(books, plan)
    assert books.table.num_in_flight == num_decodes
    for _ in range(20):
        books.waiting(100)
    plan = books.plan()
    assert plan is not None
    assert not plan.decode_ids
    assert plan.num_tokens > 100


@pytest.mark.parametrize("limit", [{"max_micro_batch_seqs": 3}, {"max_num_batched_tokens": 3}])
def test_a_share_larger_than_a_micro_batch_takes_turns(limit: dict[str, int]) -> None:
    books = balanced(num_stages=2, **limit)
    fill(books, 7, 7)
    served: list[int] = []
    for _ in range(5):
        plan = books.plan()
        assert plan is not None
        assert plan.queue == 0
        assert len(plan.decode_ids) == 3
        served += plan.decode_ids
        books.table.queues[0].advance([i for i in books.table.queues[0].ids if i not in set(plan.decode_ids)])
    assert set(served[:9]) == set(range(7)), "everybody within three"


def test_a_prompt_above_the_budget_is_split() -> None:
    books = balanced(max_num_batched_tokens=64)
    books.waiting(500)
    assert sum(chunks(books.plan()).values()) <= 64


def test_the_smallest_budget_and_a_price_on_history_leave_a_token() -> None:
    books = balanced(num_stages=2, max_num_batched_tokens=1)
    for start in range(0, 8192, 256):
        plan = StepPlan(0, chunk_ids=[1], chunk_tokens=[256], chunk_starts=[start], chunk_samples=[False])
        seconds = 1e-6 * plan.context_tokens
        books.table.timing.observe(plan, StepResult(0, 0, [], busy=[(0.0, seconds), (seconds, 2 * seconds)]))
    assert books.table.timing.history_price > 0
    books.prefilling(3000, 2000)
    assert chunks(books.plan()) == {0: 1}


# -- how many tokens


def test_prompts_are_shared_out_among_the_queues_beside_their_decodes() -> None:
    books = balanced()
    fill(books, 10, 10, 10, 10)
    books.waiting(64)
    plan = books.plan()
    assert plan is not None
    assert (len(plan.decode_ids), chunks(plan)) == (10, {40: 16}), "a quarter of 104, and chunks are multiples of 4"


def test_a_burst_is_cut_so_that_the_pipeline_fills_soon() -> None:
    books = balanced(max_num_batched_tokens=100_000, num_blocks=40_000)
    for _ in range(256):
        books.waiting(128)
    plan = books.plan()
    assert plan is not None
    assert 300 <= plan.num_tokens <= 1200, "not a quarter of all, 8192"


def test_the_size_of_a_burst_holds_to_its_end() -> None:
    books = balanced(max_num_batched_tokens=100_000, num_blocks=40_000)
    requests = [books.waiting(128) for _ in range(256)]
    first = books.plan()
    assert first is not None
    for request in requests[:200]:
        books.scheduler.abort(request.request_id)
    plan = books.plan()
    assert plan is not None
    assert plan.num_tokens == first.num_tokens


def test_one_stage_takes_all_a_budget_allows() -> None:
    books = balanced(num_stages=1)
    for _ in range(30):
        books.waiting(100)
    plan = books.plan()
    assert plan is not None
    assert plan.num_tokens == 1000


@pytest.mark.parametrize(("num_decodes", "num_blocks", "tokens"), [(0, 4000, 12_000), (1, 4000, 2048), (0, 2000, 2048)])
def test_one_stage_takes_a_burst_at_once_where_memory_holds_it_and_no_decode_would_wait(
    num_decodes: int, num_blocks: int, tokens: int
) -> None:
    """There is no pipeline to fill. Blocks are of four tokens; sixteen times the usual knee is 2048."""
    books = balanced(num_stages=1, max_num_batched_tokens=100_000, num_blocks=num_blocks)
    fill(books, num_decodes)
    for _ in range(120):
        books.waiting(100)
    plan = books.plan()
    assert plan is not None
    assert (len(plan.decode_ids), sum(plan.chunk_tokens)) == (num_decodes, tokens)


def test_where_memory_is_short_prompts_ride_with_the_decodes() -> None:
    """Those who come in as others leave take what a step has room for, not all that memory allows."""
    books = balanced(num_blocks=500)
    costs(books, base=16e-3, per_token=2e-4)  # as many as 80 tokens in the time of the fixed part
    for _ in range(100):
        books.waiting(60)
    plan = books.plan()
    assert plan is not None
    assert 60 <= plan.num_tokens <= 150


def test_micro_batches_respect_what_is_left_of_rows_and_seats() -> None:
    books = balanced(max_micro_batch_seqs=3, max_num_seqs=4)
    fill(books, 1, 0, 0, 0)
    for _ in range(9):
        books.waiting(4)
    plan = books.plan()
    assert plan is not None
    assert plan.num_rows <= 3


def test_chunks_shrink_as_their_history_grows() -> None:
    books = balanced(num_stages=2, num_blocks=9000, max_num_batched_tokens=4000)
    for start in range(0, 16384, 256):
        plan = StepPlan(0, chunk_ids=[1], chunk_tokens=[256], chunk_starts=[start], chunk_samples=[False])
        seconds = 1e-3 + 1e-4 * 256 + 5e-8 * plan.context_tokens  # a token before costs a two-thousandth of a token
        books.table.timing.observe(plan, StepResult(0, 0, [], busy=[(0.0, seconds), (seconds, 2 * seconds)]))
    request = books.waiting(16000)
    times, computed = [], 0
    while computed < 15000:
        size = chunks(books.plan())[0]
        times.append(size + 5e-4 * (size * computed + size * size / 2))
        if computed == 0:
            books.scheduler.abort(0)
            books.hold(request, size)
        else:
            request.num_computed_tokens = computed + size
            books.kv.grow(0, computed + size)
        computed += size
    assert max(times) < 1.35 * min(times)
    assert 8 <= len(times) <= 60


@pytest.mark.parametrize(("unit", "size"), [(128, 128), (48, 144), (80, 160), (50, 150), (60, 120)])
def test_a_chunk_ends_at_the_nearest_multiple_of_the_unit(unit: int, size: int) -> None:
    books = balanced(chunk_unit=unit)
    books.waiting(400)
    assert chunks(books.plan()) == {0: size}, "128 are as good as any number, until costs are known"


@pytest.mark.parametrize(("unit", "size"), [(44, 132), (48, 96)])
def test_beside_decodes_it_ends_at_the_nearest_too(unit: int, size: int) -> None:
    books = balanced(chunk_unit=unit)
    fill(books, 10, 10, 10, 10)
    books.waiting(800)
    plan = books.plan()
    assert plan is not None
    assert (len(plan.decode_ids), chunks(plan)) == (10, {40: size}), "118 beside them make 128"


# -- how many queues


def test_as_many_queues_as_stages_until_costs_are_known() -> None:
    books = balanced(num_stages=3, num_queues=6)
    fill(books, 30, 0, 0, 0, 0, 0)
    plan = books.plan()
    assert plan is not None
    assert len(plan.decode_ids) == 10
    assert set(plan.moved_queues) == {1, 2}


def test_links_make_room_for_more_queues() -> None:
    """Three of 10 rows: 53 ms round for 33 of work. Six of 5: 38 for 36."""
    books = balanced(num_stages=3, num_queues=6)
    costs(books, base=1e-3, per_token=1e-3, link=10e-3)
    fill(books, 30, 0, 0, 0, 0, 0)
    plan = books.plan()
    assert plan is not None
    assert len(plan.decode_ids) == 5


def test_where_one_stage_is_slow_and_rows_are_cheap_queues_collapse() -> None:
    """Once round is 70 ms, and every micro-batch takes 40 in the last stage: two of them take longer than one."""
    books = balanced(num_stages=4, num_queues=8)
    costs(books, base=10e-3, per_token=1e-6, slower=4.0)
    fill(books, 16, 0, 0, 0, 0, 0, 0, 0)
    plan = books.plan()
    assert plan is not None
    assert len(plan.decode_ids) == 16


def test_where_it_makes_no_difference_there_are_as_many_as_stages() -> None:
    books = balanced(num_stages=4, num_queues=8)
    costs(books, base=10e-3, per_token=1e-9)
    fill(books, 16, 0, 0, 0, 0, 0, 0, 0)
    plan = books.plan()
    assert plan is not None
    assert len(plan.decode_ids) == 4


def test_it_asks_for_more_queues_than_stages_where_there_are_several() -> None:
    scheduler = balanced().scheduler
    assert [scheduler.num_queues(stages) for stages in (1, 2, 4)] == [1, 4, 8]


def test_the_same_books_give_the_same_plan() -> None:
    def make() -> Books:
        books = balanced(num_blocks=120, max_num_batched_tokens=40)
        costs(books, base=5e-3, per_token=1e-4, link=1e-3)
        fill(books, 9, 3, 0, 1)
        books.prefilling(13, 4)
        for known in (9, 3, 17):
            books.waiting(known)
        return books

    first, second = make(), make()
    for _ in range(3):
        assert first.plan() == second.plan()
