"""The rule of vLLM PR #19873 (``BatchScheduler``) as a scheduler of this engine, to be compared with in simulation.

    llm-engine simulate --scheduler benchmarks.published_rule:PublishedRule

Work is planned first, without a token budget: every request that could run gets an entry with its full demand in one
FIFO. A micro-batch then takes entries from its head while its budget lasts, which is the smaller of
``outstanding // stages`` and ``max_num_batched_tokens``; ``outstanding`` is what is planned and in flight. Entries are
never split, and the first one is taken whatever the budget says. Without that exemption one decode on four stages has
a budget of ``1 // 4`` tokens and nothing ever runs: ``UnconditionalRule``, as a reviewer asked for.

Kinder than the original in three points: ``outstanding`` is summed up from live entries, so what is skipped cannot leak
into it; a demand above ``max_num_batched_tokens`` is planned in pieces, where the original fails an assertion; nothing
is hashed before it is pushed.
"""

from __future__ import annotations

import itertools

from llm_engine.core.views import QueueView, RequestView, TableView
from llm_engine.kvcache.resources import ResourceManager
from llm_engine.schedulers.base import Capacity, MicroBatch, Ordering, Scheduler, Verdict
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization
from llm_engine.schedulers.filling import runnable_decodes, start_prompt, take_chunk, take_decodes
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from llm_engine.schedulers.scheduling_pass import SchedulingPass


class PlannedAhead(MicroBatch):
    """Decodes that do not fit move to the queue whose turn is next, which is what one FIFO for all comes to here."""

    exempt_first = True

    def __init__(self) -> None:
        self._order = itertools.count()
        self._prompts: dict[int, tuple[int, int]] = {}
        """Planned and not pushed, by request: its place in the FIFO, tokens."""
        self._decodes: dict[int, int] = {}
        """Places of the decodes that wait in idle queues."""

    def form(self, step: SchedulingPass, waiting: Ordering, capacity: Capacity) -> None:
        if step.ahead:
            return
        newcomers = self._plan(step, waiting, capacity)
        planned = sum(tokens for _, tokens in self._prompts.values())
        outstanding = planned + len(self._decodes) + step.table.num_tokens_in_flight
        self._drain(step, newcomers, capacity, min(outstanding // step.table.num_stages, step.tokens_left))

    def _plan(self, step: SchedulingPass, waiting: Ordering, capacity: Capacity) -> dict[int, RequestView]:
        """Phase 1: an entry for everybody who could run. Returns those waiting that have one."""
        capacity_left = step.kv.free_blocks - step.promised_blocks
        rows = [i for queue in step.table.idle_queues() for i in queue.ids]
        self._decodes = {i: self._decodes[i] if i in self._decodes else next(self._order) for i in rows}
        before, self._prompts = self._prompts, {}
        limits = step.limits
        largest = min(limits.max_num_batched_tokens, limits.long_prefill_token_threshold or 1 << 62)
        for request in step.table.prefilling.values():
            self._enter(request, min(request.num_tokens - request.num_computed_tokens, largest), before)
        newcomers: dict[int, RequestView] = {}
        taken = 0
        for request in waiting.visit(step):
            taken += step.kv.blocks_for(request.num_tokens)
            if taken > capacity_left or len(newcomers) == step.seats_left:
                break
            newcomers[request.request_id] = request
            self._enter(request, min(request.num_tokens - step.prefix(request).num_tokens, largest), before)
        return newcomers

    def _enter(self, request: RequestView, tokens: int, before: dict[int, tuple[int, int]]) -> None:
        place = before[request.request_id][0] if request.request_id in before else next(self._order)
        self._prompts[request.request_id] = place, tokens

    def _drain(self, step: SchedulingPass, newcomers: dict[int, RequestView], capacity: Capacity, budget: int) -> None:
        """Phase 2: from the FIFO's head, as the budget allows."""
        mine = list(runnable_decodes(step))
        entries = [(self._decodes[i], i, 1) for i in mine]
        entries += [(place, i, tokens) for i, (place, tokens) in self._prompts.items()]
        decodes, prompts = [], []
        own = set(mine)
        for _, request_id, tokens in sorted(entries):
            first = not decodes and not prompts
            if tokens > budget and not (first and self.exempt_first):
                break
            if len(decodes) + len(prompts) == step.rows_left:
                break
            budget -= tokens
            (decodes if request_id in own else prompts).append(request_id)
        if not decodes and not prompts:
            return
        left = [i for i in mine if i not in set(decodes)]
        following = self._following(step.table, step.queue)
        if left and following is not None:
            step.move(left, following.index)
        take_decodes(step, decodes, capacity)
        for request_id in prompts:
            tokens, was_left = self._prompts[request_id][1], step.tokens_left
            step.tokens_left = tokens
            if request_id in newcomers:
                # Memory that was there when it was planned may have gone to decodes.
                request = newcomers[request_id]
                admitted = capacity.judge(step, request) is Verdict.ADMIT
                used = start_prompt(step, request) if admitted else 0
            else:
                used = take_chunk(step, step.table[request_id], capacity)
            step.tokens_left = was_left - used
            if used:
                del self._prompts[request_id]

    @staticmethod
    def _following(table: TableView, queue: QueueView) -> QueueView | None:
        """Whose turn is next: an idle one, or the one that comes back first."""
        idle = [other for other in table.idle_queues() if other.index != queue.index]
        busy = [other for other in table.queues if not other.idle]
        return idle[0] if idle else min(busy, key=lambda other: other.last_pushed, default=None)


class Unconditional(PlannedAhead):
    exempt_first = False


class PublishedRule(Scheduler):
    micro_batch_type: type[PlannedAhead] = PlannedAhead

    def __init__(self, limits: Limits, resources: ResourceManager | None = None) -> None:
        super().__init__(FcfsOrdering(), MaxUtilization(), self.micro_batch_type(), limits, resources)


class UnconditionalRule(PublishedRule):
    """Without the exemption of the first entry: one decode on four stages never runs."""

    micro_batch_type = Unconditional
