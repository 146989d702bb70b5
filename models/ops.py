"""The seam between the model's definition and what computes it; this module computes with torch and runs everywhere.

A decoder is built with one ``TorchOps`` (or a subclass that computes some of it faster). Tensors are [T, ...]: T tokens
of all rows of a step, flat. The stage's own thread alone calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .attention import AttentionPlan, attention, write_kv
from .rope import RopeTable

Linear = Callable[[torch.Tensor], torch.Tensor]
"""[T, K] -> [T, N], its weight and bias inside."""


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
}

# Below this many elements a prepacked linear costs more in its call than it saves in its reading (measured, M = 1..64).
_PACK_FROM = {torch.float32: 1 << 18, torch.bfloat16: 1 << 16}


@dataclass(slots=True)
class Step:
    """One step's geometry on the device, made once and shared by the stage's layers."""

    positions: torch.Tensor
    """[T] int64"""
    slot_mapping: torch.Tensor
    """[T] int64"""
    plan: AttentionPlan
    rope_rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Rows of each rope table used so far, by the table's id; filled by ``TorchOps``."""


class PlainLinear:
    """A linear layer as torch computes it."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """A linear layer on the CPU whose weight oneDNN has laid out for its kernels; the original is not kept."""

    __slots__ = ("bias", "packed")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    @staticmethod
    def supports(weight: torch.Tensor) -> bool:
        """Whether packing works here and pays for a weight of this size and type."""
        smallest = _PACK_FROM.get(weight.dtype)
        if smallest is None or weight.numel() < smallest or weight.device.type != "cpu":
            return False
        if not torch.backends.mkldnn.is_available():
            return False
        return weight.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class TorchOps:
    """Every operation of the decoder, in torch."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None, *, may_copy: bool = True) -> Linear:
        """Make of a weight [N, K] what computes; the weight itself is not changed.

        ``may_copy=False``: the weight is kept for something else too, and no second one may be held in memory.
        """
        if may_copy and PackedLinear.supports(weight):
            return PackedLinear(weight, bias)
        return PlainLinear(weight, bias)

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, scale: float | None) -> torch.Tensor:
        """[T] int64, [V, H] -> [T, H]"""
        hidden = F.embedding(token_ids, table)
        # The scale is rounded to the model's type first, as the models were trained.
        return hidden if scale is None else hidden * torch.tensor(scale, dtype=table.dtype, device=table.device)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """[T, H], float32 weight [H] -> [T, H], computed in float32."""
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a layer's output to the residual stream and norm the sum: (normed, sum). Changes neither argument."""
        if delta is not None:
            hidden = hidden + delta
        return self.rms_norm(hidden, weight, eps), hidden

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm: torch.Tensor | None,
        eps: float,
        rope: RopeTable | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        step: Step,
    ) -> torch.Tensor:
        """Norm and rotate queries and keys, write keys and values to the cache: [T, (Hq + 2 Hkv) * D] -> q [T, Hq, D].

        ``qk_norm`` is float32 [Hq + Hkv, D], the query's weight for each query head, then the key's; caches are
        [num_slots, Hkv, D].
        """
        heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
        qk, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
        if qk_norm is not None:
            qk = F.rms_norm(qk.float(), (head_dim,), None, eps) * qk_norm
        if rope is not None:
            qk = self._rotate(qk.float(), rope, step)
        qk = qk.to(qkv.dtype)
        write_kv(qk[:, num_heads:], v, k_cache, v_cache, step.slot_mapping)
        return qk[:, :num_heads]

    def _rotate(self, x: torch.Tensor, rope: RopeTable, step: Step) -> torch.Tensor:
        """[T, H, D] float32: element i of a head's first ``rope.dim`` turns together with element i + dim / 2."""
        rows = step.rope_rows.get(id(rope))
        if rows is None:
            cos, sin = rope.cos[step.positions], rope.sin[step.positions]  # [T, dim / 2]
            rows = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]  # [T, 1, dim]
            step.rope_rows[id(rope)] = rows
        cos, sin = rows
        turned = x[..., : rope.dim]
        turned = turned * cos + turned.roll(rope.dim // 2, -1) * sin
        return turned if rope.dim == x.shape[-1] else torch.cat((turned, x[..., rope.dim :]), -1)

    def attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        step: Step,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> torch.Tensor:
        """[T, Hq, D] -> [T, Hq, D]; a query sees the keys of its own row, itself and before, ``window`` at most."""
        return attention(q, k_cache, v_cache, step.plan, scale=scale, window=window, soft_cap=soft_cap)

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """activation(gate) * up: [T, 2 * I] -> [T, I]"""
        gate, up = gate_up.chunk(2, -1)
        return ACTIVATIONS[activation](gate).mul_(up)

    def logits(self, hidden: torch.Tensor, head: Linear, soft_cap: float | None) -> torch.Tensor:
        """[L, H] -> [L, V] in float32"""
        logits = head(hidden).float()
        return logits if soft_cap is None else logits.div_(soft_cap).tanh_().mul_(soft_cap)
