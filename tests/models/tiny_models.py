"""Small random checkpoints of every architecture, made with transformers and compared with it.

``ARCHITECTURES`` is the table: a name, how its config is made, and the context it is served with. ``build`` writes one
checkpoint; ``reference_logits`` runs transformers on it in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

VOCAB = 320
WINDOW = 24
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class TinyModel:
    """One row of the table."""

    kind: str
    """``transformers.{kind}Config`` and ``{kind}ForCausalLM``."""
    options: dict[str, Any]
    max_model_len: int | None = None
    """What it is served with, where frequencies depend on it."""
    config_edit: Callable[[dict[str, Any]], None] | None = None
    """A change to the written config.json, for spellings transformers no longer writes."""


def _old_rope(config: dict[str, Any]) -> None:
    """As checkpoints were written before ``rope_parameters``."""
    values = config.pop("rope_parameters")
    config["rope_theta"] = values.pop("rope_theta")
    config["rope_scaling"] = {"type" if key == "rope_type" else key: value for key, value in values.items()}


def _old_gemma3(config: dict[str, Any]) -> None:
    values = config.pop("rope_parameters")
    config.pop("layer_types")
    config["rope_theta"] = values["full_attention"].pop("rope_theta")
    config["rope_local_base_freq"] = values["sliding_attention"]["rope_theta"]
    config["rope_scaling"] = values["full_attention"]
    config["sliding_window_pattern"] = 2


def _rope(kind: str, theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


_LLAMA3 = _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64)
_YARN_GIVEN = _rope(
    "yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=0.9, truncate=False,
    beta_fast=16.0, beta_slow=2.0,
)  # fmt: skip
_SHORT, _LONG = [1.0 + 0.1 * i for i in range(8)], [1.5 + 0.7 * i for i in range(8)]
_LONGROPE = {
    **_rope("longrope", short_factor=_SHORT[:6], long_factor=_LONG[:6], partial_rotary_factor=0.75),
    "original_max_position_embeddings": 128,
}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 48, "sliding_window": WINDOW}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_experts": 4, "head_dim": 32}
_GEMMA3 = {
    **_GEMMA,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

ARCHITECTURES: dict[str, TinyModel] = {
    "llama": TinyModel("Llama", {}),
    "llama-bias-tied": TinyModel("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-3": TinyModel("Llama", _LLAMA3),
    "llama-3-old-config": TinyModel("Llama", _LLAMA3, config_edit=_old_rope),
    "llama-linear": TinyModel("Llama", _rope("linear", factor=2.0)),
    "llama-yarn": TinyModel("Llama", _YARN),
    "llama-yarn-mscale": TinyModel("Llama", _YARN_GIVEN),
    "llama-dynamic": TinyModel("Llama", _rope("dynamic", factor=4.0), max_model_len=500),
    "smollm3": TinyModel("SmolLM3", {"no_rope_layers": [1, 0, 1, 0]}),
    "mistral": TinyModel("Mistral", {"sliding_window": WINDOW, "head_dim": 32}),
    "qwen2": TinyModel("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": TinyModel(
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
    ),
    "qwen3": TinyModel("Qwen3", {"head_dim": 32}),
    "phi3": TinyModel("Phi3", {}),
    "phi3-longrope": TinyModel("Phi3", _LONGROPE, max_model_len=200),
    "phi3-longrope-short": TinyModel("Phi3", _LONGROPE, max_model_len=128),
    "gemma2": TinyModel("Gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": TinyModel("Gemma3", _GEMMA3),
    "gemma3-old-config": TinyModel("Gemma3", _GEMMA3, config_edit=_old_gemma3),
    "mixtral": TinyModel("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": TinyModel("Qwen3Moe", {**_MOE, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3-moe-raw": TinyModel("Qwen3Moe", {**_MOE, "norm_topk_prob": False, "decoder_sparse_step": 2}),
}


def make_model(name: str) -> Any:
    """The transformers model of a row, in float32, every weight drawn anew so that no norm is one and no bias zero."""
    import transformers

    row = ARCHITECTURES[name]
    config_class = getattr(transformers, f"{row.kind}TextConfig" if row.kind == "Gemma3" else f"{row.kind}Config")
    config = config_class(**json.loads(json.dumps({**COMMON, **row.options})), attn_implementation="eager")
    generator = torch.Generator().manual_seed(len(name) * 1000 + sum(map(ord, name)))
    model = getattr(transformers, f"{row.kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            spread = 0.25 if weight.dim() == 1 else 1.0 / weight.shape[-1] ** 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread + weight.detach().mean().round())
    return model


def build(name: str, folder: Path, **save_options: Any) -> Path:
    """Write one checkpoint to ``folder``."""
    row = ARCHITECTURES[name]
    make_model(name).save_pretrained(folder, **save_options)
    if row.config_edit is not None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        row.config_edit(config)
        path.write_text(json.dumps(config))
    return folder


@lru_cache(maxsize=2)
def reference(name: str) -> Any:
    """The transformers model, its position encoding fixed as ours is: from the context it is served with."""
    model, row = make_model(name), ARCHITECTURES[name]
    if row.max_model_len is not None:
        _fix_frequencies(model, row.max_model_len)
    return model


def _fix_frequencies(model: Any, length: int) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rotary, kind = model.model.rotary_emb, model.config.rope_parameters["rope_type"]
    inverse, scale = ROPE_INIT_FUNCTIONS[kind](model.config, torch.device("cpu"), seq_len=length)
    rotary.inv_freq, rotary.attention_scaling = inverse, scale
    rotary.rope_type = "default"  # so that no forward changes them


@torch.no_grad()
def reference_logits(name: str, token_ids: list[int]) -> torch.Tensor:
    """[T, V] float32"""
    return reference(name)(torch.tensor([token_ids]), use_cache=False).logits[0]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
