"""A stage's books of the requests it runs: one row of numpy arrays per slot.

Every stage keeps the same books and changes them when a plan *executes*, in the order of the plans, so a slot or a
block that the engine hands to somebody else in plan N still belongs to its old owner in plan N - 1. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..core.step import RequestStart, StepPlan
from .batch import Int32, Int64, StageBatch

_WIDTH_UNIT = 8
"""Block tables are cut to a multiple of this, so that their shape does not change with every block."""


@dataclass(slots=True)
class PromptRows:
    """The logits of one chunk that score the prompt: ``count`` rows from ``first_row`` on."""

    request_id: int
    slot: int
    first_row: int
    count: int
    first_position: int
    """Position of the first row's input; the row scores the token after it."""


@dataclass(slots=True)
class SamplingRows:
    """Which rows of a step's logits are sampled, in the order of ``StepPlan.sampled_ids``."""

    slots: Int64
    """[S]"""
    positions: Int64
    """[S] position of the row's input; the sampled token will sit one further."""
    logit_rows: Int64
    """[S] rows of the step's logits."""
    prompts: list[PromptRows] = field(default_factory=list)
    """Chunks of requests that want their prompt scored."""


@dataclass(slots=True)
class FedRows:
    """Places for the tokens of one step."""

    request_ids: Int64
    """[S]"""
    slots: Int64
    """[S]"""
    positions: Int64
    """[S]"""
    num_starts: int | None
    """Of requests until these rows were made: unchanged means that each still has its slot. ``None`` where one has no
    further position."""


