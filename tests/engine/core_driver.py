"""Drives an ``EngineCore`` by hand, with stages that compute inline: no thread, no clock, results as late as wanted."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_engine.core.config import SchedulerConfig
from llm_engine.core.outputs import FinishReason
from llm_engine.core.request import Request, RequestId
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import StepPlan, StepResult
from llm_engine.engine.core import EngineCore
from llm_engine.engine.delta import Delta
from llm_engine.engine.threads.reporting import deltas_of
from llm_engine.kvcache.block_hash import extra_key, hash_blocks
from llm_engine.kvcache.kv_cache_manager import KVCacheManager
from llm_engine.kvcache.resources import BaseResourceManager, ResourceManager
from llm_engine.kvcache.view import KVView
from llm_engine.schedulers.base import Scheduler
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.registry import make_scheduler
from llm_engine.workers.batch import StageBatch
from llm_engine.workers.sampler import BatchSampler
from llm_engine.workers.stage import Stage, StageOutput
from tests.toy_model_engine import NUM_LAYERS, ToyModelEngine, _keys, _logits, _mix, expected_tokens

GREEDY = SamplingParams(temperature=0.0)


def ahead_driver(**settings: Any) -> CoreDriver:
    """Books whose plans are made ahead of their tokens."""
    return CoreDriver(look_ahead=1, **settings)


def pushed(driver: CoreDriver) -> StepPlan:
    """The next plan; there must be one."""
    plan = driver.schedule()
    assert plan is not None
    return plan


class WindowedToy(ToyModelEngine):
    """The toy with a sliding window in every layer: a token sees the last ``window`` positions, its own included."""

    def __init__(self, stage: int, num_stages: int, window: int) -> None:
        super().__init__(stage, num_stages)
        self.window = window

    def _sums(self, pool, batch: StageBatch):  # type: ignore[no-untyped-def]
        sums = np.empty(batch.num_tokens, np.uint64)
        for row in range(batch.num_rows):
            for token in range(int(batch.query_starts[row]), int(batch.query_starts[row + 1])):
                seen = np.arange(max(0, int(batch.positions[token]) - self.window + 1), int(batch.positions[token]) + 1)
                blocks = batch.block_tables[row][seen // self.block_size].astype(np.int64)
                assert blocks.all(), "a block was given back that the window still sees"
                sums[token] = pool[blocks * self.block_size + seen % self.block_size].sum(dtype=np.uint64)
        return sums


def windowed_tokens(prompt: Sequence[int], count: int, window: int, stop_ids: Collection[int] = ()) -> list[int]:
    """What ``WindowedToy`` continues with, from the token ids alone."""
    known = list(prompt)
    while True:
        x = np.array(known, np.uint64)
        for layer in range(NUM_LAYERS):
            x = _mix(_sums(_keys(x, np.arange(len(known)), layer), window), layer)
        known.append(int(_logits(x[-1:])[0].argmax()))
        if known[-1] in stop_ids or len(known) == len(prompt) + count:
            return known[len(prompt) :]


def _sums(keys: NDArray[np.uint64], window: int) -> NDArray[np.uint64]:
    """Of each token, the keys that it sees. [T] -> [T]"""
    return np.array([keys[max(0, p - window + 1) : p + 1].sum(dtype=np.uint64) for p in range(len(keys))], np.uint64)


@dataclass
class Outcome:
    """What a caller of one request would have seen."""

    tokens: list[int] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    ends: list[Delta] = field(default_factory=list)

    @property
    def reason(self) -> FinishReason | None:
        return self.ends[0].finish_reason if self.ends else None


class WatchedView(KVView):
    """Remembers what was free when the pass began, so that its prediction can be held against what was taken."""

    free_before: int | None = None
    """None where no pass was made."""

    def begin_pass(self) -> None:
        super().begin_pass()
        self.free_before = self._manager.num_free_blocks

    @property
    def predicted(self) -> int | None:
        """Blocks that the pass expects to be free when its plan is booked."""
        return None if self.free_before is None else self.free_before + self._balance


class CoreDriver:
    """``schedule`` pushes and computes a plan, ``retire`` brings back the oldest result; the books are checked."""

    def __init__(
        self,
        *,
        num_queues: int = 1,
        num_stages: int | None = None,
        look_ahead: int = 0,
        late_feeds: bool = False,
        num_blocks: int = 20,
        block_size: int = 4,
        max_num_seqs: int = 4,
        max_micro_batch_seqs: int | None = None,
        max_num_batched_tokens: int = 16,
        chunk_unit: int | None = None,
        threshold: int | None = None,
        caching: bool = True,
        window: int | None = None,
        resources: Sequence[BaseResourceManager] = (),
        scheduler: Scheduler | None = None,
        preset: str = "default",
        parts: Mapping[str, Any] | None = None,
    ) -> None:
        """``late_feeds``: the ring brings the first of several stages a token when it cannot go on without it, no
        sooner. ``parts``: settings of the scheduler beside its ``preset``, by name."""
        self._readings = 0
        self.window = window
        self.late_feeds = late_feeds
        rows, unit = max_micro_batch_seqs or max_num_seqs, chunk_unit or block_size
        self.limits = Limits(max_num_seqs, rows, max_num_batched_tokens, unit, threshold)
        self.kv = KVCacheManager(num_blocks, block_size, enable_prefix_caching=caching, sliding_window=window)
        managers = ResourceManager(resources)
        self.core = EngineCore(
            self.limits, self.kv,
            scheduler or make_scheduler(SchedulerConfig(scheduler=preset, **(parts or {})), self.limits, managers),
            managers,
            num_queues=num_queues, num_stages=num_stages or num_queues, look_ahead=look_ahead,
            scheduler_name="under-test",
        )  # fmt: skip
        self.core.view = self.view = WatchedView(self.kv)
        # The books may believe in more stages than the toy has layers.
        self.num_stages = min(num_stages or num_queues, NUM_LAYERS)
        self.stages = self._make_stages()
        self.failing_stage = 0
        self.results_of_the_dead: list[StepResult] = []
        self.fail_next = 0
        """So many of the next steps fail."""
        self.pushed: list[StepPlan] = []
        self.results: deque[StepResult] = deque()
        self.outcomes: dict[int, Outcome] = {}
        self.requests: dict[int, Request] = {}
        self.now = 0.0

    def _make_stages(self) -> list[Stage]:
        self.toys: list[ToyModelEngine] = []
        self.ring: deque[tuple[int, list[int]]] = deque()
        stages = [self._make_stage(index, self.num_stages) for index in range(self.num_stages)]
        for stage in stages:
            stage.load()
            stage.allocate(self.kv.pool.num_blocks, self.kv.block_size)
        return stages

    def _stage_clock(self) -> float:
        self._readings += 1
        return float(self._readings)

    def _make_stage(self, index: int, num_stages: int) -> Stage:
        def on_forward(number: int, batch: StageBatch) -> None:
            if self._failing and index == self.failing_stage % num_stages:
                raise RuntimeError("told to fail")

        toy = ToyModelEngine(index, num_stages) if self.window is None else WindowedToy(index, num_stages, self.window)
        toy.on_forward = on_forward
        self.toys.append(toy)
        self._failing = False
        return Stage(
            toy, BatchSampler, index=index, num_stages=num_stages, max_num_seqs=self.limits.max_num_seqs,
            feeds_back=self.core.table.look_ahead > 0, clock=self._stage_clock,
        )  # fmt: skip

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int = 4,
        *,
        stop_ids: Collection[int] = (),
        params: SamplingParams = GREEDY,
        salt: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str | None = None,
    ) -> int:
        request_id = len(self.requests)
        hashes = []
        if self.kv.enable_prefix_caching:
            hashes = hash_blocks(prompt, self.kv.block_size, extra=extra_key(None, salt))
        request = Request(
            RequestId(request_id), f"r{request_id}", list(prompt), params, len(prompt) + max_tokens, self.now,
            stop_ids=frozenset(stop_ids), block_hashes=hashes, cache_salt=salt,
            priority=priority, deadline=deadline, tenant=tenant,
        )  # fmt: skip
        self.requests[request_id] = request
        self.outcomes[request_id] = Outcome()
        self.core.add(request, self.now)
        self.check()
        return request_id

    def abort(self, request_id: int) -> None:
        self.core.abort(request_id, self.now)
        self._take_outbox()
        self.check()

    def schedule(self) -> StepPlan | None:
        self.now += 1.0
        self.view.free_before = None
        plan = self.core.schedule(self.now)
        self._take_outbox()
        if plan is not None:
            predicted, free = self.view.predicted, self.kv.num_free_blocks
            assert predicted is None or predicted <= free, "the plan took more blocks than were predicted"
            self._check_plan(plan)
            self.pushed.append(plan)
            self.results.append(self._compute(plan))
        self.check()
        return plan

    def carry_out(self, action: Any, aborted: set[int]) -> None:
        """One of the actions that random lives share, else nothing; who is aborted before its end is noted."""
        match action:
            case ("schedule", count):
                for _ in range(count):
                    self.schedule()
            case ("retire", count):
                for _ in range(min(count, len(self.results))):
                    self.retire()
            case ("abort", index) if index < len(self.requests):
                if not self.outcomes[index].ends:
                    aborted.add(index)
                self.abort(index)
            case ("fail", count, stage):
                self.fail_next += count
                self.failing_stage = stage

    def retire(self) -> None:
        self.now += 1.0
        result = self.results.popleft()
        retired = self.core.retire(result, self.now)
        assert retired is not None
        for delta in [*deltas_of(retired, result, self.now), *retired.failed]:
            self._take(delta)
        self.check()

    def die(self, cause: str = "the stages were told to die", *, replay: bool = True) -> None:
        """The stages are gone with all they held; what they sent before is dropped when it comes."""
        self.now += 1.0
        self.stages = []
        self.results_of_the_dead += self.results
        self.results.clear()
        self.core.lose_stages(cause, self.now, replay=replay)
        self._take_outbox()
        self.check()
        assert not self.core.in_flight
        assert self.kv.usage == 0.0
        assert not len(self.kv.cache)
        assert self.core.table.num_resident == self.core.table.num_tokens_in_flight == 0
        assert self.schedule() is None

    def come_back(self) -> None:
        """New stages are up, with empty pools."""
        self.stages = self._make_stages()
        self.core.regain_stages()
        while self.results_of_the_dead:
            assert self.core.retire(self.results_of_the_dead.pop(), self.now) is None, "a result of the dead was taken"
        self.check()

    def step(self) -> StepPlan | None:
        """One plan there and back."""
        plan = self.schedule()
        if self.results:
            self.retire()
        return plan

    def run(self, limit: int = 5000) -> None:
        """Until nothing is left; fails where that takes too long."""
        if not self.stages:
            self.come_back()
        for _ in range(limit):
            while self.schedule() is not None:
                pass
            if not self.results:
                break
            self.retire()
        assert self.core.is_idle, [(r.external_id, r.state) for r in self.core.table.requests.values()]
        self.check_all_given_back()

    def expected(self, request_id: int) -> list[int]:
        request = self.requests[request_id]
        count = request.max_total_tokens - request.num_prompt_tokens
        if self.window is None:
            return expected_tokens(request.prompt_token_ids, count, stop_ids=request.stop_ids)
        return windowed_tokens(request.prompt_token_ids, count, self.window, request.stop_ids)

    def check(self) -> None:
        self.core.check_integrity()
        for request in self.core.table.residents():
            self._check_in_flight(request)
        assert all(len(outcome.ends) <= 1 for outcome in self.outcomes.values())

    def _check_in_flight(self, request: Request) -> None:
        """A row's position is that of its last token, those in flight included, and these are of its own queue."""
        request_id = request.request_id
        plans = [flight.plan for flight in self.core.in_flight if flight.plan.step >= request.start_step]
        assert request.num_in_flight == sum(request_id in plan.chunk_ids for plan in plans)
        sampling = [plan.queue for plan in plans if request_id in plan.sampled_ids]
        assert set(sampling) <= {request.queue}
        if request.queue is not None:
            position = self.core.table.queues[request.queue].position(request_id)
            assert position == request.num_tokens - 1 + len(sampling)

    def check_all_given_back(self) -> None:
        core = self.core
        assert core.kv.usage == 0.0
        assert core.slots.available() == core.limits.max_num_seqs
        assert not len(core.table)
        assert not core.scheduler.has_work
        assert not core.outbox
        assert all(queue.idle for queue in core.table.queues)
        assert all(len(outcome.ends) == 1 for outcome in self.outcomes.values())
        self.check_cache()

    def check_cache(self) -> None:
        """Every hash that can be found stands for known tokens, and its block holds just what these come to."""
        size, cache = self.kv.block_size, self.kv.cache
        chains: dict[bytes, list[int]] = {}
        for request in self.requests.values():
            salt = extra_key(request.adapter_id, request.cache_salt)
            for number, block_hash in enumerate(hash_blocks(request.token_ids, size, extra=salt), start=1):
                chains[block_hash] = request.token_ids[: number * size]
        layers = [(layer, pool) for toy in self.toys for layer, pool in zip(toy.layers, toy.pools, strict=True)]
        for block, block_hash in enumerate(cache.hash_of):
            if block_hash is None:
                continue
            x = np.array(chains[block_hash], np.uint64)
            for layer, pool in layers:
                keys = _keys(x, np.arange(len(x)), layer)
                assert np.array_equal(pool[block * size : (block + 1) * size], keys[-size:]), (block, layer)
                x = _mix(_sums(keys, self.window or len(keys)), layer)

    def _compute(self, plan: StepPlan) -> StepResult:
        self._failing, self.fail_next = self.fail_next > 0, max(0, self.fail_next - 1)
        passed: StageOutput | StepResult | None = None
        while not self.stages[0].can_execute(plan):
            self.stages[0].feed(*self.ring.popleft())
        for stage in self.stages:
            assert not isinstance(passed, StepResult)
            passed = stage.execute(plan, passed)
            if isinstance(passed, StageOutput) and passed.hidden is not None:
                passed.hidden = passed.hidden.copy()
        assert isinstance(passed, StepResult)
        assert passed.error is None or self._failing, passed.error
        if self.core.table.look_ahead and len(self.stages) > 1:
            self.ring.append((plan.step, passed.tokens))
            while self.ring and not self.late_feeds:
                self.stages[0].feed(*self.ring.popleft())
        return passed

    def _check_plan(self, plan: StepPlan) -> None:
        limits = self.limits
        assert 0 < plan.num_rows <= limits.max_micro_batch_seqs
        assert 0 < plan.num_tokens <= limits.max_num_batched_tokens
        assert all(0 < count <= (limits.long_prefill_token_threshold or count) for count in plan.chunk_tokens)
        assert 1 <= self.core.table.queues[plan.queue].in_flight <= 1 + self.core.table.look_ahead
        assert [flight.plan.step for flight in self.core.in_flight] == sorted(f.plan.step for f in self.core.in_flight)
        assert plan.step == len(self.pushed) + 1
        in_flight = Counter(i for flight in self.core.in_flight for i in flight.plan.decode_ids)
        assert max(in_flight.values(), default=0) <= 1 + self.core.table.look_ahead
        for request_id, position in zip(plan.decode_ids, plan.decode_positions, strict=True):
            assert position + 1 < self.requests[request_id].max_total_tokens, "a token behind the last one"
            known = position < self.requests[request_id].num_tokens
            assert known or plan.feeds_from is not None, "its input is known to nobody"

    def _take_outbox(self) -> None:
        ended, self.core.outbox = self.core.outbox, []
        for delta in ended:
            self._take(delta)

    def _take(self, delta: Delta) -> None:
        outcome = self.outcomes[delta.request.request_id]
        assert not outcome.ends, "told something after its end"
        outcome.tokens += delta.token_ids
        outcome.deltas.append(delta)
        if delta.finish_reason is not None:
            outcome.ends.append(delta)
