"""The stage's books: what a plan changes in them, and the batch they make of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import RequestStart, StepPlan
from llm_engine.workers.slots import FedRows, SlotTable
from tests.plans import GREEDY, Planner

SCORED = SamplingParams(temperature=0.0, prompt_logprobs=0)


def started(slot: int, tokens: list[int], blocks: list[int], request_id: int = 1) -> StepPlan:
    start = RequestStart(request_id, slot, tokens, len(tokens), blocks, GREEDY, 0, 0, [])
    return StepPlan(queue=0, starts=[start])


def chunk(slot: int, start: int, count: int, *, samples: bool, request_id: int = 1) -> StepPlan:
    return StepPlan(
        0, chunk_ids=[request_id], chunk_tokens=[count], chunk_slots=[slot], chunk_starts=[start],
        chunk_samples=[samples],
    )  # fmt: skip


def test_a_batch_of_decodes_and_chunks() -> None:
    table = SlotTable(8, 64, 4)
    planner = Planner(block_size=4)
    a, b, c = planner.add([10, 11, 12, 13, 14]), planner.add(list(range(20, 32))), planner.add([40, 41])
    table.apply(planner.plan({1: 5, 2: 4}))
    a.tokens.append(15)
    plan = planner.plan({1: 1, 2: 6, 3: 2})
    table.apply(plan)
    batch = table.batch(plan)
    assert batch.num_decodes == 1
    assert (batch.num_rows, batch.num_tokens) == (3, 9)
    assert batch.token_ids.tolist() == [15, *range(24, 30), 40, 41]
    assert batch.positions.tolist() == [5, *range(4, 10), 0, 1]
    assert batch.query_starts.tolist() == [0, 1, 7, 9]
    assert batch.kv_lens.tolist() == [6, 10, 2]
    for row, request in enumerate((a, b, c)):
        blocks = batch.block_tables[row].tolist()
        assert blocks == request.blocks + [0] * (len(blocks) - len(request.blocks))
    owners = [a, *[b] * 6, *[c] * 2]
    assert batch.slot_mapping.tolist() == [
        owner.blocks[p // 4] * 4 + p % 4 for owner, p in zip(owners, batch.positions.tolist(), strict=True)
    ]
    assert batch.logit_rows.tolist() == [0, 8]  # b's chunk is not its last
    rows = table.sampling_rows(plan)
    assert (rows.slots.tolist(), rows.positions.tolist(), rows.logit_rows.tolist()) == ([0, 2], [5, 1], [0, 1])
    assert not rows.prompts
    for array, kind in [
        (batch.token_ids, np.int64), (batch.positions, np.int64), (batch.query_starts, np.int32),
        (batch.kv_lens, np.int32), (batch.block_tables, np.int32), (batch.slot_mapping, np.int64),
        (batch.logit_rows, np.int64),
    ]:  # fmt: skip
        assert array.dtype == kind


def test_a_start_replaces_all_that_the_slot_held() -> None:
    table = SlotTable(2, 64, 4)
    table.apply(started(1, list(range(40)), list(range(1, 11))))
    table.apply(started(1, [7, 8], [30], request_id=2))
    plan = chunk(1, 0, 2, samples=True, request_id=2)
    batch = table.batch(plan)
    assert batch.block_tables[0].tolist() == [30, *[0] * (batch.block_tables.shape[1] - 1)]
    assert batch.token_ids.tolist() == [7, 8]


def test_blocks_grow_in_order_also_several_in_one_plan() -> None:
    table = SlotTable(3, 64, 4)
    table.apply(started(0, list(range(20)), [5]))
    table.apply(started(2, list(range(20)), [6], request_id=2))
    table.apply(StepPlan(0, grown_slots=[0, 2, 0], grown_blocks=[9, 8, 7]))
    table.apply(StepPlan(0, grown_slots=[0], grown_blocks=[3]))
    plan = chunk(0, 0, 16, samples=False)
    assert table.batch(plan).block_tables[0, :5].tolist() == [5, 9, 7, 3, 0]
    plan = chunk(2, 0, 8, samples=False, request_id=2)
    assert table.batch(plan).block_tables[0, :3].tolist() == [6, 8, 0]


def test_a_sampling_chunk_after_a_prefix_hit_reads_from_the_start() -> None:
    table = SlotTable(2, 64, 4)
    table.apply(started(0, list(range(10)), [4, 5, 6]))
    batch = table.batch(chunk(0, 8, 2, samples=True))
    assert batch.positions.tolist() == [8, 9]
    assert batch.kv_lens.tolist() == [10]
    assert batch.slot_mapping.tolist() == [24, 25]


def test_every_token_that_a_prompt_is_scored_by_has_a_logit_row() -> None:
    """A prompt of 6 in chunks of 4 and 2, among others; the last chunk's end is sampled, not scored."""
    table = SlotTable(8, 64, 4)
    planner = Planner(block_size=4)
    plain, scored = planner.add([1, 2]), planner.add([3, 4, 5, 6, 7, 8], sampling=SCORED)
    first = planner.plan({1: 2, 2: 4})
    table.apply(first)
    assert table.batch(first).logit_rows.tolist() == [1, 2, 3, 4, 5]
    rows = table.sampling_rows(first)
    assert (rows.slots.tolist(), rows.logit_rows.tolist()) == ([plain.slot], [0])
    (prompt,) = rows.prompts
    assert (prompt.request_id, prompt.slot, prompt.first_row, prompt.count, prompt.first_position) == (2, 1, 1, 4, 0)

    plain.tokens.append(9)
    second = planner.plan({1: 1, 2: 2})
    table.apply(second)
    assert table.batch(second).logit_rows.tolist() == [0, 1, 2]
    rows = table.sampling_rows(second)
    assert (rows.slots.tolist(), rows.logit_rows.tolist()) == ([0, 1], [0, 2])
    (prompt,) = rows.prompts
    assert (prompt.first_row, prompt.count, prompt.first_position) == (1, 1, 4)

    # resumed after two outputs: one chunk recomputes the prompt and what followed; only prompt tokens are scored
    scored.tokens.extend([50, 51])
    planner.pause(scored)
    third = planner.plan({2: 8})
    table.apply(third)
    assert table.batch(third).logit_rows.tolist() == [0, 1, 2, 3, 4, 7]
    assert table.sampling_rows(third).prompts[0].count == 5


