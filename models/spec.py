"""What the decoder must know of a model, whatever its checkpoint calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """A rotary position encoding before it is fixed for a context length; ``models/rope.py`` computes it."""

    kind: str
    """``default``, ``linear``, ``dynamic``, ``yarn``, ``longrope`` or ``llama3``."""
    dim: int
    """Leading elements of a head that are rotated."""
    theta: float
    max_positions: int
    """``max_position_embeddings`` of the checkpoint."""
    original_max_positions: int
    """Context the model was trained with before its positions were stretched."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What else the kind needs, as the checkpoint spells it: ``factor``, ``long_factor``, ``beta_fast``, ..."""


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """A mixture of experts in place of one MLP."""

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize: bool
    """Whether the weights of the chosen experts are scaled to sum to one."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    window: int | None = None
    """Keys a query sees, its own included; all before it when absent."""
    rope: str | None = "default"
    """Which of ``ModelSpec.ropes``; ``None`` for a layer without position encoding."""
    experts: ExpertSpec | None = None


@dataclass(frozen=True, slots=True)
class WeightNames:
    """How a checkpoint spells its weights. A layer's follow ``{layers}{index}.``; ``{expert}`` is its number."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers."
    final_norm: str = "model.norm"
    head: str = "lm_head"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three names, or one where the checkpoint holds them fused."""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    attention_out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Two names, or one where the checkpoint holds them fused."""
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate_up: tuple[str, ...] = ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj")
    expert_down: str = "mlp.experts.{expert}.down_proj"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None
    """Norm of attention's output before it is added, where there is one."""
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder-only model. An architecture is a function from a checkpoint's config to this."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    ropes: Mapping[str, RopeSpec]
    max_positions: int
    """Longest context the checkpoint is made for."""
    norm_eps: float
    norm_offset: float = 0.0
    """Added to every norm's weight: 1 where the checkpoint stores the difference from one."""
    activation: str = "silu"
    attention_scale: float
    attention_soft_cap: float | None = None
    final_soft_cap: float | None = None
    embedding_scale: float | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    names: WeightNames = field(default_factory=WeightNames)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def q_size(self) -> int:
        """Width of the queries of one token."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys, or the values, of one token."""
        return self.num_kv_heads * self.head_dim

    def num_weights(self, layer: LayerSpec, *, of_a_token: bool = False) -> int:
        """Of one layer's matrices, or of those that one token passes."""
        attention = self.hidden_size * 2 * (self.q_size + self.kv_size)
        if layer.experts is None:
            return attention + 3 * self.hidden_size * self.intermediate_size
        experts = layer.experts
        count = experts.top_k if of_a_token else experts.num_experts
        return attention + self.hidden_size * (experts.num_experts + 3 * experts.intermediate_size * count)

    @property
    def active_share(self) -> float:
        """Of the layers' weights, what one token uses: all of them but in a mixture of experts."""
        used = sum(self.num_weights(layer, of_a_token=True) for layer in self.layers)
        return used / sum(map(self.num_weights, self.layers))

    @property
    def sliding_window(self) -> int | None:
        """The widest window, where every layer has one."""
        windows = [layer.window for layer in self.layers]
        return None if None in windows else max(w for w in windows if w is not None)
