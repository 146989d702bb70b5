"""What a step costs on a stage: the formula, and how it is learnt from steps that came back.

Standard library only: the micro-batch policy, the simulator and the executor's patience with a stuck step all use it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .step import StepPlan


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

    def at(self, num_tokens: float, context_tokens: float = 0.0) -> float:
        """Seconds of a step of so many tokens."""
        return self.base + self.per_token * num_tokens + self.per_context * context_tokens

    def seconds(self, shape: StepShape) -> float:
        return self.base + self.per_token * shape.num_tokens + self.per_context * shape.context_tokens


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds by tokens: a line, and where steps of about so many were seen, what those took.

    A mixture of experts reads two experts for one token and all of them for a few dozen: no line holds both."""

    line: LinearCost
    bends: Mapping[int, float]
    """By half-octave of tokens: what was measured, as a share of the line. Empty where only the line is asked for."""

    def at(self, num_tokens: float) -> float:
        """Seconds of a step of so many tokens."""
        return self.line.at(num_tokens) * self.bends.get(_octave(num_tokens), 1.0)

    @classmethod
    def total(cls, costs: Sequence[StepCost]) -> StepCost:
        """What they take one after the other."""
        line = LinearCost(sum(cost.line.base for cost in costs), sum(cost.line.per_token for cost in costs))
        bends = {}
        for octave in sorted({octave for cost in costs for octave in cost.bends}):
            size = 2.0 ** ((octave - 1) / 2)
            whole = line.at(size)
            if whole:
                parts = (cost.line.at(size) * cost.bends.get(octave, 1.0) for cost in costs)
                bends[octave] = sum(parts) / whole
        return cls(line, bends)


@dataclass(slots=True)
class _Cell:
    """Steps of about one size and history: their means."""

    count: float
    num_tokens: float
    context_tokens: float
    seconds: list[float]


class CostFit:
    """``LinearCost`` fitted online to steps that came back, for several columns at once: one per stage.

    Steps are gathered in cells by size and history, half an octave wide, and least squares run over the cells' means.
    So a thousand steps of one size do not make the fit forget what others cost, and a cell follows what changes; none
    is ever given up.
    Errors count relative to the time taken. Coefficients that come out negative, as noise makes them, are dropped and
    the rest fitted again. Until sizes differ, the fixed part is taken for that of ``prior_knee`` tokens.
    """

    MEMORY = 32
    """A cell's mean is of about so many steps."""

    def __init__(self, num_columns: int = 1, prior_knee: float = 64.0) -> None:
        self._num_columns, self._prior_knee = num_columns, prior_knee
        self._cells: dict[tuple[int, int], _Cell] = {}
        self._costs: list[LinearCost] | None = None
        self.num_steps = 0

    def observe(self, num_tokens: int, context_tokens: int, *seconds: float) -> None:
        """One step that took so long, in every column."""
        self.num_steps += 1
        self._costs = None
        key = _octave(num_tokens), _octave(context_tokens)
        cell = self._cells.get(key)
        if cell is None:
            self._cells[key] = _Cell(1, num_tokens, context_tokens, list(seconds))
            return
        cell.count = min(cell.count + 1, self.MEMORY)
        share = 1.0 / cell.count
        cell.num_tokens += (num_tokens - cell.num_tokens) * share
        cell.context_tokens += (context_tokens - cell.context_tokens) * share
        for column, value in enumerate(seconds):
            cell.seconds[column] += (value - cell.seconds[column]) * share

    def observe_at_most(self, num_tokens: int, context_tokens: int, *seconds: float) -> None:
        """One step that took no longer than this: it counts where more was expected of its like."""
        cell = self._cells.get((_octave(num_tokens), _octave(context_tokens)))
        expected = (
            cell.seconds if cell is not None else [cost.at(num_tokens) for cost in self.near(num_tokens, bent=True)]
        )
        if sum(seconds) < sum(expected):
            self.observe(num_tokens, context_tokens, *seconds)

    @property
    def cost(self) -> LinearCost | None:
        """The fit of the first column; ``None`` before the first step."""
        costs = self.costs
        return costs[0] if costs else None

    @property
    def costs(self) -> Sequence[LinearCost]:
        """Of every column; empty before the first step."""
        if self._costs is None and self._cells:
            self._costs = self._fit()
        return self._costs or ()

    @property
    def knee(self) -> float | None:
        """Tokens that the best rate so far computes in the time of the shortest step: with fewer a step hardly gets
        shorter, with more it takes longer in proportion. ``None`` before the first step."""
        if not self._cells:
            return None
        # Where only large steps were seen, a short one is guessed.
        prior = self._prior_knee
        return self.best_rate * min(
            seconds * min(1.0, 2 * prior / (prior + tokens)) for tokens, seconds in self._slowest_columns()
        )

    @property
    def best_rate(self) -> float:
        """Tokens a second of the best steps so far; 0 before the first step. Where only short ones were seen, what a
        large one could do is guessed: or small micro-batches, chosen by a small knee, would confirm it for ever."""
        prior = self._prior_knee
        rates = (max(tokens, min(prior, (prior + tokens) / 2)) / seconds for tokens, seconds in self._slowest_columns())
        return max(rates, default=0.0)

    def _slowest_columns(self) -> list[tuple[float, float]]:
        """By cell: tokens, and seconds of the column that took longest."""
        return [(cell.num_tokens, max([*cell.seconds, 1e-9])) for cell in self._cells.values()]

    def was_seen(self, num_tokens: float) -> bool:
        """Whether a step of about so many tokens was measured."""
        octave = _octave(num_tokens)
        return any(tokens == octave for tokens, _ in self._cells)

    def near(self, num_tokens: float, bent: bool = False) -> list[StepCost]:
        """The fit of every column where steps of about this size count most; the cost of their usual history is put
        on the tokens. ``bent``: with what each size took, too. Empty before the first step."""
        if not self._cells:
            return []
        total = history = 0.0
        for cell in self._cells.values():
            if cell.num_tokens:
                weight = cell.count * self._closeness(cell, num_tokens)
                total += weight
                history += weight * cell.context_tokens / cell.num_tokens
        history = history / total if total else 0.0
        return [
            StepCost(
                LinearCost(fit.base, fit.per_token + history * fit.per_context),
                self._bends(column, fit) if bent else {},
            )
            for column, fit in enumerate(self._fit(num_tokens))
        ]

    def _bends(self, column: int, fit: LinearCost) -> dict[int, float]:
        """A single step counts half: the fit is as good a witness."""
        found: dict[int, tuple[float, float]] = {}
        for (octave, _), cell in self._cells.items():
            expected = fit.at(cell.num_tokens, cell.context_tokens)
            if expected:
                count, total = found.get(octave, (1.0, 1.0))
                found[octave] = count + cell.count, total + cell.count * cell.seconds[column] / expected
        return {octave: total / count for octave, (count, total) in found.items()}

    @staticmethod
    def _closeness(cell: _Cell, num_tokens: float) -> float:
        octaves = math.log2((cell.num_tokens + 1.0) / (num_tokens + 1.0))
        return 1.0 / (1.0 + octaves * octaves) ** 2

    def _fit(self, near: float | None = None) -> list[LinearCost]:
        products = [[0.0] * 3 for _ in range(3)]
        targets = [[0.0] * 3 for _ in range(self._num_columns)]
        cells = self._weighted()
        # Of a cell that took no time at all the relative error would outweigh all the others.
        least = max(1e-3 * max(sum(cell.seconds) for cell in cells) / self._num_columns, 1e-9)
        for cell in cells:
            # Scaled so that the three columns are of like size, or the solution would lose its digits.
            row = (1.0, cell.num_tokens * 1e-2, cell.context_tokens * 1e-5)
            mean = max(sum(cell.seconds) / self._num_columns, least)
            weight = cell.count / (mean * mean)
            if near is not None:
                weight *= self._closeness(cell, near)
            for i in range(3):
                for j in range(3):
                    products[i][j] += weight * row[i] * row[j]
                for target, value in zip(targets, cell.seconds, strict=True):
                    target[i] += weight * row[i] * value
        solve = _NonNegative(products).solve
        solutions = [solve(target) for target in targets]
        return [LinearCost(base, per_token * 1e-2, per_context * 1e-5) for base, per_token, per_context in solutions]

    def _weighted(self) -> list[_Cell]:
        cells = list(self._cells.values())
        first = cells[0]
        share = self._prior_knee / (self._prior_knee + first.num_tokens)
        # Counts as a hundredth of a step: any other size outweighs it.
        return [*cells, _Cell(0.01, 0.0, 0.0, [value * share for value in first.seconds])]


