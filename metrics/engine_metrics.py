"""What an engine tells Prometheus.

The output thread records; a scrape reads. Recording adds to plain numbers under one short lock, because a step of 256
decodes must not cost 256 observations: equal inter-token times of a step arrive as one (seconds, count) pair. What the
books know already (running, waiting, blocks in use, ...) is asked for when somebody scrapes, so it is never stale.

Several engines may share one registry: the families exist once per registry, each engine adds its own series under
its ``engine`` label.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from ..core.trace import StepStats
from .families import families_of
from .histogram import Histogram
from .pipeline_metrics import PipelineMetrics
from .request_groups import RequestGroups
from .step_parts import PARTS

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.05, *REQUEST_BUCKETS[1:])
STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
MICRO_BATCH_BUCKETS = tuple(float(2**i) for i in range(15))


@dataclass(slots=True)
class StepSample:
    """One retired step, for ``record_step``."""

    stats: StepStats
    generation_tokens: int
    """Tokens handed to requests by this step."""
    inter_token: Sequence[tuple[float, int]] = ()
    """(seconds since the previous token, how many requests saw that gap). First tokens are not in it."""


@dataclass(slots=True)
class FirstTokenSample:
    """A request's first token, for ``record_first_token``; seconds count from arrival."""

    ttft_seconds: float
    queue_seconds: float
    """Until it was first scheduled."""
    prompt_tokens: int
    """The whole prompt, cached part included. For n > 1 give it with the first choice only, 0 with the others."""
    tenant: str | None = None
    priority: int = 0


@dataclass(slots=True)
class FinishedSample:
    """A request that ended, for ``record_finished``."""

    reason: str
    """A ``FinishReason``, or ``shed``."""
    e2e_seconds: float
    """From arrival."""
    generation_tokens: int = 0
    """All it got."""
    tenant: str | None = None
    priority: int = 0


@dataclass(slots=True)
class BooksSample:
    """What the engine's books say now; read at scrape time. Counters never fall."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage_ratio: float = 0.0
    """Blocks that requests hold, over all blocks: 0 when nothing runs, whatever the prefix cache keeps."""
    prefix_queries: int = 0
    """Tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    """Tokens found there."""
    num_preemptions: int = 0
    num_replays: int = 0
    """Running requests that were computed again because their stages died."""
    num_stage_restarts: int = 0
    num_stages_up: int = 0
    num_in_flight: int = 0
    """Micro-batches that were booked and have not come back."""


