"""``llm-engine simulate``, in process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_engine.cli.main import main
from llm_engine.metrics.pipeline_report import report
from llm_engine.metrics.step_trace import read_trace

LOAD = ["--requests", "24", "--input-len", "64", "--output-len", "16"]
SMALL = [*LOAD, "--scheduler", "greedy"]
SPREAD = {"mean", "p50", "p90", "p99"}


def simulate(tmp_path: Path, *words: str) -> dict[str, Any]:
    target = tmp_path / "out.json"
    assert main(["simulate", *SMALL, "--json", str(target), *words]) == 0
    found: dict[str, Any] = json.loads(target.read_text(), parse_constant=pytest.fail)
    return found


def test_the_figures_have_the_names_that_are_published(tmp_path: Path) -> None:
    found = simulate(tmp_path)
    for key in ("ttft_s", "itl_s", "e2e_s"):
        assert set(found[key]) == SPREAD
        assert 0 < found[key]["p50"] <= found[key]["p90"] <= found[key]["p99"]
    assert set(found["micro_batch_tokens"]) == {"min", "mean", "max"}
    assert len(found["stage_busy"]) == 4
    assert all(0 < ratio <= 1 for ratio in found["stage_busy"])
    assert found["bubble_fraction"] == pytest.approx(1 - sum(found["stage_busy"]) / 4)
    assert found["output_throughput"] == pytest.approx(24 * 16 / found["makespan_s"])
    assert found["request_throughput"] == pytest.approx(24 / found["makespan_s"])
    assert 0 < found["kv_usage_peak"] <= 1
    assert found["preemptions"] == 0


def test_every_setting_stands_beside_the_figures(tmp_path: Path) -> None:
    told = simulate(tmp_path, "--link", "300,2.5", "--seed", "7", "--stages", "5", "--host-overhead-us", "100")
    settings = told["settings"]
    assert settings["model_shape"] == "llama-2-13b"
    assert settings["layers_per_stage"] == [8, 8, 8, 8, 8]
    assert settings["link_latency_us"] == pytest.approx(300)
    assert settings["link_gbit"] == pytest.approx(2.5)
    assert settings["host_push_us"] == pytest.approx(50)
    assert settings["seed"] == 7
    assert settings["rate"] == "inf"
    assert settings["scheduler"] == "greedy"
    assert settings["max_num_batched_tokens"] == 2048
    assert settings["block_size"] == 64
    assert settings["num_kv_blocks"] > 300
    assert settings["num_queues"] >= 5


def test_the_same_command_gives_the_same_figures(tmp_path: Path) -> None:
    words = ("--lengths", "lognormal", "--rate", "5", "--seed", "3")
    assert simulate(tmp_path, *words) == simulate(tmp_path, *words)


def test_the_table_shows_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = simulate(tmp_path)
    printed = capsys.readouterr().out
    for text in ("makespan", "inter-token", "bubble fraction", "KV use, peak", "preemptions", "imbalance of 4 in a"):
        assert text in printed
    assert f"{found['makespan_s']:.4g} s" in printed
    assert ", ".join(f"{100 * ratio:.1f}" for ratio in found["stage_busy"]) in printed


def test_what_was_not_to_be_measured_is_a_dash_and_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = simulate(tmp_path, "--requests", "1", "--output-len", "1")
    assert (found["stage_busy"], found["bubble_fraction"]) == ([None] * 4, None)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    for name in ("stages busy between fill and drain", "bubble fraction"):
        assert [*name.split(), "-"] in printed


def test_a_trace_reads_back_and_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    found = simulate(tmp_path, "--trace", str(path))
    trace = read_trace(str(path))
    assert trace.metadata.simulated
    assert trace.metadata.layers_per_stage == (10, 10, 10, 10)
    assert len(trace.records) == found["steps"]
    traced = report(trace.records)
    assert list(traced.stage_busy) == pytest.approx(found["stage_busy"])
    assert main(["trace", str(path)]) == 0


def test_a_trace_of_many_steps_holds_the_last_ones(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    found = simulate(tmp_path, "--trace", str(path), "--trace-steps", "10")
    steps = [record.step for record in read_trace(str(path)).records]
    assert steps == list(range(found["steps"] - 9, found["steps"] + 1))


def test_the_timeline_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "timeline.png"
    simulate(tmp_path, "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_a_workload_from_a_file(tmp_path: Path) -> None:
    load = tmp_path / "load.jsonl"
    load.write_text('{"input_len": 10, "output_len": 3}\n{"arrival_s": 1.5, "input_len": 20, "output_len": 2}\n')
    target = tmp_path / "out.json"
    assert main(["simulate", "--workload", str(load), "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["finished_requests"] == 2
    assert found["output_tokens"] == 5
    assert found["settings"]["requests"] == 2
    assert found["settings"]["input_len"] is None
    assert found["makespan_s"] > 1.5


def test_what_was_resolved_stands_beside_the_figures(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    assert main(["simulate", *LOAD, "--ordering", "priority", "--json", str(target)]) == 0
    settings = json.loads(target.read_text())["settings"]
    names = [settings[name] for name in ("scheduler", "ordering", "capacity", "micro_batch")]
    assert names == ["balanced", "priority", "max-utilization", "balanced"]
    resolved = [settings[name] for name in ("dtype", "link", "hardware", "num_layers", "max_model_len")]
    assert resolved == ["bfloat16", "lan-1g", "rtx-4070", 40, 4096]
    assert settings["host_overhead_us"] == pytest.approx(200)
    assert main(["simulate", *LOAD, "--json", str(target), "--link", "ipc", "--dtype", "float16"]) == 0
    settings = json.loads(target.read_text())["settings"]
    assert (settings["scheduler"], settings["link"], settings["dtype"]) == ("balanced", "ipc", "float16")


def test_no_model_is_needed_and_no_torch() -> None:
    code = (
        "import sys\n"
        "from llm_engine.cli.main import main\n"
        f"assert main(['simulate', *{SMALL!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'zmq', 'asyncio'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model-shape", "llama-9"], 2, "model_shape is 'llama-9'; allowed: llama-2-7b"),
        (["--hardware", "abacus"], 2, "rtx-4070"),
        (["--link", "rope"], 2, "LATENCY_US,GBIT"),
        (["--scheduler", "gready"], 2, "greedy"),
        (["--requests", "0"], 2, "requests is 0"),
        (["--rate", "0"], 2, "rate is 0.0"),
        (["--rate", "fast"], 2, "rate"),
        (["--stages", "50"], 2, "40 layers"),
        (["--stages", "2"], 1, "2 such devices cannot hold the model: its weights take 24.2 GiB"),
        (["--num-kv-blocks", "2"], 1, "the cache has 1"),
        (["--json", "/nowhere/at/all.json"], 2, "json is '/nowhere/at/all.json'; allowed: a file that can be written"),
        (["--plot", "/nowhere/at/all.png"], 2, "plot is"),
        (["--workload", "/nowhere/at/all"], 2, "bursty-chat, long-documents, many-tenants, shared-prefix, or a file"),
        (["--workload", "bursty-chat"], 2, "requests is 24; allowed: nothing beside workload='bursty-chat'"),
        (["--time-scale", "2"], 2, "nothing without a workload"),
        (["--deadline-ms", "0"], 2, "milliseconds above 0"),
        (["--slo-itl-ms", "-1"], 2, "milliseconds above 0"),
        (["--compare", "fair"], 2, "scheduler is 'greedy'; allowed: nothing beside compare"),
        (["--stagse", "4"], 2, "did you mean --stages"),
        (["--output-len", "5000"], 2, "output_len is 5000; allowed: at most 4032: the context is 4096 tokens"),
        (["--input-len", "5000"], 2, "input_len is 5000; allowed: at most 4095: the context is 4096 tokens"),
        (["--num-kv-blocks", "99999999999999"], 2, "num_kv_blocks is 99999999999999; allowed: at most"),
        (["--fit", "/nowhere/at/all"], 2, "fit is '/nowhere/at/all'; allowed: a file that can be read"),
        (["--plot", "picture.xyz"], 2, "plot is 'picture.xyz'; allowed: a file name that ends in one of"),
        (["--json", "a.json", "--trace", "./a.json"], 2, "json is 'a.json'; allowed: another file than that of trace"),
        (["--json", "a.png", "--plot", "a.png"], 2, "plot is 'a.png'; allowed: another file than that of json"),
        (["--workload", "a.jsonl", "--json", "a.jsonl"], 2, "json is 'a.jsonl'; allowed: another file than that of wo"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    words: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        ended = main(["simulate", *SMALL, *words])
    except SystemExit as left:
        ended = left.code
    assert ended == code
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1
    assert not told.out
    assert not list(tmp_path.iterdir())


def test_a_short_run_shows_no_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    simulate(tmp_path)
    assert capsys.readouterr().err == ""
