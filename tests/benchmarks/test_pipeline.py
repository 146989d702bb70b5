"""Pipelines on real stages: what is asked, the table's columns, the pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pipeline
from benchmarks.pipeline_turn import MIXES, draw, measure
from llm_engine import LLM
from llm_engine.cli.main import main as llm_engine
from llm_engine.metrics.step_trace import read_trace
from llm_engine.metrics.timeline import BUBBLE, DECODE
from tests.metrics.test_timeline import share

LAYERS = {"small": 12, "tiny": 4}
PUBLISHABLE = 150_000
"""Bytes of a picture."""


def test_the_host_is_asked_at_64_requests_with_one_stage_and_two_ahead_and_not() -> None:
    asked = [group for group in pipeline.groups(LAYERS) if group.name.startswith("host-")]
    assert [group.model for group in asked] == ["tiny", "small"]
    for group in asked:
        assert MIXES[group.mix].requests == 64
        assert MIXES[group.mix].output > MIXES[group.mix].own
        ways = {
            (row.settings.get("pipeline_parallel_size", 1), row.settings["schedule_ahead"]): row.name
            for row in group.rows
        }
        assert ways == {
            (1, True): "1 stage, ahead", (1, False): "1 stage, not ahead",
            (2, True): "2 stages, ahead", (2, False): "2 stages, not ahead",
        }  # fmt: skip


def test_what_is_drawn_is_asked() -> None:
    rows = {group.name: {row.name for row in group.rows} for group in pipeline.groups(LAYERS)}
    assert all(set(names) <= rows[group] for group, names in pipeline.DRAWN.items())


def run(name: str, seconds: float, host: list[float] | None) -> dict[str, Any]:
    return {
        "group": "host-tiny", "name": name, "seed": 0, "seconds": seconds, "ttft_s": 0.1, "stage_busy": [0.5],
        "host_overhead_us": host, "other_cores": 0.0,
    }  # fmt: skip


def result(*runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "when": "2026-01-02 03:04", "repeats": 1, "runs": list(runs), "failures": [],
        "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 16.0, "system": "Linux 6"},
        "groups": [{"name": "host-tiny", "model": "tiny", "mix": "host", "question": "64 requests"}],
        "timelines": {"host-tiny": {"b": "pipeline-b.png"}},
    }  # fmt: skip


def test_the_table_has_both_percentiles_of_the_host_overhead() -> None:
    page = pipeline.markdown(result(run("a", 2.0, [310.0, 950.0]), run("a", 2.0, [290.0, 850.0]), run("b", 1.0, None)))
    header, _, first, second = (line for line in page.splitlines() if line.startswith("|"))
    assert header.endswith("| host overhead p50, µs | p99, µs |")
    assert first.endswith("| 300 (290..310) | 900 (850..950) |")
    assert second.endswith("| - | - |")
    assert "![b](pipeline-b.png)" in page


def test_the_hosts_figures_are_those_of_the_trace_command(tmp_path: Path) -> None:
    trace, report, picture = (tmp_path / name for name in ("trace.json", "report.json", "timeline.png"))
    with LLM(num_kv_blocks=600, schedule_ahead=False) as llm:
        p50, p99 = measure(llm, [[n, n + 1, n + 2] for n in range(64)], 24)["host_overhead_us"]
        llm.write_trace(str(trace))
        draw(llm.get_stats(), str(picture), "demo")
    assert llm_engine(["trace", str(trace), "--json", str(report)]) == 0
    told = json.loads(report.read_text())["host_overhead"]
    # A trace file has microseconds with a few digits.
    assert (p50, p99) == pytest.approx((1e6 * told["p50"], 1e6 * told["p99"]), abs=1.0)
    assert 0 < p50 <= p99
    assert share(picture, DECODE) > 0


def test_a_picture_shows_greedy_standing_still_and_is_small_enough_to_publish(tmp_path: Path) -> None:
    empty = {}
    for scheduler in ("greedy", "balanced"):
        trace, picture = tmp_path / f"{scheduler}.json", tmp_path / f"{scheduler}.png"
        words = ["--stages", "2", "--hardware", "cpu-1core-avx512", "--model-shape", "llama-2-7b", "--link", "ipc"]
        words += ["--requests", "64", "--output-len", "32", "--max-num-batched-tokens", str(pipeline.UNLIMITED)]
        words += ["--no-schedule-ahead", "--unlimited-kv", "--scheduler", scheduler, "--trace", str(trace)]
        assert llm_engine(["simulate", *words]) == 0
        draw(read_trace(str(trace)).records, str(picture), scheduler)
        assert picture.stat().st_size < PUBLISHABLE
        empty[scheduler] = share(picture, BUBBLE)
    assert empty["greedy"] > 4 * empty["balanced"]


def test_a_timeline_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--small", "s", "--tiny", "t", "--timelines"]
    assert pipeline.parse_args(words).timelines
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        pipeline.parse_args(words)
    assert "matplotlib" in capsys.readouterr().err
