"""Choosing tokens on the last stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ..core.step import RequestStart, TokenLogprobs
from .batch import Int64
from .slots import PromptRows, SlotTable


class Sampler(Protocol):
    """Chooses one token per row of logits. Called by the last stage's thread only; replaceable."""

    def start(self, start: RequestStart) -> None:
        """A request takes its slot; the slot table has it already. Must not raise."""

    def sample(self, logits: Any, slots: Int64, positions: Int64) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """Tokens of the rows, and the log-probabilities of those that asked, by row.

        ``logits`` is [S, V] in float32, numpy or torch, and may be overwritten. ``slots`` [S] says whose row it is,
        ``positions`` [S] where its input sits: the token will sit one further.
        """

    def score_prompts(self, logits: Any, prompts: list[PromptRows]) -> dict[int, list[TokenLogprobs]]:
        """By request id: each scored row's entry for the token that really follows. Leaves ``logits`` as they are."""


SamplerFactory = Callable[[SlotTable, int], Sampler]
"""Makes a sampler from the stage's books and the size of the vocabulary."""


class BatchSampler:
    def __init__(self, slots: SlotTable, vocab_size: int) -> None:
        self._slots = slots

    def start(self, start: RequestStart) -> None:
        pass

    def sample(self, logits: Any, slots: Int64, positions: Int64) -> tuple[list[int], dict[int, TokenLogprobs]]:
        return np.asarray(logits).argmax(axis=1).tolist(), {}

    def score_prompts(self, logits: Any, prompts: list[PromptRows]) -> dict[int, list[TokenLogprobs]]:
        return {}
