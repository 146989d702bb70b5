"""Choosing tokens on the last stage, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..core.step import RequestStart, TokenLogprobs
from .batch import Int64
from .logits import Draws, Logits, Scores, wrap
from .logits_edits import LogitsEdits
from .noise import uniforms
from .slots import PromptRows, SlotTable


class Sampler(Protocol):
    """Chooses one token per row of logits. Called by the last stage's thread only; replaceable."""

    def start(self, start: RequestStart) -> None:
        """A request takes its slot, which the slot table holds already. Must not raise."""

    def sample(self, logits: Any, slots: Int64, positions: Int64) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """Tokens of the rows, and by row the log-probabilities of those that asked.

        ``logits`` is [S, V] in float32, numpy or torch, and may be overwritten. ``slots`` [S] says whose row it is,
        ``positions`` [S] where its input sits: the token will sit one further.
        """

    def score_prompts(self, logits: Any, prompts: list[PromptRows]) -> dict[int, list[TokenLogprobs]]:
        """By request id: for each scored row the token that really follows. Leaves ``logits`` as they are."""


SamplerFactory = Callable[[SlotTable, int], Sampler]
"""Makes a sampler from the stage's books and the size of the vocabulary."""

_DRAWN, _EDITED, _SCORED = 1, 2, 4


class BatchSampler:
    """``Sampler`` for everything in ``SamplingParams``.

    Per slot it keeps columns of parameters, filled when a request starts, and flags that say what the slot needs: rows
    that need nothing cost one argmax over the batch, whatever their neighbours ask for. Log-probabilities are of the
    model's own logits, before edits and temperature. How a token is drawn is told in ``logits.Draws`` and ``noise``.
    """

    def __init__(self, slots: SlotTable, vocab_size: int) -> None:
        count = slots.max_num_seqs
        self._slots = slots
        self._edits = LogitsEdits(slots, vocab_size)
        self._flags: NDArray[np.uint8] = np.zeros(count, np.uint8)
        self._seeds: NDArray[np.uint64] = np.zeros(count, np.uint64)
        self._choices: Int64 = np.zeros(count, np.int64)
        self._temperature: NDArray[np.float32] = np.ones(count, np.float32)
        self._top_k: Int64 = np.zeros(count, np.int64)
        self._top_p: NDArray[np.float64] = np.ones(count, np.float64)
        self._min_p: NDArray[np.float32] = np.zeros(count, np.float32)
        self._num_logprobs = [0] * count
        self._num_prompt_logprobs = [0] * count

    def start(self, start: RequestStart) -> None:
        slot, sampling = start.slot, start.sampling
        edited = sampling.needs_logits_processing or bool(start.bad_words_ids)
        self._flags[slot] = (
            _DRAWN * (not sampling.is_greedy) | _EDITED * edited | _SCORED * (sampling.logprobs is not None)
        )
        self._edits.start(start)
        self._seeds[slot] = start.seed & (2**64 - 1)
        self._choices[slot] = start.choice_index
        self._temperature[slot] = sampling.temperature
        self._top_k[slot] = sampling.top_k
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._num_logprobs[slot] = sampling.logprobs or 0
        self._num_prompt_logprobs[slot] = sampling.prompt_logprobs or 0

    def sample(self, logits: Any, slots: Int64, positions: Int64) -> tuple[list[int], dict[int, TokenLogprobs]]:
        batch = wrap(logits)
        flags = self._flags[slots]
        wanted = int(np.bitwise_or.reduce(flags))
        if not wanted:
            return batch.argmax().tolist(), {}
        scored = np.flatnonzero(flags & _SCORED)
        raw = batch.take(scored) if len(scored) else None
        if wanted & _EDITED:
            edited = np.flatnonzero(flags & _EDITED)
            self._edits.apply(batch, edited, slots[edited], positions[edited])
        drawn = np.flatnonzero(flags & _DRAWN)
        tokens = batch.argmax() if len(drawn) < len(slots) else np.empty(len(slots), np.int64)
        if len(drawn):
            tokens[drawn] = batch.draw(drawn, self._draws(slots[drawn], positions[drawn]))
        logprobs = {}
        if raw is not None:
            nums = [self._num_logprobs[slot] for slot in slots[scored].tolist()]
            logprobs = dict(zip(scored.tolist(), _entries(raw, tokens[scored], nums), strict=True))
        return tokens.tolist(), logprobs

    def score_prompts(self, logits: Any, prompts: list[PromptRows]) -> dict[int, list[TokenLogprobs]]:
        batch = wrap(logits)
        entries = {}
        for prompt in prompts:
            rows = np.arange(prompt.first_row, prompt.first_row + prompt.count)
            begin = prompt.first_position + 1
            tokens = self._slots.tokens[prompt.slot, begin : begin + prompt.count].astype(np.int64)
            nums = [self._num_prompt_logprobs[prompt.slot]] * prompt.count
            entries[prompt.request_id] = _entries(batch.take(rows), tokens, nums)
        return entries

    def _draws(self, slots: Int64, positions: Int64) -> Draws:
        output_positions = positions + 1 - self._slots.num_prompt_tokens[slots]
        return Draws(
            self._temperature[slots],
            self._top_k[slots],
            self._top_p[slots],
            self._min_p[slots],
            uniforms(self._seeds[slots], self._choices[slots], output_positions),
        )


def _entries(logits: Logits, tokens: Int64, nums: list[int]) -> list[TokenLogprobs]:
    """The scores of one token a row, with ``nums[row]`` of the likeliest beside it."""
    scores: Scores = logits.score(tokens, min(max(nums), logits.vocab_size))
    columns = (tokens, scores.logprobs, scores.ranks, scores.top_ids, scores.top_logprobs)
    return [
        TokenLogprobs(token, logprob, rank, top_ids[:num], top_logprobs[:num])
        for token, logprob, rank, top_ids, top_logprobs, num in zip(
            *(column.tolist() for column in columns), nums, strict=True
        )
    ]
