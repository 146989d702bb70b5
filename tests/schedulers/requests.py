"""Requests as orderings see them, made by hand."""

from __future__ import annotations

from typing import Any

from llm_engine.core.request import Request, RequestId
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import StepPlan
from llm_engine.schedulers.base import Ordering


def a_request(
    number: int,
    *,
    prompt: int = 4,
    max_tokens: int = 16,
    produced: int = 0,
    arrival: float = 0.0,
    params: SamplingParams | None = None,
    **more: Any,
) -> Request:
    """One that waits, with so many tokens of its answer there already."""
    request = Request(
        RequestId(number), str(number), [1] * prompt, params or SamplingParams(), prompt + max_tokens, arrival, **more
    )
    request.token_ids += [2] * produced
    return request


def serve(ordering: Ordering, request: Request, start: float, first_token: float, end: float, num_tokens: int) -> None:
    """One life, told to the ordering as ``Scheduler`` does."""
    ordering.add(request)
    list(ordering.shed(start))
    ordering.remove(request.request_id)
    ordering.started(request)
    last_chunk = StepPlan(queue=0, chunk_ids=[request.request_id], chunk_tokens=[1], chunk_samples=[True])
    request.token_ids.append(2)
    if num_tokens > 1:
        ordering.retired(last_chunk, [])
        list(ordering.shed(first_token))
        request.token_ids += [2] * (num_tokens - 1)
        last_chunk = StepPlan(queue=0, decode_ids=[request.request_id])
    ordering.remove(request.request_id)
    ordering.ended(request.request_id)
    ordering.retired(last_chunk, [request.request_id])
    list(ordering.shed(end))
