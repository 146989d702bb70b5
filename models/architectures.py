"""The table of architectures: a checkpoint's ``architectures[0]`` to a function from its config to a ``ModelSpec``.

Another architecture is one more function here, or an entry point of another package in ``llm_engine.architectures``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.errors import EngineError, ModelLoadError
from ..core.registry import Registry
from .config import CheckpointConfig, rope_spec
from .ops import ACTIVATIONS
from .spec import ExpertSpec, LayerSpec, ModelSpec, RopeSpec, WeightNames

ARCHITECTURES: Registry[ModelSpec] = Registry("architecture", group="llm_engine.architectures")
for _name, _function in {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "Phi3ForCausalLM": "phi3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}.items():
    ARCHITECTURES.add(_name, f".models.architectures:{_function}")

# What checkpoints call an activation, and what we do.
_ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def model_spec(config: CheckpointConfig) -> ModelSpec:
    """The model a checkpoint holds; raises ``ModelLoadError`` for an unknown architecture, listing the known ones."""
    name = config.architecture
    known = ARCHITECTURES.names()
    if name not in known:
        raise ModelLoadError(f"architecture {name!r} is not supported; known: {', '.join(sorted(known))}")
    build: Callable[[CheckpointConfig], ModelSpec] = ARCHITECTURES.get(name)
    try:
        spec = build(config)
    except EngineError:
        raise
    except Exception as error:
        raise ModelLoadError(f"{config.source} does not describe a {name}: {error or repr(error)}") from error
    if not isinstance(spec, ModelSpec):
        raise ModelLoadError(f"architecture {name!r} makes {spec!r}, not a ModelSpec")
    return spec


def llama(config: CheckpointConfig, **changes: Any) -> ModelSpec:
    """Llama 2 and 3, SmolLM: what the others differ from. ``changes`` are fields of ``ModelSpec``."""
    attention_bias = bool(config.get("attention_bias"))
    fields: dict[str, Any] = {
        "architecture": config.architecture,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config.either("num_key_value_heads", config["num_attention_heads"]),
        "head_dim": config.head_dim,
        "layers": (LayerSpec(),) * config["num_hidden_layers"],
        "max_positions": config["max_position_embeddings"],
        "norm_eps": config.either("rms_norm_eps", 1e-6),
        "activation": _activation(config, "hidden_act"),
        "attention_scale": config.head_dim**-0.5,
        "qkv_bias": attention_bias,
        "attention_out_bias": attention_bias,
        "mlp_bias": bool(config.get("mlp_bias")),
        "tie_embeddings": config.either("tie_word_embeddings", False),
    }
    fields.update(changes)
    if "ropes" not in fields:
        fields["ropes"] = {"default": rope_spec(config)}
    if fields["num_heads"] % fields["num_kv_heads"]:
        raise ModelLoadError(
            f"{config.source}: {fields['num_heads']} query heads cannot share {fields['num_kv_heads']} key heads"
        )
    return ModelSpec(**fields)


def mistral(config: CheckpointConfig) -> ModelSpec:
    """Llama whose layers all have a window, if any has."""
    return llama(config, layers=_uniform(config, config.get("sliding_window")), **_NO_BIAS)


def qwen2(config: CheckpointConfig) -> ModelSpec:
    """Qwen2 and 2.5: biases on queries, keys and values."""
    return llama(config, layers=_layers(config), qkv_bias=True, attention_out_bias=False, mlp_bias=False)


def qwen3(config: CheckpointConfig, **changes: Any) -> ModelSpec:
    """Each head's query and key normed. The head size does not follow from the hidden size."""
    config = _with_defaults(config, head_dim=128)
    return llama(config, **{"layers": _layers(config), "qk_norm": True, "mlp_bias": False, **changes})


def smollm3(config: CheckpointConfig) -> ModelSpec:
    """Llama with every fourth layer left without position encoding."""
    count = config["num_hidden_layers"]
    interval = config.either("no_rope_layer_interval", 4)
    has_rope = config.get("no_rope_layers") or [(index + 1) % interval != 0 for index in range(count)]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types") or ["full_attention" if rope else "sliding_attention" for rope in has_rope]
    layers = tuple(
        LayerSpec(window=_window(config, kind, window), rope="default" if rope else None)
        for kind, rope in zip(kinds[:count], has_rope[:count], strict=True)
    )
    return llama(
        config,
        layers=layers,
        ropes={"default": rope_spec(config, default_theta=2000000.0)},
        tie_embeddings=config.either("tie_word_embeddings", True),
    )


def phi3(config: CheckpointConfig) -> ModelSpec:
    """Queries, keys and values fused in the checkpoint, gate and up too; part of a head rotated."""
    names = WeightNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
    config = _with_defaults(config, original_max_position_embeddings=4096)
    # The first checkpoints call their encoding by its working titles.
    rope = rope_spec(config, aliases={"su": "longrope", "yarn": "longrope"})
    layers = _uniform(config, config.get("sliding_window"))
    return llama(config, layers=layers, ropes={"default": rope}, names=names, **_NO_BIAS)


_SANDWICH = WeightNames(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)


def gemma2(config: CheckpointConfig, **changes: Any) -> ModelSpec:
    """Norms before and after each half, scores and logits capped, every other layer with a window."""
    config = _with_defaults(config, head_dim=256)
    fields: dict[str, Any] = {
        "layers": _layers(config, pattern=2, window=config.either("sliding_window", 4096)),
        "activation": _activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        "norm_offset": 1.0,
        "attention_scale": config.either("query_pre_attn_scalar", 256) ** -0.5,
        "attention_soft_cap": config.get("attn_logit_softcapping", 50.0),
        "final_soft_cap": config.get("final_logit_softcapping", 30.0),
        "embedding_scale": config["hidden_size"] ** 0.5,
        "tie_embeddings": config.either("tie_word_embeddings", True),
        "names": _SANDWICH,
        "mlp_bias": False,
    }
    return llama(config, **{**fields, **changes})


