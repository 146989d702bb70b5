"""From a retirement to records, deltas and metrics; outside the lock."""

from __future__ import annotations

from ...core.cost_model import StepShape
from ...core.errors import RequestShedError
from ...core.outputs import FinishReason
from ...core.request import RequestEvent
from ...core.step import StepResult, TokenLogprobs
from ...core.trace import StepStats
from ...metrics.engine_metrics import EngineMetrics, FinishedSample, FirstTokenSample, StepSample
from ..delta import Delta
from ..retirement import Retired


def deltas_of(retired: Retired, result: StepResult, now: float) -> list[Delta]:
    """One delta per request that got a token, in row order; then the prompts' log-probabilities without a token."""
    logprobs, prompt_logprobs, finished = result.logprobs, result.prompt_logprobs, retired.finished
    if not (logprobs or prompt_logprobs or finished):
        return [Delta(request, [token], now) for request, token in zip(retired.requests, retired.tokens, strict=True)]
    plan, deltas = retired.flight.plan, []
    starts = dict(zip(plan.chunk_ids, plan.chunk_starts, strict=True)) if prompt_logprobs else {}
    for request, token, row in zip(retired.requests, retired.tokens, retired.rows, strict=True):
        delta = Delta(request, [token], now)
        if row in logprobs:
            delta.logprobs = [logprobs[row]]
        _add_prompt_logprobs(delta, prompt_logprobs, starts)
        delta.finish_reason, delta.stop_reason = finished.get(request.request_id, (None, None))
        deltas.append(delta)
    told = {request.request_id for request in retired.requests}
    for request in retired.chunked:
        if request.request_id in prompt_logprobs and request.request_id not in told:
            delta = Delta(request, [], now)
            _add_prompt_logprobs(delta, prompt_logprobs, starts)
            deltas.append(delta)
    return deltas


def _add_prompt_logprobs(delta: Delta, by_id: dict[int, list[TokenLogprobs]], starts: dict[int, int]) -> None:
    request_id = delta.request.request_id
    if request_id in by_id:
        # The chunk's first token is scored by the one before it; its own row scores the next.
        delta.prompt_logprobs, delta.prompt_start = by_id[request_id], starts[request_id] + 1


def stats_of(
    retired: Retired, result: StepResult, collected_at: float, update_at: float, retired_at: float
) -> StepStats:
    """The record of a step that has retired."""
    flight, plan = retired.flight, retired.flight.plan
    shape = StepShape.of(plan)
    return StepStats(
        epoch=plan.epoch,
        step=plan.step,
        queue=plan.queue,
        num_decodes=len(plan.decode_ids),
        num_chunks=len(plan.chunk_ids),
        num_tokens=shape.num_tokens,
        context_tokens=shape.context_tokens,
        kv_tokens=shape.kv_tokens,
        num_sampled=shape.num_sampled,
        ahead=plan.feeds_from is not None,
        num_paused=len(plan.paused_ids),
        num_resumed=len(plan.resumed_ids),
        num_finished=len(retired.finished),
        num_running=retired.num_running,
        num_waiting=retired.num_waiting,
        kv_usage=retired.kv_usage,
        began_at=flight.began_at,
        booked_at=flight.booked_at,
        pushed_at=flight.pushed_at or flight.booked_at,
        collected_at=collected_at,
        update_at=update_at,
        retired_at=retired_at,
        busy=tuple(result.busy),
        failed=result.error is not None,
        after_idle=flight.after_idle,
    )


def record_step(metrics: EngineMetrics, retired: Retired, stats: StepStats) -> None:
    """Tell the metrics of one step and of the first tokens in it."""
    num_decodes = len(retired.tokens) - len(retired.first_tokens)
    inter_token = [(retired.since_last, num_decodes)] if retired.since_last is not None and num_decodes else ()
    metrics.record_step(StepSample(stats, len(retired.tokens), inter_token))
    for request in retired.first_tokens:
        first, scheduled = request.time_of(RequestEvent.FIRST_TOKEN), request.time_of(RequestEvent.SCHEDULED)
        assert first is not None and scheduled is not None
        metrics.record_first_token(
            FirstTokenSample(
                first - request.arrival,
                scheduled - request.arrival,
                request.num_prompt_tokens if request.choice_index == 0 else 0,
                request.tenant,
                request.priority,
            )
        )


def record_finished(metrics: EngineMetrics, delta: Delta) -> None:
    """Tell the metrics of one request's end. Shedding is a decision, not a fault: it is counted by itself."""
    reason = "shed" if isinstance(delta.error, RequestShedError) else (delta.finish_reason or FinishReason.ERROR).value
    request = delta.request
    metrics.record_finished(
        FinishedSample(reason, delta.at - request.arrival, request.num_output_tokens, request.tenant, request.priority)
    )
