"""Paged attention in plain torch: any device, any dtype, any head size. Copies the keys it needs, a few rows a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .paged import Geometry

_GATHER_TOKENS = 1 << 16
"""Decode rows are padded to their longest and computed together, but no more keys than this are copied at once."""


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    geometry: Geometry,
    rows: Sequence[int],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> None:
    """Fill ``out`` [T, Hq, D] for ``rows``; q [T, Hq, D], k and v [num_slots, Hkv, D]."""
    starts, kv_lens = geometry.query_starts_list, geometry.kv_lens_list
    decodes: list[int] = []
    for row in rows:
        queries = starts[row + 1] - starts[row]
        if queries == 1:
            decodes.append(row)
        elif queries > 1:
            span = slice(starts[row], starts[row + 1])
            out[span] = _chunk(q[span], k, v, geometry, row, scale=scale, window=window, soft_cap=soft_cap)
    for group in _groups(decodes, kv_lens, window):
        tokens = torch.tensor([starts[row] for row in group], device=q.device)
        out[tokens] = _decodes(q[tokens], k, v, geometry, group, scale=scale, window=window, soft_cap=soft_cap)


def _groups(rows: list[int], kv_lens: list[int], window: int | None) -> list[list[int]]:
    """Rows of like length together, so that padding and the memory for the copies stay small."""
    groups: list[list[int]] = []
    limit = 0
    for row in sorted(rows, key=lambda row: -kv_lens[row]):
        if not groups or len(groups[-1]) >= limit:
            longest = kv_lens[row] if window is None else min(kv_lens[row], window)
            limit = max(_GATHER_TOKENS // longest, 1)
            groups.append([])
        groups[-1].append(row)
    return groups


def _decodes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: Geometry,
    rows: list[int],
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """One query per row: q [N, Hq, D] -> [N, Hq, D]."""
    index = torch.tensor(rows, device=q.device)
    lens = geometry.kv_lens[index].long()
    first = torch.zeros_like(lens) if window is None else (lens - window).clamp(min=0)
    longest = max(geometry.kv_lens_list[row] for row in rows)
    span = longest if window is None else min(longest, window)
    positions = first[:, None] + torch.arange(span, device=q.device)
    visible = positions < lens[:, None]
    # Past its end a row reads its own last key again: whatever else lies in the pool may not be a number.
    positions = torch.minimum(positions, lens[:, None] - 1)
    block = geometry.block_tables[index].long().gather(1, positions // geometry.block_size)
    slots = block * geometry.block_size + positions % geometry.block_size
    out = _softmax_attention(
        q[:, :, None],
        k[slots].transpose(1, 2),
        v[slots].transpose(1, 2),
        visible[:, None, None],
        scale=scale,
        soft_cap=soft_cap,
    )
    return out[:, :, 0]


def _chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    geometry: Geometry,
    row: int,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """The queries of one row: q [M, Hq, D] -> [M, Hq, D]."""
    queries, kv_len = len(q), geometry.kv_lens_list[row]
    first = 0 if window is None else max(kv_len - queries - window + 1, 0)
    positions = torch.arange(first, kv_len, device=q.device)
    size = geometry.block_size
    slots = geometry.block_tables[row, positions // size].long() * size + positions % size
    query_positions = torch.arange(kv_len - queries, kv_len, device=q.device)[:, None]
    visible = positions <= query_positions
    if window is not None:
        visible &= positions > query_positions - window
    out = _softmax_attention(
        q.transpose(0, 1)[None],
        k[slots].transpose(0, 1)[None],
        v[slots].transpose(0, 1)[None],
        visible,
        scale=scale,
        soft_cap=soft_cap,
    )
    return out[0].transpose(0, 1)


def _softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    *,
    scale: float,
    soft_cap: float | None,
) -> torch.Tensor:
    """q [B, Hq, M, D], k and v [B, Hkv, S, D], visible broadcastable to [B, Hq, M, S] -> [B, Hq, M, D]."""
    if soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    grouped = q.float().view(len(q), heads, group, *q.shape[2:])  # [B, Hkv, G, M, D]
    scores = grouped @ k.float().transpose(-1, -2)[:, :, None] * scale
    scores = soft_cap * torch.tanh(scores / soft_cap)
    mask = visible if visible.dim() == 2 else visible[:, :, None]  # [M, S] or [B, 1, 1, 1, S]
    scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v.float()[:, :, None]).flatten(1, 2).to(q.dtype)
