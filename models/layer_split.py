"""How many layers each stage takes: even, best for one kind of load, or the automatic compromise. Pure arithmetic.

A pipeline is as fast as its slowest stage. The last one also has the head, which is as much work as many layers while
decoding, and next to nothing in a prompt, where one token in hundreds passes it. So one split cannot be best for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from .layer_cost import LayerTimes

_SLACK = 1 + 1e-9
_WORTHWHILE = 0.97
"""An automatic split replaces the even one for a gain of this much at least: estimates are no finer."""

Cost = Callable[[int, int], float]
"""Of a stage that holds layers ``start`` to ``end``; may not fall when a layer is added."""


def even_split(num_layers: int, num_stages: int) -> list[int]:
    """As many layers everywhere; what does not divide goes to early stages, since the last one has the head."""
    each, extra = divmod(num_layers, num_stages)
    return [each + (stage < extra) for stage in range(num_stages)]


def stage_times(times: LayerTimes, split: Sequence[int]) -> list[float]:
    """Seconds of each stage, the embedding on the first, the head on the last."""
    cost = _cost_of(times)
    return [cost(start, end) for start, end in _ranges(split)]


def best_split(times: LayerTimes, num_stages: int) -> list[int]:
    """The split whose slowest stage is fastest."""
    return _partition(_cost_of(times), len(times.layers), num_stages)


def mixed_split(mixes: Sequence[LayerTimes], num_stages: int) -> list[int]:
    """The best split for a load that spends as much time on a single stage in each of the mixes, micro-batches of all
    of them in flight together."""
    costs = [(_cost_of(times), times.total) for times in mixes]
    return _partition(
        lambda start, end: sum(cost(start, end) / total for cost, total in costs), len(mixes[0].layers), num_stages
    )


def automatic_split(mixes: Sequence[LayerTimes], num_stages: int) -> list[int]:
    """Of the splits that are in no mix slower than the even one, that with the least regret.

    The regret of a split is how many times slower it is than the best split for a mix, in the mix where that is most.
    Nobody who does not know the load loses by the estimate against not thinking at all, and where layers do not divide
    evenly, or differ, the stage with the head is relieved. Where they do divide, a stage can only be relieved at the
    prompts' expense: that is a choice about the load, and left to who knows it (``best_split``, ``mixed_split``).
    """
    num_layers = len(mixes[0].layers)
    even = even_split(num_layers, num_stages)
    costs = [_cost_of(times) for times in mixes]
    limits = [max(stage_times(times, even)) * _SLACK for times in mixes]
    bests = [max(stage_times(times, best_split(times, num_stages))) for times in mixes]

    def regret(start: int, end: int) -> float:
        worst = 0.0
        for cost, limit, best in zip(costs, limits, bests, strict=True):
            seconds = cost(start, end)
            if seconds > limit:
                return math.inf
            worst = max(worst, seconds / best)
        return worst

    split = _partition(regret, num_layers, num_stages)
    gained = max(_all(regret, split)) < _WORTHWHILE * max(_all(regret, even))
    return split if gained else even


NAMED_SPLITS: Mapping[str, Callable[[LayerTimes, LayerTimes, int], list[int]]] = {
    "auto": lambda decode, prefill, num_stages: automatic_split([decode, prefill], num_stages),
    "decode": lambda decode, prefill, num_stages: best_split(decode, num_stages),
    "prefill": lambda decode, prefill, num_stages: best_split(prefill, num_stages),
    "mixed": lambda decode, prefill, num_stages: mixed_split([decode, prefill], num_stages),
    "even": lambda decode, prefill, num_stages: even_split(len(decode.layers), num_stages),
}
"""The splits of ``core.stage_settings.SPLIT_NAMES``, from the times of a typical decode and a typical prefill step."""


def _cost_of(times: LayerTimes) -> Cost:
    before = list(accumulate(times.layers, initial=0.0))

    def cost(start: int, end: int) -> float:
        seconds = before[end] - before[start]
        if start == 0:
            seconds += times.embedding
        return seconds + times.head if end == len(times.layers) else seconds

    return cost


def _ranges(split: Sequence[int]) -> list[tuple[int, int]]:
    ends = list(accumulate(split))
    return list(zip([0, *ends], ends, strict=False))


def _all(cost: Cost, split: Sequence[int]) -> list[float]:
    return [cost(start, end) for start, end in _ranges(split)]


def _partition(cost: Cost, num_layers: int, num_stages: int) -> list[int]:
    """The split whose slowest stage is fastest, by dynamic programming over (stages, layers); exact.

    Among those the one with the least sum of squares, so that the others are level where one stage is slowest whatever
    is done. Among equals the one with more layers on early stages.
    """
    # Any split's slowest stage bounds the least one, and so how long a stage the search must try.
    limit = max(_all(cost, even_split(num_layers, num_stages))) * _SLACK
    _, slowest = _search(cost, num_layers, num_stages, limit, max)
    split, _ = _search(lambda start, end: cost(start, end) ** 2, num_layers, num_stages, (slowest * _SLACK) ** 2, _sum)
    return split


def _sum(total: float, cost: float) -> float:
    return total + cost


def _search(
    cost: Cost, num_layers: int, num_stages: int, limit: float, join: Callable[[float, float], float]
) -> tuple[list[int], float]:
    """The split that makes the joined costs of its stages least, with no stage above ``limit``; one must exist."""
    least = [0.0] + [math.inf] * num_layers
    """[layers] joined cost of the first so many layers on the stages so far."""
    choices: list[list[int]] = []
    """[stage][layers] where the stage begins if it ends there."""
    for stage in range(num_stages):
        found, choice = [math.inf] * (num_layers + 1), [0] * (num_layers + 1)
        # Every stage takes a layer at least, those behind this one too.
        for end in range(stage + 1, num_layers - (num_stages - 1 - stage) + 1):
            for start in range(end - 1, stage - 1, -1):
                seconds = cost(start, end)
                if seconds > limit:
                    break  # and so is every longer stage
                joined = join(least[start], seconds)
                if joined * _SLACK < found[end]:
                    found[end], choice[end] = joined, start
        least = found
        choices.append(choice)
    assert least[num_layers] < math.inf
    split, end = [], num_layers
    for choice in reversed(choices):
        split.append(end - choice[end])
        end = choice[end]
    return split[::-1], least[num_layers]
