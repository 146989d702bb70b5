"""What requests change in their logits before a token is chosen: bans, biases, penalties.

Applied in vLLM's order: allowed ids, bad words, ``min_tokens``, ``logit_bias``, then the penalties: repetition over
prompt and output, presence and frequency over the output. All touch few places, so they work on gathered values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..core.step import RequestStart
from .batch import Int64
from .logits import Float32, Logits
from .slots import SlotTable


@dataclass(slots=True)
class _Special:
    """A slot's own bans and biases; ids outside the vocabulary are left out."""

    allowed: Int64 | None
    stop_ids: Int64
    min_tokens: int
    bias_ids: Int64
    bias: Float32
    bad_words: list[tuple[list[int], int]] = field(default_factory=list)
    """Preceding output tokens, banned token."""


class LogitsEdits:
    """Per slot, what its request asked for. Called by the sampler."""

    def __init__(self, slots: SlotTable, vocab_size: int) -> None:
        self._slots = slots
        self._vocab_size = vocab_size
        self._special: dict[int, _Special] = {}
        self._repetition: Float32 = np.ones(slots.max_num_seqs, np.float32)
        self._presence: Float32 = np.zeros(slots.max_num_seqs, np.float32)
        self._frequency: Float32 = np.zeros(slots.max_num_seqs, np.float32)

    def start(self, start: RequestStart) -> None:
        """Take over a slot."""
        slot, sampling = start.slot, start.sampling
        self._repetition[slot] = sampling.repetition_penalty
        self._presence[slot] = sampling.presence_penalty
        self._frequency[slot] = sampling.frequency_penalty
        self._special.pop(slot, None)
        if sampling.allowed_token_ids or sampling.logit_bias or start.bad_words_ids or sampling.min_tokens:
            bias = {i: value for i, value in sampling.logit_bias.items() if i < self._vocab_size}
            self._special[slot] = _Special(
                allowed=self._known(sampling.allowed_token_ids) if sampling.allowed_token_ids else None,
                stop_ids=self._known(start.stop_ids),
                min_tokens=sampling.min_tokens,
                bias_ids=np.fromiter(bias, np.int64),
                bias=np.fromiter(bias.values(), np.float32),
                bad_words=[(ids[:-1], ids[-1]) for ids in start.bad_words_ids if ids and ids[-1] < self._vocab_size],
            )

    def apply(self, logits: Logits, rows: Int64, slots: Int64, positions: Int64) -> None:
        """Edit some rows; ``slots`` and ``positions`` [R] belong to ``rows`` [R]."""
        self._apply_special(logits, rows, slots, positions)
        begins = self._slots.num_prompt_tokens[slots]
        repeats = self._repetition[slots]
        some = np.flatnonzero(repeats != 1.0)
        if len(some):
            of, ids = self._tokens(slots[some], np.zeros(len(some), np.int64), positions[some] + 1)
            values, penalties = logits.get(rows[some][of], ids), repeats[some][of]
            logits.put(rows[some][of], ids, np.where(values > 0, values / penalties, values * penalties))
        presence, frequency = self._presence[slots], self._frequency[slots]
        some = np.flatnonzero((presence != 0.0) | (frequency != 0.0))
        if len(some):
            of, ids = self._tokens(slots[some], begins[some], positions[some] + 1)
            places, counts = np.unique(of * self._vocab_size + ids, return_counts=True)
            of, ids = np.divmod(places, self._vocab_size)
            penalties = presence[some][of] + frequency[some][of] * counts.astype(np.float32)
            logits.put(rows[some][of], ids, logits.get(rows[some][of], ids) - penalties)

    def _apply_special(self, logits: Logits, rows: Int64, slots: Int64, positions: Int64) -> None:
        banned: list[tuple[int, Int64]] = []
        biased: list[tuple[int, _Special]] = []
        for row, slot, position in zip(rows.tolist(), slots.tolist(), positions.tolist(), strict=True):
            special = self._special.get(slot)
            if special is None:
                continue
            if special.allowed is not None:
                logits.keep_only(row, special.allowed)
            outputs = self._slots.tokens[slot, self._slots.num_prompt_tokens[slot] : position + 1]
            words = [last for before, last in special.bad_words if _ends_with(outputs, before)]
            if words:
                banned.append((row, np.asarray(words, np.int64)))
            if len(outputs) < special.min_tokens:
                banned.append((row, special.stop_ids))
            if len(special.bias_ids):
                biased.append((row, special))
        if banned:
            at = np.repeat([row for row, _ in banned], [len(ids) for _, ids in banned])
            logits.put(at, np.concatenate([ids for _, ids in banned]), -np.inf)
        if biased:
            at = np.repeat([row for row, _ in biased], [len(special.bias_ids) for _, special in biased])
            ids = np.concatenate([special.bias_ids for _, special in biased])
            logits.put(at, ids, logits.get(at, ids) + np.concatenate([special.bias for _, special in biased]))

    def _tokens(self, slots: Int64, begins: Int64, ends: Int64) -> tuple[Int64, Int64]:
        """The known tokens from ``begins`` up to ``ends`` of each slot, flat: whose (index into ``slots``), and ids."""
        counts = np.maximum(ends - begins, 0)
        of = np.repeat(np.arange(len(slots)), counts)
        places = np.arange(len(of)) - np.repeat(counts.cumsum() - counts - begins, counts)
        return of, self._slots.tokens[slots[of], places].astype(np.int64)

    def _known(self, ids: Sequence[int]) -> Int64:
        return np.asarray([i for i in ids if i < self._vocab_size], np.int64)


def _ends_with(tokens: NDArray[np.int32], end: list[int]) -> bool:
    return len(end) <= len(tokens) and (not end or tokens[-len(end) :].tolist() == end)
