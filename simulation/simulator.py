"""The engine's own books on a virtual clock: arrivals and results are events, the two threads are one serial host."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from ..core.cost_model import StepShape
from ..core.errors import RequestShedError
from ..core.request import Request, RequestId
from ..core.sampling_params import SamplingParams
from ..core.step import StepPlan, StepResult
from ..engine.core import EngineCore
from ..engine.delta import Delta
from ..engine.threads.reporting import stats_of
from ..kvcache.block_hash import hash_blocks
from .cohorts import seat
from .contention import Contention
from .pipeline import Passage, Pipeline, Spans
from .run import Served, SimulationRun, Step
from .steady import SteadyTimes
from .workload import Arrival, prompt

SAMPLED = 0
"""Every token that is sampled here; nothing stops at it."""


@dataclass(frozen=True, slots=True)
class HostCost:
    """Seconds the two threads need for a micro-batch. They share one interpreter, so they work one after the other."""

    push: float = 100e-6
    """To schedule, book and push a plan."""
    retire: float = 100e-6
    """To collect a result and bring the books up to date."""
    push_per_row: float = 0.0
    retire_per_row: float = 0.0


class Simulator:
    """Drives one ``EngineCore`` through a workload. Made for one run."""

    def __init__(
        self,
        core: EngineCore,
        pipeline: Pipeline,
        host: HostCost | None = None,
        *,
        keep_stats: int = 0,
        on_finished: Callable[[int], None] | None = None,
    ) -> None:
        """``keep_stats``: how many steps' records are kept, the last ones. ``on_finished`` is told how many requests
        have ended whenever some do."""
        self.core, self.pipeline, self.host = core, pipeline, host or HostCost()
        self._on_finished = on_finished
        self._run = SimulationRun(len(core.table.queues), stats=deque(maxlen=keep_stats))
        self._steady = SteadyTimes(pipeline.num_stages, len(core.table.queues) * (1 + core.table.look_ahead))
        self._now = 0.0
        self._after_idle = True
        self._events: list[tuple[float, int, Request | _Pushed]] = []
        self._order = itertools.count()
        self._served: dict[int, Served] = {}
        """Those to come and those that are there, by request id."""
        self._next_id = 0
        self._contention = Contention(())
        self._kv_seconds = 0.0
        self._kv_seen_at = 0.0

    def start_with(self, cohorts: Iterable[int], input_len: int, output_len: int) -> None:
        """Before ``run``: put so many requests into each running queue, their prompts computed and their first tokens
        sampled at time 0, for nothing. What a load that grew lopsided looks like."""
        for queue, count in enumerate(cohorts):
            prompts = [prompt(self._next_id + index, input_len) for index in range(count)]
            requests = [self._request(Arrival(0.0, token_ids, output_len)) for token_ids in prompts]
            seat(self.core, queue, requests)
            for request in requests:
                served = self._served[request.request_id]
                served.first_token_at, served.num_output_tokens = 0.0, 1

    def run(self, arrivals: Iterable[Arrival] = (), *, max_steps: int | None = None) -> SimulationRun:
        """Until everybody has been served, or ``max_steps`` were pushed. ``arrivals`` in their order.

        Raises ``SchedulerError`` as the engine would.
        """
        for arrival in arrivals:
            self._at(arrival.at, self._request(arrival))
        self._contention = Contention(self._run.requests)
        limit = math.inf if max_steps is None else max_steps
        while len(self._run.steps) < limit:
            self._take_what_is_due()
            if not self._push_one():
                if not self._events:
                    break
                self._now = max(self._now, self._events[0][0])
        self._steady.close()
        run = self._run
        run.loads, run.stage_busy = self._steady.loads, self._steady.stage_busy
        run.num_preemptions = self.core.num_preemptions
        run.busy_seconds = self.pipeline.busy_seconds
        run.kv_usage_mean = self._kv_seconds / (self._kv_seen_at or 1.0)
        run.prefix_queries, run.prefix_hits = self.core.kv.prefix_queries, self.core.kv.prefix_hits
        return run

    def _request(self, arrival: Arrival) -> Request:
        request = Request(
            request_id=RequestId(self._next_id),
            external_id=str(self._next_id),
            prompt_token_ids=arrival.prompt_token_ids,
            params=SamplingParams(max_tokens=arrival.output_len, temperature=0.0, ignore_eos=True),
            max_total_tokens=arrival.num_tokens,
            arrival=arrival.at,
            priority=arrival.priority,
            deadline=None if arrival.deadline is None else arrival.at + arrival.deadline,
            tenant=arrival.tenant,
        )
        served = Served(
            arrival=arrival.at,
            num_prompt_tokens=len(arrival.prompt_token_ids),
            max_output_tokens=arrival.output_len,
            tenant=arrival.tenant,
            priority=arrival.priority,
            deadline=request.deadline,
        )
        self._served[request.request_id] = served
        self._run.requests.append(served)
        self._next_id += 1
        if self.core.kv.enable_prefix_caching:
            hash_blocks(request.prompt_token_ids, self.core.kv.block_size, known=request.block_hashes)
        return request

    def _at(self, time: float, event: Request | _Pushed) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def _take_what_is_due(self) -> None:
        """Bring the books up to date with what has reached the host. Retiring takes time, in which more may come."""
        while self._events and self._events[0][0] <= self._now:
            reached_at, _, event = heapq.heappop(self._events)
            if isinstance(event, Request):
                self._after_idle |= self.core.is_idle
                self.core.add(event, self._now)
            else:
                self._retire(event, reached_at)

    def _push_one(self) -> bool:
        """One plan, if there is one to make."""
        began_at = self._now
        self._note_kv()
        plan = self.core.schedule(began_at)
        if self.core.outbox:
            failed, self.core.outbox = self.core.outbox, []
            self._note_failures(failed)
        if plan is None:
            return False
        shape = StepShape.of(plan)
        flight = self.core.in_flight[-1]
        self._now += self.host.push + self.host.push_per_row * shape.num_rows
        flight.booked_at = flight.pushed_at = self._now
        flight.after_idle, self._after_idle = self._after_idle, False
        passage = self.pipeline.push(plan.step, shape, self._now, plan.feeds_from)
        self._steady.add(passage, after_idle=flight.after_idle)
        run = self._run
        run.kv_usage_peak = max(run.kv_usage_peak, self.core.kv.usage)
        load, began, ended = len(self._steady.loads), passage.begins[0], passage.ends[-1]
        run.steps.append(Step(load, plan.queue, shape.num_tokens, len(plan.decode_ids), began, ended))
        self._at(passage.result_at, _Pushed(plan, shape, passage))
        return True

    def _retire(self, pushed: _Pushed, reached_at: float) -> None:
        began_at, plan = self._now, pushed.plan
        self._note_kv()
        self._now += self.host.retire + self.host.retire_per_row * pushed.shape.num_rows
        self.pipeline.forget(plan.step)
        busy = Spans(pushed.passage.begins, pushed.passage.ends)
        tokens = [SAMPLED] * pushed.shape.num_sampled
        result = StepResult(plan.epoch, plan.step, tokens, busy=cast(list[tuple[float, float]], busy))
        retired = self.core.retire(result, self._now)
        assert retired is not None
        self._note_tokens(retired.requests)
        if retired.finished:
            self._note_ends([request for request in retired.requests if request.request_id in retired.finished])
        self._note_failures(retired.failed)
        self._run.makespan = self._now
        if self._contention.ends_at <= self._now:
            self._note_shares(self._contention)
        if self._run.stats.maxlen:
            self._run.stats.append(stats_of(retired, result, reached_at, began_at, self._now))

    def _note_tokens(self, requests: list[Request]) -> None:
        now, run = self._now, self._run
        run.num_output_tokens += len(requests)
        for request in requests:
            served = self._served[request.request_id]
            if served.first_token_at is None:
                served.first_token_at = now
                served.num_cached_tokens = request.num_cached_tokens or 0
                run.ttfts.append(now - served.arrival)
            else:
                run.itls.append(now - served.last_token_at)
            served.last_token_at = now
            served.num_output_tokens += 1

    def _note_ends(self, requests: list[Request]) -> None:
        for request in requests:
            self._run.e2es.append(self._now - request.arrival)
            served = self._served.pop(request.request_id)
            served.finished = True
            self._contention.ended(served, self._now)
        self._tell_ends()

    def _note_failures(self, ended: Sequence[Delta]) -> None:
        """Requests that can never run, or were shed, were ended."""
        if not ended:
            return
        self._run.num_failed += len(ended)
        for delta in ended:
            served = self._served.pop(delta.request.request_id)
            served.shed = isinstance(delta.error, RequestShedError)
            self._contention.ended(served, self._now)
        if self._run.failure is None:
            self._run.failure = str(ended[0].error)
        self._tell_ends()

    def _tell_ends(self) -> None:
        if self._on_finished is not None:
            self._on_finished(len(self._run.e2es) + self._run.num_failed)

    def _note_kv(self) -> None:
        """Before the books change: what is held was held since they changed last."""
        self._kv_seconds += self.core.kv.usage * (self._now - self._kv_seen_at)
        self._kv_seen_at = self._now

    def _note_shares(self, contention: Contention) -> None:
        """What each tenant has got so far."""
        contention.ends_at = math.inf
        found = Counter[str | None]()
        for served in self._run.requests:
            found[served.tenant] += served.num_tokens
        for request_id, served in self._served.items():
            request = self.core.table.get(request_id)
            if request is not None and not served.num_output_tokens:
                found[served.tenant] += request.num_computed_tokens
        self._run.tenant_tokens, self._run.contended_until = dict(found), self._now


@dataclass(frozen=True, slots=True)
class _Pushed:
    """A plan on its way; as an event, its result."""

    plan: StepPlan
    shape: StepShape
    passage: Passage
