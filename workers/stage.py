"""One pipeline stage: applies a plan to its books, runs the model engine, and samples where it is the last."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import EngineDeadError, ModelLoadError
from ..core.step import StepPlan, StepResult
from .model_engine import ModelEngine, ModelInfo, Progress
from .sampler import Sampler, SamplerFactory
from .slots import FedRows, SlotTable

_TRACEBACK_FRAMES = 6
METHODS = ("load", "allocate", "forward", "check_device", "release")
"""Of a ``ModelEngine``."""


@dataclass(slots=True)
class StageOutput:
    """What a stage hands to the next one along with the plan."""

    hidden: Any
    """[T, hidden_size], or ``None`` once the step has failed; valid until the stage's next ``execute``."""
    busy: list[tuple[float, float]] = field(default_factory=list)
    """When each stage so far began and ended."""
    error: str | None = None
    """Set when this or an earlier stage failed: the stages behind only apply the plan to their books."""


class Stage:
    """Called by one thread only, in this order: ``load``, ``allocate``, ``execute``..., ``release``.

    With ``feeds_back`` plans may be made ahead of their tokens (``StepPlan.feeds_from``). The last stage then feeds
    itself; the first of several is told by ``feed`` what each step sampled, and executes such a plan only once it
    ``can_execute`` it.
    """

    def __init__(
        self,
        model_engine: ModelEngine,
        make_sampler: SamplerFactory,
        *,
        index: int,
        num_stages: int,
        max_num_seqs: int,
        feeds_back: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ``ModelLoadError`` for a model engine that lacks a method."""
        missing = [name for name in METHODS if not callable(getattr(model_engine, name, None))]
        if missing:  # found by the first step that fails, this would end the engine
            raise ModelLoadError(f"{type(model_engine).__name__} is no model engine: no {', '.join(missing)}")
        self.index = index
        self.is_last = index == num_stages - 1
        self._model_engine = model_engine
        self._make_sampler = make_sampler
        self._max_num_seqs = max_num_seqs
        self._clock = clock
        self._info: ModelInfo | None = None
        self._slots: SlotTable | None = None
        self._sampler: Sampler | None = None
        self._feeds_back = feeds_back
        self._is_fed = feeds_back and index == 0 and num_stages > 1
        self._feeds_itself = feeds_back and self.is_last
        self._news: list[tuple[FedRows, Sequence[int]]] = []
        """Tokens that are known and not in the books yet."""
        self._unfed: dict[int, FedRows] = {}
        """By step: places for tokens that the last stage has not told of yet."""

    def load(self, progress: Progress | None = None) -> ModelInfo:
        """Load the stage's weights. Raises what the model engine raises."""
        self._info = self._model_engine.load(progress)
        return self._info

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Make the KV pool and the books."""
        assert self._info is not None, "load comes first"
        self._model_engine.allocate(num_blocks, block_size)
        self._slots = SlotTable(self._max_num_seqs, self._info.max_model_len, block_size)
        if self.is_last:
            self._sampler = self._make_sampler(self._slots, self._info.vocab_size)

    def execute(self, plan: StepPlan, received: StageOutput | None) -> StageOutput | StepResult:
        """Run one plan; ``received`` is the previous stage's output, ``None`` on the first stage.

        The last stage answers with a ``StepResult``, the others with a ``StageOutput``. The books take the plan's
        changes whatever becomes of the forward: a failure there, or in sampling, or on an earlier stage ends in
        ``StepResult.error``. A plan that contradicts the books raises, and so does a failure after which the device
        computes nothing any more: the stage is then of no further use.
        """
        assert self._slots is not None, "allocate comes first"
        began = self._clock()
        assert self.can_execute(plan), f"step {plan.step} goes on from tokens that are not here"
        self.catch_up()
        self._slots.apply(plan)
        if self._is_fed:
            self._unfed[plan.step] = self._slots.fed_rows(self._slots.sampling_rows(plan))
        if self._sampler is not None:
            for start in plan.starts:
                self._sampler.start(start)
        hidden = received.hidden if received is not None else None
        busy = received.busy if received is not None else []
        error = received.error if received is not None else None
        result = StepResult(plan.epoch, plan.step, [])
        output = None
        if error is None:
            output, error = self._compute(plan, hidden, result)
        busy = [*busy, (began, self._clock())]
        if not self.is_last:
            return StageOutput(output if error is None else None, busy, error)
        if error is not None:
            return StepResult(plan.epoch, plan.step, [], error=error, busy=busy)
        result.busy = busy
        return result

    def can_execute(self, plan: StepPlan) -> bool:
        """Whether every token that the plan goes on from has been fed."""
        if plan.feeds_from is None:
            return True
        assert self._feeds_back, f"step {plan.step} was made ahead of its tokens, which nobody feeds here"
        oldest = next(iter(self._unfed), None)  # steps come in order
        return oldest is None or oldest > plan.feeds_from

    def feed(self, step: int, tokens: Sequence[int]) -> None:
        """What the last stage sampled in a step; nothing where the step failed. For the first stage of several. Raises
        ``KeyError`` for a step that nothing is awaited of, ``ValueError`` for another number of tokens than of rows."""
        rows = self._unfed.pop(step)
        if len(tokens):
            if len(tokens) != len(rows.slots):
                raise ValueError(f"{len(tokens)} tokens for {len(rows.slots)} rows")
            self._news.append((rows, tokens))

    def catch_up(self) -> None:
        """Enter tokens that have become known into the books. ``execute`` begins with it; the last stage may do it as
        soon as those are told who wait for them."""
        for rows, tokens in self._news:
            assert self._slots is not None
            self._slots.feed(rows, tokens)
        self._news.clear()

    def release(self) -> None:
        """Drop weights, pool and books. Callable twice and before ``load``."""
        self._model_engine.release()
        self._slots = self._sampler = None
        self._news.clear()
        self._unfed.clear()

    def _compute(self, plan: StepPlan, hidden: Any, result: StepResult) -> tuple[Any, str | None]:
        """The forward's output, on the last stage sampled into ``result``; or why there is none."""
        assert self._slots is not None
        try:
            output = self._model_engine.forward(self._slots.batch(plan), hidden)
            if self._sampler is not None:
                self._sample(self._sampler, plan, output, result)
            return output, None
        except Exception as exc:  # noqa: BLE001 - it is the step's answer
            error = f"stage {self.index}: {describe(exc)}"
        # Only here is the exception gone, and with it what the step had taken of the device's memory.
        try:
            self._model_engine.check_device()
        except Exception as broken:
            what = f"the device computes nothing any more: {broken}"
            raise EngineDeadError(f"{what}\nseen first when step {plan.step} failed: {error}") from broken
        return None, error

    def _sample(self, sampler: Sampler, plan: StepPlan, logits: Any, result: StepResult) -> None:
        assert self._slots is not None
        rows = self._slots.sampling_rows(plan)
        if rows.prompts:
            result.prompt_logprobs = sampler.score_prompts(logits, rows.prompts)
            logits = logits[rows.logit_rows]
        if len(rows.slots):
            result.tokens, result.logprobs = sampler.sample(logits, rows.slots, rows.positions)
            if len(result.tokens) != len(rows.slots):
                raise ValueError(f"the sampler gave {len(result.tokens)} tokens for {len(rows.slots)} rows")
            if self._feeds_itself:
                self._news.append((self._slots.fed_rows(rows), result.tokens))


def describe(exc: BaseException) -> str:
    """An exception in a few lines: what, then its last frames."""
    what = "".join(traceback.format_exception_only(exc)).strip()
    frames = "".join(traceback.format_tb(exc.__traceback__)[-_TRACEBACK_FRAMES:])
    return f"{what}\n{frames}".rstrip()