def test_a_decodes_input_enters_the_record() -> None:
    table = SlotTable(4, 64, 4)
    table.apply(started(3, [1, 2], [1]))
    table.apply(StepPlan(0, [1], decode_slots=[3], decode_positions=[2], decode_tokens=[77]))
    assert table.tokens[3, :3].tolist() == [1, 2, 77]


@pytest.mark.parametrize("plan", [
    StepPlan(0, [9], decode_slots=[0], decode_positions=[2], decode_tokens=[1]),
    chunk(0, 0, 1, samples=True, request_id=9),
    StepPlan(0, grown_slots=[0] * 20, grown_blocks=[1] * 20),
    started(0, list(range(100)), [1]),
])  # fmt: skip
def test_a_plan_that_contradicts_the_books_is_refused(plan: StepPlan) -> None:
    table = SlotTable(4, 64, 4)
    table.apply(started(0, [1, 2], [1]))
    with pytest.raises(AssertionError):
        table.apply(plan)


def test_a_token_without_a_block_is_refused() -> None:
    table = SlotTable(4, 64, 4)
    table.apply(started(0, list(range(9)), [1, 2]))
    with pytest.raises(AssertionError, match="no block"):
        table.batch(chunk(0, 0, 9, samples=True))


def fed_rows(table: SlotTable, plan: StepPlan) -> FedRows:
    return table.fed_rows(table.sampling_rows(plan))


def test_a_plan_ahead_goes_on_from_what_was_fed() -> None:
    """Decode rows first, then the chunks that sample: the second request's does not."""
    table, planner = SlotTable(8, 64, 4), Planner(block_size=4)
    first = planner.add([10, 11, 12])
    planner.add(list(range(20, 29)))
    planner.add([40, 41])
    table.apply(planner.plan({1: 3}))
    first.tokens.append(13)
    step = planner.plan({1: 1, 2: 4, 3: 2})
    table.apply(step)
    rows = fed_rows(table, step)
    assert (rows.request_ids.tolist(), rows.slots.tolist(), rows.positions.tolist()) == ([1, 3], [0, 2], [4, 2])
    table.feed(rows, [77, 88])
    ahead = planner.plan({1: 1, 2: 5, 3: 1}, feeds_from=step.step)
    assert list(ahead.decode_tokens) == []
    table.apply(ahead)
    batch = table.batch(ahead)
    assert batch.token_ids.tolist() == [77, 88, *range(24, 29)]
    assert batch.positions.tolist() == [4, 2, *range(4, 9)]
    assert table.tokens[0, :5].tolist() == [10, 11, 12, 13, 77]


