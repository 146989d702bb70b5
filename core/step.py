"""What one step asks of the stages and what comes back, in columns.

A ``StepPlan`` is made in two strokes under the state lock: a scheduler fills in the *decision* (who computes how many
tokens, who is paused), ``EngineCore`` checks it, takes the blocks and fills in the *booking* (slots, positions, tokens,
block changes). Executors and workers only read it. A row is one request in one step; decode rows come first, then chunk
rows, and every column of a group is parallel to its ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .sampling_params import SamplingParams


@dataclass(slots=True)
class RequestStart:
    """All a worker must know of a request, sent once when it starts and again, whole, when it resumes."""

    request_id: int
    slot: int
    """Row of the workers' per-request arrays; a later start with the same slot replaces this request."""
    token_ids: list[int]
    """Every known token: prompt, then what was generated before a pause."""
    num_prompt_tokens: int
    block_ids: list[int]
    """Blocks held when the step begins, in token order (prefix hits and those for the first chunk)."""
    sampling: SamplingParams
    seed: int
    choice_index: int
    stop_ids: list[int]
    """Ids that may not be sampled before ``sampling.min_tokens`` outputs."""
    bad_words_ids: list[list[int]] = field(default_factory=list)
    adapter_id: str | None = None


@dataclass(slots=True)
class StepPlan:
    """One micro-batch. See the module's docstring for who fills in what."""

    queue: int
    """The running queue whose decodes it carries and which the chunks' requests will join."""
    decode_ids: Sequence[int] = ()
    chunk_ids: list[int] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    """Tokens each chunk computes; prefix hits are not counted."""
    paused_ids: list[int] = field(default_factory=list)
    """Residents that give their blocks back before this step; they resume by recomputing."""
    moved_ids: list[int] = field(default_factory=list)
    """Decodes of this queue that belong to another one from now on; they are not in this plan's rows. Only while the
    queue is idle."""
    moved_queues: list[int] = field(default_factory=list)
    """Parallel to ``moved_ids``: the queue each joins."""
    shed_ids: list[int] = field(default_factory=list)
    """Waiting requests that end here, unserved. Only in a plan without rows."""
    shed_reasons: list[str] = field(default_factory=list)
    """Parallel to ``shed_ids``: what each caller is told."""

    # -- booking, by EngineCore
    epoch: int = 0
    step: int = 0
    decode_slots: Sequence[int] = ()
    decode_positions: Sequence[int] = ()
    decode_tokens: Sequence[int] = ()
    """Each decode row's input: its last known token, which sits at its position. Empty where ``feeds_from`` is set."""
    feeds_from: int | None = None
    """Set where the plan was made ahead of its tokens: the decode rows' inputs are what the workers sampled up to and
    including this step."""
    chunk_slots: list[int] = field(default_factory=list)
    chunk_starts: list[int] = field(default_factory=list)
    """Position of each chunk's first token: everything before it is in the cache."""
    chunk_samples: list[bool] = field(default_factory=list)
    """Whether the chunk is the last one of its prompt, so that a token is sampled after it."""
    starts: list[RequestStart] = field(default_factory=list)
    grown_slots: list[int] = field(default_factory=list)
    grown_blocks: list[int] = field(default_factory=list)
    """Parallel to ``grown_slots``: append this block to that slot's table, in order."""
    resumed_ids: list[int] = field(default_factory=list)
    finished_ids: list[int] = field(default_factory=list)
    """Requests that ended since the last plan; a request a worker no longer hears of has no other notice."""

    @property
    def num_rows(self) -> int:
        return len(self.decode_ids) + len(self.chunk_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.decode_ids) + sum(self.chunk_tokens)

    @property
    def num_sampled(self) -> int:
        """Rows whose next token is chosen."""
        return len(self.decode_ids) + sum(self.chunk_samples)

    @property
    def context_tokens(self) -> int:
        """Sum over the step's tokens of the positions each attends to, its own included. Once booked."""
        chunks = zip(self.chunk_starts, self.chunk_tokens, strict=True)
        return (
            sum(self.decode_positions)
            + len(self.decode_positions)
            + sum(count * start + count * (count + 1) // 2 for start, count in chunks)
        )

    @property
    def sampled_ids(self) -> list[int]:
        """Ids in the order of ``StepResult.tokens``: decode rows, then the chunks that sample."""
        return [
            *self.decode_ids,
            *(i for i, samples in zip(self.chunk_ids, self.chunk_samples, strict=True) if samples),
        ]


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the distribution before temperature and truncation."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest token."""
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True)
class StepResult:
    """What the last stage hands back for one plan."""

    epoch: int
    step: int
    tokens: list[int]
    """One per sampling row, in the order of ``StepPlan.sampled_ids``."""
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    """By index into ``tokens``; only rows that asked."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    """By request id: one entry per token of the chunk, for the *next* prompt token; the prompt's last is left out."""
    error: str | None = None
    """Why the step failed, with the stage's traceback; nothing else of a failed step is valid."""
    busy: list[tuple[float, float]] = field(default_factory=list)
    """Per stage: when its forward began and ended, on ``time.monotonic``."""
