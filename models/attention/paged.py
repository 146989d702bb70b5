"""The CPU operator behind xformers' call: the native kernel where there is one, torch otherwise."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...native import kernels
from . import torch_path


@dataclass(frozen=True, slots=True)
class Geometry:
    """R rows of a ragged batch over a paged pool. A row's last query sees the row's last key."""

    query_starts: torch.Tensor
    """[R + 1] int32"""
    query_starts_list: list[int]
    kv_lens: torch.Tensor
    """[R] int32"""
    kv_lens_list: list[int]
    block_tables: torch.Tensor
    """[R, W] int32"""
    block_size: int


_NATIVE_DTYPES = {torch.float32: kernels.FLOAT32, torch.bfloat16: kernels.BFLOAT16}
_NO_LIMIT = 2**31
_AMX_ROW_LIMIT = 32
"""With AMX, torch's own bfloat16 attention overtakes the kernel for rows of more queries than this (2 to 3 times on
512 queries); without it the kernel stays 2 to 3 times ahead."""


@functools.cache
def has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 tiles."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("amx_bf16", False)


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: Geometry,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Causal attention with fp32 accumulation, shapes as xformers hands them to an operator.

    q [1, T, Hkv, G, D], k and v [1, num_slots, Hkv, G, D] with stride 0 over G -> [1, T, Hkv, G, D].
    """
    out = torch.empty(q.shape, dtype=q.dtype)
    starts = geometry.query_starts_list
    in_torch: Sequence[int] = range(len(starts) - 1)
    if native_supports(q, k, v):
        limit = _NO_LIMIT
        if q.dtype == torch.bfloat16 and soft_cap is None and has_amx():
            limit = _AMX_ROW_LIMIT
        _native(q, k, v, out, geometry, scale=scale, window=window, soft_cap=soft_cap, max_queries=limit)
        if limit >= starts[-1]:
            return out
        in_torch = [row for row in in_torch if starts[row + 1] - starts[row] > limit]
    torch_path.paged_attention(
        q[0].flatten(1, 2),
        k[0, :, :, 0],
        v[0, :, :, 0],
        out[0].flatten(1, 2),
        geometry,
        in_torch,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    return out


def native_supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the native kernel is built and takes these: float32 or bfloat16, heads of 16n side by side."""
    head_dim = q.shape[-1]
    _, _, kv_heads, group, _ = q.shape
    return (
        q.dtype in _NATIVE_DTYPES
        and head_dim % 16 == 0
        and q.stride(4) == k.stride(4) == v.stride(4) == 1
        and (group == 1 or q.stride(3) == head_dim)
        and (kv_heads == 1 or (q.stride(2) == group * head_dim and k.stride(2) == v.stride(2) == head_dim))
        and kernels.function("paged_attention") is not None
    )


def _native(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    geometry: Geometry,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    max_queries: int,
) -> None:
    kernel = kernels.function("paged_attention")
    assert kernel is not None
    assert geometry.block_tables.is_contiguous()
    _, _, kv_heads, group, head_dim = q.shape
    rows, table_width = geometry.block_tables.shape
    kernel(
        _NATIVE_DTYPES[q.dtype],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        geometry.query_starts.data_ptr(),
        geometry.kv_lens.data_ptr(),
        geometry.block_tables.data_ptr(),
        rows,
        table_width,
        geometry.block_size,
        kv_heads * group,
        kv_heads,
        head_dim,
        q.stride(1),
        k.stride(1),
        v.stride(1),
        window or 0,
        max_queries,
        scale,
        soft_cap or 0.0,
        torch.get_num_threads(),
    )
