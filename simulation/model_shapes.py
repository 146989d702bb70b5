"""Models by their shape alone: from a checkpoint's ``config.json``, or a few well-known ones by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..core.errors import ConfigError, ModelLoadError
from ..models.spec import ExpertSpec, LayerSpec, ModelSpec


def _llama(
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    vocab_size: int,
    *,
    max_positions: int,
    head_dim: int | None = None,
    experts: ExpertSpec | None = None,
    tied: bool = False,
    qkv_bias: bool = False,
) -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim or hidden_size // num_heads,
        layers=(LayerSpec(experts=experts),) * num_layers,
        ropes={},
        max_positions=max_positions,
        norm_eps=1e-5,
        attention_scale=1.0,
        qkv_bias=qkv_bias,
        tie_embeddings=tied,
    )


# As in the config.json that each was published with.
SHAPES = {
    "llama-2-7b": _llama(32, 4096, 11008, 32, 32, 32000, max_positions=4096),
    "llama-2-13b": _llama(40, 5120, 13824, 40, 40, 32000, max_positions=4096),
    "llama-2-70b": _llama(80, 8192, 28672, 64, 8, 32000, max_positions=4096),
    "llama-3-8b": _llama(32, 4096, 14336, 32, 8, 128256, max_positions=8192),
    "llama-3-70b": _llama(80, 8192, 28672, 64, 8, 128256, max_positions=8192),
    "llama-3.1-405b": _llama(126, 16384, 53248, 128, 8, 128256, max_positions=131072),
    "mistral-7b": _llama(32, 4096, 14336, 32, 8, 32768, max_positions=32768),
    "mixtral-8x7b": _llama(
        32, 4096, 14336, 32, 8, 32000, max_positions=32768, experts=ExpertSpec(8, 2, 14336, normalize=True)
    ),
    "qwen2.5-7b": _llama(28, 3584, 18944, 28, 4, 152064, max_positions=32768, qkv_bias=True),
    "qwen2.5-72b": _llama(80, 8192, 29568, 64, 8, 152064, max_positions=32768, qkv_bias=True),
    "qwen3-8b": _llama(36, 4096, 12288, 32, 8, 151936, max_positions=40960, head_dim=128),
    "qwen3-32b": _llama(64, 5120, 25600, 64, 8, 151936, max_positions=40960, head_dim=128),
}


def find_shape(name: str, num_layers: int | None = None) -> ModelSpec:
    """A name of ``SHAPES``, or a folder with a ``config.json`` (no weights are needed).

    ``num_layers`` makes a deeper or flatter model of the same width. Raises ``ConfigError`` or ``ModelLoadError``.
    """
    if name in SHAPES:
        spec = SHAPES[name]
    elif (Path(name) / "config.json").is_file():
        # Loads torch, which the built-in shapes do not need.
        from ..models.architectures import model_spec
        from ..models.config import read_config

        spec = model_spec(read_config(Path(name)))
    elif Path(name).is_dir():
        raise ModelLoadError(f"{name} is no checkpoint: it has no config.json")
    else:
        raise ConfigError("model_shape", name, f"{', '.join(SHAPES)}, or a folder with a config.json")
    if num_layers is None:
        return spec
    repeated = spec.layers * -(-num_layers // spec.num_layers)
    return replace(spec, layers=repeated[:num_layers])


def dtype_of(name: str) -> str:
    """The type that ``auto`` takes for a shape: that of a folder's ``config.json`` where it names one, as an engine
    does; else 16 bits. Raises ``ModelLoadError``."""
    if name in SHAPES:
        return "bfloat16"
    from ..models.config import read_config

    dtype = read_config(Path(name)).dtype or "bfloat16"
    return dtype if dtype in ("bfloat16", "float16") else "float32"
