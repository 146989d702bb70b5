"""One micro-batch as a stage computes it: flat, ragged, in numpy. No torch here, so a toy model engine needs none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(slots=True)
class StageBatch:
    """R rows (requests) of T tokens in all; decode rows, one token each, come first."""

    num_decodes: int
    token_ids: Int64
    """[T]"""
    positions: Int64
    """[T] position of each token in its request."""
    query_starts: Int32
    """[R + 1] first token of each row; the last entry is T."""
    kv_lens: Int32
    """[R] tokens in the cache once this step has written its own: last position + 1."""
    block_tables: Int32
    """[R, W] block of each ``block_size`` positions; entries past a row's blocks are the null block 0."""
    slot_mapping: Int64
    """[T] where each token's key and value go: block * block_size + offset."""
    logit_rows: Int64
    """[L] tokens whose logits are wanted, in order."""

    @property
    def num_rows(self) -> int:
        return len(self.kv_lens)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def query_lens(self) -> Int32:
        """[R]"""
        return np.diff(self.query_starts)