def gemma3(config: CheckpointConfig) -> ModelSpec:
    """Gemma 2 with normed queries and keys instead of capped scores, five windowed layers to one that sees all, and
    position encodings of their own for the two."""
    if config.get("use_bidirectional_attention"):
        raise ModelLoadError(f"{config.source}: use_bidirectional_attention is set; only causal models are served")
    pattern = config.either("sliding_window_pattern", 6)
    kinds = config.get("layer_types") or _pattern(config["num_hidden_layers"], pattern)
    layers = tuple(
        LayerSpec(window=_window(config, kind, config.either("sliding_window", 4096)), rope=kind) for kind in kinds
    )
    return gemma2(
        config,
        layers=layers,
        ropes=_gemma3_ropes(_with_defaults(config, head_dim=256)),
        attention_soft_cap=None,
        final_soft_cap=config.get("final_logit_softcapping"),
        qk_norm=True,
    )


def _gemma3_ropes(config: CheckpointConfig) -> dict[str, RopeSpec]:
    """Old checkpoints stretch only the encoding of the layers that see all, and give the other's base by itself."""
    new = config.get("rope_parameters") is not None
    local = config if new else CheckpointConfig(config, config.source)
    if not new:
        local["rope_theta"] = config.either("rope_local_base_freq", 10000.0)
        local["rope_scaling"] = None
    return {
        "full_attention": rope_spec(config, default_theta=1000000.0, layer_type="full_attention"),
        "sliding_attention": rope_spec(local, default_theta=10000.0, layer_type="sliding_attention"),
    }


def mixtral(config: CheckpointConfig) -> ModelSpec:
    """Mistral with eight MLPs a layer, of which a token takes two."""
    experts = ExpertSpec(
        num_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
        normalize=True,
    )
    expert = "block_sparse_moe.experts.{expert}."
    names = WeightNames(
        router="block_sparse_moe.gate", expert_gate_up=(expert + "w1", expert + "w3"), expert_down=expert + "w2"
    )
    layers = tuple(
        LayerSpec(window=layer.window, experts=experts) for layer in _uniform(config, config.get("sliding_window"))
    )
    ropes = {"default": rope_spec(config, default_theta=1000000.0)}
    return llama(config, layers=layers, ropes=ropes, names=names, **_NO_BIAS)


def qwen3_moe(config: CheckpointConfig) -> ModelSpec:
    """Qwen3 with many small experts in most layers."""
    experts = ExpertSpec(
        num_experts=config.get("num_experts") or config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        normalize=config.either("norm_topk_prob", False),
    )
    dense, step = config.get("mlp_only_layers") or (), config.either("decoder_sparse_step", 1)
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    layers = tuple(
        LayerSpec(window=window, experts=experts if index not in dense and (index + 1) % step == 0 else None)
        for index in range(config["num_hidden_layers"])
    )
    return qwen3(config, layers=layers)


_NO_BIAS = {"qkv_bias": False, "attention_out_bias": False, "mlp_bias": False}


def _with_defaults(config: CheckpointConfig, **defaults: Any) -> CheckpointConfig:
    """The config with an architecture's own defaults for keys that are missing or null."""
    given = {key: value for key, value in config.items() if value is not None or key not in defaults}
    return CheckpointConfig({**defaults, **given}, config.source)


def _activation(config: CheckpointConfig, key: str, default: str = "silu") -> str:
    name = config.either(key, default)
    if name not in _ACTIVATION_NAMES:
        raise ModelLoadError(f"{config.source}: {key} {name!r} is not supported; known: {', '.join(_ACTIVATION_NAMES)}")
    assert _ACTIVATION_NAMES[name] in ACTIVATIONS
    return _ACTIVATION_NAMES[name]


def _uniform(config: CheckpointConfig, window: int | None) -> tuple[LayerSpec, ...]:
    return tuple(LayerSpec(window=window) for _ in range(config["num_hidden_layers"]))


def _layers(config: CheckpointConfig, pattern: int | None = None, window: int | None = None) -> tuple[LayerSpec, ...]:
    """Layers by ``layer_types``, or where it is missing by the pattern, or by Qwen's ``max_window_layers``."""
    count = config["num_hidden_layers"]
    if pattern is None and config.get("use_sliding_window"):
        window = config.either("sliding_window", 4096)
    kinds = config.get("layer_types")
    if kinds is None and pattern is not None:
        kinds = _pattern(count, pattern)
    elif kinds is None:
        first = config.either("max_window_layers", 28) if window is not None else count
        kinds = ["full_attention" if index < first else "sliding_attention" for index in range(count)]
    if len(kinds) != count:
        raise ModelLoadError(f"{config.source}: layer_types names {len(kinds)} layers of {count}")
    return tuple(LayerSpec(window=_window(config, kind, window)) for kind in kinds)


def _pattern(count: int, every: int) -> list[str]:
    """Windowed layers, but every so many-th sees all."""
    return ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(count)]


def _window(config: CheckpointConfig, kind: str, window: int | None) -> int | None:
    if kind not in ("full_attention", "sliding_attention"):
        raise ModelLoadError(
            f"{config.source}: layer type {kind!r} is not supported; known: full_attention, sliding_attention"
        )
    return window if kind == "sliding_attention" else None
