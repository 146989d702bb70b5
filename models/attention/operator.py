"""What the model calls: attention over the pool, and writing this step's keys and values into it."""

from __future__ import annotations

import torch

from . import torch_path, xf
from .plan import AttentionPlan


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Causal attention of a layer; its keys and values of this step must be in the cache already.

    q [T, Hq, D], caches [num_blocks * block_size, Hkv, D] -> [T, Hq, D]. A query at position p sees the keys at
    p - window + 1 .. p (all up to p where ``window`` is None); scores become cap * tanh(score / cap) where a soft cap
    is given. On CUDA no stock operator of xformers knows soft caps: those layers run in plain torch.
    """
    if plan.device.type == "cuda":
        return _cuda(q, k_cache, v_cache, plan, scale=scale, window=window, soft_cap=soft_cap)
    return _grouped(q, k_cache, v_cache, plan.paged_bias, xf.cpu_op(window, soft_cap), scale)


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Put k, v [T, Hkv, D] at slots ``slot_mapping`` [T] int64 of the caches [num_slots, Hkv, D]."""
    k_cache.index_copy_(0, slot_mapping, k)
    v_cache.index_copy_(0, slot_mapping, v)


def _cuda(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    if soft_cap is not None:
        out = torch.empty_like(q)
        rows = range(len(plan.kv_lens))
        torch_path.paged_attention(
            q, k_cache, v_cache, out, plan.geometry(), rows, scale=scale, window=window, soft_cap=soft_cap
        )
        return out
    op = xf.paged_cuda_op(q.dtype, q.shape[-1], plan.block_size) if plan.num_paged_rows and window is None else None
    if op is None:
        return _gathered(q, k_cache, v_cache, plan, 0, window, scale)
    decodes = plan.num_paged_tokens
    out = torch.empty_like(q)
    out[:decodes] = paged_decode(q[:decodes], k_cache, v_cache, plan, op, scale)
    if decodes < len(q):
        out[decodes:] = _gathered(q[decodes:], k_cache, v_cache, plan, plan.num_paged_rows, None, scale)
    return out


def paged_decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, op: object, scale: float
) -> torch.Tensor:
    """The plan's paged rows, padded to a batch the kernel was compiled for: q [N, Hq, D] -> [N, Hq, D]."""
    extra = plan.padded_rows - plan.num_paged_rows
    padded = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, extra)) if extra else q.contiguous()
    return _grouped(padded, k_cache, v_cache, plan.paged_bias, op, scale)[: len(q)]


def _gathered(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: AttentionPlan,
    first_row: int,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Rows from ``first_row`` on over a copy of their keys: q [N, Hq, D] -> [N, Hq, D]."""
    keys = plan.gathered(first_row, window)
    op, shared_heads = xf.gathered_cuda_op(q.dtype, q.shape[-1])
    k, v = k_cache[keys.slots], v_cache[keys.slots]  # [S, Hkv, D]
    group = q.shape[1] // k.shape[1]
    if shared_heads:
        return _grouped(q, k, v, keys.bias, op, scale)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return xf.forward(q[None], k[None], v[None], keys.bias, op=op, scale=scale).view(q.shape)


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: object, op: object, scale: float) -> torch.Tensor:
    """xformers' call with grouped heads: q [N, Hq, D], k and v [S, Hkv, D] -> [N, Hq, D]."""
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    # Stride 0 over the group: operators see that its queries share the keys, and nothing is copied.
    shape = (1, -1, -1, group, -1)
    out = xf.forward(
        q.view(1, tokens, kv_heads, group, head_dim),
        k[None, :, :, None].expand(shape),
        v[None, :, :, None].expand(shape),
        bias,
        op=op,
        scale=scale,
    )
    return out.view(tokens, heads, head_dim)
