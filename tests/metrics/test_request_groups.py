"""Series by tenant and by priority: what is counted, and that their number has an end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from llm_engine import LLM, SamplingParams
from llm_engine.core.errors import ConfigError
from llm_engine.metrics import EngineMetrics, FinishedSample, FirstTokenSample
from llm_engine.metrics.request_groups import label_of

KINDS = ("tenant", "priority")


def make(max_tenants: int = 3, max_priorities: int = 3) -> tuple[EngineMetrics, CollectorRegistry]:
    registry = CollectorRegistry()
    metrics = EngineMetrics(
        registry, model_name="m", version="1", max_tenants=max_tenants, max_priorities=max_priorities
    )
    return metrics, registry


def read(registry: CollectorRegistry, kind: str, name: str) -> dict[str, float]:
    """Label to value."""
    return {
        sample.labels[kind]: sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == f"llm_engine_{kind}_{name}" and sample.labels.get("le", "+Inf") == "+Inf"
    }


def finish(metrics: EngineMetrics, **whose: Any) -> None:
    metrics.record_finished(FinishedSample("stop", 1.0, 5, **whose))


def test_each_has_numbers_of_its_own() -> None:
    metrics, registry = make()
    metrics.record_first_token(FirstTokenSample(0.3, 0.2, 7, "alice", 1))
    metrics.record_first_token(FirstTokenSample(0.5, 0.1, 9, "alice", 2))
    metrics.record_first_token(FirstTokenSample(4.0, 3.0, 2, "bob", 1))
    metrics.record_finished(FinishedSample("stop", 1.0, 11, "alice", 1))
    metrics.record_finished(FinishedSample("abort", 1.0, 0, "bob", 1))
    assert read(registry, "tenant", "time_to_first_token_seconds_sum") == {"alice": 0.8, "bob": 4.0}
    assert read(registry, "tenant", "time_to_first_token_seconds_bucket") == {"alice": 2, "bob": 1}
    assert read(registry, "tenant", "request_queue_time_seconds_sum") == pytest.approx({"alice": 0.3, "bob": 3.0})
    assert read(registry, "tenant", "prompt_tokens_total") == {"alice": 16, "bob": 2}
    assert read(registry, "tenant", "generation_tokens_total") == {"alice": 11, "bob": 0}
    assert read(registry, "tenant", "requests_finished_total") == {"alice": 1, "bob": 1}
    assert read(registry, "priority", "prompt_tokens_total") == {"1": 9, "2": 9}
    assert read(registry, "priority", "requests_finished_total") == {"1": 2, "2": 0}


def test_who_comes_after_the_limit_shares_other() -> None:
    metrics, registry = make(2, 1)
    for name in ("c", "a", "b", None, "c", "d", None):
        finish(metrics, tenant=name, priority=len(name or ""))
    assert read(registry, "tenant", "requests_finished_total") == {"c": 2, "a": 1, "other": 2, "anonymous": 2}
    assert read(registry, "priority", "requests_finished_total") == {"1": 5, "other": 2}


def test_with_none_allowed_nothing_is_counted() -> None:
    metrics, registry = make(0, 0)
    finish(metrics, tenant="a", priority=3)
    for kind in KINDS:
        assert read(registry, kind, "requests_finished_total") == {}


def test_before_the_first_request_there_are_no_series() -> None:
    _, registry = make()
    assert all(read(registry, kind, "requests_finished_total") == {} for kind in KINDS)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (None, "anonymous"),
        ("", "anonymous"),
        ("alice", "alice"),
        ("Zoë 山", "Zoë 山"),
        ("x" * 1000, "x" * 64),
        ('a"b\\c', 'a"b\\c'),
        ("a\nb\x00\x85c\u2028", "a?b??c?"),
        ("lone \ud800 surrogate", "lone ? surrogate"),
        (0, "0"),
        (-12, "-12"),
        pytest.param(10**5000, "huge", id="huge"),
        pytest.param(-(10**5000), "-huge", id="minus huge"),
    ],
)
def test_a_label_is_a_short_printable_text(value: str | int | None, label: str) -> None:
    assert label_of(value) == label
    metrics, registry = make()
    finish(metrics, **({"priority": value} if isinstance(value, int) else {"tenant": value}))
    kind = "priority" if isinstance(value, int) else "tenant"
    assert read(registry, kind, "requests_finished_total") == {label: 1}
    scraped = text_string_to_metric_families(generate_latest(registry).decode())
    assert label in {sample.labels.get(kind) for family in scraped for sample in family.samples}


texts = st.one_of(st.none(), st.text(max_size=80), st.sampled_from(["other", "anonymous", "a", "b"]))
requests = st.lists(st.tuples(texts, st.integers(-(2**200), 2**200), st.integers(0, 9)), max_size=30)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(requests, st.integers(1, 4), st.integers(1, 4))
def test_whatever_comes_the_number_of_series_has_an_end_and_no_counter_falls(
    lives: list[tuple[str | None, int, int]], max_tenants: int, max_priorities: int
) -> None:
    metrics, registry = make(max_tenants, max_priorities)
    before: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for number, (tenant, priority, tokens) in enumerate(lives, start=1):
        metrics.record_finished(FinishedSample("stop", 1.0, tokens, tenant, priority))
        if number % 5 and number < len(lives):
            continue
        for kind, most in (("tenant", max_tenants + 2), ("priority", max_priorities + 1)):
            now = read(registry, kind, "requests_finished_total")
            assert len(now) <= most
            assert sum(now.values()) == number
            assert all(now[label] >= count for label, count in before[kind].items())
            before[kind] = now
    assert sum(read(registry, "tenant", "generation_tokens_total").values()) == sum(tokens for *_, tokens in lives)


def test_an_engine_counts_by_tenant_what_it_counts_at_all() -> None:
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with LLM(num_kv_blocks=40, metrics_tenants=2, metrics_priorities=0) as llm:
        for tenant, length in (("alice", 3), ("bob", 4), ("carol", 5), ("alice", 6), (None, 7)):
            llm.submit(list(range(1, length + 1)), params, tenant=tenant).result(60)
        registry = llm.registry
        assert read(registry, "tenant", "prompt_tokens_total") == {"alice": 9, "bob": 4, "other": 5, "anonymous": 7}
        assert read(registry, "tenant", "generation_tokens_total") == {
            "alice": 12, "bob": 6, "other": 6, "anonymous": 6,
        }  # fmt: skip
        whole = registry.get_sample_value("llm_engine_generation_tokens_total", {"model_name": "demo", "engine": "0"})
        assert whole == 30
        assert read(registry, "tenant", "time_to_first_token_seconds_bucket")["alice"] == 2
        assert read(registry, "priority", "requests_finished_total") == {}


@pytest.mark.parametrize("field", ["metrics_tenants", "metrics_priorities"])
@pytest.mark.parametrize("value", [-1, 1.5, "4"])
def test_a_limit_is_a_whole_number_of_0_or_more(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        LLM(**{field: value})
