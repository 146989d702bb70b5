"""From a request's fields to ``SamplingParams``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.errors import InvalidParamsError
from ..core.sampling_params import SAMPLING_FIELDS, SamplingParams
from .protocol import ChatRequest, CompletionRequest, GenerationRequest

COMPLETION_MAX_TOKENS = 16


def completion_params(request: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """A completion's params. ``max_tokens=0`` with ``echo`` scores the prompt: one token is made and not shown."""
    given = _given(request)
    given["max_tokens"] = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if request.echo:
        given["max_tokens"] = max(given["max_tokens"], 1) if request.max_tokens == 0 else given["max_tokens"]
        if request.logprobs is not None and request.prompt_logprobs is None:
            given["prompt_logprobs"] = request.logprobs
    if request.echo and request.stream:
        raise InvalidParamsError("echo", True, "false while stream is true")
    return _make(given, defaults)


def chat_params(request: ChatRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """A chat's params; without a limit the answer may fill the context."""
    given = _given(request)
    given.pop("logprobs", None)
    if request.max_completion_tokens is not None:
        given["max_tokens"] = request.max_completion_tokens
    given.setdefault("max_tokens", None)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidParamsError("top_logprobs", request.top_logprobs, "only together with logprobs=true")
    if request.logprobs:
        given["logprobs"] = request.top_logprobs or 0
    return _make(given, defaults)


def chat_spelling(request: ChatRequest) -> dict[str, str]:
    """The engine's names of fields that a chat request spells otherwise."""
    limit = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    return {"prompt": "messages", "logprobs": "top_logprobs", "max_tokens": limit}


def _given(request: GenerationRequest) -> dict[str, Any]:
    return {name: value for name in SAMPLING_FIELDS if (value := getattr(request, name, None)) is not None}


def _make(given: dict[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    known = {name: value for name, value in defaults.items() if name in SAMPLING_FIELDS and value is not None}
    return SamplingParams(**{**known, **given})
