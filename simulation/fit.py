"""What a real run cost, learnt from its step records, in terms that hold for other mixes and other stage counts.

A stage's forward is ``layers x (base + f(tokens) + per_context x context + per_kv x cache read)``, on the last stage
the head's ``base + g(sampled rows)`` beside, on the first the embedding's ``per_token``, and a fixed part on each.
``f`` and ``g`` are piecewise linear and never fall. A trace of two stages or more tells layers from head; with one
stage the parts are told apart by what they depend on, as far as the steps differ.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..core.cost_model import StepShape
from ..core.errors import ConfigError
from ..core.trace import StepStats
from ..models.layer_cost import LayerTimes
from .delays import DelayFit, fit_delays
from .least_squares import Array, column_sizes, robust

TOKEN_KNOTS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048)
ROW_KNOTS = (1, 8, 32, 128)
LEAST_STEPS = 20
_WILD = 10.0
"""A step that took so many times its prediction is no sample of what steps cost: a first use, a stopped process."""


@dataclass(frozen=True, slots=True)
class Ramp:
    """A function that is linear between knots, 0 at the first, and never falls."""

    knots: tuple[int, ...]
    slopes: tuple[float, ...]
    """Behind each knot."""
    heights: tuple[float, ...]
    """At each knot."""

    @classmethod
    def of(cls, knots: tuple[int, ...], slopes: Sequence[float]) -> Ramp:
        heights = [0.0]
        for slope, (low, high) in zip(slopes, pairwise(knots), strict=False):
            heights.append(heights[-1] + slope * (high - low))
        return cls(knots, tuple(slopes), tuple(heights))

    def __call__(self, x: float) -> float:
        at = max(bisect_right(self.knots, x) - 1, 0)
        return self.heights[at] + self.slopes[at] * (x - self.knots[at])


def _segments(values: Array, knots: tuple[int, ...]) -> Array:
    """How much of each value lies behind each knot: the columns whose factors are a ramp's slopes."""
    lows = np.array(knots, dtype=np.float64)
    highs = np.append(lows[1:], np.inf)
    columns: Array = np.clip(values[:, None], lows, highs) - lows
    return columns


@dataclass(frozen=True, slots=True)
class FittedParts:
    """Seconds of the parts of a step."""

    stage: float
    """Of each stage, whatever it holds."""
    stage_per_row: float
    layer: float
    layer_tokens: Ramp
    layer_per_context: float
    layer_per_kv: float
    embedding_per_token: float
    head: float
    """Where something is sampled."""
    head_rows: Ramp

    def layer_seconds(self, shape: StepShape) -> float:
        attention = self.layer_per_context * shape.context_tokens + self.layer_per_kv * shape.kv_tokens
        return self.layer + self.layer_tokens(shape.num_tokens) + attention

    def head_seconds(self, shape: StepShape) -> float:
        return self.head + self.head_rows(shape.num_sampled) if shape.num_sampled else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class FittedCost:
    """Seconds of one stage."""

    parts: FittedParts
    num_layers: int
    is_first: bool
    is_last: bool

    def seconds(self, shape: StepShape) -> float:
        parts = self.parts
        total = parts.stage + parts.stage_per_row * shape.num_rows + self.num_layers * parts.layer_seconds(shape)
        if self.is_first:
            total += parts.embedding_per_token * shape.num_tokens
        return total + parts.head_seconds(shape) if self.is_last else total


@dataclass(frozen=True, slots=True)
class FittedPipeline:
    """What ``fit`` found."""

    parts: FittedParts
    delays: DelayFit
    num_layers: int
    num_steps: int
    error: float
    """Middle of the relative errors over steps and stages: half of them were met better."""

    def costs(self, split: Sequence[int]) -> list[FittedCost]:
        """Of stages with so many layers each; stages that are alike share theirs."""
        made: dict[tuple[int, bool, bool], FittedCost] = {}
        costs = []
        for stage, layers in enumerate(split):
            key = layers, stage == 0, stage == len(split) - 1
            costs.append(made.setdefault(key, FittedCost(self.parts, *key)))
        return costs

    def layer_times(self, shape: StepShape) -> LayerTimes:
        """By parts, to split layers by."""
        parts = self.parts
        layer = parts.layer_seconds(shape)
        embedding = parts.embedding_per_token * shape.num_tokens
        return LayerTimes(embedding, (layer,) * self.num_layers, parts.head_seconds(shape))


