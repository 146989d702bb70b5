"""Frequencies and tables against transformers' own functions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_engine.core.errors import ModelLoadError
from llm_engine.models.config import CheckpointConfig, rope_spec, stretched_length
from llm_engine.models.rope import frequencies, rope_table

CPU = torch.device("cpu")
FACTORS = {"short_factor": [1.0 + i / 9 for i in range(16)], "long_factor": [2.0 + i for i in range(16)]}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, 4096),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 10000),
    "dynamic, short": ({"rope_type": "dynamic", "factor": 4.0}, 1000),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
    "yarn, given": (
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 0.9,
            "beta_fast": 20, "beta_slow": 3, "truncate": False,
        },
        4096,
    ),
    "yarn, mscale": (
        {
            "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 1024, "mscale": 0.7,
            "mscale_all_dim": 0.8,
        },
        4096,
    ),
    "llama3": (
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        4096,
    ),
    "longrope, long": ({"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 512}, 4096),
    "longrope, short": ({"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 512}, 512),
    "longrope, factor": (
        {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 512, "factor": 3.0}, 4096,
    ),
    "longrope, scale": (
        {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 512, "attention_factor": 1.1}, 4096,
    ),
}  # fmt: skip
BASE = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 4096}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, length = CASES[case]
    parameters = {"rope_theta": 50000.0, **parameters}
    theirs = SimpleNamespace(
        **BASE, head_dim=32, rope_parameters=dict(parameters), standardize_rope_params=lambda: None, per_layer_config={}
    )
    expected, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, CPU, seq_len=length)
    spec = rope_spec(CheckpointConfig({**BASE, "rope_parameters": parameters}))
    found, found_scale = frequencies(spec, length)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found_scale == pytest.approx(scale, rel=1e-12)


def test_tables_hold_each_position() -> None:
    spec = rope_spec(CheckpointConfig({**BASE, "rope_theta": 100.0, "partial_rotary_factor": 0.5}))
    table = rope_table(spec, 300, CPU)
    assert table.dim == 16
    angle = 299 * 100.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(table.cos[299], angle.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(table.sin[299], angle.sin(), rtol=0, atol=1e-4)
    assert table.cos[0].eq(1).all()
    assert table.sin[0].eq(0).all()


def test_old_and_new_spelling_agree() -> None:
    old = CheckpointConfig({**BASE, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = CheckpointConfig({**BASE, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}})
    ours = [frequencies(rope_spec(config), 4096)[0] for config in (old, new)]
    assert torch.equal(*ours)


@pytest.mark.parametrize(
    ("parameters", "length"),
    [
        ({}, 4096),
        ({"rope_type": "linear", "factor": 2.0}, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
    ],
)
def test_stretched_length(parameters: dict[str, Any], length: int) -> None:
    assert stretched_length(rope_spec(CheckpointConfig({**BASE, "rope_parameters": parameters}))) == length


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "mrope"}, "rope type 'mrope' is not supported; known: default, linear"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope type 'llama3' needs 'low_freq_factor'"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 16}, "short_factor has 1 entries"),
        ({"full_attention": {"rope_type": "default"}}, "by layer type are not supported"),
    ],
)
def test_what_is_wrong_is_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        rope_spec(CheckpointConfig({**BASE, "rope_parameters": parameters}))
