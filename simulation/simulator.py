"""The engine's own books on a virtual clock: arrivals and results are events, the two threads are one serial host."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from ..core.cost_model import StepShape
from ..core.request import Request, RequestId
from ..core.sampling_params import SamplingParams
from ..core.step import StepPlan, StepResult
from ..core.trace import StepStats
from ..engine.core import EngineCore
from ..kvcache.block_hash import hash_blocks
from .pipeline import Passage, Pipeline, Times
from .workload import Arrival

_SAMPLED = 0
"""Every token that is sampled here; nothing stops at it."""


@dataclass(frozen=True, slots=True)
class HostCost:
    """What the two threads need for a micro-batch. They share one interpreter, so they are one after the other."""

    push: float = 100e-6
    """Seconds to schedule, book and push a plan."""
    retire: float = 100e-6
    """Seconds to collect a result and bring the books up to date."""
    push_per_row: float = 0.0
    retire_per_row: float = 0.0


@dataclass(slots=True)
class Step:
    """One micro-batch as it went by."""

    num_tokens: int
    num_decodes: int
    num_chunks: int
    queue: int
    began: float
    """The first stage begins with it."""
    ended: float
    """The last stage is done."""


@dataclass(slots=True)
class SimulationRun:
    """What happened, in virtual seconds."""

    makespan: float = 0.0
    filled_at: float = 0.0
    """The last stage gets its first work."""
    drained_at: float = 0.0
    """The first stage is done with its last."""
    steps: list[Step] = field(default_factory=list)
    ttfts: list[float] = field(default_factory=list)
    itls: list[float] = field(default_factory=list)
    e2es: list[float] = field(default_factory=list)
    num_output_tokens: int = 0
    num_failed: int = 0
    failure: str | None = None
    """What the first request that failed was told."""
    kv_usage_peak: float = 0.0
    num_preemptions: int = 0
    busy_seconds: list[float] = field(default_factory=list)
    """Per stage, of the whole run."""
    steady_busy: list[float] = field(default_factory=list)
    """Per stage: share of the time between ``filled_at`` and ``drained_at`` that it computes."""
    stats: list[StepStats] = field(default_factory=list)
    """As an engine would have noted them, where they were asked for."""


class Simulator:
    """Drives one ``EngineCore`` to the end of a workload. Made for one run."""

    def __init__(
        self,
        core: EngineCore,
        pipeline: Pipeline,
        host: HostCost = HostCost(),
        *,
        keep_stats: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """``on_progress`` is told now and then how many requests have ended."""
        self.core, self.pipeline, self.host = core, pipeline, host
        self.run_so_far = SimulationRun()
        self._keep_stats = keep_stats
        self._on_progress = on_progress or (lambda ended: None)
        self._now = 0.0
        self._events: list[tuple[float, int, Request | _Pushed]] = []
        self._order = itertools.count()
        self._last_token_at: dict[int, float] = {}
        self._early: Times = np.zeros(pipeline.num_stages)
        self._tail: deque[Passage] = deque(maxlen=(1 + core.table.look_ahead) * len(core.table.queues) + 1)

    def run(self, arrivals: Iterable[Arrival], *, max_steps: int | None = None) -> SimulationRun:
        """Until everybody has been served, or ``max_steps`` were pushed."""
        for index, arrival in enumerate(arrivals):
            self._at(arrival.at, self._request(index, arrival))
        while self._events and (max_steps is None or len(self.run_so_far.steps) < max_steps):
            self._now = max(self._now, self._events[0][0])
            while True:
                self._take_what_is_due()
                if not self._push_one():
                    break
        return self._finish()

    def _request(self, index: int, arrival: Arrival) -> Request:
        request = Request(
            request_id=RequestId(index),
            external_id=str(index),
            prompt_token_ids=arrival.prompt_token_ids,
            params=SamplingParams(max_tokens=arrival.output_len, temperature=0.0, ignore_eos=True),
            max_total_tokens=len(arrival.prompt_token_ids) + arrival.output_len,
            arrival=arrival.at,
        )
        if self.core.kv.enable_prefix_caching:
            hash_blocks(request.prompt_token_ids, self.core.kv.block_size, known=request.block_hashes)
        return request

    def _at(self, time: float, event: Request | _Pushed) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def _take_what_is_due(self) -> None:
        """Bring the books up to date with everything that has reached the host. Retiring takes time, in which more may
        come."""
        while self._events and self._events[0][0] <= self._now:
            reached_at, _, event = heapq.heappop(self._events)
            if isinstance(event, Request):
                self.core.add(event, self._now)
            else:
                self._retire(event, reached_at)

    def _push_one(self) -> bool:
        began_at = self._now
        plan = self.core.schedule(began_at)
        if self.core.outbox:
            self._note_failures()
        if plan is None:
            return False
        self._now += self.host.push + self.host.push_per_row * plan.num_rows
        shape = StepShape.of(plan)
        passage = self.pipeline.push(plan.step, shape, self._now, plan.feeds_from)
        self._tail.append(passage)
        run = self.run_so_far
        if not run.steps:
            run.filled_at = passage.begins[-1]
        if passage.begins[0] < run.filled_at:
            self._early += _seconds_in(passage, 0.0, run.filled_at)
        run.kv_usage_peak = max(run.kv_usage_peak, self.core.kv.usage)
        run.steps.append(
            Step(
                shape.num_tokens,
                len(plan.decode_ids),
                len(plan.chunk_ids),
                plan.queue,
                passage.begins[0],
                passage.ends[-1],
            )
        )
        self._at(passage.result_at, _Pushed(plan, shape, passage, began_at, self._now))
        return True

    def _retire(self, pushed: _Pushed, reached_at: float) -> None:
        began_at = self._now
        plan, run = pushed.plan, self.run_so_far
        now = self._now = began_at + self.host.retire + self.host.retire_per_row * plan.num_rows
        self.pipeline.forget(plan.step)
        busy = list(zip(pushed.passage.begins, pushed.passage.ends, strict=True))
        result = StepResult(plan.epoch, plan.step, [_SAMPLED] * pushed.shape.num_sampled, busy=busy)
        retired = self.core.retire(result, now)
        assert retired is not None
        last, itls, ttfts = self._last_token_at, run.itls, run.ttfts
        for request in retired.requests:
            before = last.get(request.request_id)
            if before is None:
                ttfts.append(now - request.arrival)
            else:
                itls.append(now - before)
            last[request.request_id] = now
        run.num_output_tokens += len(retired.requests)
        if retired.finished:
            for request in retired.requests:
                if request.request_id in retired.finished:
                    run.e2es.append(now - request.arrival)
                    del last[request.request_id]
            self._on_progress(len(run.e2es))
        run.makespan = now
        if self._keep_stats:
            run.stats.append(self._stats_of(pushed, len(retired.finished), reached_at, began_at))

    def _note_failures(self) -> None:
        ended, self.core.outbox = self.core.outbox, []
        self.run_so_far.num_failed += len(ended)
        if self.run_so_far.failure is None:
            self.run_so_far.failure = str(ended[0].error)

    def _stats_of(self, pushed: _Pushed, num_finished: int, reached_at: float, update_at: float) -> StepStats:
        core, plan, shape = self.core, pushed.plan, pushed.shape
        return StepStats(
            epoch=plan.epoch,
            step=plan.step,
            queue=plan.queue,
            num_decodes=len(plan.decode_ids),
            num_chunks=len(plan.chunk_ids),
            num_tokens=shape.num_tokens,
            context_tokens=shape.context_tokens,
            kv_tokens=shape.kv_tokens,
            num_sampled=shape.num_sampled,
            ahead=plan.feeds_from is not None,
            num_paused=len(plan.paused_ids),
            num_resumed=len(plan.resumed_ids),
            num_finished=num_finished,
            num_running=core.table.num_resident,
            num_waiting=core.num_waiting,
            kv_usage=core.kv.usage,
            began_at=pushed.began_at,
            booked_at=pushed.pushed_at,
            pushed_at=pushed.pushed_at,
            collected_at=reached_at,
            update_at=update_at,
            retired_at=self._now,
            busy=tuple(zip(pushed.passage.begins, pushed.passage.ends, strict=True)),
        )

    def _finish(self) -> SimulationRun:
        run = self.run_so_far
        run.num_preemptions = self.core.num_preemptions
        run.busy_seconds = self.pipeline.busy_seconds
        if self._tail:
            run.drained_at = self._tail[-1].ends[0]
            # What a stage did before and after is little, and still at hand.
            late = sum(_seconds_in(passage, run.drained_at, math.inf) for passage in self._tail)
            steady = max(run.drained_at - run.filled_at, 0.0)
            seconds = np.array(run.busy_seconds) - self._early - late
            run.steady_busy = (seconds / steady).tolist() if steady else [0.0] * self.pipeline.num_stages
        return run


def _seconds_in(passage: Passage, begin: float, end: float) -> Times:
    """Per stage: for how long it worked on this plan between two times."""
    spans = np.clip(passage.ends, begin, end) - np.clip(passage.begins, begin, end)
    found: Times = spans
    return found


@dataclass(frozen=True, slots=True)
class _Pushed:
    """A plan on its way."""

    plan: StepPlan
    shape: StepShape
    passage: Passage
    began_at: float
    pushed_at: float
