"""The benchmarks' own logic: one set of prompts for everyone, figures, ratios, tables. No engine runs here."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import offline, report
from benchmarks.make_models import MODELS
from benchmarks.peers.protocol import Run, figures, peak_rss_mb, versions
from benchmarks.workloads import WORKLOADS, make_prompts, measured_seed, warm_up_seed
from llm_engine.cli import bench_offline


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_prompts_are_those_of_the_engines_command(name: str) -> None:
    ours, command = WORKLOADS[name], bench_offline.WORKLOADS[name]
    for seed in (0, 5):
        asked = bench_offline.make_prompts(command, command.requests, bench_offline.HIGHEST_ID, seed)
        assert make_prompts(ours, seed) == asked
    assert ours.output == command.output


def test_no_two_runs_share_a_seed() -> None:
    seeds = [seed(repeat) for repeat in range(5) for seed in (warm_up_seed, measured_seed)]
    assert len(set(seeds)) == len(seeds)
    # The engine's command counts up from the seed it is given.
    assert measured_seed(3) == warm_up_seed(3) + 1


def test_a_prefix_shared_within_a_run_is_not_shared_between_runs() -> None:
    first, second = (make_prompts(WORKLOADS["W4"], seed) for seed in (0, 1))
    assert {tuple(ids[:768]) for ids in first} == {tuple(first[0][:768])}
    assert first[0][:768] != second[0][:768]


def test_kv_tokens_count_the_shared_ones_once() -> None:
    assert WORKLOADS["W1"].kv_tokens == 64 * 256
    assert WORKLOADS["W4"].kv_tokens == 768 + 32 * 64


def test_figures_are_means_over_requests() -> None:
    run = Run(total_s=2.0, first_token_s=[0.1, 0.3], last_token_s=[1.1, 1.9], output_tokens=[11, 5])
    assert figures(run) == pytest.approx({"total_s": 2.0, "output_throughput": 8.0, "ttft_ms": 200.0, "itl_ms": 250.0})


def test_peak_memory_and_versions_are_of_this_process() -> None:
    assert peak_rss_mb() > 10
    assert set(versions(("pytest",))) == {"python", "pytest"}


CANNED: dict[str, Any] = {
    "when": "2026-01-02 03:04",
    "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 16.0, "system": "Linux 6"},
    "model": {"name": "small", "weight_bytes": 300 * 2**20, "kv_bytes_per_token": 12 * 1024},
    "threads": 2,
    "repeats": 3,
    "runs": [],
    "failures": [],
}


def canned(**contenders: list[float]) -> dict[str, Any]:
    """A report of W1 (throughputs as given) and W2 (inter-token latency = 1000 / that)."""
    result = copy.deepcopy(CANNED)
    for repeat in range(3):
        for name, throughputs in contenders.items():
            if repeat >= len(throughputs):
                continue
            for workload in ("W1", "W2"):
                result["runs"].append({
                    "contender": name.replace("_", "-"), "repeat": repeat, "load_before": 0.5, "other_cores": 0.1,
                    "workload": workload, "model": "small", "total_s": 8192 / throughputs[repeat],
                    "output_throughput": throughputs[repeat], "ttft_ms": 40.0,
                    "itl_ms": 1000 / throughputs[repeat], "peak_rss_mb": 500.0 + repeat, "versions": {"torch": "9"},
                })  # fmt: skip
    return result


def test_ratio_is_made_within_each_repeat_against_the_best_peer() -> None:
    result = canned(llm_engine=[50.0, 60.0, 100.0], slow=[10.0, 10.0, 999.0], fast=[100.0, 80.0, 100.0])
    assert report.best_peer(result, report.FIGURES[0]) == "fast"
    assert report.ratio(result, report.FIGURES[0]) == report.Spread(0.75, 0.5, 1.0)
    itl = next(figure for figure in report.FIGURES if figure.key == "itl_ms")
    assert report.best_peer(result, itl) == "fast"
    spread = report.ratio(result, itl)
    assert spread is not None
    assert (spread.low, spread.high) == pytest.approx((1.0, 2.0))


def test_ratio_skips_repeats_that_one_side_did_not_finish() -> None:
    result = canned(llm_engine=[50.0, 60.0, 100.0], fast=[100.0])
    assert report.ratio(result, report.FIGURES[0]) == report.Spread(0.5, 0.5, 0.5)
    assert report.ratio(canned(llm_engine=[50.0]), report.FIGURES[0]) is None
    assert report.ratio(canned(fast=[50.0]), report.FIGURES[0]) is None


def test_tables_and_page() -> None:
    result = canned(fast=[1000.0, 1200.0, 1100.0], llm_engine=[600.0, 600.0, 600.0])
    header, rows = report.speed_table(result)
    assert header == ["median (min..max)", "llm-engine", "fast", "engine / best peer"]
    assert rows[0] == [
        "W1 output tok/s (higher is better)", "600 (600..600)", "1,100 (1,000..1,200)", "0.55 (0.50..0.60) of fast",
    ]  # fmt: skip
    assert [row[0].split()[0] for row in rows] == ["W1", "W2", "W2"]
    _, memory = report.memory_table(result)
    # 300 of weights, 64 x 256 tokens of 12 KiB, and 600.
    assert memory[0] == ["W1", "502", "502", "0.46 x 1,092"]
    page = report.markdown(result)
    assert "| W1 output tok/s (higher is better) | 600 (600..600) |" in page
    assert "A CPU, 2 cores" in page
    assert "Load average before a run 0.50" in page
    assert "fast: torch 9" in page


def test_a_failure_is_on_the_page() -> None:
    result = canned(llm_engine=[1.0])
    result["failures"] = [{"contender": "fast", "repeat": 1, "error": "exit code 1"}]
    assert "Failed: fast, repeat 2: exit code 1" in report.markdown(result)


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    words = ["--model", str(tmp_path)]
    args = offline.parse_args([*words, "--peer", "vllm=/a/python", "--peer", "openvino=/b/python"])
    assert [(peer.name, peer.python) for peer in args.peer] == [("vllm", "/a/python"), ("openvino", "/b/python")]
    for wrong in (["--peer", "vllm"], ["--peer", "other=/python"], ["--repeats", "0"], ["--model", "nowhere"]):
        with pytest.raises(SystemExit):
            offline.parse_args([*words, *wrong])
        assert wrong[0] in capsys.readouterr().err


def test_a_contender_that_fails_leaves_its_words(tmp_path: Path) -> None:
    contender = offline.Contender("broken", "/bin/false", "none")
    args = argparse.Namespace(
        model=tmp_path, workload=["W2"], repeats=1, threads=1, kv_gib=1, cache=tmp_path, timeout=20.0
    )
    result = copy.deepcopy(CANNED)
    offline.measure(args, contender, 0, result)
    assert result["runs"] == []
    assert result["failures"] == [{"contender": "broken", "repeat": 0, "error": "exit code 1 (limit 20 s)"}]


def test_model_facts(tmp_path: Path) -> None:
    _, _, shape = MODELS["small"]
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (tmp_path / "model.safetensors").write_bytes(bytes(10))
    about = offline.describe_model(tmp_path)
    assert (about["weight_bytes"], about["kv_bytes_per_token"]) == (10, 12 * 1024)
