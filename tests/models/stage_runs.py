"""Stages run by hand: sequences with scattered blocks, batches of them, hidden states passed from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm_engine.workers.batch import StageBatch
from llm_engine.workers.model_engine import ModelInfo
from llm_engine.workers.torch_model_engine import TorchModelEngine

BLOCK = 16


@dataclass
class Sequence:
    """A text and how much of it is in the cache."""

    token_ids: list[int]
    blocks: list[int]
    done: int = 0

    @property
    def left(self) -> int:
        return len(self.token_ids) - self.done


class Stages:
    """A whole model in ``num_stages`` stages with a pool of ``num_blocks`` blocks."""

    def __init__(self, folder: Path, num_stages: int = 1, num_blocks: int = 64, **options: Any) -> None:
        options = {"dtype": "float32", "device": "cpu", **options}
        self.engines = [
            TorchModelEngine(str(folder), stage=stage, num_stages=num_stages, **options) for stage in range(num_stages)
        ]
        self.infos: list[ModelInfo] = [engine.load() for engine in self.engines]
        for engine in self.engines:
            engine.allocate(num_blocks, BLOCK)
        self._free = (np.random.default_rng(0).permutation(num_blocks - 1) + 1).tolist()

    def sequence(self, token_ids: list[int]) -> Sequence:
        """A new sequence, its blocks scattered over the pool."""
        return Sequence(token_ids, [self._free.pop() for _ in range(-(-len(token_ids) // BLOCK))])

    def free(self, sequence: Sequence) -> None:
        """Give its blocks back, what is written in them left for the next owner to overwrite."""
        self._free[:0] = sequence.blocks

    def run(self, *rows: tuple[Sequence, int]) -> list[torch.Tensor]:
        """Compute the next tokens of some sequences in one batch; logits [n, V] of each."""
        rows = tuple(sorted(rows, key=lambda row: row[1] != 1))
        batch = make_batch(list(rows))
        hidden: torch.Tensor | None = None
        for engine in self.engines:
            hidden = engine.forward(batch, hidden)
        assert hidden is not None
        assert hidden.dtype == torch.float32
        for sequence, count in rows:
            sequence.done += count
        return list(hidden.clone().split([count for _, count in rows]))


def make_batch(rows: list[tuple[Sequence, int]]) -> StageBatch:
    """The next ``count`` tokens of each sequence, decodes first; logits wanted of every token."""
    width = max(len(sequence.blocks) for sequence, _ in rows)
    tables = np.zeros((len(rows), width), np.int32)
    tokens, positions, slots = [], [], []
    for row, (sequence, count) in enumerate(rows):
        tables[row, : len(sequence.blocks)] = sequence.blocks
        where = np.arange(sequence.done, sequence.done + count)
        tokens.append(np.array(sequence.token_ids)[where])
        positions.append(where)
        slots.append(np.array(sequence.blocks)[where // BLOCK] * BLOCK + where % BLOCK)
    counts = [count for _, count in rows]
    return StageBatch(
        num_decodes=sum(count == 1 for count in counts),
        token_ids=np.concatenate(tokens),
        positions=np.concatenate(positions),
        query_starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        kv_lens=np.array([sequence.done + count for sequence, count in rows], np.int32),
        block_tables=tables,
        slot_mapping=np.concatenate(slots),
        logit_rows=np.arange(sum(counts)),
    )
