"""``llm-engine simulate``, in process: from a trace, from a folder, with the memory told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_engine.cli.main import main

LOAD = ["--requests", "24", "--input-len", "64", "--output-len", "48", "--max-num-batched-tokens", "256"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 12,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def simulate(tmp_path: Path, *words: str) -> dict[str, Any]:
    target = tmp_path / "out.json"
    assert main(["simulate", *LOAD, "--json", str(target), *words]) == 0
    found: dict[str, Any] = json.loads(target.read_text(), parse_constant=pytest.fail)
    return found


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of three stages with 12 layers in all."""
    path = str(tmp_path_factory.mktemp("traces") / "trace.json")
    words = ["--num-layers", "12", "--stages", "3", "--scheduler", "greedy", "--trace", path]
    assert main(["simulate", *LOAD, *words]) == 0
    return path


def test_a_fit_takes_stages_pool_and_costs_of_its_trace(
    tmp_path: Path, trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    real = simulate(tmp_path, "--num-layers", "12", "--stages", "3", "--scheduler", "greedy")
    capsys.readouterr()
    fitted = simulate(tmp_path, "--fit", trace, "--scheduler", "greedy")
    for name in ("stages", "layers_per_stage", "num_kv_blocks", "block_size", "max_num_batched_tokens"):
        assert fitted["settings"][name] == real["settings"][name]
    assert fitted["makespan_s"] == pytest.approx(real["makespan_s"], rel=0.05)
    assert f"llama-2-13b, 3 stages, fitted to {trace} within" in capsys.readouterr().out
    more = simulate(tmp_path, "--fit", trace, "--stages", "4", "--pipeline-layer-partition", "4,4,2,2")
    assert more["settings"]["layers_per_stage"] == [4, 4, 2, 2]
    same = simulate(tmp_path, "--fit", trace, "--pipeline-layer-partition", "5,4,3")
    assert same["settings"]["layers_per_stage"] == [5, 4, 3]


def test_several_schedulers_on_one_fit(tmp_path: Path, trace: str) -> None:
    runs = simulate(tmp_path, "--fit", trace, "--compare", "greedy,balanced")["runs"]
    assert [run["settings"]["stages"] for run in runs] == [3, 3]


def test_a_folder_is_simulated_in_its_own_type(tmp_path: Path) -> None:
    bytes_of = {}
    for dtype in ("float32", "bfloat16"):
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": dtype}))
        settings = simulate(tmp_path, "--model-shape", str(tmp_path), "--stages", "2")["settings"]
        assert (settings["dtype"], settings["layers_per_stage"]) == (dtype, [6, 6])
        bytes_of[dtype] = settings["num_kv_blocks"]
    assert bytes_of["float32"] < 0.52 * bytes_of["bfloat16"]


def test_the_memory_may_be_a_share_or_without_limit(tmp_path: Path) -> None:
    blocks = {
        words: simulate(tmp_path, *words)["settings"]["num_kv_blocks"]
        for words in ((), ("--gpu-memory-utilization", "0.8"), ("--unlimited-kv",))
    }
    assert blocks["--gpu-memory-utilization", "0.8"] < blocks[()]
    assert blocks["--unlimited-kv",] == 2 + 24 * 2  # of 64 tokens: 112 for each


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hardware", "l4"], "hardware is 'l4'; allowed: nothing beside fit"),
        (["--dtype", "float32"], "dtype is 'float32'; allowed: nothing beside fit"),
        (["--gpu-memory-utilization", "0.5"], "gpu_memory_utilization is 0.5; allowed: nothing beside fit"),
        (["--unlimited-kv", "--num-kv-blocks", "50"], "num_kv_blocks is 50; allowed: nothing beside unlimited_kv"),
        (["--link", "ipc"], "link is 'ipc'; allowed: nothing beside a fit"),
        (["--stages", "13"], "stages is 13; allowed: at most the model's 12 layers"),
        (["--pipeline-layer-partition", "6,6"], "allowed: 3 numbers of 1 or more with commas"),
        (["--pipeline-layer-partition", "six"], "pipeline_layer_partition is 'six'"),
    ],
)
def test_what_does_not_go_with_a_fit_is_refused_in_a_line(
    trace: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *LOAD, "--fit", trace, *words]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert (told.err.count("\n"), told.out) == (1, "")
