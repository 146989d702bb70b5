"""One request's life: its states, its events, and what the books know of it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NewType

from .sampling_params import SamplingParams

RequestId = NewType("RequestId", int)
BlockHash = NewType("BlockHash", bytes)


class RequestState(enum.Enum):
    WAITING = "waiting"
    """Never scheduled yet, or refused so far: holds no blocks."""
    PREFILLING = "prefilling"
    """Resident; some of its known tokens are in no plan yet."""
    DECODING = "decoding"
    """Resident in a running queue: at the earliest, its last chunk is in flight there."""
    PAUSED = "paused"
    """Gave its blocks back; waits to be recomputed from its known tokens."""
    PARKED = "parked"
    """Waits for something outside (a grammar, an adapter); keeps its place and blocks nobody."""
    FINISHED = "finished"


_S = RequestState
TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    _S.WAITING: frozenset({_S.PREFILLING, _S.PARKED, _S.FINISHED}),
    _S.PARKED: frozenset({_S.WAITING, _S.FINISHED}),
    _S.PREFILLING: frozenset({_S.DECODING, _S.PAUSED, _S.FINISHED}),
    _S.DECODING: frozenset({_S.PAUSED, _S.FINISHED}),
    _S.PAUSED: frozenset({_S.PREFILLING, _S.FINISHED}),
    _S.FINISHED: frozenset(),
}
RESIDENT_STATES = frozenset({_S.PREFILLING, _S.DECODING})


class RequestEvent(enum.Enum):
    QUEUED = "queued"
    SCHEDULED = "scheduled"
    PAUSED = "paused"
    RESUMED = "resumed"
    FIRST_TOKEN = "first_token"
    FINISHED = "finished"


class IllegalTransition(AssertionError):
    """A request was moved between states that do not follow each other: a bug of ours."""


@dataclass(slots=True, eq=False)
class Request:
    """One choice of a caller's request: the unit that is scheduled.

    The caller's thread makes it; from the inbox on, only holders of the state lock touch it. Schedulers read it
    (``RequestView``) and never write.
    """

    request_id: RequestId
    """Rises with arrival within one engine."""
    external_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    max_total_tokens: int
    """Prompt and output together: it finishes when it has this many."""
    arrival: float
    stop_ids: frozenset[int] = frozenset()
    """Ids that end it: stop_token_ids and, unless ignored, the end-of-sequence ids."""
    seed: int = 0
    choice_index: int = 0
    priority: int = 0
    """Lower goes first, where the ordering knows priorities."""
    deadline: float | None = None
    """When its last token should be there, on the clock of ``arrival``."""
    tenant: str | None = None
    adapter_id: str | None = None
    cache_salt: str | None = None
    bad_words_ids: list[list[int]] = field(default_factory=list)
    block_hashes: list[BlockHash] = field(default_factory=list)
    """Hashes of the full blocks of its known tokens; extended as tokens become known."""
    sink: Any = None
    """Where its deltas go; opaque to the books."""

    state: RequestState = RequestState.WAITING
    token_ids: list[int] = field(default_factory=list)
    """Known tokens: prompt, then outputs."""
    slot: int | None = None
    queue: int | None = None
    """Its running queue while it decodes."""
    num_computed_tokens: int = 0
    """While it prefills: tokens computed or in flight. While it decodes the queue's columns know."""
    start_step: int = 0
    """Step that made it resident; results of earlier steps are not its own."""
    num_in_flight: int = 0
    """Chunks of it that were pushed and have not come back."""
    num_cached_tokens: int | None = None
    """Prefix hit when it was first scheduled."""
    num_preemptions: int = 0
    death_causes: list[str] = field(default_factory=list)
    """Of the stages' deaths that found it in flight."""
    events: list[tuple[RequestEvent, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def is_resident(self) -> bool:
        return self.state in RESIDENT_STATES

    @property
    def reads_prefix_cache(self) -> bool:
        """Prompt log-probabilities need every prompt position computed."""
        return self.params.prompt_logprobs is None

    def move_to(self, state: RequestState) -> None:
        """Change state; raises ``IllegalTransition`` for a move the table does not list."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"request {self.external_id}: {self.state.value} -> {state.value}")
        self.state = state

    def record(self, event: RequestEvent, now: float) -> None:
        """Note an event with its time (seconds, monotonic)."""
        self.events.append((event, now))

    def time_of(self, event: RequestEvent) -> float | None:
        """When the event first happened, or ``None``."""
        return next((at for kind, at in self.events if kind is event), None)
