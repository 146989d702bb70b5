"""Decodes first, then prompts, as many tokens as the budget allows: one micro-batch takes all it can."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.views import RequestView
from ..base import Capacity, MicroBatch, Ordering, Verdict
from ..scheduling_pass import SchedulingPass


class GreedyMicroBatch(MicroBatch):
    """The unified step of vLLM's V1 scheduler: every request computes its next n tokens, in this order: the queue's
    decodes, the prompts in progress by admission, the waiting by the ordering. Generation loses no budget to prefill.
    """

    def __init__(self) -> None:
        self._turn: dict[int, int] = {}

    def form(self, step: SchedulingPass, waiting: Ordering, capacity: Capacity) -> None:
        self._take_decodes(step, capacity)
        for request in step.table.prefilling.values():
            if not step.has_room:
                return
            self._take_chunk(step, request, capacity)
        for request in waiting.visit(step.now):
            if not step.has_room:
                return
            verdict = capacity.judge(step, request)
            if verdict is Verdict.STOP:
                return
            if verdict is Verdict.ADMIT and not self._start(step, request):
                return

    def _take_decodes(self, step: SchedulingPass, capacity: Capacity) -> None:
        ids = self._rows(step)
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

    def _rows(self, step: SchedulingPass) -> Sequence[int]:
        """The queue's rows; where they exceed a micro-batch, the next ones in turn."""
        ids: Sequence[int] = step.queue.ids
        if step.ahead and (ending := set(step.queue.ending())):
            ids = [request_id for request_id in ids if request_id not in ending]
        limit = min(step.rows_left, step.tokens_left)
        if len(ids) <= limit:
            return ids[:]
        start = self._turn.get(step.queue.index, 0) % len(ids)
        self._turn[step.queue.index] = start + limit
        return [ids[(start + k) % len(ids)] for k in range(limit)]

    @staticmethod
    def _take_chunk(step: SchedulingPass, request: RequestView, capacity: Capacity) -> None:
        start, remaining = request.num_computed_tokens, request.num_tokens - request.num_computed_tokens
        if not remaining or step.is_paused(request.request_id):
            return  # its last chunk is in flight
        size = step.chunk_size(start, remaining)
        if not size:
            return
        num_blocks = step.kv.blocks_to_grow(request.request_id, start + size)
        if num_blocks > step.kv.free_blocks and not capacity.make_room(step, num_blocks):
            return
        if not step.is_paused(request.request_id):
            step.add_chunk(request, size, num_blocks)

    @staticmethod
    def _start(step: SchedulingPass, request: RequestView) -> bool:
        match = step.prefix(request)
        size = step.chunk_size(match.num_tokens, request.num_tokens - match.num_tokens)
        if size:
            step.start(request, size)
        return size > 0
