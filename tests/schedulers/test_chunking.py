"""How prompts share a micro-batch, for both policies that chunk: one table, the two ways beside each other.

Blocks and units are 4 tokens. Requests are numbered as they are made: decodes, prompts in progress, the waiting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_engine.core.errors import ConfigError
from llm_engine.core.step import StepPlan
from llm_engine.schedulers import chunking
from llm_engine.schedulers.base import Scheduler
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization
from llm_engine.schedulers.chunking import CHUNKINGS, Chunk, ChunkingOptions, equal_progress
from llm_engine.schedulers.micro_batches.balanced import BalancedMicroBatch
from llm_engine.schedulers.micro_batches.greedy import GreedyMicroBatch
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from tests.schedulers.books import Books, Places, chunks

POLICIES = {"greedy": GreedyMicroBatch, "balanced": BalancedMicroBatch}


def books_of(policy: str, way: str, **settings: Any) -> Books:
    made = Books(**settings)
    micro_batch = POLICIES[policy](ChunkingOptions(chunking=way))
    made.scheduler = Scheduler(FcfsOrdering(), MaxUtilization(), micro_batch, made.limits, made.resources)
    return made


@dataclass(frozen=True)
class Case:
    """What there is, and the chunks that each way makes of it."""

    name: str
    budget: int
    fcfs: dict[int, int]
    equal: dict[int, int]
    decodes: int = 0
    prefilling: tuple[tuple[int, int], ...] = ()
    """Known tokens, computed."""
    waiting: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("one prompt alone takes all it can", 12, {0: 12}, {0: 12}, waiting=(30,)),
    Case("a unit each, then another for the first", 12, {0: 12}, {0: 8, 1: 4}, waiting=(30, 30)),
    Case("a round that comes out even", 16, {0: 16}, {0: 8, 1: 8}, waiting=(30, 30)),
    Case("what fits whole is not chunked", 24, {0: 6, 1: 18}, {0: 6, 1: 18}, waiting=(6, 18)),
    Case("one that ends leaves its turns to others", 16, {1: 8, 0: 6}, {1: 8, 0: 6}, waiting=(6, 30)),
    Case("by admission, then the waiting", 12, {0: 12}, {0: 8, 1: 4}, prefilling=((30, 8),), waiting=(30,)),
    Case("decodes come first", 10, {3: 4}, {3: 4}, decodes=3, waiting=(30,)),
    Case("a unit that is too large is nobody's but the first's", 5, {3: 2}, {3: 2}, decodes=3, waiting=(30, 30)),
    Case("who has less left than a unit still runs", 7, {0: 4, 1: 2}, {0: 4, 1: 2}, prefilling=((30, 8), (10, 8))),
    Case("nor is it put off by one whose unit did not fit", 6, {0: 4, 2: 2}, {0: 4, 2: 2},
         prefilling=((30, 8), (30, 8), (10, 8))),
    Case("one of the waiting is not overtaken", 6, {0: 4}, {0: 4}, waiting=(30, 30, 2)),
    Case("an odd start is brought to a multiple", 10, {0: 10}, {0: 6, 1: 4}, prefilling=((30, 6),), waiting=(30,)),
    Case("the end of a prompt is not rounded", 32, {1: 28, 0: 3}, {1: 28, 0: 3}, prefilling=((11, 8),), waiting=(50,)),
    Case("no more than there are seats", 32, {0: 30}, {0: 16, 1: 16}, waiting=(30, 30, 30),
         settings={"max_num_seqs": 2}),
    Case("no more than there are rows", 32, {0: 30}, {0: 16, 1: 16}, waiting=(30, 30, 30),
         settings={"max_micro_batch_seqs": 2}),
    Case("none longer than the threshold", 32, {0: 8, 1: 8, 2: 6}, {0: 8, 1: 8, 2: 6}, waiting=(30, 30, 6),
         settings={"threshold": 8}),
    Case("a threshold below the unit is the unit", 9, {0: 3, 1: 3, 2: 3}, {0: 3, 1: 3, 2: 3}, waiting=(30, 30, 30),
         settings={"threshold": 3}),
    Case("a larger unit", 32, {0: 32}, {0: 16, 1: 16}, waiting=(60, 60), settings={"chunk_unit": 16}),
    Case("only whom memory admits", 32, {0: 30}, {0: 30}, waiting=(30, 30, 2), settings={"num_blocks": 12}),
]  # fmt: skip


def plan_of(case: Case, policy: str, way: str) -> tuple[Books, StepPlan]:
    made = books_of(policy, way, **{"max_num_batched_tokens": case.budget, **case.settings})
    for _ in range(case.decodes):
        made.decoding(6)
    for known, computed in case.prefilling:
        made.prefilling(known, computed)
    for known in case.waiting:
        made.waiting(known)
    plan = made.plan()
    assert plan is not None
    return made, plan


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fcfs(case: Case, policy: str) -> None:
    _, plan = plan_of(case, policy, "fcfs")
    assert list(chunks(plan).items()) == list(case.fcfs.items())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_progress(case: Case, policy: str) -> None:
    made, plan = plan_of(case, policy, "equal-progress")
    assert list(chunks(plan).items()) == list(case.equal.items())
    first = case.decodes + len(case.prefilling)
    started = [request_id for request_id in plan.chunk_ids if request_id >= first]
    assert len(made.scheduler.ordering) == len(case.waiting) - len(started), "who got nothing waits on"


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", CHUNKINGS)
def test_chunks_that_do_not_end_their_prompts_stand_first(policy: str, way: str) -> None:
    made = books_of(policy, way, threshold=8)
    for known in (6, 30, 5, 20):
        made.waiting(known)
    plan = made.plan()
    assert plan is not None
    assert (plan.chunk_ids, plan.chunk_tokens) == ([1, 3, 0, 2], [8, 8, 6, 5])


@pytest.mark.parametrize("policy", POLICIES)
def test_within_each_they_go_by_adapter_none_first_and_else_stay_as_they_were(policy: str) -> None:
    made = books_of(policy, "fcfs", threshold=4)
    adapters = ("b", None, "a", None, "b", "a", None, "b")
    for number, adapter in enumerate(adapters):
        made.waiting(30 if number < 4 else 4).adapter_id = adapter
    plan = made.plan()
    assert plan is not None
    assert plan.chunk_ids == [1, 3, 2, 0, 6, 5, 4, 7]


def test_a_prefix_hit_is_no_progress_to_catch_up_with() -> None:
    made = books_of("greedy", "equal-progress", max_num_batched_tokens=12)
    made.decoding(17, first=1)
    made.waiting(30, first=1)  # 16 of its tokens are found
    made.waiting(30)
    assert chunks(made.plan()) == {1: 4, 2: 4}, "11 are left beside the decode"


def test_who_lacks_a_resource_is_passed_over() -> None:
    made = books_of("greedy", "equal-progress", max_num_batched_tokens=16, resources=[Places("even numbers only", 0)])
    made.resources.managers[0].needed = lambda request: request.request_id % 2  # type: ignore[method-assign]
    for _ in range(4):
        made.waiting(30)
    assert chunks(made.plan()) == {0: 8, 2: 8}


def test_a_chunk_grows_as_far_as_there_are_blocks_and_pauses_nobody_for_it() -> None:
    made = books_of("greedy", "equal-progress", num_queues=2, num_blocks=6)
    made.decoding(12, queue=0)
    made.prefilling(16, 8)
    made.in_flight(0)
    plan = made.plan()
    assert plan is not None
    assert (chunks(plan), plan.paused_ids) == ({1: 4}, []), "one block is free, and its other unit would need two"


def test_its_first_unit_may_pause_a_younger_one_as_ever() -> None:
    made = books_of("greedy", "equal-progress", num_blocks=5, max_num_batched_tokens=8)
    made.prefilling(16, 8)
    made.prefilling(16, 8)
    plan = made.plan()
    assert plan is not None
    assert (chunks(plan), plan.paused_ids) == ({0: 8}, [1])


@pytest.mark.parametrize("window", [None, 8])
def test_what_the_rounds_take_is_counted_as_if_taken_at_once(window: int | None) -> None:
    made = books_of("greedy", "equal-progress", num_blocks=40, window=window)
    made.prefilling(30, 13)
    made.waiting(30)
    made.waiting(9)
    step = made.a_pass()
    before = step.kv.free_blocks
    made.scheduler.micro_batch.form(step, made.scheduler.ordering, made.scheduler.capacity)
    assert dict(zip(step.plan.chunk_ids, step.plan.chunk_tokens, strict=True)) == {0: 11, 1: 12, 2: 9}
    predicted, reserved, promised = before - step.kv.free_blocks, step.reserved_blocks, step.promised_blocks

    once = made.a_pass()
    once.add_chunk(made.table[0], 11, once.kv.blocks_to_grow(0, 24))
    once.start(made.table[1], 12)
    once.start(made.table[2], 9)
    assert (predicted, reserved, promised) == (before - once.kv.free_blocks, once.reserved_blocks, once.promised_blocks)
    assert step.tokens_left == once.tokens_left == 0


def test_balanced_shares_out_what_it_thinks_right_not_the_budget() -> None:
    made = books_of("balanced", "equal-progress", num_stages=4, num_queues=4, num_blocks=4000, max_num_seqs=100,
                    max_micro_batch_seqs=100, max_num_batched_tokens=1000)  # fmt: skip
    for queue in range(4):
        for _ in range(10):
            made.decoding(6, queue=queue)
    made.waiting(32)
    made.waiting(32)
    plan = made.plan()
    assert plan is not None
    assert (len(plan.decode_ids), chunks(plan)) == (10, {40: 8, 41: 8}), "a quarter of 104, in multiples of 4"


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="chunking is 'equal'; allowed: fcfs, equal-progress"):
        ChunkingOptions(chunking="equal")


# -- the rounds by themselves


def unit_by_unit(rows: list[Chunk], unit: int, tokens: int) -> list[int]:
    """The rule as it is written."""
    sizes = [row.size for row in rows]
    progress = True
    while progress and tokens:
        progress = False
        for index, row in enumerate(rows):
            reached = row.start + sizes[index]
            more = min(unit - reached % unit, row.most - sizes[index])
            if 0 < more <= tokens:
                sizes[index], tokens, progress = sizes[index] + more, tokens - more, True
    return sizes


ROWS = st.lists(
    st.builds(lambda start, size, more: Chunk(start, size, size + more), st.integers(0, 40), st.integers(1, 20),
              st.integers(0, 90)),
    max_size=8,
)  # fmt: skip


@given(ROWS, st.integers(1, 20), st.integers(0, 300))
def test_rounds_that_are_counted_end_as_those_gone_through(rows: list[Chunk], unit: int, tokens: int) -> None:
    assert equal_progress(rows, unit, tokens) == unit_by_unit(rows, unit, tokens)


@given(ROWS, st.integers(1, 20), st.integers(0, 300), st.floats(0, 400), st.floats(0, 0.01))
def test_with_a_price_on_history_both_budgets_hold_and_nothing_that_fits_is_left(
    rows: list[Chunk], unit: int, tokens: int, room: float, price: float
) -> None:
    sizes = equal_progress(rows, unit, tokens, room, price)
    taken = sum(sizes) - sum(row.size for row in rows)
    spent = sum(
        chunking.worth(row.start + row.size, size - row.size, price) for row, size in zip(rows, sizes, strict=True)
    )
    assert taken <= tokens
    assert spent <= room + 1e-6
    for row, size in zip(rows, sizes, strict=True):
        assert row.size <= size <= row.most
        more = min(unit - (row.start + size) % unit, row.most - size)
        if more:
            dear = chunking.worth(row.start + size, more, price) > room - spent - 1e-6
            assert taken + more > tokens or dear


def test_many_rounds_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    worth = chunking.worth

    def counted(*args: Any) -> float:
        nonlocal calls
        calls += 1
        return worth(*args)

    monkeypatch.setattr(chunking, "worth", counted)
    rows = [Chunk(0, 1, 100_000 * (i + 1)) for i in range(10)]
    assert sum(equal_progress(rows, 1, 1_000_000)) == 1_000_010
    assert calls < 2000
