"""Micro-batches of equal size, so that every stage of a pipeline has as much to do as the others at any time."""

from __future__ import annotations

from collections.abc import Iterator

from ...core.views import QueueView, RequestView, TableView
from ..base import Capacity, MicroBatch, Ordering, Verdict
from ..batch_size import BatchSize
from ..filling import Turns, runnable_decodes, start_prompt, take_chunk, take_decodes
from ..outstanding import outstanding, tokens_worth, worth
from ..queue_count import QueueCount
from ..scheduling_pass import SchedulingPass


class BalancedMicroBatch(MicroBatch):
    """Four choices, each from what is there now:

    1. how many queues are in use (``QueueCount``): what steps cost decides;
    2. who decodes in which: a queue that comes home with more than its share hands the rest to the shortest ones;
    3. how large a micro-batch is (``BatchSize``): its share of what is outstanding, and no more than pays;
    4. who is in it: the queue's decodes, then prompts in progress by admission, then the waiting by the ordering, in
       chunks that shrink as what lies before them grows, so that micro-batches take equal time.

    Sources: the rule of vLLM PR #19873 (outstanding tokens / stages), bound late and split; SGLang's chunks by fitted
    cost.
    """

    def __init__(self) -> None:
        self._turns = Turns()
        self._queues = QueueCount()
        self._size = BatchSize()

    def num_queues(self, num_stages: int) -> int:
        return 2 * num_stages if num_stages > 1 else 1

    def visit(self, table: TableView) -> Iterator[QueueView]:
        """Idle queues, then, with one micro-batch in flight for each queue in use, one of them once more."""
        in_use = self._queues.count or table.num_stages
        idle, asked = table.idle_queues(), max(in_use, table.num_stages)
        # Of those without decodes only the lowest: the count is chosen anew while one forms, and may leave others out.
        # Up to the stages also beyond the count: a burst beside one decode must not wait until that comes home.
        empty = asked
        for queue in idle:
            if queue.index < empty and not queue.ids:
                empty = queue.index
        for queue in idle:
            if queue.ids or queue.index == empty < asked:
                yield queue
        if table.num_in_flight <= max(in_use, table.num_stages):
            yield from table.queues_to_look_ahead()

    def form(self, step: SchedulingPass, waiting: Ordering, capacity: Capacity) -> None:
        table, queue = step.table, step.queue
        price = table.timing.history_price
        work = outstanding(step, waiting, capacity, price)
        largest = self._size.largest(table, work, step.limits, self._queues.count or table.num_stages)
        in_use = self._queues.choose(table, work, largest)
        share = -(-work.num_decodes // in_use) if queue.index < in_use else 0
        if len(queue) > share + share // 32:
            if step.ahead:
                return  # its rows must come home before they can move
            self._level(step, in_use, share)
        if queue.index >= in_use:
            return
        rows = self._turns.take(step, runnable_decodes(step))
        spread = -(-work.num_tokens // in_use)
        if not len(rows):
            spread = max(spread, int(self._size.knee(table)))  # a step of its own has room up to the knee
        target = min(largest, max(spread, len(rows) + step.limits.chunk_unit))
        take_decodes(step, rows, capacity)
        self._take_prompts(step, waiting, capacity, (target - len(rows)) * work.mean_worth, price)

    def added(self, request: RequestView) -> None:
        self._size.added(request)

    def ended(self, request_id: int) -> None:
        self._size.ended(request_id)

    @staticmethod
    def _level(step: SchedulingPass, in_use: int, share: int) -> None:
        """Hand the queue's rows above its share to the shortest others, as many as fill them up to theirs."""
        spare = list(step.queue.ids)[share:]
        fair = -(-(step.table.num_decoding + step.table.num_joining) // in_use)
        others = [q for q in step.table.queues if q.index < in_use and q.index != step.queue.index]
        for other in sorted(others, key=lambda q: len(q) + q.num_joining):
            room = max(0, fair - len(other) - other.num_joining)
            step.move(spare[:room], other.index)
            del spare[:room]

    def _take_prompts(
        self, step: SchedulingPass, waiting: Ordering, capacity: Capacity, room: float, price: float
    ) -> None:
        """Chunks that take as long as ``room`` tokens without history, within the pass's budget."""
        budget = step.tokens_left

        def fits(start: int) -> bool:
            least = 0 if step.plan.num_rows else 1  # a token whose history costs too much, rather than nothing for ever
            step.tokens_left = min(budget, max(least, tokens_worth(room, start, price)))
            return step.has_room

        for request in step.table.unfilled.values():
            start = request.num_computed_tokens
            if not fits(start):
                return
            used = take_chunk(step, request, capacity)
            budget, room = budget - used, room - worth(start, used, price)
        for request in waiting.visit(step):
            start = step.prefix(request).num_tokens
            if not fits(start):
                return
            verdict = capacity.judge(step, request)
            if verdict is Verdict.STOP:
                return
            if verdict is Verdict.ADMIT:
                used = start_prompt(step, request)
                if not used:
                    return
                budget, room = budget - used, room - worth(start, used, price)
