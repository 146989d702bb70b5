"""What attention must know of a step's batch, prepared once and shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from . import xf
from .paged import Geometry

NULL_BLOCK = 0
_MIN_TABLE_WIDTH = 16


class RaggedBatch(Protocol):
    """The part of a stage's batch that attention reads; R rows of T tokens in all, decode rows (one token) first."""

    @property
    def num_decodes(self) -> int: ...
    @property
    def query_starts(self) -> NDArray[np.int32]:
        """[R + 1] first token of each row; the last entry is T."""

    @property
    def kv_lens(self) -> NDArray[np.int32]:
        """[R] tokens in the cache, this step's own included; at least the row's query length."""

    @property
    def block_tables(self) -> NDArray[np.int32]:
        """[R, W] block of each ``block_size`` positions, padded with the null block."""


@dataclass(slots=True)
class GatheredKeys:
    """Keys of some rows, to be copied from the pool into one run: where they lie, and the bias over the copy."""

    slots: torch.Tensor
    """[S] int64, the slot of each key, row after row."""
    bias: Any


@dataclass(slots=True)
class AttentionPlan:
    """One step's geometry. Immutable for the callers; a layer only reads it, or fills its cache of gathered keys.

    The first ``num_paged_rows`` rows (``num_paged_tokens`` tokens) are covered by ``paged_bias``, which reads the
    pool through the block tables: all rows on the CPU, the decode rows on CUDA. What remains is gathered.
    """

    query_lens: NDArray[np.int32]
    kv_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    block_size: int
    device: torch.device
    num_decodes: int
    num_paged_rows: int
    num_paged_tokens: int
    padded_rows: int
    """Rows of ``paged_bias``; those past ``num_paged_rows`` are padding of one token that reads the null block."""
    paged_bias: Any
    _gathered: dict[tuple[int, int | None], GatheredKeys] = field(default_factory=dict)
    _geometry: Geometry | None = None

    @classmethod
    def build(
        cls, batch: RaggedBatch, *, block_size: int, device: torch.device, paged_decodes_only: bool | None = None
    ) -> AttentionPlan:
        """Plan attention for ``batch``. The arrays of ``batch`` are not kept; the plan outlives them.

        ``paged_decodes_only`` is what CUDA's operators need (and the default there): decode rows alone read the pool
        in place, padded to sizes that are compiled once.
        """
        kv_lens = np.array(batch.kv_lens, dtype=np.int32)
        query_lens = np.diff(batch.query_starts).astype(np.int32)
        tables = np.array(batch.block_tables, dtype=np.int32, order="C")
        assert (query_lens <= kv_lens).all(), "a row has more queries than keys"
        assert (query_lens[: batch.num_decodes] == 1).all(), "decode rows come first, one token each"
        rows, padded = len(kv_lens), len(kv_lens)
        if device.type == "cuda" if paged_decodes_only is None else paged_decodes_only:
            rows = batch.num_decodes
            padded, tables = bucket(rows), _widen(tables)
        plan = cls(
            query_lens=query_lens,
            kv_lens=kv_lens,
            block_tables=tables,
            block_size=block_size,
            device=device,
            num_decodes=batch.num_decodes,
            num_paged_rows=rows,
            num_paged_tokens=int(query_lens[:rows].sum()),
            padded_rows=padded,
            paged_bias=None,
        )
        if rows:
            plan.paged_bias = plan._paged_bias()
        return plan

    def _paged_bias(self) -> Any:
        rows, extra = self.num_paged_rows, self.padded_rows - self.num_paged_rows
        tables = np.pad(self.block_tables[:rows], ((0, extra), (0, 0)), constant_values=NULL_BLOCK)
        return xf.paged_causal_bias(
            [*self.query_lens[:rows].tolist(), *[1] * extra],
            [*self.kv_lens[:rows].tolist(), *[1] * extra],
            _to_device(tables, self.device),
            self.block_size,
            self.device,
        )

    def gathered(self, first_row: int, window: int | None) -> GatheredKeys:
        """Keys of the rows from ``first_row`` on, those before every query's window left out; made once per step."""
        key = (first_row, window)
        found = self._gathered.get(key)
        if found is None:
            starts = first_visible(self.query_lens, self.kv_lens, window)[first_row:]
            lens = self.kv_lens[first_row:] - starts
            slots = row_slots(self.block_tables[first_row:], starts, lens, self.block_size)
            queries = self.query_lens[first_row:].tolist()
            bias = xf.gathered_causal_bias(queries, lens.tolist(), window, self.device)
            found = self._gathered[key] = GatheredKeys(_to_device(slots, self.device), bias)
        return found

    def geometry(self) -> Geometry:
        """All rows, for the torch path on a device whose bias covers only some."""
        if self._geometry is None:
            starts = np.concatenate(([0], np.cumsum(self.query_lens))).astype(np.int32)
            self._geometry = Geometry(
                query_starts=_to_device(starts, self.device),
                query_starts_list=starts.tolist(),
                kv_lens=_to_device(self.kv_lens, self.device),
                kv_lens_list=self.kv_lens.tolist(),
                block_tables=_to_device(self.block_tables, self.device),
                block_size=self.block_size,
            )
        return self._geometry


def bucket(rows: int) -> int:
    """Rows padded to a count a kernel was compiled for: powers of two up to 16, then multiples of 16."""
    if rows <= 1:
        return rows
    return 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16


def first_visible(query_lens: NDArray[np.int32], kv_lens: NDArray[np.int32], window: int | None) -> NDArray[np.int32]:
    """[R] first key that any query of each row sees."""
    if window is None:
        return np.zeros_like(kv_lens)
    first: NDArray[np.int32] = np.maximum(kv_lens - query_lens - (window - 1), 0).astype(np.int32)
    return first


def row_slots(
    block_tables: NDArray[np.int32], starts: NDArray[np.int32], lens: NDArray[np.int32], block_size: int
) -> NDArray[np.int64]:
    """[sum lens] slots of positions starts..starts+lens of each row, row after row."""
    total = int(lens.sum())
    row = np.repeat(np.arange(len(lens)), lens)
    position = np.arange(total) + np.repeat(starts - (np.cumsum(lens) - lens), lens)
    block, offset = np.divmod(position, block_size)
    slots: NDArray[np.int64] = block_tables[row, block].astype(np.int64) * block_size + offset
    return slots


def _widen(tables: NDArray[np.int32]) -> NDArray[np.int32]:
    """Block tables padded to a power of two columns: the kernels on CUDA are compiled once per width."""
    width = max(_MIN_TABLE_WIDTH, 1 << max(tables.shape[1] - 1, 0).bit_length())
    return np.pad(tables, ((0, 0), (0, width - tables.shape[1])), constant_values=NULL_BLOCK)


def _to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
