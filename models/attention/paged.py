"""The CPU operator behind xformers' call: the native kernel where there is one, torch otherwise."""

from __future__ import annotations

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
    """q [T, Hq, D], k and v [num_slots, Hkv, D] (any slot stride) -> [T, Hq, D], causal, in fp32 accumulation."""
    out = torch.empty(q.shape, dtype=q.dtype)
    if native_supports(q, k, v):
        _native(q, k, v, out, geometry, scale=scale, window=window, soft_cap=soft_cap)
    else:
        torch_path.paged_attention(q, k, v, out, geometry, scale=scale, window=window, soft_cap=soft_cap)
    return out


def native_supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the native kernel is built and takes these: float32 or bfloat16, heads of 16n side by side."""
    head_dim = q.shape[-1]
    return (
        q.dtype in _NATIVE_DTYPES
        and head_dim % 16 == 0
        and all(x.stride(2) == 1 and (x.stride(1) == head_dim or x.shape[1] == 1) for x in (q, k, v))
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
) -> None:
    kernel = kernels.function("paged_attention")
    assert kernel is not None and geometry.block_tables.is_contiguous()
    kernel(
        _NATIVE_DTYPES[q.dtype],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        geometry.query_starts.data_ptr(),
        geometry.kv_lens.data_ptr(),
        geometry.block_tables.data_ptr(),
        *geometry.block_tables.shape,
        geometry.block_size,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        q.stride(0),
        k.stride(0),
        v.stride(0),
        window or 0,
        _NO_LIMIT,
        scale,
        soft_cap or 0.0,
        torch.get_num_threads(),
    )
