"""From a checked decision to a plan the stages can run: takes slots and blocks, moves positions, publishes hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..core.errors import SchedulerError
from ..core.request import Request, RequestEvent
from ..core.request_table import RequestTable
from ..core.step import RequestStart, StepPlan

if TYPE_CHECKING:
    from .core import EngineCore


def book(core: EngineCore, plan: StepPlan, now: float, most_found: Mapping[int, int]) -> list[Request]:
    """Fill in the plan's booking columns and move the books to where the step will have brought them; returns the
    requests in the order of ``plan.sampled_ids``. Decode rows stand in the order of the queue's.

    ``most_found``: of newcomers by request id, tokens of the hit that their plan counted on, where the cache may hold
    more of their prefix by now. A longer hit would take more free blocks than were counted.

    Under the state lock. Raises ``SchedulerError`` where the plan needs more blocks than are free; what was booked
    before that stays consistent, and the engine ends with the error.
    """
    carry_out_moves(core.table, plan)
    # The order the prediction assumes: newcomers hold their hits before anybody's growth can evict them.
    newcomers = {row: core.table[i] for row, i in enumerate(plan.chunk_ids) if not core.table[i].is_resident}
    for row, request in newcomers.items():
        cached = _hold(core, plan, request, most_found.get(request.request_id, request.num_tokens), now)
        # A policy of somebody else's may not have counted on the hit.
        plan.chunk_tokens[row] = min(plan.chunk_tokens[row], request.num_tokens - cached)
    for row, request in newcomers.items():
        reached = request.num_computed_tokens + plan.chunk_tokens[row]
        _demand(core, request, core.kv.blocks_to_grow(request.request_id, reached))
        core.kv.grow(request.request_id, reached)
        plan.starts.append(_start_of(core, request))
    started = {request.request_id for request in newcomers.values()}
    sampled = _book_decodes(core, plan)
    for request_id, num_tokens in zip(plan.chunk_ids, plan.chunk_tokens, strict=True):
        request = core.table[request_id]
        start = request.num_computed_tokens
        if request_id not in started:
            _grow(core, plan, request, start + num_tokens)
        assert request.slot is not None
        plan.chunk_slots.append(request.slot)
        plan.chunk_starts.append(start)
        request.num_computed_tokens = start + num_tokens
        plan.chunk_samples.append(request.num_computed_tokens == request.num_tokens)
        if plan.chunk_samples[-1]:
            core.table.start_decode(request, plan.queue)
            sampled.append(request)
        core.kv.publish(request_id, request.block_hashes, request.num_computed_tokens, plan.step)
    return sampled


def carry_out_moves(table: RequestTable, plan: StepPlan) -> None:
    """Decodes change their queues; nothing is taken for it. Under the state lock."""
    for request_id, target in zip(plan.moved_ids, plan.moved_queues, strict=True):
        table.move(table[request_id], target)


def _book_decodes(core: EngineCore, plan: StepPlan) -> list[Request]:
    queue, kv = core.table.queues[plan.queue], core.kv
    if not len(plan.decode_ids):
        return []
    left_out: Sequence[int] = ()
    if len(plan.decode_ids) < len(queue):
        left_out = queue.ending() if queue.in_flight else ()
        if len(plan.decode_ids) + len(left_out) != len(queue):
            chosen = set(plan.decode_ids)
            left_out = [request_id for request_id in queue.ids if request_id not in chosen]
    rows = queue.rows(left_out)
    plan.decode_ids, plan.decode_slots, plan.decode_positions, requests = rows
    if queue.last_sampled is None:
        plan.decode_tokens = [request.token_ids[-1] for request in requests]
    else:
        # Ahead of its tokens: where a row was not in that step its token is known, and the workers know it as well.
        plan.feeds_from = queue.last_sampled
    due = [request_id for request_id in queue.due_for_block() if request_id not in left_out]
    needed = kv.blocks_to_advance(due)
    if needed > kv.num_free_blocks:
        raise SchedulerError(
            f"scheduler {core.scheduler_name} returned an impossible plan: its decodes need {needed} blocks and "
            f"{kv.num_free_blocks} are free"
        )
    for request_id in due:
        request = core.table[request_id]
        # The block before is full, and all its tokens are known: of a row in flight only the last one is not.
        core.extend_hashes(request)
        kv.publish(request_id, request.block_hashes, queue.position(request_id), plan.step)
        assert request.slot is not None
        plan.grown_slots.append(request.slot)
        plan.grown_blocks.append(kv.grow_by_one(request_id))
    queue.advance(left_out)
    return requests


def _grow(core: EngineCore, plan: StepPlan, request: Request, num_tokens: int) -> None:
    _demand(core, request, core.kv.blocks_to_grow(request.request_id, num_tokens))
    assert request.slot is not None
    for block in core.kv.grow(request.request_id, num_tokens):
        plan.grown_slots.append(request.slot)
        plan.grown_blocks.append(block)


def _hold(core: EngineCore, plan: StepPlan, request: Request, most_found: int, now: float) -> int:
    """Make a newcomer resident, with its prefix hit and a slot; returns the tokens of the hit."""
    resumed = request.num_preemptions > 0
    cached = core.kv.add_sequence(
        request.request_id,
        request.block_hashes[: most_found // core.kv.block_size],
        request.num_tokens,
        read_prefix=request.reads_prefix_cache,
        resumed=resumed,
    )
    request.slot = core.slots.acquire()
    request.start_step = plan.step
    core.table.start_prefill(request, cached)
    if request.num_cached_tokens is None:
        request.num_cached_tokens = cached
    if resumed:
        plan.resumed_ids.append(request.request_id)
    request.record(RequestEvent.RESUMED if resumed else RequestEvent.SCHEDULED, now)
    core.view.forget(request.request_id)
    return cached


def _start_of(core: EngineCore, request: Request) -> RequestStart:
    assert request.slot is not None
    return RequestStart(
        request_id=request.request_id,
        slot=request.slot,
        token_ids=list(request.token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        block_ids=core.kv.block_ids(request.request_id),
        sampling=request.params,
        seed=request.seed,
        choice_index=request.choice_index,
        stop_ids=sorted(request.stop_ids),
        bad_words_ids=request.bad_words_ids,
        adapter_id=request.adapter_id,
    )


def _demand(core: EngineCore, request: Request, num_blocks: int) -> None:
    if num_blocks > core.kv.num_free_blocks:
        raise SchedulerError(
            f"scheduler {core.scheduler_name} returned an impossible plan: request {request.external_id} needs "
            f"{num_blocks} blocks and {core.kv.num_free_blocks} are free"
        )
