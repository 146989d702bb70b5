"""What the tokens of a step do to the requests that asked for them; the way back of ``booking.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.decode_queue import DecodeQueue
from ..core.outputs import FinishReason
from ..core.request import Request, RequestEvent
from ..core.request_table import RequestTable
from ..core.step import StepPlan, StepResult
from .delta import Delta


@dataclass(slots=True)
class InFlight:
    """A plan that was booked and has not come back."""

    plan: StepPlan
    generation: int
    """The queue's when it was booked: unchanged means that every decode row still stands."""
    requests: list[Request]
    """In the order of ``plan.sampled_ids``."""
    ending: list[int]
    """Decodes whose limit is reached by the token this plan samples, or an earlier one in flight: those are gone when
    this one retires."""
    began_at: float
    after_idle: bool = False
    """Noted by the scheduling thread: the books had nobody when it began to look."""
    booked_at: float = 0.0
    pushed_at: float = 0.0
    """Noted by the scheduling thread when ``push`` returned; 0 where it had not by the time of the record."""


@dataclass(slots=True)
class Retired:
    """What a retirement leaves to be told outside the lock."""

    flight: InFlight
    requests: list[Request] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Index of each token in ``StepResult.tokens``, to look up its log-probabilities."""
    chunked: list[Request] = field(default_factory=list)
    """Requests whose chunk this step computed and that still live."""
    first_tokens: list[Request] = field(default_factory=list)
    finished: dict[int, tuple[FinishReason, int | None]] = field(default_factory=dict)
    """By request id: reason and stop token."""
    failed: list[Delta] = field(default_factory=list)
    since_last: float | None = None
    """Seconds since this queue's last retirement: the decodes' inter-token time."""
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    """These three: the books as it left them."""

    def tell(self, request: Request, token: int, row: int) -> None:
        """Note one request's new token, row ``row`` of the result."""
        self.requests.append(request)
        self.tokens.append(token)
        self.rows.append(row)


class UnexpectedResult(Exception):
    """A result that the plan it should answer did not ask for: its stages are not to be believed any more."""


def check_result(result: StepResult, epoch: int, flight: InFlight | None) -> None:
    """Raise ``UnexpectedResult`` unless ``result`` answers ``flight``, the oldest plan in flight, of this ``epoch``."""
    expected = (epoch, flight.plan.step) if flight is not None else None
    if (result.epoch, result.step) != expected:
        raise UnexpectedResult(f"it answered (epoch, step) {result.epoch, result.step} where {expected} was in flight")
    if result.error is not None:
        return
    assert flight is not None
    if len(result.tokens) != len(flight.requests):
        answered, asked = len(result.tokens), len(flight.requests)
        raise UnexpectedResult(f"it answered {answered} tokens to step {result.step}, which asked for {asked}")
    if result.prompt_logprobs and not result.prompt_logprobs.keys() <= set(flight.plan.chunk_ids):
        raise UnexpectedResult(f"it scored prompts that are not in step {result.step}")


def advance(table: RequestTable, retired: Retired, tokens: list[int], now: float) -> None:
    """Append the sampled tokens, and note in ``retired`` who got what and whom it ends. ``tokens`` are in the order of
    ``plan.sampled_ids``. Under the state lock.

    A row whose request ended, or was paused, since the push is dropped.
    """
    flight = retired.flight
    queue, num_decodes = table.queues[flight.plan.queue], len(flight.plan.decode_ids)
    _advance_decodes(queue, retired, tokens[:num_decodes])
    for row in range(num_decodes, len(tokens)):
        request = flight.requests[row]
        if _stands(request, flight.plan):
            request.token_ids.append(tokens[row])
            retired.tell(request, tokens[row], row)
            if request.num_output_tokens == 1:
                request.record(RequestEvent.FIRST_TOKEN, now)
                retired.first_tokens.append(request)
    for request_id in flight.ending:
        if request_id in queue and _stands(table[request_id], flight.plan):
            retired.finished[request_id] = (FinishReason.LENGTH, None)
    _check_stops(table, retired)


def _advance_decodes(queue: DecodeQueue, retired: Retired, tokens: list[int]) -> None:
    flight, rows = retired.flight, list(range(len(tokens)))
    requests = flight.requests[: len(tokens)]
    if flight.generation != queue.generation:
        # Somebody came or left; mostly none of these, since who ends is not in the step made ahead of that.
        kept = [row for row in rows if _stands(requests[row], flight.plan)]
        if len(kept) < len(rows):
            rows = kept
            requests, tokens = [requests[row] for row in rows], [tokens[row] for row in rows]
    for request, token in zip(requests, tokens, strict=True):
        request.token_ids.append(token)
    retired.requests, retired.tokens, retired.rows = requests, tokens, rows


def _stands(request: Request, plan: StepPlan) -> bool:
    """Whether it is still the row that the plan carried: not gone, and not paused and started anew meanwhile."""
    return request.queue == plan.queue and request.start_step <= plan.step


def _check_stops(table: RequestTable, retired: Retired) -> None:
    """Stop ids win over length; one set test when nobody stopped."""
    if table.stop_ids.keys().isdisjoint(retired.tokens):
        return
    for request, token in zip(retired.requests, retired.tokens, strict=True):
        if token in request.stop_ids and request.num_output_tokens >= request.params.min_tokens:
            listed = token in request.params.stop_token_ids
            retired.finished[request.request_id] = (FinishReason.STOP, token if listed else None)
