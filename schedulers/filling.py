"""How rows get into a plan, whoever chose them: their blocks, and who sits out when memory is short.

What the micro-batch policies share. Each function fills in the pass's plan and returns when there is no room.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.views import RequestView
from .base import Capacity
from .scheduling_pass import SchedulingPass


class Turns:
    """Which of a queue's rows run, where they exceed a micro-batch: the next ones in turn.

    A turn passes when rows of the queue are pushed: a plan that comes to nothing costs nobody a turn.
    """

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, int, int]] = {}
        """By queue: its pushes at the last answer, where that began and where it ended."""

    def take(self, step: SchedulingPass, ids: Sequence[int]) -> Sequence[int]:
        limit = min(step.rows_left, step.tokens_left // step.limits.tokens_per_decode)
        if len(ids) <= limit:
            return ids[:]
        pushes, start, stop = self._last.get(step.queue.index, (0, 0, 0))
        start = (start if step.queue.num_pushes == pushes else stop) % len(ids)
        self._last[step.queue.index] = step.queue.num_pushes, start, start + limit
        return [ids[(start + k) % len(ids)] for k in range(limit)]


def runnable_decodes(step: SchedulingPass) -> Sequence[int]:
    """The queue's rows, less those that end with the step in flight and those the plan pauses or moves elsewhere."""
    ids: Sequence[int] = step.queue.ids
    gone = {*step.plan.moved_ids, *step.plan.paused_ids}
    if step.ahead:
        gone.update(step.queue.ending())
    return [request_id for request_id in ids if request_id not in gone] if gone else ids


def take_decodes(step: SchedulingPass, ids: Sequence[int], capacity: Capacity) -> None:
    """Take these rows of the queue, as many as find a block where they need one."""
    if not len(ids):
        return
    due = step.queue.due_for_block()
    if len(ids) < len(step.queue):
        taken = set(ids)
        due = [request_id for request_id in due if request_id in taken]
    needed = step.kv.blocks_to_advance(due)
    if needed > step.kv.free_blocks:
        while needed > step.kv.free_blocks and capacity.make_room(step, step.kv.free_blocks + 1):
            due = [request_id for request_id in due if not step.is_paused(request_id)]
            needed = step.kv.blocks_to_advance(due)
        # Where nobody is left to pause (the others are in flight), rows without a block sit this one out.
        stalled = set()
        while needed > step.kv.free_blocks:
            step.is_short = True
            stalled.add(due.pop())
            needed = step.kv.blocks_to_advance(due)
        ids = [i for i in ids if not step.is_paused(i) and i not in stalled]
    step.add_decodes(ids, needed)


def take_chunk(step: SchedulingPass, request: RequestView, capacity: Capacity) -> int:
    """Take the next chunk of a resident's prompt, as long as fits into ``step.tokens_left``; returns its tokens."""
    start, remaining = request.num_computed_tokens, request.num_tokens - request.num_computed_tokens
    if step.is_paused(request.request_id):
        return 0
    size = step.chunk_size(start, remaining)
    if not size:
        return 0
    num_blocks = step.kv.blocks_to_grow(request.request_id, start + size)
    if num_blocks > step.kv.free_blocks and not capacity.make_room(step, num_blocks):
        return 0
    if step.is_paused(request.request_id):
        return 0
    step.add_chunk(request, size, num_blocks)
    return size


def start_prompt(step: SchedulingPass, request: RequestView) -> int:
    """Make a waiting request that capacity admitted resident with its first chunk; returns its tokens."""
    match = step.prefix(request)
    size = step.chunk_size(match.num_tokens, request.num_tokens - match.num_tokens)
    if size:
        step.start(request, size)
    return size
