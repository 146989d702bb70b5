"""The metric families, once per registry, and the collector that every engine in it adds its series to."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from ..core.errors import ConfigError


class Source(Protocol):
    """One engine's numbers."""

    engine: str
    """The value of its label."""

    def collect_into(self, families: dict[str, Any]) -> None:
        """Add this engine's series to the families, which are by name without the prefix."""


_LABELS = ("model_name", "engine")
_HELP: dict[str, tuple[Callable[..., Metric], str, tuple[str, ...]]] = {
    "": (InfoMetricFamily, "The engine's version and what it serves.", _LABELS),
    "time_to_first_token_seconds": (HistogramMetricFamily, "From arrival to the first token.", _LABELS),
    "inter_token_latency_seconds": (HistogramMetricFamily, "Between two tokens of one choice.", _LABELS),
    "e2e_request_latency_seconds": (HistogramMetricFamily, "From arrival to the end, whatever the reason.", _LABELS),
    "request_queue_time_seconds": (HistogramMetricFamily, "From arrival to being scheduled first.", _LABELS),
    "step_seconds": (HistogramMetricFamily, "From a micro-batch's push to its result.", _LABELS),
    "micro_batch_tokens": (HistogramMetricFamily, "Tokens computed in one micro-batch.", _LABELS),
    "step_part_seconds": (SummaryMetricFamily, "Where a step's time went, by part.", (*_LABELS, "part")),
    "stage_busy_ratio": (GaugeMetricFamily, "Share of the last 10 s that a stage computed.", (*_LABELS, "stage")),
    "stage_busy_seconds": (CounterMetricFamily, "Seconds that a stage computed.", (*_LABELS, "stage")),
    "stage_bubble_seconds": (
        CounterMetricFamily,
        "Seconds that a stage stood still while the engine had requests.",
        (*_LABELS, "stage"),
    ),
    "micro_batches_in_flight": (GaugeMetricFamily, "Micro-batches pushed and not retired.", _LABELS),
    "micro_batch_imbalance_ratio": (
        GaugeMetricFamily,
        "Largest over mean tokens of the last micro-batches, one per queue.",
        _LABELS,
    ),
    "prompt_tokens": (CounterMetricFamily, "Prompt tokens of requests with a first token, cached ones too.", _LABELS),
    "generation_tokens": (CounterMetricFamily, "Tokens generated.", _LABELS),
    "requests_finished": (CounterMetricFamily, "Requests that ended, by reason.", (*_LABELS, "reason")),
    "requests_rejected": (CounterMetricFamily, "Requests refused before they were queued.", (*_LABELS, "reason")),
    "num_requests_running": (GaugeMetricFamily, "Requests that hold KV blocks.", _LABELS),
    "num_requests_waiting": (GaugeMetricFamily, "Requests that wait: new, paused or parked.", _LABELS),
    "kv_cache_usage_ratio": (GaugeMetricFamily, "Share of the KV blocks that requests hold, 0 to 1.", _LABELS),
    "prefix_cache_queries": (CounterMetricFamily, "Tokens looked up in the prefix cache.", _LABELS),
    "prefix_cache_hits": (CounterMetricFamily, "Tokens found in the prefix cache.", _LABELS),
    "preemptions": (CounterMetricFamily, "Times a running request gave its blocks back to be recomputed.", _LABELS),
    "replays": (CounterMetricFamily, "Running requests computed again because their stages died.", _LABELS),
    "stage_restarts": (CounterMetricFamily, "Times the stages were started again after one died.", _LABELS),
    "stages_up": (GaugeMetricFamily, "Stages that take micro-batches: all of them, or none.", _LABELS),
}


class Families(Collector):
    """The one collector of a registry: makes the families, lets each engine add its series."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Covers the list of engines."""
        self._engines: dict[str, Source] = {}

    def add(self, source: Source, engine: str | None) -> None:
        """Give the engine its label, the lowest free number when absent, and collect from it from now on."""
        with self._lock:
            if engine is None:
                engine = next(name for name in map(str, itertools.count()) if name not in self._engines)
            elif engine in self._engines:
                raise ConfigError("engine", engine, "a label that no other engine of this registry uses")
            source.engine = engine
            self._engines[engine] = source

    def remove(self, source: Source) -> None:
        """Collect from it no more."""
        with self._lock:
            if self._engines.get(source.engine) is source:
                del self._engines[source.engine]

    def describe(self) -> Iterable[Metric]:
        return list(self._fresh().values())

    def collect(self) -> Iterable[Metric]:
        families = self._fresh()
        with self._lock:
            engines = list(self._engines.values())
        for source in engines:
            source.collect_into(families)
        return list(families.values())

    @staticmethod
    def _fresh() -> dict[str, Metric]:
        return {
            name: family("llm_engine" + (f"_{name}" if name else ""), text, labels=labels)
            for name, (family, text, labels) in _HELP.items()
        }


_known: weakref.WeakKeyDictionary[CollectorRegistry, Families] = weakref.WeakKeyDictionary()
_known_lock = threading.Lock()


def families_of(registry: CollectorRegistry) -> Families:
    """The registry's collector of ours, made with the first engine."""
    with _known_lock:
        families = _known.get(registry)
        if families is None:
            families = Families()
            registry.register(families)
            _known[registry] = families
        return families
