"""Seats are counted, blocks are not; what happens where the cache does not hold everybody. Blocks hold 4 tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.errors import CapacityError
from llm_engine.schedulers.base import Verdict
from tests.engine.core_driver import CoreDriver
from tests.engine.test_core_properties import check_outcomes, live, lives, shapes
from tests.schedulers.books import Books, Places, chunks

ADMIT, SKIP, STOP = Verdict.ADMIT, Verdict.SKIP, Verdict.STOP


def books(**settings: Any) -> Books:
    return Books(scheduler="max-requests", **settings)


def judge(made: Books, known: int, **asked: Any) -> Verdict:
    return made.scheduler.capacity.judge(made.a_pass(), made.waiting(known, **asked))


@pytest.mark.parametrize(
    ("residents", "verdict"), [pytest.param(2, ADMIT, id="the last seat"), pytest.param(3, STOP, id="no seat is left")]
)
def test_seats_are_counted(residents: int, verdict: Verdict) -> None:
    made = books(max_num_seqs=3)
    for _ in range(residents):
        made.decoding(4)
    assert judge(made, 4) is verdict


def test_what_prompts_in_progress_still_need_is_not_reserved() -> None:
    made = books(num_blocks=6, max_num_batched_tokens=8)
    made.prefilling(24, 8)  # 4 blocks are free, and it needs them all
    assert judge(made, 16) is ADMIT


@pytest.mark.parametrize(("free", "verdict"), [(2, ADMIT), (1, STOP)])
def test_the_first_chunk_must_find_its_blocks(free: int, verdict: Verdict) -> None:
    made = books(num_blocks=6, max_num_batched_tokens=8)
    made.decoding(4 * (6 - free) + 1)
    assert judge(made, 20) is verdict


def test_a_hit_that_somebody_holds_needs_none() -> None:
    made = books(num_blocks=5)
    made.decoding(17, first=1)
    assert judge(made, 20, first=1) is ADMIT
    assert judge(made, 20, first=2) is STOP


def test_who_would_never_fit_is_not_begun() -> None:
    made = books(num_blocks=5, max_num_batched_tokens=8)
    assert judge(made, 20) is ADMIT
    assert judge(made, 21) is STOP


def test_who_lacks_a_resource_is_passed_over() -> None:
    assert judge(books(resources=[Places("rare", 0)]), 4) is SKIP


def test_duplicates_are_not_deferred() -> None:
    made = books()
    for _ in range(2):
        made.waiting(12, first=1)
    assert chunks(made.plan()) == {0: 12, 1: 12}


def test_nobody_is_paused_to_admit_another() -> None:
    made = books(num_blocks=3, max_num_seqs=2, parts={"ordering": "priority"})
    made.decoding(9, priority=5)
    made.waiting(12, priority=0)
    step = made.a_pass()
    made.scheduler.capacity.make_way(step, made.scheduler.ordering)
    assert step.plan.paused_ids == []
    assert made.scheduler.capacity.judge(step, made.table[1]) is STOP


def test_a_decode_that_finds_no_block_pauses_the_youngest() -> None:
    made = books(num_blocks=4)
    made.decoding(9)
    made.decoding(9)
    plan = made.plan()
    assert plan is not None
    assert (plan.paused_ids, list(plan.decode_ids)) == ([1], [0])


def test_a_pass_that_paused_admits_nobody() -> None:
    made = books(num_blocks=10)
    step = made.a_pass()
    step.pause(made.decoding(9))
    assert made.scheduler.capacity.judge(step, made.waiting(1)) is STOP


def test_more_than_the_cache_holds_take_turns() -> None:
    driver = CoreDriver(preset="max-requests", num_blocks=6, max_num_seqs=4)
    for number in range(4):
        driver.add([number] * 8, 9)  # each needs 4 of 5 blocks in the end
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in range(4))
    assert driver.core.num_preemptions


def test_who_can_never_run_is_told() -> None:
    driver = CoreDriver(preset="max-requests", num_blocks=5)
    asked = driver.add(range(17), 2)
    driver.run()
    error = driver.outcomes[asked].ends[0].error
    assert isinstance(error, CapacityError)
    assert "needs room for 17 tokens and 4 of 4 blocks of 4 are free; raise num_kv_blocks" in str(error)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shapes, st.integers(1, 8), lives, st.sampled_from([None, None, 3, 8]))
def test_any_life_ends_right(shape: dict[str, Any], num_queues: int, todo: list[Any], window: int | None) -> None:
    """Whatever fits alone ends with the right tokens, however much too small the cache is for all."""
    shape = {**shape, "num_queues": num_queues}
    blocks = max(2, 1 + shape.pop("num_tokens") // shape["block_size"])
    driver = CoreDriver(
        **shape | {"preset": "max-requests"},
        parts={"micro_batch": shape["preset"]},
        num_blocks=blocks,
        window=window,
    )
    check_outcomes(driver, live(driver, todo))
