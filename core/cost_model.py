"""What a step costs on a stage: the formula, and how it is learnt from steps that came back.

Standard library only: the micro-batch policy, the simulator and the executor's patience with a stuck step all use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .step import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the cost of a step depends on."""

    num_tokens: int
    context_tokens: int
    """Sum over the tokens of the positions each attends to."""
    num_sampled: int = 0
    """Rows that pass the head, on the last stage."""
    num_rows: int = 0
    kv_tokens: int = 0
    """Sum over the rows of the cache each reads: what a decode streams from memory."""

    @classmethod
    def of(cls, plan: StepPlan) -> StepShape:
        """The shape of a booked plan."""
        kv_tokens = (
            sum(plan.decode_positions) + len(plan.decode_positions) + sum(plan.chunk_starts) + sum(plan.chunk_tokens)
        )
        return cls(plan.num_tokens, plan.context_tokens, plan.num_sampled, plan.num_rows, kv_tokens)


class StageCost(Protocol):
    """Seconds one stage computes for one step."""

    def seconds(self, shape: StepShape) -> float: ...


@dataclass(frozen=True, slots=True)
class LinearCost:
    """``base + per_token * tokens + per_context * (tokens x history)``: weights read, weights used, attention.

    The form SGLang fits to choose its chunks by, written over a whole micro-batch.
    """

    base: float
    per_token: float
    per_context: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        return self.base + self.per_token * shape.num_tokens + self.per_context * shape.context_tokens


class CostFit:
    """``LinearCost`` fitted online: least squares over the steps seen, each one worth ``decay`` of the next.

    Three features, so the normal equations are nine numbers and a step costs a few microseconds. Coefficients that come
    out negative, as noise makes them, are dropped and the rest fitted again.
    """

    def __init__(self, decay: float = 0.995) -> None:
        self._decay = decay
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3
        self.num_steps = 0
        self._cost: LinearCost | None = None

    def observe(self, num_tokens: int, context_tokens: int, seconds: float) -> None:
        """One step that took so long."""
        # Scaled so that the three columns are of like size, or the solution would lose its digits; and weighted by
        # the time taken, so that a relative error counts the same in a small step as in a large one.
        weight = 1.0 / max(seconds, 1e-6)
        row = (weight, num_tokens * 1e-2 * weight, context_tokens * 1e-5 * weight)
        for i in range(3):
            for j in range(3):
                self._products[i][j] = self._products[i][j] * self._decay + row[i] * row[j]
            self._targets[i] = self._targets[i] * self._decay + row[i] * seconds * weight
        self.num_steps += 1
        self._cost = None

    @property
    def cost(self) -> LinearCost | None:
        """The fit; ``None`` before the first step."""
        if self._cost is None and self.num_steps:
            base, per_token, per_context = self._solve()
            self._cost = LinearCost(base, per_token * 1e-2, per_context * 1e-5)
        return self._cost

    def _solve(self) -> list[float]:
        kept = [0, 1, 2]
        while True:
            # A little ridge: steps that are all alike leave the system singular.
            matrix = [
                [self._products[i][j] + (1e-6 * self._products[i][i] + 1e-12 if i == j else 0.0) for j in kept]
                for i in kept
            ]
            solution = _solve(matrix, [self._targets[i] for i in kept])
            lowest = min(range(len(kept)), key=solution.__getitem__)
            if solution[lowest] >= 0 or len(kept) == 1:
                found = [0.0] * 3
                for index, value in zip(kept, solution, strict=True):
                    found[index] = max(value, 0.0)
                return found
            del kept[lowest]


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss with pivots, for a handful of unknowns."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda r: abs(rows[r][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for other in range(size):
            if other != column:
                factor = rows[other][column] / rows[column][column]
                rows[other] = [a - factor * b for a, b in zip(rows[other], rows[column], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


class PipelineTiming:
    """What the books have learnt of the pipeline. Under the state lock; schedulers read it (``TimingView``)."""

    def __init__(self, num_stages: int) -> None:
        self._fits = [CostFit() for _ in range(num_stages)]
        self.overhead = 0.0
        """Seconds a micro-batch spends between and beside the stages on its way round: links, threads, scheduling.
        A running mean over steps that waited for no stage."""
        self.num_steps = 0

    def observe(self, plan: StepPlan, result: StepResult) -> None:
        """A step came back; one without times, or that failed, teaches nothing."""
        if len(result.busy) != len(self._fits) or result.error is not None:
            return
        tokens, context = plan.num_tokens, plan.context_tokens
        for fit, (began, ended) in zip(self._fits, result.busy, strict=True):
            fit.observe(tokens, context, ended - began)
        self.num_steps += 1

    @property
    def stages(self) -> Sequence[LinearCost | None]:
        return [fit.cost for fit in self._fits]

    @property
    def slowest(self) -> LinearCost | None:
        """The stage that takes longest for a small step; ``None`` while nothing is known."""
        costs = [cost for cost in self.stages if cost is not None]
        return max(costs, key=lambda cost: cost.base + 64 * cost.per_token, default=None)
