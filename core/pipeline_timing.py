"""What the books have learnt of the pipeline: how long stages compute, and what lies between and beside them.

Learnt from the busy spans that results bring home; the same spans give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .cost_model import CostFit, LinearCost, StepCost
from .step import StepPlan, StepResult

_EVERY_STEP_UP_TO = 16
"""Stages; with more, only some steps are looked at, so that a step's cost does not grow with them."""
_MOSTLY_PROMPTS = 0.1
"""Share of decodes in a step that still counts as one of prompts."""
_HIGHEST_PRICE = 1 / 256
"""Of a token of history: none was seen to cost so much."""
_USUAL_KNEE = 128.0
"""Tokens up to which a step of a dense model hardly takes longer, until it is known."""
Spans = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """What a micro-batch costs: in the slowest stage, and on its whole way round when it waits for nobody."""

    slowest: StepCost
    around: StepCost
    """All stages, the links between them and back, the host."""


class PipelineTiming:
    """Under the state lock; schedulers read it (``TimingView``)."""

    def __init__(self, num_stages: int, active_share: float = 1.0) -> None:
        """``active_share``: of the weights, what one token uses."""
        self.num_steps = 0
        """Steps that came back with times."""
        self.usual_knee = _USUAL_KNEE / active_share
        """Tokens up to which a step of such a model hardly takes longer on most devices: four times as many where
        a token uses a quarter of the weights that a step reads."""
        self._num_stages = num_stages
        self._steps = CostFit(num_stages, self.usual_knee / 2)
        self._prompts = CostFit(1, self.usual_knee / 2)
        """The slowest stage in steps of prompts: a chunk reads its history once, a row of decodes each its own."""
        self._decodes = CostFit(num_stages, self.usual_knee / 2)
        """Every stage in steps of decodes alone. Nothing of what prompts cost says what a row costs that reads a long
        history."""
        self._link = CostFit()
        """From one stage to the next: the mean over those where it can be told."""
        self._back = CostFit()
        """From the last stage to the first: result, books, next push, or the feedback of tokens."""
        self._before = self._spans_at(-math.inf)
        """Of the last step. Before the first one every stage stood idle."""
        self._last_of_queue: dict[int, tuple[int, float]] = {}
        """Per queue: the first decode of its last step, and when the last stage was done with it."""
        self._fresh_until = 0
        self._trips: dict[tuple[int, bool, bool], RoundTrip] = {}
        self._knee: float | None = None

    def observe(self, plan: StepPlan, result: StepResult) -> None:
        """A step came back, in the order of the pushes; one without times, or that failed, teaches nothing."""
        spans = result.busy
        known = len(spans) == self._num_stages
        before, self._before = self._before, spans if known else self._spans_at(math.inf)
        if not known or result.error is not None:
            return
        if self.num_steps % max(1, self._num_stages // _EVERY_STEP_UP_TO) == 0:
            seconds = [ended - began for began, ended in spans]
            self._steps.observe(plan.num_tokens, plan.context_tokens, *seconds)
            if len(plan.decode_ids) == plan.num_tokens:
                self._decodes.observe(plan.num_tokens, plan.context_tokens, *seconds)
            if len(plan.decode_ids) <= plan.num_tokens * _MOSTLY_PROMPTS:
                self._prompts.observe(plan.num_tokens, plan.context_tokens, max(seconds))
            self._observe_ways(plan, spans, before)
        self.num_steps += 1
        first = plan.decode_ids[0] if len(plan.decode_ids) else -1
        self._last_of_queue[plan.queue] = first, spans[-1][1]

    def _observe_ways(self, plan: StepPlan, spans: Spans, before: Spans) -> None:
        """A stage computes one step after the other, so a gap tells of the way only where the next stage stood idle for
        most of it; else the way took no longer than that. That a stage stood idle for a moment says nothing: real ones
        need one between two steps that wait before them."""
        tokens, gaps, idle = plan.num_tokens, list[float](), list[float]()
        for stage in range(1, self._num_stages):
            gap, stood = spans[stage][0] - spans[stage - 1][1], spans[stage][0] - before[stage][1]
            (idle if 2.0 * stood > gap else gaps).append(max(0.0, gap))
        if idle:
            self._link.observe(tokens, 0, sum(idle) / len(idle))
        elif gaps:
            self._link.observe_at_most(tokens, 0, min(gaps))
        first, ended = self._last_of_queue.get(plan.queue, (-1, 0.0))
        if len(plan.decode_ids) and first == plan.decode_ids[0]:
            # The same decodes again, which waited for nothing but their tokens.
            gap, stood = spans[0][0] - ended, spans[0][0] - before[0][1]
            observe = self._back.observe if 2.0 * stood > gap else self._back.observe_at_most
            observe(tokens, 0, max(0.0, gap))

    def _spans_at(self, moment: float) -> Spans:
        """As if every stage had been done with its last step then."""
        return [(moment, moment)] * self._num_stages

    def restart(self) -> None:
        """The stages are new, and their clocks may be: no step of theirs follows one of the old ones."""
        self._before = self._spans_at(-math.inf)
        self._last_of_queue.clear()

    @property
    def stages(self) -> Sequence[LinearCost | None]:
        return self._steps.costs or [None] * self._num_stages

    @property
    def history_price(self) -> float:
        """What a token before a chunk's token costs, as a share of a token; 0 until it is known.

        A token counts at least half of its share in the best step so far: where all steps were short, and took the time
        of the weights whatever their tokens, the fit finds no price of tokens and lays on the history what they cost.
        """
        cost = self._prompts.cost
        if cost is None or not cost.per_context:
            return 0.0
        per_token = max(cost.per_token, 0.5 / self._prompts.best_rate)
        return cost.per_context / max(per_token, cost.per_context / _HIGHEST_PRICE)

    def round_trip(self, num_tokens: float, bent: bool = False, decodes: bool = False) -> RoundTrip | None:
        """What a micro-batch of about so many tokens costs; ``None`` while nothing is known. ``bent``: not the line
        through all sizes, but what each of them took. ``decodes``: as steps of decodes alone tell it, once one was
        seen. Refreshed now and then, since fitting costs more than looking."""
        if not self.num_steps:
            return None
        self._refresh()
        size = round(2 * math.log2(num_tokens + 1.0))
        key = size, bent, decodes
        if key not in self._trips:
            self._trips[key] = self._fit(2.0 ** (size / 2) - 1.0, bent, decodes)
        return self._trips[key]

    def was_seen(self, num_decodes: float) -> bool:
        """Whether a step of about so many decodes, and nothing else, was measured."""
        return self._decodes.was_seen(num_decodes)

    @property
    def knee(self) -> float:
        """Tokens up to which a step hardly takes longer; see ``CostFit.knee``."""
        self._refresh()
        if self._knee is None:
            self._knee = self._steps.knee or self.usual_knee
        return self._knee

    def _refresh(self) -> None:
        if self.num_steps >= self._fresh_until:
            self._fresh_until = self.num_steps + max(1, min(32, self.num_steps // 4))
            self._trips.clear()
            self._knee = None

    def _fit(self, num_tokens: float, bent: bool, decodes: bool) -> RoundTrip:
        steps = self._decodes if decodes and self._decodes.num_steps else self._steps
        stages, link, back = (fit.near(num_tokens, bent) for fit in (steps, self._link, self._back))
        around = StepCost.total([*stages, *link * (self._num_stages - 1), *back])
        return RoundTrip(max(stages, key=lambda cost: cost.at(num_tokens)), around)
