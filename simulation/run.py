"""What happened in a simulation, request by request and step by step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ..core.trace import StepStats


@dataclass(frozen=True, slots=True)
class Step:
    """One micro-batch as it went by."""

    load: int
    """Index into ``SimulationRun.loads``."""
    queue: int
    num_tokens: int
    num_decodes: int
    began: float
    """The first stage began with it."""
    ended: float
    """The last stage was done."""


@dataclass(slots=True)
class Served:
    """What became of one request. Times are virtual seconds."""

    arrival: float
    num_prompt_tokens: int
    max_output_tokens: int
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None
    """When its last token should have been there."""
    first_token_at: float | None = None
    last_token_at: float = 0.0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    """Of its prompt, found when it first started."""
    finished: bool = False
    shed: bool = False
    """Given up by the scheduler while it waited."""

    @property
    def num_tokens(self) -> int:
        """What it has got: its prompt, once that was computed, and its answer so far."""
        return self.num_prompt_tokens + self.num_output_tokens if self.num_output_tokens else 0

    @property
    def num_tokens_asked(self) -> int:
        return self.num_prompt_tokens + self.max_output_tokens

    @property
    def ttft(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.arrival

    @property
    def mean_itl(self) -> float | None:
        """Between its tokens; ``None`` for fewer than two."""
        if self.first_token_at is None or self.num_output_tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.num_output_tokens - 1)


@dataclass(slots=True)
class SimulationRun:
    """What happened, in virtual seconds."""

    num_queues: int
    makespan: float = 0.0
    """When the last result was in the books."""
    steps: list[Step] = field(default_factory=list)
    loads: list[tuple[float, float]] = field(default_factory=list)
    """When the pipeline was full; see ``steady.py``."""
    stage_busy: list[float] = field(default_factory=list)
    """Per stage: the share of that time which it computed; zeros where there was none (``full_seconds``)."""
    busy_seconds: list[float] = field(default_factory=list)
    """Per stage, of the whole run."""
    ttfts: list[float] = field(default_factory=list)
    itls: list[float] = field(default_factory=list)
    e2es: list[float] = field(default_factory=list)
    requests: list[Served] = field(default_factory=list)
    """By arrival."""
    tenant_tokens: dict[str | None, int] = field(default_factory=dict)
    """Prompt tokens in the cache and tokens sampled, by tenant, when the run's ``contended_until`` came."""
    contended_until: float = 0.0
    """The last arrival or, where all came at once, when the first tenant had all it asked for."""
    num_output_tokens: int = 0
    num_failed: int = 0
    """Shed ones included."""
    failure: str | None = None
    """What the first request that failed was told."""
    kv_usage_peak: float = 0.0
    kv_usage_mean: float = 0.0
    """Over time."""
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    """Prompt tokens of requests that started, and those of them that were found."""
    stats: deque[StepStats] = field(default_factory=deque)
    """The last steps as an engine would have noted them, as many as were asked for."""

    @property
    def full_seconds(self) -> float:
        """How long the pipeline was full, over all loads."""
        return sum(end - begin for begin, end in self.loads)