def fit(records: Sequence[StepStats], layers_per_stage: Sequence[int]) -> FittedPipeline:
    """Fit the records of one run, in the order of their retirement. Raises ``ConfigError`` where they are too few, or
    tell no stage times, or nobody knows which stage had which layers."""
    num_stages = len(layers_per_stage)
    steps = [r for r in records if len(r.busy) == num_stages and not r.failed]
    if not num_stages or len(steps) < LEAST_STEPS:
        raise ConfigError(
            "fit", f"{len(steps)} steps", f"a trace of {LEAST_STEPS} steps or more with the layers and times of stages"
        )
    rows, seconds = _samples(steps, layers_per_stage)
    ridge = _ridge(column_sizes(rows, seconds))
    kept = np.ones(len(seconds), dtype=bool)
    for _ in range(2):
        found = robust(rows[kept], seconds[kept], ridge)
        predicted = np.maximum(rows @ found, 1e-9)
        kept = seconds < _WILD * predicted
        if not kept.any():
            raise ConfigError("fit", f"{len(steps)} steps", "a trace of steps whose times go with what they computed")
    # The middle of skewed samples lies below their mean, and a run takes the sum.
    found *= float(seconds[kept].sum() / predicted[kept].sum())
    error = float(np.median(np.abs(rows[kept] @ found / seconds[kept] - 1.0)))
    return FittedPipeline(_parts_of(found.tolist()), fit_delays(steps), sum(layers_per_stage), len(steps), error)


_TOKENS_AT = 2
_CONTEXT_AT = _TOKENS_AT + 1 + len(TOKEN_KNOTS)
_HEAD_AT = _CONTEXT_AT + 3
_NUM_COLUMNS = _HEAD_AT + 1 + len(ROW_KNOTS)


def _samples(steps: Sequence[StepStats], layers_per_stage: Sequence[int]) -> tuple[Array, Array]:
    """A row for each step and stage: what each unknown is multiplied by; and the seconds it took."""

    def column(name: str) -> Array:
        return np.array([getattr(step, name) for step in steps], dtype=np.float64)

    tokens, sampled = column("num_tokens"), column("num_sampled")
    num_rows = column("num_decodes") + column("num_chunks")
    layer = np.column_stack(
        [np.ones(len(steps)), _segments(tokens, TOKEN_KNOTS), column("context_tokens"), column("kv_tokens")]
    )
    head = np.column_stack([sampled > 0, _segments(sampled, ROW_KNOTS)])
    busy = np.array([step.busy for step in steps], dtype=np.float64)
    blocks = []
    for stage, layers in enumerate(layers_per_stage):
        is_first, is_last = stage == 0, stage == len(layers_per_stage) - 1
        block = [np.ones(len(steps)), num_rows, layers * layer, is_first * tokens, is_last * head]
        blocks.append(np.column_stack(block))
    seconds = (busy[:, :, 1] - busy[:, :, 0]).T.reshape(-1)
    return np.vstack(blocks), np.maximum(seconds, 1e-7)


def _ridge(sizes: Array) -> Array:
    """Wishes for what the samples do not tell, so weak that they give way to what they do: slopes of neighbouring
    segments alike, and little that does not go with the layers."""
    wishes: list[Array] = []
    for at, knots in ((_TOKENS_AT + 1, TOKEN_KNOTS), (_HEAD_AT + 1, ROW_KNOTS)):
        weight = 3e-2 * float(sizes[at : at + len(knots)].max())
        for index in range(len(knots) - 1):
            wish = np.zeros(_NUM_COLUMNS)
            wish[at + index], wish[at + index + 1] = weight, -weight
            wishes.append(wish)
    weights = 1e-4 * sizes
    weights[:_TOKENS_AT] = 3e-2 * sizes[:_TOKENS_AT]
    return np.vstack([*wishes, np.diag(weights)])


def _parts_of(x: Sequence[float]) -> FittedParts:
    return FittedParts(
        stage=x[0],
        stage_per_row=x[1],
        layer=x[_TOKENS_AT],
        layer_tokens=Ramp.of(TOKEN_KNOTS, x[_TOKENS_AT + 1 : _CONTEXT_AT]),
        layer_per_context=x[_CONTEXT_AT],
        layer_per_kv=x[_CONTEXT_AT + 1],
        embedding_per_token=x[_CONTEXT_AT + 2],
        head=x[_HEAD_AT],
        head_rows=Ramp.of(ROW_KNOTS, x[_HEAD_AT + 1 :]),
    )