def decodes(slots: list[int], ids: list[int], positions: list[int]) -> StepPlan:
    return StepPlan(
        queue=0, step=1, decode_ids=ids, decode_slots=slots, decode_positions=positions, decode_tokens=[9] * len(ids)
    )


def test_what_is_fed_reaches_only_who_still_has_its_slot() -> None:
    table = SlotTable(2, 64, 4)
    table.apply(started(0, [1, 2], [1]))
    table.apply(started(1, [3, 4], [2], request_id=2))
    step = decodes([0, 1], [1, 2], [2, 2])
    table.apply(step)
    rows = fed_rows(table, step)
    table.apply(started(1, [5, 6, 7, 8], [3], request_id=3))
    table.feed(rows, [77, 88])
    assert table.tokens[0, :4].tolist() == [1, 2, 9, 77]
    assert table.tokens[1, :4].tolist() == [5, 6, 7, 8]


def test_what_is_fed_behind_the_last_position_is_left_out() -> None:
    table = SlotTable(2, 3, 4)
    table.apply(started(0, [1, 2], [1]))
    table.apply(started(1, [4], [2], request_id=2))
    step = decodes([0, 1], [1, 2], [2, 1])
    table.apply(step)
    table.feed(fed_rows(table, step), [77, 88])
    assert table.tokens.tolist() == [[1, 2, 9], [4, 9, 88]]


def test_large_tables_cost_no_memory_up_front() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    table = SlotTable(1024, 131072, 16)
    table.apply(started(0, list(range(100)), [1]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB; all of it would be 570 MiB


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_batches_agree_with_the_planners_books(data: st.DataObject) -> None:
    """Random steps over random requests, with pauses, finishes and reused slots and blocks."""
    table, planner = SlotTable(6, 64, 4), Planner(block_size=4, num_blocks=200)
    for _ in range(data.draw(st.integers(1, 12))):
        if len(planner.requests) < 6 and data.draw(st.booleans()):
            length = data.draw(st.integers(1, 20))
            planner.add(list(range(length)), sampling=data.draw(st.sampled_from([GREEDY, SCORED])))
        for request in list(planner.requests.values()):
            what = data.draw(st.sampled_from(["run", "run", "run", "pause", "finish"]))
            if what == "pause":
                planner.pause(request)
            elif what == "finish":
                planner.finish(request)
        rows = {}
        for request_id, request in planner.requests.items():
            left = len(request.tokens) - request.num_computed
            if data.draw(st.booleans()):
                rows[request_id] = data.draw(st.integers(1, left))
        plan = planner.plan(rows)
        table.apply(plan)
        if not rows:
            continue
        batch, sampled = table.batch(plan), table.sampling_rows(plan)
        ids = [*plan.decode_ids, *plan.chunk_ids]
        for row, request_id in enumerate(ids):
            request = planner.requests[request_id]
            span = slice(int(batch.query_starts[row]), int(batch.query_starts[row + 1]))
            end = request.num_computed
            positions = list(range(end - rows[request_id], end))
            assert batch.positions[span].tolist() == positions
            assert batch.token_ids[span].tolist() == [request.tokens[p] for p in positions]
            assert batch.slot_mapping[span].tolist() == [request.blocks[p // 4] * 4 + p % 4 for p in positions]
            assert batch.kv_lens[row] == end
            assert batch.block_tables[row, : len(request.blocks)].tolist() == request.blocks
            assert not batch.block_tables[row, len(request.blocks) :].any()
        assert [planner.requests[i].slot for i in plan.sampled_ids] == sampled.slots.tolist()
        assert batch.positions[batch.logit_rows[sampled.logit_rows]].tolist() == sampled.positions.tolist()
        for prompt in sampled.prompts:
            scored = batch.logit_rows[prompt.first_row : prompt.first_row + prompt.count]
            first = prompt.first_position
            assert batch.positions[scored].tolist() == list(range(first, first + prompt.count))
        assert len(batch.logit_rows) == len(sampled.slots) + sum(p.count for p in sampled.prompts)
        for request_id in plan.sampled_ids:
            planner.requests[request_id].tokens.append(data.draw(st.integers(0, 96)))
