"""``docs/metrics.md`` lists what an engine exposes: no more, no less, under the same names, types and labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from llm_engine import LLM, SamplingParams

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
COMMON_LABELS = {"model_name", "engine"}
_ROW = re.compile(r"^\| `(llm_engine_\w+)` \| (\w+) \|(.*?)\| .+ \|$", re.MULTILINE)

Described = dict[str, tuple[str, dict[str, set[str]]]]
"""Name to (type, label to its values; none for a label with any value)."""


@pytest.fixture(scope="module")
def exposed() -> Iterator[list[Metric]]:
    with LLM(num_kv_blocks=20) as llm:
        llm.generate([1, 2, 3], SamplingParams(max_tokens=3), use_tqdm=False)
        yield list(text_string_to_metric_families(generate_latest(llm.registry).decode()))


def names_of(family: Metric) -> str:
    return family.name + "_total" if family.type == "counter" else family.name


def test_the_table_is_what_an_engine_exposes(exposed: list[Metric]) -> None:
    found: Described = {}
    for family in exposed:
        labels: dict[str, set[str]] = {}
        for sample in family.samples:
            assert sample.labels.keys() >= COMMON_LABELS
            for label, value in sample.labels.items():
                if label not in {*COMMON_LABELS, "le"}:
                    labels.setdefault(label, set()).add(value)
        labels = {label: values if label in ("reason", "part") else set() for label, values in labels.items()}
        found[names_of(family)] = (family.type, labels)
    written: Described = {}
    for name, kind, text in _ROW.findall(PAGE):
        label, *values = re.findall(r"`(\w+)`", text) or [""]
        written[name] = (kind, {label: set(values)} if label else {})
    assert written == found


def test_queries_name_samples_that_exist(exposed: list[Metric]) -> None:
    samples = {sample.name for family in exposed for sample in family.samples}
    blocks = re.findall(r"```promql\n(.*?)```", PAGE, re.DOTALL)
    asked = {name for block in blocks for name in re.findall(r"llm_engine_\w+", block)}
    assert asked
    assert asked <= samples


def test_what_the_page_says_of_rejections_and_choices() -> None:
    with LLM(num_kv_blocks=20) as llm:

        def value(name: str, **labels: str) -> float | None:
            return llm.registry.get_sample_value(name, {"model_name": "demo", "engine": "0", **labels})

        with pytest.raises(ValueError):
            llm.generate("", use_tqdm=False)
        with pytest.raises(ValueError):
            SamplingParams(n=0)
        llm.generate([5, 6, 7], SamplingParams(n=3, max_tokens=2, ignore_eos=True), use_tqdm=False)
        assert value("llm_engine_requests_rejected_total", reason="invalid") == 1
        assert value("llm_engine_requests_finished_total", reason="length") == 3
        assert value("llm_engine_prompt_tokens_total") == 3
        registry = llm.registry
    assert [family for family in registry.collect() if family.samples] == []
