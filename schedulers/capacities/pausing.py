"""Whom to pause: when a resident finds no block, and when a waiting request outranks residents.

What the capacity policies that pause share. A request in flight is never paused, nor one that the plan carries already.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...core.views import RequestView
from ..scheduling_pass import SchedulingPass


def pause_until_free(step: SchedulingPass, num_blocks: int) -> bool:
    """Pause whom the ordering would pause first, one by one, until so many blocks are free; whether they are."""
    while step.kv.free_blocks < num_blocks:
        chosen = {*step.plan.decode_ids, *step.plan.chunk_ids}
        candidates = (
            request
            for request in step.table.residents()
            if request.request_id not in chosen
            and not step.is_paused(request.request_id)
            and not step.table.is_in_flight(request)
        )
        victim = max(candidates, key=step.ordering.pause_key, default=None)
        if victim is None:
            return False
        step.pause(victim)
    return True


def whom_to_displace(
    step: SchedulingPass, newcomer: RequestView, displaceable: Sequence[RequestView], needed: int, kept: int
) -> list[RequestView]:
    """The fewest of ``displaceable``, those to be paused first taken first, without whom the newcomer finds a seat and
    ``needed`` blocks and has a part in this micro-batch; none where it would not even without all of them.

    ``kept``: free blocks that are not given away while anybody else is resident.
    """
    victims = sorted(displaceable, key=step.ordering.pause_key, reverse=True)
    if step.kv.free_blocks + sum(step.kv.num_held(victim.request_id) for victim in victims) < needed:
        return []
    due = step.queue.due_for_block()
    room = step.kv.free_blocks - step.promised_blocks - step.kv.blocks_to_advance(due)
    freed = step.kv.would_release([victim.request_id for victim in victims], step.prefix(newcomer))
    for count, victim in enumerate(victims, start=1):
        if victim.request_id in step.table.unfilled:
            room += step.promised_to(victim)
        elif victim.request_id in due:
            room += step.kv.blocks_to_advance([victim.request_id])
        seats = step.seats_left + count
        spared = 0 if seats == step.limits.max_num_seqs else kept
        if seats > 0 and needed + spared <= room + freed[count - 1] and _would_run(step, newcomer, victims[:count]):
            return victims[:count]
    return []


def _would_run(step: SchedulingPass, newcomer: RequestView, without: Sequence[RequestView]) -> bool:
    """Whether the micro-batch has room for a newcomer behind the queue's decodes and the prompts in progress, less
    those that would be paused."""
    gone = {request.request_id for request in without}
    limits, least = step.limits, 1
    decodes = len(step.queue) - sum(request_id in step.queue for request_id in gone)
    rows, tokens = step.rows_left - decodes, step.tokens_left - decodes * limits.tokens_per_decode
    for request in step.table.unfilled.values():
        if rows <= 0 or tokens <= 0:
            return False
        if request.request_id not in gone:
            start = request.num_computed_tokens
            rows, tokens = rows - 1, tokens - step.longest_chunk(start, request.num_tokens - start)
            # Behind another chunk one of less than a unit is not begun.
            least = min(limits.unit, newcomer.num_tokens - step.prefix(newcomer).num_tokens)
    return rows > 0 and tokens >= least
