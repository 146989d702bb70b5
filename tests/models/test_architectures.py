"""Specs from configs: what real checkpoints leave out, generation defaults, other packages."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from llm_engine.core.errors import ModelLoadError
from llm_engine.models.architectures import llama, model_spec
from llm_engine.models.config import CheckpointConfig
from llm_engine.models.generation import read_generation_defaults
from llm_engine.models.spec import ModelSpec

BASE = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 8, "max_position_embeddings": 2048,
}  # fmt: skip


def spec(architecture: str, **changes: Any) -> ModelSpec:
    return model_spec(CheckpointConfig({**BASE, "architectures": [architecture], **changes}))


def test_defaults_a_config_may_leave_out() -> None:
    assert spec("LlamaForCausalLM").num_kv_heads == 8
    assert spec("LlamaForCausalLM").head_dim == 32
    assert not spec("LlamaForCausalLM").tie_embeddings
    assert spec("Qwen3ForCausalLM").head_dim == 128
    gemma = spec("Gemma2ForCausalLM")
    assert (gemma.head_dim, gemma.attention_scale, gemma.tie_embeddings) == (256, 1 / 16, True)
    assert (gemma.attention_soft_cap, gemma.final_soft_cap) == (50.0, 30.0)
    assert [layer.window for layer in gemma.layers[:3]] == [4096, None, 4096]
    assert spec("MixtralForCausalLM", num_local_experts=8, num_experts_per_tok=2).ropes["default"].theta == 1e6


def test_gemma3_pattern_and_bases() -> None:
    gemma = spec("Gemma3ForCausalLM", sliding_window=512, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert [layer.window for layer in gemma.layers] == [512] * 5 + [None] + [512] * 2
    assert [layer.rope for layer in gemma.layers[4:7]] == ["sliding_attention", "full_attention", "sliding_attention"]
    local, far = gemma.ropes["sliding_attention"], gemma.ropes["full_attention"]
    assert (local.kind, local.theta, far.kind, far.theta) == ("default", 1e4, "linear", 1e6)
    assert gemma.sliding_window is None
    assert gemma.attention_soft_cap is None


def test_qwen_windows() -> None:
    plain = spec("Qwen2ForCausalLM", sliding_window=100)
    assert plain.sliding_window is None
    assert plain.qkv_bias
    assert not plain.attention_out_bias
    some = spec("Qwen2ForCausalLM", sliding_window=100, use_sliding_window=True, max_window_layers=6)
    assert [layer.window for layer in some.layers] == [None] * 6 + [100] * 2


def test_smollm3_leaves_every_fourth_layer_unrotated() -> None:
    layers = spec("SmolLM3ForCausalLM").layers
    assert [layer.rope is None for layer in layers] == [False, False, False, True] * 2


def test_qwen3_moe_dense_layers() -> None:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    layers = spec("Qwen3MoeForCausalLM", **moe, mlp_only_layers=[1], decoder_sparse_step=2).layers
    assert [layer.experts is not None for layer in layers] == [False, False, False, True] + [False, True] * 2


def test_an_architecture_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[EntryPoint]:
        assert group == "llm_engine.architectures"
        return [EntryPoint("OtherForCausalLM", f"{__name__}:other", group)]

    monkeypatch.setattr("llm_engine.core.registry.entry_points", points)
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(other=other))
    assert spec("OtherForCausalLM").activation == "gelu"
    with pytest.raises(ModelLoadError, match="OtherForCausalLM"):
        spec("UnheardOf")


def other(config: CheckpointConfig) -> ModelSpec:
    return llama(config, activation="gelu")


@pytest.mark.parametrize(
    ("config", "generation", "eos", "sampling"),
    [
        ({"eos_token_id": 5}, None, [5], {}),
        ({"eos_token_id": 5}, {"eos_token_id": [9, 7]}, [5, 7, 9], {}),
        ({}, {"temperature": 0.6, "top_p": 0.9, "do_sample": True}, [], {"temperature": 0.6, "top_p": 0.9}),
        ({}, {"do_sample": False, "top_p": 0.9}, [], {"temperature": 0.0}),
    ],
)
def test_generation_defaults(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, eos: list[int], sampling: dict[str, Any]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = read_generation_defaults(tmp_path, CheckpointConfig(config))
    assert (found.eos_token_ids, found.sampling) == (eos, sampling)


def test_a_broken_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="generation_config"):
        read_generation_defaults(tmp_path, CheckpointConfig({}))
