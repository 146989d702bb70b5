"""The two loops' bodies called inline: a whole life of requests without a single thread, on a clock that is given."""

from __future__ import annotations

import itertools
import threading
from collections import deque

from prometheus_client import CollectorRegistry

from llm_engine.core.config import SchedulerConfig
from llm_engine.core.outputs import FinishReason
from llm_engine.core.request import Request, RequestId
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import StepPlan, StepResult
from llm_engine.core.trace import StepStats
from llm_engine.engine.core import EngineCore
from llm_engine.engine.executors.base import Collected, Executor, ExecutorInfo, Wake
from llm_engine.engine.stream import QueueSink
from llm_engine.engine.threads.output_thread import OutputThread
from llm_engine.engine.threads.scheduling_thread import SchedulingThread
from llm_engine.engine.threads.state import EngineState
from llm_engine.kvcache.kv_cache_manager import KVCacheManager
from llm_engine.kvcache.resources import ResourceManager
from llm_engine.metrics.engine_metrics import EngineMetrics
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.registry import make_scheduler
from llm_engine.workers.sampler import BatchSampler
from llm_engine.workers.stage import Stage
from tests.toy_model_engine import ToyModelEngine, expected_tokens

BLOCK_SIZE, NUM_BLOCKS = 4, 40


class InlineExecutor(Executor):
    """Computes in ``push``; the result waits for ``collect``."""

    def __init__(self) -> None:
        self.stage = Stage(ToyModelEngine(), BatchSampler, index=0, num_stages=1, max_num_seqs=4)
        self.events: deque[StepResult | Wake] = deque()

    def start(self) -> ExecutorInfo:
        info = self.stage.load()
        self.stage.allocate(NUM_BLOCKS, BLOCK_SIZE)
        return ExecutorInfo(info, NUM_BLOCKS, BLOCK_SIZE, 1)

    def push(self, plan: StepPlan) -> None:
        result = self.stage.execute(plan, None)
        assert isinstance(result, StepResult)
        self.events.append(result)

    def collect(self, timeout: float | None) -> Collected:
        return self.events.popleft() if self.events else None

    def wake(self) -> None:
        self.events.append(Wake())

    def shutdown(self) -> None:
        self.stage.release()

    @property
    def num_stages(self) -> int:
        return 1


def make_state(clock: itertools.count[int]) -> EngineState:
    limits = Limits(max_num_seqs=4, max_micro_batch_seqs=4, max_num_batched_tokens=16, chunk_unit=BLOCK_SIZE)
    kv, resources = KVCacheManager(NUM_BLOCKS, BLOCK_SIZE), ResourceManager()
    core = EngineCore(limits, kv, make_scheduler(SchedulerConfig(), limits, resources), resources, num_queues=1)
    return EngineState(core, clock=lambda: float(next(clock)))


def test_a_whole_life_without_a_thread() -> None:
    before = threading.active_count()
    executor, state, sink = InlineExecutor(), make_state(itertools.count()), QueueSink()
    executor.start()
    stats: deque[StepStats] = deque()
    metrics = EngineMetrics(CollectorRegistry(), model_name="toy", version="0")
    scheduling = SchedulingThread(state, executor, "scheduling")
    output = OutputThread(executor, lambda info: state, metrics, stats, "output")
    prompts = [[5, 6, 7], list(range(30)), [9] * 11, [1, 2], [3] * 20, [8]]
    params = SamplingParams(temperature=0.0, max_tokens=12)
    requests = [
        Request(RequestId(i), str(i), prompt, params, len(prompt) + 12, arrival=0.0, sink=sink)
        for i, prompt in enumerate(prompts)
    ]
    state.submit(requests)
    state.abort([5])
    while not state.core.is_idle or not stats:
        assert scheduling.schedule_once(wait=False)
        assert output.collect_once(state, 0.0)
        state.core.check_integrity()
    ends = {}
    while deltas := sink.take(0.0):
        ends.update((d.request.request_id, d.finish_reason) for d in deltas if d.finish_reason is not None)
    assert ends == {**dict.fromkeys(range(5), FinishReason.LENGTH), 5: FinishReason.ABORT}
    for request, prompt in zip(requests[:5], prompts, strict=False):
        assert request.token_ids[len(prompt) :] == expected_tokens(prompt, 12)
    assert state.core.kv.usage == 0.0
    times = [step.retired_at for step in stats]
    assert times == sorted(times) and max(times) == int(max(times)), "time came from somewhere else"
    state.stop()
    assert not scheduling.schedule_once()
    assert threading.active_count() == before