def _octave(number: float) -> int:
    """Half-octaves: 1, 1.4, 2, 2.8, ... have numbers that follow each other."""
    return math.frexp(number * number)[1] if number else -1


class _NonNegative:
    """Three normal equations for many right sides: what comes out negative is left out, and the rest solved again."""

    def __init__(self, products: list[list[float]]) -> None:
        self._products = products
        self._inverses: dict[tuple[int, ...], list[list[float]]] = {}
        """By the unknowns that are kept: with a thousand stages most keep the same."""

    def solve(self, target: list[float]) -> tuple[float, float, float]:
        kept: tuple[int, ...] = (0, 1, 2)
        while True:
            right = [target[i] for i in kept]
            solution = [sum(map(operator.mul, row, right)) for row in self._inverse(kept)]
            lowest = min(solution)
            if lowest >= 0 or len(kept) == 1:
                found = [0.0, 0.0, 0.0]
                for index, value in zip(kept, solution, strict=True):
                    found[index] = max(value, 0.0)
                return found[0], found[1], found[2]
            out = solution.index(lowest)
            kept = kept[:out] + kept[out + 1 :]

    def _inverse(self, kept: tuple[int, ...]) -> list[list[float]]:
        if kept not in self._inverses:
            # A little ridge, since steps that are all alike leave the system singular; more of it on the history, which
            # goes with the tokens where prompts are alike, and would take their part.
            ridge = (1e-9, 1e-9, 1e-2)
            matrix = [[self._products[i][j] * (1.0 + (ridge[i] if i == j else 0.0)) for j in kept] for i in kept]
            for row in range(len(kept)):
                matrix[row][row] += 1e-12
            columns = [_solve(matrix, [float(i == j) for j in range(len(kept))]) for i in range(len(kept))]
            self._inverses[kept] = [list(row) for row in zip(*columns, strict=True)]
        return self._inverses[kept]


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
