"""The offline benchmark: its workloads, its report, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_engine.cli.bench_offline import WORKLOADS, Figures, make_prompts, make_report
from llm_engine.cli.main import main


@pytest.mark.parametrize(
    ("name", "requests", "prompt", "shared"),
    [("W1", 64, 128, 0), ("W2", 1, 128, 0), ("W3", 16, 1024, 0), ("W4", 32, 800, 768)],
)
def test_workloads_are_those_of_the_benchmarks_page(name: str, requests: int, prompt: int, shared: int) -> None:
    workload = WORKLOADS[name]
    prompts = make_prompts(workload, workload.requests, 31_000, seed=0)
    assert len(prompts) == requests
    assert {len(ids) for ids in prompts} == {prompt}
    assert len({tuple(ids[:shared]) for ids in prompts}) == 1
    assert len({tuple(ids[shared:]) for ids in prompts}) == requests
    assert all(100 <= token_id < 31_000 for ids in prompts for token_id in ids)


def test_prompts_repeat_with_their_seed_and_change_with_it() -> None:
    workload = WORKLOADS["W4"]
    assert make_prompts(workload, 2, 1000, 3) == make_prompts(workload, 2, 1000, 3)
    assert make_prompts(workload, 2, 1000, 3)[0][:768] != make_prompts(workload, 2, 1000, 4)[0][:768]


def test_the_report_shows_the_best_run_and_keeps_all() -> None:
    slow, fast = Figures(2.0, 10.0, 5.0, 1.0), Figures(1.0, 20.0, 4.0, 0.9)
    report = make_report("W1", "m", 64, [slow, fast])
    assert {"workload", "model", "total_s", "output_throughput", "ttft_ms", "itl_ms", "peak_rss_mb", "versions"} <= set(
        report
    )
    assert report["total_s"] == 1.0
    assert [run["total_s"] for run in report["runs"]] == [2.0, 1.0]
    assert report["peak_rss_mb"] > 1
    assert report["versions"]["llm-engine"]


def test_a_run_on_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "w1.json"
    words = ["--workload", "W1", "--requests", "2", "--repeat", "2", "--json", str(target), "--num-kv-blocks", "64"]
    assert main(["bench", "offline", *words, "--cpu-threads", "1"]) == 0
    report = json.loads(target.read_text())
    assert report["requests"] == 2
    assert len(report["runs"]) == 2
    for run in report["runs"]:
        assert run["output_throughput"] == pytest.approx(2 * 128 / run["total_s"])
        assert 0 < run["ttft_ms"] < 1e3 * run["total_s"]
        assert run["itl_ms"] > 0
    assert "W1" in capsys.readouterr().out
