"""From a retirement to deltas and metrics; outside the lock."""

from __future__ import annotations

from ...core.outputs import FinishReason
from ...core.request import RequestEvent
from ...core.step import StepResult
from ...metrics.engine_metrics import EngineMetrics, FinishedSample, FirstTokenSample, StepSample
from ..core import Retired
from ..delta import Delta
from ..stats import StepStats


def deltas_of(retired: Retired, result: StepResult, now: float) -> list[Delta]:
    """One delta per request that got a token, in row order; then the prompts' log-probabilities without a token."""
    logprobs, prompt_logprobs, finished = result.logprobs, result.prompt_logprobs, retired.finished
    if not (logprobs or prompt_logprobs or finished):
        return [Delta(request, [token], now) for request, token in zip(retired.requests, retired.tokens, strict=True)]
    deltas = []
    for request, token, row in zip(retired.requests, retired.tokens, retired.rows, strict=True):
        delta = Delta(request, [token], now)
        if row in logprobs:
            delta.logprobs = [logprobs[row]]
        delta.prompt_logprobs = prompt_logprobs.get(request.request_id)
        delta.finish_reason, delta.stop_reason = finished.get(request.request_id, (None, None))
        deltas.append(delta)
    told = {request.request_id for request in retired.requests}
    for request in retired.chunked:
        if request.request_id in prompt_logprobs and request.request_id not in told:
            deltas.append(Delta(request, [], now, prompt_logprobs=prompt_logprobs[request.request_id]))
    return deltas


def record_step(metrics: EngineMetrics, retired: Retired, stats: StepStats) -> None:
    """Tell the metrics of one step and of the first tokens in it."""
    num_decodes = len(retired.tokens) - len(retired.first_tokens)
    inter_token = [(retired.since_last, num_decodes)] if retired.since_last is not None and num_decodes else ()
    metrics.record_step(StepSample(stats.step_seconds, stats.num_tokens, len(retired.tokens), inter_token))
    for request in retired.first_tokens:
        first, scheduled = request.time_of(RequestEvent.FIRST_TOKEN), request.time_of(RequestEvent.SCHEDULED)
        assert first is not None and scheduled is not None
        metrics.record_first_token(
            FirstTokenSample(first - request.arrival, scheduled - request.arrival, request.num_prompt_tokens)
        )


def record_finished(metrics: EngineMetrics, delta: Delta) -> None:
    """Tell the metrics of one request's end."""
    reason = delta.finish_reason or FinishReason.ERROR
    metrics.record_finished(FinishedSample(reason.value, delta.at - delta.request.arrival))
