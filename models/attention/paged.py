"""The CPU operator behind xformers' call: the native kernel where there is one, torch otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    out = torch.empty_like(q)
    torch_path.paged_attention(q, k, v, out, geometry, scale=scale, window=window, soft_cap=soft_cap)
    return out


def native_supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the native kernel is built and takes these: float32 or bfloat16, head size a multiple of 16."""
    return False
