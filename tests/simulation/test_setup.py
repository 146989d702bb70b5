"""From settings to a simulation: names resolved, memory enforced, what is impossible refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_engine.core.config import EngineConfig
from llm_engine.core.errors import CapacityError, ConfigError, ModelLoadError
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.hardware import HARDWARE
from llm_engine.simulation.model_shapes import SHAPES, find_shape
from llm_engine.simulation.setup import Setup, set_up
from llm_engine.simulation.workload import Arrival, prompt

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "num_hidden_layers": 40,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def made(engine: dict[str, Any] | None = None, **settings: Any) -> Setup:
    return set_up(SimulationConfig(**settings), EngineConfig.of(**(engine or {})))


def test_the_defaults_are_the_headline() -> None:
    setup = made()
    assert setup.model == "llama-2-13b"
    assert setup.split == (10, 10, 10, 10)
    assert 20_500 <= (setup.num_kv_blocks - 1) * setup.block_size <= 21_500
    assert len(setup.arrivals) == 256


def test_a_folder_with_a_config_is_a_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    read, known = find_shape(str(tmp_path)), SHAPES["llama-2-13b"]
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "layers", "kv_size"):
        assert getattr(read, name) == getattr(known, name)
    named, folder = made(), made(model_shape=str(tmp_path))
    assert folder.simulator().run(folder.arrivals).makespan == named.simulator().run(named.arrivals).makespan


@pytest.mark.parametrize(
    ("key", "named", "told", "taken"),
    [
        ("torch_dtype", "float32", "auto", "float32"),
        ("dtype", "float16", "auto", "float16"),
        ("dtype", "torch.bfloat16", "auto", "bfloat16"),
        ("dtype", "float64", "auto", "float32"),  # as an engine does with what it does not compute in
        ("dtype", "float32", "float16", "float16"),
    ],
)
def test_a_folders_type_is_taken_as_an_engine_takes_it(
    tmp_path: Path, key: str, named: str, told: str, taken: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, key: named}))
    folder = made({"dtype": told}, model_shape=str(tmp_path), hardware="a100-80g")
    known = made({"dtype": taken}, hardware="a100-80g")
    assert folder.dtype == known.dtype == taken
    assert folder.num_kv_blocks == known.num_kv_blocks
    assert folder.simulator().run(folder.arrivals).makespan == known.simulator().run(known.arrivals).makespan


def test_a_shape_may_be_deeper() -> None:
    assert find_shape("llama-2-7b", 1000).num_layers == 1000
    assert find_shape("llama-2-7b", 3).num_layers == 3


@pytest.mark.parametrize(
    ("settings", "field", "known"),
    [
        ({"model_shape": "llama-9"}, "model_shape", "llama-2-13b, llama-2-70b"),
        ({"hardware": "abacus"}, "hardware", "rtx-4070, rtx-4090"),
        ({"link": "string"}, "link", "lan-1g, lan-10g"),
        ({"stages": 41}, "stages", "40 layers"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(settings: dict[str, Any], field: str, known: str) -> None:
    with pytest.raises(ConfigError, match=known) as refused:
        made(**settings)
    assert refused.value.field == field


def test_an_unknown_scheduler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="greedy"):
        made({"scheduler": "gready"}).simulator()


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        made(model_shape=str(tmp_path))
    (tmp_path / "config.json").write_text('{"architectures": ["NobodyForCausalLM"]}')
    with pytest.raises(ModelLoadError, match="NobodyForCausalLM"):
        made(model_shape=str(tmp_path))


def test_devices_that_cannot_hold_the_model_are_refused() -> None:
    with pytest.raises(CapacityError, match="2 such devices cannot hold the model"):
        made(stages=2)
    with pytest.raises(CapacityError, match="1 such device cannot hold the model"):
        made(stages=1)
    assert made(stages=2, hardware="rtx-4090").num_kv_blocks > 100


def test_memory_follows_the_share_and_may_be_told_or_unlimited() -> None:
    assert made({"gpu_memory_utilization": 0.8}).num_kv_blocks < made().num_kv_blocks
    assert made({"num_kv_blocks": 77}).num_kv_blocks == 77
    with pytest.raises(ConfigError, match="num_kv_blocks is 77; allowed: nothing beside unlimited_kv"):
        made({"num_kv_blocks": 77}, unlimited_kv=True)
    setup = made(unlimited_kv=True)
    assert (setup.num_kv_blocks - 1) * setup.block_size >= 256 * 256
    assert setup.simulator().run(setup.arrivals).num_preemptions == 0


def test_more_blocks_than_can_be_counted_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_kv_blocks is 99999999999999; allowed: at most 16777216"):
        made({"num_kv_blocks": 99_999_999_999_999})
    many = [Arrival(0.0, prompt(0, 3000), 1000)] * 5_000
    with pytest.raises(
        ConfigError, match=r"unlimited_kv is True; allowed: a load that needs at most 16777216 blocks, not 2"
    ):
        set_up(SimulationConfig(unlimited_kv=True), EngineConfig.of(block_size=1), arrivals=many)


def test_a_cpu_has_its_own_defaults() -> None:
    setup = made(hardware="cpu-1core-avx512", model_shape="llama-2-7b")
    assert (setup.block_size, setup.limits.max_num_batched_tokens) == (16, 512)
    assert set(HARDWARE) > {"cpu-1core-avx512", "cpu-2core-avx512"}


def test_a_request_that_the_cache_can_never_hold_is_refused_before_the_run() -> None:
    with pytest.raises(CapacityError, match="request 0, with 128 tokens in and 128 out, needs 4 blocks of 64"):
        made({"num_kv_blocks": 4})
    assert made({"num_kv_blocks": 5}).num_kv_blocks == 5


def test_layers_are_split_as_told_or_by_time() -> None:
    assert made({"pipeline_layer_partition": "10,12,10,8", "pipeline_parallel_size": 4}).split == (10, 12, 10, 8)
    with pytest.raises(ConfigError, match="40 layers"):
        made({"pipeline_layer_partition": "10,12,10,9", "pipeline_parallel_size": 4})
    decode = made({"pipeline_layer_partition": "decode"}, model_shape="llama-3-8b", hardware="a100-40g").split
    assert sum(decode) == 32
    assert decode[-1] < decode[0]


def test_a_link_may_be_spelled_and_the_host_may_cost_nothing() -> None:
    setup = made(link="50,10", host_overhead_us=0.0)
    assert (setup.link.latency, setup.link.bandwidth) == (50e-6, 1.25e9)
    assert (setup.host.push, setup.host.retire) == (0.0, 0.0)