class SlotTable:
    """Called by the stage's own thread only. ``tokens`` and ``num_prompt_tokens`` may be read by its sampler.

    The arrays are mapped lazily: a slot costs memory for the tokens it has held, not for ``max_model_len``.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_blocks = -(-max_model_len // block_size)
        self.tokens: Int32 = np.zeros((max_num_seqs, max_model_len), np.int32)
        """Known tokens. A decode's input enters when its step executes, so ``tokens[slot, : position + 1]`` is whole
        for every row of a step."""
        self.num_prompt_tokens: Int64 = np.zeros(max_num_seqs, np.int64)
        self._num_starts = 0
        self._request_ids: Int64 = np.full(max_num_seqs, -1, np.int64)
        self._block_tables: Int32 = np.zeros((max_num_seqs, self.max_blocks), np.int32)
        self._num_blocks = [0] * max_num_seqs
        self._scores_prompt: NDArray[np.bool_] = np.zeros(max_num_seqs, np.bool_)

    def apply(self, plan: StepPlan) -> None:
        """Enter a plan's changes. Raises ``AssertionError`` for one that contradicts the books, which are void then."""
        for start in plan.starts:
            self._start(start)
        tables, num_blocks = self._block_tables, self._num_blocks
        for slot, block in zip(plan.grown_slots, plan.grown_blocks, strict=True):
            count = num_blocks[slot]
            assert count < self.max_blocks, f"slot {slot} outgrew its block table"
            tables[slot, count] = block
            num_blocks[slot] = count + 1
        if len(plan.decode_ids):
            slots = np.asarray(plan.decode_slots, np.int64)
            assert np.array_equal(self._request_ids[slots], np.asarray(plan.decode_ids)), "decode rows: wrong slots"
            if plan.feeds_from is None:
                self.tokens[slots, np.asarray(plan.decode_positions)] = plan.decode_tokens
        for slot, request_id in zip(plan.chunk_slots, plan.chunk_ids, strict=True):
            assert self._request_ids[slot] == request_id, "chunk rows: wrong slots"

    def batch(self, plan: StepPlan) -> StageBatch:
        """The applied plan, as the model computes it. Decode rows cost no Python each."""
        num_decodes, num_chunks = len(plan.decode_ids), len(plan.chunk_ids)
        query_starts = np.arange(num_decodes + num_chunks + 1, dtype=np.int32)
        row_slots = np.empty(num_decodes + num_chunks, np.int64)
        row_slots[:num_decodes] = plan.decode_slots
        row_slots[num_decodes:] = plan.chunk_slots
        if num_chunks:
            query_starts[num_decodes + 1 :] = num_decodes + np.cumsum(plan.chunk_tokens)
        num_tokens = int(query_starts[-1])
        token_ids = np.empty(num_tokens, np.int64)
        positions = np.empty(num_tokens, np.int64)
        positions[:num_decodes] = plan.decode_positions
        if plan.feeds_from is None:
            token_ids[:num_decodes] = plan.decode_tokens
        else:
            token_ids[:num_decodes] = self.tokens[row_slots[:num_decodes], positions[:num_decodes]]
        at = num_decodes
        for slot, start, count in zip(plan.chunk_slots, plan.chunk_starts, plan.chunk_tokens, strict=True):
            token_ids[at : at + count] = self.tokens[slot, start : start + count]
            positions[at : at + count] = np.arange(start, start + count)
            at += count
        kv_lens = (positions[query_starts[1:] - 1] + 1).astype(np.int32)

        width = -(-int(kv_lens.max(initial=1)) // self.block_size)
        width = min(-(-width // _WIDTH_UNIT) * _WIDTH_UNIT, self.max_blocks)
        block_tables = self._block_tables[row_slots, :width]
        rows = np.repeat(np.arange(len(row_slots)), np.diff(query_starts)) if num_chunks else query_starts[:-1]
        blocks = block_tables[rows, positions // self.block_size].astype(np.int64)
        assert blocks.all(), "a token of the step has no block"
        return StageBatch(
            num_decodes=num_decodes,
            token_ids=token_ids,
            positions=positions,
            query_starts=query_starts,
            kv_lens=kv_lens,
            block_tables=block_tables,
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            logit_rows=self._logit_rows(plan),
        )

    def fed_rows(self, rows: SamplingRows) -> FedRows:
        """Where the tokens that the plan last applied samples will stand."""
        positions = rows.positions + 1
        inside = not len(positions) or positions.max() < self.tokens.shape[1]
        return FedRows(self._request_ids[rows.slots], rows.slots, positions, self._num_starts if inside else None)

    def feed(self, rows: FedRows, tokens: Sequence[int]) -> None:
        """Enter tokens just sampled, from which a plan made ahead of them goes on. What no longer has its slot, or has
        no further position, is left out. As many as there are rows."""
        if rows.num_starts == self._num_starts:
            self.tokens[rows.slots, rows.positions] = tokens
            return
        inside = (self._request_ids[rows.slots] == rows.request_ids) & (rows.positions < self.tokens.shape[1])
        self.tokens[rows.slots[inside], rows.positions[inside]] = np.asarray(tokens, np.int32)[inside]

    def sampling_rows(self, plan: StepPlan) -> SamplingRows:
        """Where in the logits of ``batch(plan)`` the sampled rows are."""
        num_decodes = len(plan.decode_ids)
        slots, positions = [], []
        logit_rows, prompts = [], []
        row = num_decodes
        chunks = zip(
            plan.chunk_ids, plan.chunk_slots, plan.chunk_starts, plan.chunk_tokens, plan.chunk_samples, strict=True
        )
        for request_id, slot, start, count, samples in chunks:
            scored = self._num_scored(slot, start, count)
            if scored:
                prompts.append(PromptRows(request_id, slot, row, scored, start))
                row += scored
            if samples:
                slots.append(slot)
                positions.append(start + count - 1)
                logit_rows.append(row)
                row += 1
        return SamplingRows(
            np.concatenate([np.asarray(plan.decode_slots, np.int64), np.asarray(slots, np.int64)]),
            np.concatenate([np.asarray(plan.decode_positions, np.int64), np.asarray(positions, np.int64)]),
            np.concatenate([np.arange(num_decodes), np.asarray(logit_rows, np.int64)]),
            prompts,
        )

    def _start(self, start: RequestStart) -> None:
        slot, known, held = start.slot, len(start.token_ids), len(start.block_ids)
        assert known <= self.tokens.shape[1] and held <= self.max_blocks, f"request {start.request_id} is too long"
        self._num_starts += 1
        self._request_ids[slot] = start.request_id
        self.tokens[slot, :known] = start.token_ids
        self.num_prompt_tokens[slot] = start.num_prompt_tokens
        self._block_tables[slot, : self._num_blocks[slot]] = 0
        self._block_tables[slot, :held] = start.block_ids
        self._num_blocks[slot] = held
        self._scores_prompt[slot] = start.sampling.prompt_logprobs is not None

    def _num_scored(self, slot: int, start: int, count: int) -> int:
        """Tokens of a chunk whose logits score a prompt token: those with another prompt token behind them."""
        if not self._scores_prompt[slot]:
            return 0
        return min(max(int(self.num_prompt_tokens[slot]) - 1 - start, 0), count)

    def _logit_rows(self, plan: StepPlan) -> Int64:
        """Tokens of the batch whose logits are wanted; must agree with ``sampling_rows``."""
        num_decodes = len(plan.decode_ids)
        rows = [np.arange(num_decodes)]
        at = num_decodes
        chunks = zip(plan.chunk_slots, plan.chunk_starts, plan.chunk_tokens, plan.chunk_samples, strict=True)
        for slot, start, count, samples in chunks:
            scored = self._num_scored(slot, start, count)
            rows.append(np.arange(at, at + scored))
            if samples:
                rows.append(np.asarray([at + count - 1]))
            at += count
        return np.concatenate(rows)
