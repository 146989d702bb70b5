"""How long one step may take before the stage that computes it counts as stuck."""

from __future__ import annotations

from collections.abc import Iterable

from ...core.step import StepPlan
from ...core.views import TimingView

LEAST_SECONDS = 30.0
UNKNOWN_SECONDS = 300.0
"""While no step has come back: the first one of a large model on a small machine may take minutes. That a stage has
warmed up tells of one token, and of no prompt."""
FACTOR = 10.0


def step_patience(timing: TimingView, in_flight: Iterable[StepPlan]) -> float:
    """Ten times what the longest of these booked steps is expected to take over all stages, by what steps took so far;
    half a minute at least. Under the state lock."""
    costs = [cost for cost in timing.stages if cost is not None]
    if not costs:
        return UNKNOWN_SECONDS
    shapes = ((plan.num_tokens, plan.context_tokens) for plan in in_flight)
    expected = (sum(cost.at(tokens, context) for cost in costs) for tokens, context in shapes)
    return max(LEAST_SECONDS, FACTOR * max(expected, default=0.0))
