"""Books set up by hand, for tests of what a scheduler decides over them. Nothing is carried out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_engine.core.config import SchedulerConfig
from llm_engine.core.request import Request, RequestId
from llm_engine.core.request_table import RequestTable
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import StepPlan
from llm_engine.kvcache.block_hash import hash_blocks
from llm_engine.kvcache.kv_cache_manager import KVCacheManager
from llm_engine.kvcache.resources import BaseResourceManager, ResourceManager
from llm_engine.kvcache.view import KVView
from llm_engine.schedulers.base import Ordering, Scheduler
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.registry import make_scheduler
from llm_engine.schedulers.scheduling_pass import SchedulingPass


class Books:
    """Requests are numbered in the order they are made; blocks hold 4 tokens."""

    def __init__(
        self,
        *,
        num_queues: int = 1,
        num_blocks: int = 100,
        max_num_seqs: int = 8,
        max_micro_batch_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        chunk_unit: int = 4,
        threshold: int | None = None,
        window: int | None = None,
        resources: Sequence[BaseResourceManager] = (),
        scheduler: str = "default",
        num_stages: int = 1,
        look_ahead: int = 0,
        parts: Mapping[str, Any] | None = None,
    ) -> None:
        """``parts``: settings of the scheduler beside its preset, by name."""
        self.table = RequestTable(num_queues, 4, num_stages=num_stages, look_ahead=look_ahead)
        self._steps = 0
        self.kv = KVCacheManager(num_blocks + 1, 4, sliding_window=window)
        self.view = KVView(self.kv)
        self.limits = Limits(max_num_seqs, max_micro_batch_seqs, max_num_batched_tokens, chunk_unit, threshold)
        self.resources = ResourceManager(resources)
        self.scheduler: Scheduler = make_scheduler(
            SchedulerConfig(scheduler=scheduler, **(parts or {})), self.limits, self.resources
        )

    def _make(self, known: int, max_tokens: int, first: int | None, priority: int = 0) -> Request:
        number = len(self.table.requests)
        prompt = [number if first is None else first] + [50 + i % 40 for i in range(known - 1)]
        request = Request(
            RequestId(number), str(number), prompt, SamplingParams(), known + max_tokens, 0.0, priority=priority
        )
        request.block_hashes = hash_blocks(prompt, 4)
        self.table.add(request)
        return request

    def waiting(self, known: int, *, first: int | None = None, max_tokens: int = 50, priority: int = 0) -> Request:
        """One that arrived. Those with the same ``first`` token share their prefix."""
        request = self._make(known, max_tokens, first, priority)
        self.scheduler.add(request)
        return request

    def prefilling(
        self,
        known: int,
        computed: int,
        *,
        in_flight: int = 0,
        first: int | None = None,
        max_tokens: int = 50,
        priority: int = 0,
    ) -> Request:
        """A resident with part of its prompt computed; its full blocks can be found."""
        request = self._make(known, max_tokens, first, priority)
        self._hold(request, computed)
        self.table.start_prefill(request)
        request.num_computed_tokens = computed
        request.num_in_flight = in_flight
        return request

    def decoding(
        self, known: int, *, queue: int = 0, first: int | None = None, max_tokens: int = 50, priority: int = 0
    ) -> Request:
        """A resident that waits to compute its last known token."""
        request = self._make(known, max_tokens, first, priority)
        self._hold(request, known - 1)
        self.table.start_prefill(request, known - 1)
        self.table.start_decode(request, queue)
        self.table.move(request, queue)  # its last chunk has come back, and a token with it
        return request

    def joining(self, known: int, *, queue: int = 0, first: int | None = None, max_tokens: int = 50) -> Request:
        """A resident whose last chunk a plan of this queue carries; ``in_flight`` pushes that."""
        request = self._make(known, max_tokens, first, 0)
        self._hold(request, known)
        self.table.start_prefill(request, known)
        self.table.start_decode(request, queue)
        return request

    def in_flight(self, queue: int) -> StepPlan:
        """A plan was pushed for this queue."""
        self._steps += 1
        plan = StepPlan(queue=queue, step=self._steps)
        self.table.enter(plan)
        return plan

    def pushed(self, plan: StepPlan) -> None:
        """This plan's decodes are on their way."""
        self._steps += 1
        plan.step = self._steps
        self.table.enter(plan)

    def hold(self, request: Request, computed: int) -> None:
        """One that waited is resident with part of its prompt computed."""
        self._hold(request, computed)
        self.table.start_prefill(request, computed)

    def _hold(self, request: Request, computed: int) -> None:
        request.slot = request.request_id
        self.kv.add_sequence(request.request_id, (), request.num_tokens, read_prefix=False)
        self.kv.grow(request.request_id, computed)
        self.kv.publish(request.request_id, request.block_hashes, computed, 0)
        self.scheduler.capacity.started(request)

    def plan(self) -> StepPlan | None:
        return self.scheduler.schedule(0.0, self.table, self.view)

    def a_pass(self, queue: int = 0, *, now: float = 0.0, ordering: Ordering | None = None) -> SchedulingPass:
        """A pass of one's own, for tests of single parts."""
        ordering = ordering or self.scheduler.ordering
        return SchedulingPass(
            now, self.table, self.view, self.limits, self.table.queues[queue], self.resources, ordering
        )


def order(ordering: Ordering, now: float = 0.0) -> list[int]:
    """Ids in visiting order, over empty books."""
    return [request.request_id for request in ordering.visit(Books().a_pass(now=now, ordering=ordering))]


def chunks(plan: StepPlan | None) -> dict[int, int]:
    """``{request id: tokens}`` of a plan's chunks, in order."""
    assert plan is not None
    return dict(zip(plan.chunk_ids, plan.chunk_tokens, strict=True))


class Places(BaseResourceManager):
    """So many places, nobody holds any."""

    def __init__(self, name: str, count: int, wanted: int = 1) -> None:
        self.name, self.count, self.wanted = name, count, wanted

    def needed(self, request: Any) -> int:
        return self.wanted

    def available(self) -> int:
        return self.count
