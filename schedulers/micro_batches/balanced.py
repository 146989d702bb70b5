"""Micro-batches of equal size, so that every stage of a pipeline has as much to do as the others at any time."""

from __future__ import annotations

from collections.abc import Iterator

from ...core.views import QueueView, RequestView, TableView
from ..base import Capacity, MicroBatch, Ordering
from ..batch_size import BatchSize
from ..chunking import ChunkingOptions, take_prompts
from ..filling import Turns, runnable_decodes, take_decodes
from ..outstanding import outstanding
from ..prompts_first import PromptsFirst
from ..queue_count import QueueCount
from ..scheduling_pass import SchedulingPass
from ..traffic import Traffic


class BalancedMicroBatch(MicroBatch):
    """Four choices, each from what is there now:

    1. how many queues are in use (``QueueCount``): what steps cost decides;
    2. who decodes in which: a queue that comes home with more than its share hands the rest to the shortest ones;
    3. how large a micro-batch is (``BatchSize``): its share of what is outstanding, and no more than pays;
    4. who is in it: the queue's decodes, unless they wait for the burst they came with (``PromptsFirst``), then prompts
       in progress by admission, then the waiting by the ordering, in chunks that shrink as what lies before them grows,
       so that micro-batches take equal time.

    Sources: the rule of vLLM PR #19873 (outstanding tokens / stages), bound late and split; SGLang's chunks by fitted
    cost.
    """

    Options = ChunkingOptions

    def __init__(self, options: ChunkingOptions | None = None) -> None:
        self._chunking = (options or ChunkingOptions()).chunking
        self._turns = Turns()
        self._queues = QueueCount()
        self._traffic = Traffic()
        self._size = BatchSize(self._traffic)
        self._prompts_first = PromptsFirst(self._traffic)

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
        prompts_first = self._prompts_first.apply(step, work)
        riding = 0 if prompts_first else work.num_decodes
        largest = self._size.largest(table, work, step.limits, self._queues.count or table.num_stages, riding)
        in_use = self._queues.choose(table, work, largest)
        share = -(-work.num_decodes // in_use) if queue.index < in_use else 0
        if len(queue) > share + share // 32:
            if step.ahead:
                return  # its rows must come home before they can move
            self._level(step, in_use, share)
        if queue.index >= in_use:
            return
        rows = [] if prompts_first else self._turns.take(step, runnable_decodes(step))
        spread = -(-work.num_tokens // in_use)
        if not len(rows):
            spread = max(spread, int(table.timing.knee))  # a step of its own has room up to the knee
        decode_tokens = len(rows) * step.limits.tokens_per_decode
        target = min(largest, max(spread, decode_tokens + step.limits.chunk_unit))
        take_decodes(step, rows, capacity)
        rows_left = step.rows_left
        few = table.num_stages > 1 and work.num_decodes + work.num_prompts <= table.num_stages
        if few and work.prompt_tokens <= work.num_prompts * target:
            # Each decodes in a queue of its own anyhow: a step for each costs little, and no link carries two at once.
            step.rows_left = min(rows_left, 1)
        room = (target - decode_tokens) * work.mean_worth
        take_prompts(step, waiting, capacity, self._chunking, room=room, price=price)
        computed = sum(step.plan.chunk_tokens)
        self._prompts_first.computed(computed)
        # They fill no step after all; where few go one by one, they need not.
        if prompts_first and computed < (1 if few else table.timing.knee):
            step.rows_left = rows_left - len(step.plan.chunk_ids)
            take_decodes(step, self._turns.take(step, runnable_decodes(step)), capacity)

    def added(self, request: RequestView) -> None:
        self._traffic.added(request)

    def ended(self, request_id: int) -> None:
        self._traffic.ended(request_id)

    @staticmethod
    def _level(step: SchedulingPass, in_use: int, share: int) -> None:
        """Hand the queue's rows above its share to the shortest others, as many as fill them up to theirs."""
        spare = [i for i in step.queue.ids if not step.is_paused(i)][share:]
        fair = -(-step.table.num_decoding // in_use)
        others = [q for q in step.table.queues if q.index < in_use and q.index != step.queue.index]
        for other in sorted(others, key=len):
            room = max(0, fair - len(other))
            step.move(spare[:room], other.index)
            del spare[:room]
