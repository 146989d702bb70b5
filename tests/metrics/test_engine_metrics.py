"""The exposition, read back with the reference parser."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from llm_engine.core.errors import ConfigError
from llm_engine.core.trace import StepStats
from llm_engine.metrics import BooksSample, EngineMetrics, FinishedSample, FirstTokenSample, StepSample
from tests.metrics.records import PLAIN


def scrape(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    labels = {"model_name": "m", "engine": "0", **labels}
    return scrape(registry)[(f"llm_engine_{name}", tuple(sorted(labels.items())))]


def make(registry: CollectorRegistry, **more: object) -> EngineMetrics:
    return EngineMetrics(registry, model_name="m", version="1.2", **more)  # type: ignore[arg-type]


def sized(seconds: float, tokens: int) -> StepStats:
    """A step that took so long and had so many tokens."""
    return replace(PLAIN, num_tokens=tokens, retired_at=seconds)


def test_a_new_engine_shows_every_series_at_zero() -> None:
    registry = CollectorRegistry()
    make(registry)
    samples = scrape(registry)
    assert samples.pop(("llm_engine_info", (("engine", "0"), ("model_name", "m"), ("version", "1.2")))) == 1
    assert set(samples.values()) == {0.0}
    names = {name for name, _ in samples}
    assert {
        "llm_engine_time_to_first_token_seconds_count", "llm_engine_inter_token_latency_seconds_count",
        "llm_engine_e2e_request_latency_seconds_count", "llm_engine_request_queue_time_seconds_count",
        "llm_engine_step_seconds_count", "llm_engine_micro_batch_tokens_count", "llm_engine_prompt_tokens_total",
        "llm_engine_generation_tokens_total", "llm_engine_requests_finished_total",
        "llm_engine_requests_rejected_total", "llm_engine_num_requests_running", "llm_engine_num_requests_waiting",
        "llm_engine_kv_cache_usage_ratio", "llm_engine_prefix_cache_queries_total",
        "llm_engine_prefix_cache_hits_total", "llm_engine_preemptions_total", "llm_engine_step_part_seconds_sum",
        "llm_engine_stage_busy_ratio", "llm_engine_stage_busy_seconds_total",
        "llm_engine_stage_bubble_seconds_total", "llm_engine_micro_batches_in_flight",
        "llm_engine_micro_batch_imbalance_ratio",
    } <= names  # fmt: skip
    assert not any(":" in name for name in names)


def test_what_was_recorded_is_what_is_scraped() -> None:
    registry = CollectorRegistry()
    books = BooksSample()
    metrics = make(registry, books=lambda: books)
    metrics.record_first_token(FirstTokenSample(ttft_seconds=0.03, queue_seconds=0.002, prompt_tokens=7))
    metrics.record_step(StepSample(sized(0.004, 256), 250, inter_token=[(0.02, 200), (0.01, 50)]))
    metrics.record_finished(FinishedSample("stop", 1.25))
    metrics.record_rejected("queue_full")
    books.num_running, books.num_waiting, books.kv_usage_ratio = 3, 4, 0.5
    books.prefix_queries, books.prefix_hits, books.num_preemptions = 100, 64, 2
    books.num_in_flight = 5

    assert value(registry, "time_to_first_token_seconds_bucket", le="0.02") == 0
    assert value(registry, "time_to_first_token_seconds_bucket", le="0.04") == 1
    assert value(registry, "request_queue_time_seconds_sum") == pytest.approx(0.002)
    assert value(registry, "prompt_tokens_total") == 7
    assert value(registry, "generation_tokens_total") == 250
    assert value(registry, "inter_token_latency_seconds_bucket", le="0.01") == 50  # a bound belongs to its bucket
    assert value(registry, "inter_token_latency_seconds_count") == 250
    assert value(registry, "inter_token_latency_seconds_sum") == pytest.approx(4.5)
    assert value(registry, "step_seconds_bucket", le="0.005") == 1
    assert value(registry, "micro_batch_tokens_bucket", le="256.0") == 1
    assert value(registry, "micro_batch_tokens_bucket", le="128.0") == 0
    assert value(registry, "requests_finished_total", reason="stop") == 1
    assert value(registry, "requests_finished_total", reason="abort") == 0
    assert value(registry, "e2e_request_latency_seconds_sum") == 1.25
    assert value(registry, "requests_rejected_total", reason="queue_full") == 1
    assert value(registry, "num_requests_running") == 3
    assert value(registry, "num_requests_waiting") == 4
    assert value(registry, "kv_cache_usage_ratio") == 0.5
    assert value(registry, "prefix_cache_queries_total") == 100
    assert value(registry, "prefix_cache_hits_total") == 64
    assert value(registry, "preemptions_total") == 2
    assert value(registry, "micro_batches_in_flight") == 5


def test_values_beyond_the_last_bucket_are_counted() -> None:
    registry = CollectorRegistry()
    make(registry).record_step(StepSample(sized(1e6, 10**6), 0))
    assert value(registry, "step_seconds_bucket", le="10.0") == 0
    assert value(registry, "step_seconds_bucket", le="+Inf") == 1


def test_engines_share_a_registry_under_their_labels() -> None:
    registry = CollectorRegistry()
    first, second = make(registry), make(registry)
    named = make(registry, engine="blue")
    assert (first.engine, second.engine, named.engine) == ("0", "1", "blue")
    second.record_finished(FinishedSample("length", 0.1))
    assert value(registry, "requests_finished_total", reason="length", engine="0") == 0
    assert value(registry, "requests_finished_total", reason="length", engine="1") == 1
    with pytest.raises(ConfigError, match="blue"):
        make(registry, engine="blue")
    assert generate_latest(registry).decode().count("# TYPE llm_engine_num_requests_running gauge") == 1


def test_a_closed_engine_leaves_the_registry_and_its_number_is_free_again() -> None:
    registry = CollectorRegistry()
    first, second = make(registry), make(registry)
    first.close()
    first.close()
    assert {dict(labels)["engine"] for _, labels in scrape(registry)} == {"1"}
    assert make(registry).engine == "0"
    second.close()


def test_a_registry_that_is_dropped_takes_its_collector_along() -> None:
    from llm_engine.metrics import families

    registry = CollectorRegistry()
    make(registry)
    before = len(families._known)
    del registry
    assert len(families._known) == before - 1


def test_concurrent_recording_loses_nothing() -> None:
    registry = CollectorRegistry()
    metrics = make(registry)

    def record() -> None:
        for _ in range(500):
            metrics.record_step(StepSample(sized(0.001, 1), 1, [(0.001, 1)]))

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        generate_latest(registry)
    for thread in threads:
        thread.join()
    assert value(registry, "generation_tokens_total") == 2000
    assert value(registry, "inter_token_latency_seconds_count") == 2000


def test_a_step_costs_less_than_fifty_microseconds() -> None:
    metrics = make(CollectorRegistry())
    sample = StepSample(sized(0.01, 256), 256, [(0.02, 200), (0.03, 56)])
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(200):
            metrics.record_step(sample)
        best = min(best, (time.perf_counter() - start) / 200)
    assert best < 50e-6
