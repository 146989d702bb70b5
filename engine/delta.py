"""What the output thread hands to a request's sink: the new part of one choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..core.outputs import FinishReason
from ..core.request import Request
from ..core.step import TokenLogprobs


@dataclass(slots=True)
class Delta:
    """New tokens of a request, or its end, or both. ``error`` is set only together with ``FinishReason.ERROR``."""

    request: Request
    token_ids: list[int]
    at: float
    """When the step came back, on ``time.monotonic``."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    prompt_start: int = 0
    """Position of the first prompt token that ``prompt_logprobs`` score; after a pause some are scored again."""
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: Exception | None = None


class Sink(Protocol):
    """Where deltas go. Called by the output thread only, never under the state lock; must not block."""

    def deliver(self, deltas: list[Delta]) -> None:
        """Take the deltas of one step, in order."""
