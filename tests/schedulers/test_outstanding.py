"""How much there is to do, from what the books say now."""

from __future__ import annotations

from typing import Any

import pytest

from llm_engine.schedulers.outstanding import Outstanding, outstanding, tokens_worth, worth
from tests.schedulers.books import Books


def look(books: Books, price: float = 0.0) -> Outstanding:
    return outstanding(books.a_pass(), books.scheduler.ordering, books.scheduler.capacity, price)


def books(**settings: Any) -> Books:
    return Books(**{"num_queues": 2, "num_blocks": 100, "max_num_seqs": 100, **settings})


def test_nothing_is_outstanding_in_empty_books() -> None:
    found = look(books())
    assert (found.num_tokens, found.num_decodes, found.num_prompts, found.crowded) == (0, 0, 0, False)


def test_decodes_count_and_so_do_those_whose_last_chunk_is_in_flight() -> None:
    made = books()
    for queue in (0, 0, 1):
        made.decoding(6, queue=queue)
    for _ in range(4):
        made.joining(6, queue=1)
    made.in_flight(1)
    found = look(made)
    assert (found.num_decodes, found.idle_decodes) == (7, 2)


def test_prompts_count_by_what_is_left_of_them() -> None:
    made = books()
    made.prefilling(20, 8)
    made.joining(8, queue=1)
    made.in_flight(1)
    made.waiting(10)
    found = look(made)
    assert (found.prompt_tokens, found.num_prompts) == (22, 2)


def test_a_prefix_hit_is_not_counted() -> None:
    made = books()
    made.decoding(17, first=1)
    made.waiting(22, first=1)
    assert look(made).prompt_tokens == 6


def test_only_those_count_who_find_memory() -> None:
    made = books(num_blocks=12)  # of 4 tokens
    for _ in range(5):
        made.waiting(16)
    found = look(made)
    assert (found.prompt_tokens, found.num_prompts, found.crowded) == (48, 3, True)


def test_only_those_count_who_find_a_seat() -> None:
    made = books(max_num_seqs=2)
    for _ in range(5):
        made.waiting(16)
    found = look(made)
    assert (found.prompt_tokens, found.crowded) == (32, True)


def test_who_is_refused_by_capacity_does_not_count() -> None:
    made = books(num_blocks=12)
    made.prefilling(44, 4)
    made.waiting(16)
    found = look(made)
    assert (found.prompt_tokens, found.crowded) == (40, True), "the promised blocks are not free"


def test_behind_the_first_of_a_long_line_the_others_are_taken_to_be_alike() -> None:
    made = books(num_blocks=10_000, max_num_seqs=1000)
    for _ in range(500):
        made.waiting(16)
    found = look(made)
    assert (found.prompt_tokens, found.num_prompts, found.crowded) == (8000, 500, False)
    made = books(num_blocks=400, max_num_seqs=1000)
    for _ in range(500):
        made.waiting(16)
    found = look(made)
    assert (found.prompt_tokens, found.num_prompts, found.crowded) == (1600, 100, True)


def test_looking_takes_nothing() -> None:
    made = books()
    made.waiting(16)
    assert look(made) == look(made)
    assert made.kv.num_free_blocks == 100


@pytest.mark.parametrize("price", [0.0, 1e-4, 0.01])
@pytest.mark.parametrize("start", [0, 100, 5000])
@pytest.mark.parametrize("room", [1, 64, 1000])
def test_so_many_tokens_as_the_room_is_worth(price: float, start: int, room: int) -> None:
    count = tokens_worth(room, start, price)
    assert worth(start, count, price) <= room < worth(start, count + 1, price)


def test_no_room_is_worth_no_tokens() -> None:
    assert tokens_worth(0, 10, 0.1) == tokens_worth(-5, 10, 0.1) == tokens_worth(-5, 10, 0.0) == 0


def test_history_makes_the_rest_of_a_prompt_worth_more() -> None:
    made = books(num_blocks=1000)
    made.prefilling(1000, 500)
    assert look(made, 1e-3).mean_worth == pytest.approx(1.75)
    assert look(made).mean_worth == 1.0


def test_who_waits_for_a_hit_is_neither_counted_nor_crowded_out() -> None:
    made = books()
    made.prefilling(20, 8, first=1)
    for _ in range(3):
        made.waiting(20, first=1)
    made.waiting(16)
    found = look(made)
    assert (found.prompt_tokens, found.num_prompts, found.crowded) == (12 + 16, 2, False)


def test_a_line_of_none_but_duplicates_is_looked_at_no_further_than_any() -> None:
    made = books()
    made.prefilling(20, 8, first=1)
    for _ in range(100):
        made.waiting(20, first=1)
    found = look(made)
    assert (found.prompt_tokens, found.crowded) == (12, False)


def test_where_completion_is_reserved_only_those_count_who_may_grow_to_it() -> None:
    made = books(num_blocks=40, scheduler="guaranteed-no-evict")
    for _ in range(5):
        made.waiting(16, max_tokens=50)  # 4 blocks, 17 in the end
    found = look(made)
    assert (found.prompt_tokens, found.crowded) == (32, True)


def test_a_batch_that_is_closed_crowds_everybody_out() -> None:
    made = books(scheduler="static-batch")
    first = made.waiting(16)
    plan = made.plan()
    assert plan is not None
    made.hold(first, 16)
    made.scheduler.update(plan, [])
    made.waiting(16)
    found = look(made)
    assert (found.prompt_tokens, found.crowded) == (0, True)
