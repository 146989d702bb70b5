"""A decoder layer and its halves. Shapes: T tokens, H hidden, Hq query heads, Hkv key heads of D, I intermediate."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .moe import Experts
from .ops import Step, TorchOps
from .rope import RopeTable
from .spec import ModelSpec
from .weights import Survey, WeightReader


class Attention:
    """Queries, keys and values in one linear; rotation and cache; attention over the cache; the output's linear."""

    def __init__(
        self, spec: ModelSpec, index: int, ops: TorchOps, ropes: Mapping[str, RopeTable], load: Survey | WeightReader
    ) -> None:
        layer, names, prefix = spec.layers[index], spec.names, f"{spec.names.layers}{index}."
        self.spec, self.ops = spec, ops
        self.window = layer.window
        self.rope = None if layer.rope is None else ropes.get(layer.rope)
        sizes = (spec.q_size, spec.kv_size, spec.kv_size)
        rows = sizes if len(names.qkv) == 3 else (sum(sizes),)
        parts = [(prefix + name, count) for name, count in zip(names.qkv, rows, strict=True)]
        self.qkv = load.linear(parts, spec.hidden_size, bias=spec.qkv_bias)
        self.out = load.linear(
            [(prefix + names.attention_out, spec.hidden_size)], spec.q_size, bias=spec.attention_out_bias
        )
        self.qk_norm: torch.Tensor | None = None
        if spec.qk_norm:
            q_norm = load.norm(prefix + names.q_norm, spec.head_dim, spec.norm_offset)
            k_norm = load.norm(prefix + names.k_norm, spec.head_dim, spec.norm_offset)
            if q_norm is not None:
                self.qk_norm = torch.stack([q_norm] * spec.num_heads + [k_norm] * spec.num_kv_heads)
        self.k_cache = self.v_cache = torch.empty(0)

    def __call__(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """[T, H] -> [T, H]"""
        spec, ops = self.spec, self.ops
        q = ops.rotate_and_store(  # [T, (Hq + 2 Hkv) * D] -> [T, Hq, D]
            self.qkv(x),
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            qk_norm=self.qk_norm,
            eps=spec.norm_eps,
            rope=self.rope,
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            step=step,
        )
        seen = ops.attention(  # [T, Hq, D]
            q,
            self.k_cache,
            self.v_cache,
            step,
            scale=spec.attention_scale,
            window=self.window,
            soft_cap=spec.attention_soft_cap,
        )
        return self.out(seen.reshape(-1, spec.q_size))


class Mlp:
    """down(activation(gate(x)) * up(x)), gate and up in one linear."""

    def __init__(self, spec: ModelSpec, index: int, ops: TorchOps, load: Survey | WeightReader) -> None:
        names, prefix = spec.names, f"{spec.names.layers}{index}."
        self.activation, self.ops = spec.activation, ops
        rows = 2 * spec.intermediate_size // len(names.gate_up)
        parts = [(prefix + name, rows) for name in names.gate_up]
        self.gate_up = load.linear(parts, spec.hidden_size, bias=spec.mlp_bias)
        self.down = load.linear([(prefix + names.down, spec.hidden_size)], spec.intermediate_size, bias=spec.mlp_bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]"""
        return self.down(self.ops.gated(self.gate_up(x), self.activation))


class DecoderLayer:
    """Attention, then MLP or experts, each normed before and, in some models, after."""

    def __init__(
        self, spec: ModelSpec, index: int, ops: TorchOps, ropes: Mapping[str, RopeTable], load: Survey | WeightReader
    ) -> None:
        names, prefix = spec.names, f"{spec.names.layers}{index}."
        self.eps, self.ops = spec.norm_eps, ops

        def norm(name: str | None) -> torch.Tensor | None:
            return None if name is None else load.norm(prefix + name, spec.hidden_size, spec.norm_offset)

        self.attention_norm, self.attention_post_norm = norm(names.attention_norm), norm(names.attention_post_norm)
        self.mlp_norm, self.mlp_post_norm = norm(names.mlp_norm), norm(names.mlp_post_norm)
        self.attention = Attention(spec, index, ops, ropes, load)
        self.mlp = Experts(spec, index, ops, load) if spec.layers[index].experts else Mlp(spec, index, ops, load)

    def __call__(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual stream [T, H] and what is still to be added to it [T, H], in and out: sums meet their norms."""
        ops, eps = self.ops, self.eps
        x, hidden = ops.add_rms_norm(hidden, delta, self.attention_norm, eps)
        x = self.attention(x, step)
        if self.attention_post_norm is not None:
            x = ops.rms_norm(x, self.attention_post_norm, eps)
        x, hidden = ops.add_rms_norm(hidden, x, self.mlp_norm, eps)
        x = self.mlp(x)
        if self.mlp_post_norm is not None:
            x = ops.rms_norm(x, self.mlp_post_norm, eps)
        return hidden, x
