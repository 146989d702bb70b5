"""Draft tokens: how many a prompt's last chunk may carry, and that budgets count those of decodes."""

from __future__ import annotations

import pytest

from llm_engine.schedulers.drafts import fit_drafts
from llm_engine.schedulers.limits import Limits
from tests.schedulers.books import Books


@pytest.mark.parametrize(
    ("name", "chunks", "budget", "longest", "expected"),
    [
        ("all of them where the block has room", [(9, 9, True)], 99, None, [3]),
        ("up to the end of the block", [(10, 10, True)], 99, None, [2]),
        ("none where the chunk ends with its block", [(12, 12, True)], 99, None, [0]),
        ("the position counts, not the size", [(4, 13, True)], 99, None, [3]),
        ("none with a chunk that is not the last", [(8, 9, False), (9, 9, True)], 99, None, [0, 3]),
        ("as far as the budget goes, in order", [(9, 9, True), (5, 5, True), (1, 1, True)], 5, None, [3, 2, 0]),
        ("what one leaves is the next one's", [(11, 11, True), (9, 9, True)], 4, None, [1, 3]),
        ("within the longest chunk", [(9, 9, True), (5, 5, True)], 99, 10, [1, 3]),
        ("a chunk as long as may be has none", [(9, 9, True)], 99, 9, [0]),
        ("nothing left is nothing", [(9, 9, True)], 0, None, [0]),
    ],
)
def test_last_chunks(
    name: str, chunks: list[tuple[int, int, bool]], budget: int, longest: int | None, expected: list[int]
) -> None:
    assert fit_drafts(chunks, 3, 4, budget, longest) == expected, name


def drafting(num_drafts: int, budget: int) -> Books:
    books = Books(max_num_batched_tokens=budget)
    books.limits = Limits(8, 8, budget, 4, num_draft_tokens=num_drafts)
    books.scheduler.limits = books.limits
    return books


def test_a_decode_costs_its_token_and_its_drafts() -> None:
    books = drafting(2, 12)
    for _ in range(2):
        books.decoding(6)
    books.waiting(30)
    plan = books.plan()
    assert plan is not None
    assert (list(plan.decode_ids), plan.chunk_tokens) == ([0, 1], [4]), "six are left, and chunks are multiples of 4"


def test_decodes_that_exceed_the_budget_with_their_drafts_take_turns() -> None:
    books = drafting(3, 9)
    for _ in range(3):
        books.decoding(6)
    plan = books.plan()
    assert plan is not None
    assert list(plan.decode_ids) == [0, 1]


def test_the_pass_fits_the_drafts_of_last_chunks_into_what_is_left() -> None:
    books = drafting(3, 16)
    books.waiting(5)
    books.waiting(9)
    step = books.a_pass()
    step.start(books.table[0], 5)
    step.start(books.table[1], 9)
    step.finish()
    assert step.chunk_drafts == [2, 0], "two tokens are left"


def test_nothing_drafts_where_nothing_is_said() -> None:
    books = Books()
    books.waiting(5)
    step = books.a_pass()
    step.start(books.table[0], 5)
    step.finish()
    assert (books.limits.tokens_per_decode, step.chunk_drafts) == (1, [])
