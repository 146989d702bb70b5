"""What a caller gets back."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from .step import TokenLogprobs


class FinishReason(enum.StrEnum):
    """Why a choice ended; the values are the API's."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True)
class RequestMetrics:
    """Times on ``time.monotonic``, in seconds; ``None`` while it has not happened."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    num_preemptions: int = 0
    """Times it was computed again: it had been paused for want of memory, or its stages had died."""


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request. In a stream, ``text``, ``token_ids`` and ``logprobs`` are what is new."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; ``None`` for end of sequence and for length."""
    error: str | None = None
    """Why it failed, with ``FinishReason.ERROR``."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A request's answer: all of it from ``generate``, the new part from ``stream``."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the request was first scheduled."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One per prompt token, ``None`` for the first, where asked for."""

    @property
    def finished(self) -> bool:
        return all(output.finished for output in self.outputs)