class EngineMetrics:
    """One engine's numbers in a registry. Every method may be called from any thread.

    ``registry`` may be private or shared. ``engine`` is the value of the label; the lowest number nobody in that
    registry uses when absent. ``max_tenants``, ``max_priorities``: how many of them have series of their own, the first
    that come; 0 for none. ``books`` is called at each scrape, in the scraping thread; it should copy under the
    state lock and hold nothing else. Raises ``ConfigError`` for a label already taken in that registry.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        model_name: str,
        version: str,
        engine: str | None = None,
        num_stages: int = 1,
        max_tenants: int = 0,
        max_priorities: int = 0,
        books: Callable[[], BooksSample] = BooksSample,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model_name, self.version = model_name, version
        self._books = books
        self._lock = threading.Lock()
        """Covers the numbers below. Nothing is called while it is held."""
        self._ttft = Histogram(TTFT_BUCKETS)
        self._inter_token = Histogram(INTER_TOKEN_BUCKETS)
        self._e2e = Histogram(REQUEST_BUCKETS)
        self._queue_time = Histogram(QUEUE_BUCKETS)
        self._step = Histogram(STEP_BUCKETS)
        self._micro_batch = Histogram(MICRO_BATCH_BUCKETS)
        self._pipeline = PipelineMetrics(num_stages, clock)
        self._by_tenant = RequestGroups("tenant", max_tenants, TTFT_BUCKETS, QUEUE_BUCKETS)
        self._by_priority = RequestGroups("priority", max_priorities, TTFT_BUCKETS, QUEUE_BUCKETS)
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._finished: defaultdict[str, int] = defaultdict(
            int, {"stop": 0, "length": 0, "abort": 0, "error": 0, "shed": 0}
        )
        self._rejected: defaultdict[str, int] = defaultdict(int, {"queue_full": 0, "capacity": 0, "invalid": 0})
        self._families = families_of(registry)
        self.engine = ""
        self._families.add(self, engine)

    def record_step(self, sample: StepSample) -> None:
        """Count a retired step."""
        with self._lock:
            self._step.add(sample.stats.step_seconds)
            self._micro_batch.add(sample.stats.num_tokens)
            self._pipeline.add(sample.stats)
            self._generation_tokens += sample.generation_tokens
            for seconds, count in sample.inter_token:
                self._inter_token.add(seconds, count)

    def record_first_token(self, sample: FirstTokenSample) -> None:
        """Count a request's first token and its prompt."""
        with self._lock:
            self._ttft.add(sample.ttft_seconds)
            self._queue_time.add(sample.queue_seconds)
            self._prompt_tokens += sample.prompt_tokens
            for groups, value in ((self._by_tenant, sample.tenant), (self._by_priority, sample.priority)):
                groups.first_token(value, sample.ttft_seconds, sample.queue_seconds, sample.prompt_tokens)

    def record_finished(self, sample: FinishedSample) -> None:
        """Count a request that ended, for whatever reason."""
        with self._lock:
            self._finished[str(sample.reason)] += 1
            self._e2e.add(sample.e2e_seconds)
            self._by_tenant.finished(sample.tenant, sample.generation_tokens)
            self._by_priority.finished(sample.priority, sample.generation_tokens)

    def record_rejected(self, reason: str) -> None:
        """Count a request refused before it was queued: ``queue_full``, ``capacity`` or ``invalid``."""
        with self._lock:
            self._rejected[reason] += 1

    def close(self) -> None:
        """Take this engine's series out of the registry. Calling it twice is fine."""
        self._families.remove(self)

    def collect_into(self, families: dict[str, Any]) -> None:
        """Add this engine's series to the families; called by the registry's collector at a scrape."""
        books = self._books()
        labels = [self.model_name, self.engine]
        with self._lock:
            histograms = {
                "time_to_first_token_seconds": self._ttft.read(),
                "inter_token_latency_seconds": self._inter_token.read(),
                "e2e_request_latency_seconds": self._e2e.read(),
                "request_queue_time_seconds": self._queue_time.read(),
                "step_seconds": self._step.read(),
                "micro_batch_tokens": self._micro_batch.read(),
            }
            values = {
                "prompt_tokens": self._prompt_tokens,
                "generation_tokens": self._generation_tokens,
            }
            by_reason = {"requests_finished": dict(self._finished), "requests_rejected": dict(self._rejected)}
            pipeline = self._pipeline
            by_stage = {
                "stage_busy_ratio": pipeline.busy_ratios(),
                "stage_busy_seconds": list(pipeline.busy_seconds),
                "stage_bubble_seconds": list(pipeline.bubble_seconds),
            }
            num_steps, part_seconds = pipeline.num_steps, list(pipeline.part_seconds)
            imbalance = pipeline.imbalance()
            self._by_tenant.collect_into(families, labels)
            self._by_priority.collect_into(families, labels)
        values |= {
            "num_requests_running": books.num_running,
            "num_requests_waiting": books.num_waiting,
            "prefix_cache_queries": books.prefix_queries,
            "prefix_cache_hits": books.prefix_hits,
            "preemptions": books.num_preemptions,
            "replays": books.num_replays,
            "stage_restarts": books.num_stage_restarts,
            "stages_up": books.num_stages_up,
            "micro_batches_in_flight": books.num_in_flight,
        }
        for name, value in values.items():
            families[name].add_metric(labels, value)
        families["kv_cache_usage_ratio"].add_metric(labels, books.kv_usage_ratio)
        families["micro_batch_imbalance_ratio"].add_metric(labels, imbalance)
        for name, per_stage in by_stage.items():
            for stage, number in enumerate(per_stage):
                families[name].add_metric([*labels, str(stage)], number)
        for part, seconds in zip(PARTS, part_seconds, strict=True):
            families["step_part_seconds"].add_metric([*labels, part], num_steps, seconds)
        for name, (buckets, total) in histograms.items():
            families[name].add_metric(labels, buckets, total)
        for name, counts in by_reason.items():
            for reason, count in counts.items():
                families[name].add_metric([*labels, reason], count)
        families[""].add_metric(labels, {"version": self.version})
