"""Random ragged batches over a paged pool, and what attention over them must give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from llm_engine.models.attention import AttentionPlan, xf


@dataclasses.dataclass
class Case:
    """One batch: ``rows`` are (query length, key length), decode rows first."""

    rows: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    window: int | None = None
    soft_cap: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.scale = self.head_dim**-0.5
        counts = [-(-kv // self.block_size) for _, kv in self.rows]
        blocks = (torch.randperm(sum(counts), generator=generator) + 1).numpy()
        self.block_tables = np.zeros((len(self.rows), max(counts) + 1), dtype=np.int32)
        used = 0
        for row, count in enumerate(counts):
            self.block_tables[row, :count] = blocks[used : used + count]
            used += count
        queries = [q for q, _ in self.rows]
        self.num_decodes = sum(q == 1 for q in queries)
        assert queries[: self.num_decodes] == [1] * self.num_decodes
        self.query_starts = np.concatenate(([0], np.cumsum(queries))).astype(np.int32)
        self.kv_lens = np.array([kv for _, kv in self.rows], dtype=np.int32)
        slots = (used + 1) * self.block_size
        make = lambda *shape: torch.randn(*shape, generator=generator).to(self.dtype)  # noqa: E731
        self.q = make(sum(queries), self.heads, self.head_dim)
        self.k = make(slots, self.kv_heads, self.head_dim)
        self.v = make(slots, self.kv_heads, self.head_dim)
        self._poison()

    def _poison(self) -> None:
        """Slots that hold no key must never be looked at: not in the null block, not past the end of a row."""
        live = torch.zeros(len(self.k), dtype=torch.bool)
        for row in range(len(self.rows)):
            live[self.row_slots(row)] = True
        self.k[~live] = math.nan
        self.v[~live] = math.nan

    def row_slots(self, row: int) -> torch.Tensor:
        position = np.arange(self.kv_lens[row])
        block = self.block_tables[row, position // self.block_size]
        return torch.from_numpy(block * self.block_size + position % self.block_size).long()

    def plan(self) -> AttentionPlan:
        return AttentionPlan.build(self, block_size=self.block_size, device=torch.device("cpu"))

    def expected(self) -> torch.Tensor:
        """In float64, from xformers' own idea of the mask; the window laid over it by position."""
        cpu, queries = torch.device("cpu"), np.diff(self.query_starts).tolist()
        tables = torch.from_numpy(self.block_tables.copy())
        bias = xf.paged_causal_bias(queries, self.kv_lens.tolist(), tables, self.block_size, cpu)
        padded = len(self.rows) * tables.shape[1] * self.block_size
        mask = bias.materialize((len(self.q), padded), dtype=torch.float64)  # [T, slots]
        for row, (count, kv_len) in enumerate(self.rows):
            if self.window is not None:
                start = self.query_starts[row]
                for query in range(count):
                    position = kv_len - count + query
                    mask[start + query, self.row_slots(row)[: max(position - self.window + 1, 0)]] = -math.inf
        slots = mask.shape[1]
        group = self.heads // self.kv_heads
        k = self.k[:slots].double().nan_to_num().repeat_interleave(group, 1)
        v = self.v[:slots].double().nan_to_num().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", self.q.double(), k) * self.scale
        if self.soft_cap is not None:
            scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
        return torch.einsum("hqk,khd->qhd", (scores + mask).softmax(-1), v)


@pytest.fixture
def make_case() -> Callable[..., Case]:
    return Case
