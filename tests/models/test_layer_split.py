"""Splits of layers over stages, against trying them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.models.layer_cost import LayerTimes
from llm_engine.models.layer_split import automatic_split, best_split, even_split, mixed_split, stage_times


def all_splits(num_layers: int, num_stages: int) -> Iterator[list[int]]:
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        edges = [0, *cuts, num_layers]
        yield [end - start for start, end in pairwise(edges)]


def slowest(times: LayerTimes, split: list[int]) -> float:
    return max(stage_times(times, split))


def least(num_stages: int, times: LayerTimes, measure: Callable[[list[int]], float]) -> float:
    return min(measure(split) for split in all_splits(len(times.layers), num_stages))


def alike(num_layers: int, head: float, embedding: float = 0.0) -> LayerTimes:
    return LayerTimes(embedding, (1.0,) * num_layers, head)


seconds = st.floats(1e-5, 10.0)


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[LayerTimes], int]:
    num_layers = draw(st.integers(1, 8))
    one = st.builds(LayerTimes, seconds, st.tuples(*[seconds] * num_layers), st.floats(1e-5, 60.0))
    return [draw(one), draw(one)], draw(st.integers(1, num_layers))


def test_even_is_as_many_everywhere_the_rest_early() -> None:
    assert even_split(12, 2) == [6, 6]
    assert even_split(8, 3) == [3, 3, 2]
    assert even_split(5, 5) == [1] * 5
    assert even_split(7, 1) == [7]


def test_the_head_is_counted_as_what_it_costs() -> None:
    assert best_split(alike(12, 0.1), 2) == [6, 6]
    assert best_split(alike(12, 2.8), 2) == [7, 5]
    assert best_split(alike(6, 4.3), 2) == [5, 1]


def test_the_embedding_is_counted_too() -> None:
    assert best_split(alike(12, 0.0, embedding=4.0), 2) == [4, 8]


def test_layers_may_differ() -> None:
    assert best_split(LayerTimes(0.0, (5.0, 1.0, 1.0, 1.0, 1.0, 1.0), 0.0), 2) == [1, 5]


def test_stages_that_are_not_the_slowest_are_level() -> None:
    assert best_split(alike(7, 10.0), 4) == [2, 2, 2, 1]


@given(mixes())
def test_the_best_split_is_the_best_of_all(drawn: tuple[list[LayerTimes], int]) -> None:
    (times, _), num_stages = drawn
    split = best_split(times, num_stages)
    assert len(split) == num_stages
    assert sum(split) == len(times.layers)
    assert min(split) >= 1
    assert slowest(times, split) == pytest.approx(least(num_stages, times, lambda split: slowest(times, split)))


@given(mixes())
def test_the_mixed_split_is_the_best_for_half_of_each(drawn: tuple[list[LayerTimes], int]) -> None:
    pair, num_stages = drawn

    def busiest(split: list[int]) -> float:
        shares = [[seconds / times.total for seconds in stage_times(times, split)] for times in pair]
        return max(map(sum, zip(*shares, strict=True)))

    assert busiest(mixed_split(pair, num_stages)) == pytest.approx(least(num_stages, pair[0], busiest))


@given(mixes())
@settings(max_examples=300)
def test_the_automatic_split_is_never_worse_than_the_even_one(drawn: tuple[list[LayerTimes], int]) -> None:
    pair, num_stages = drawn
    split, even = automatic_split(pair, num_stages), even_split(len(pair[0].layers), num_stages)
    for times in pair:
        assert slowest(times, split) <= slowest(times, even) * (1 + 1e-8)


@given(mixes())
def test_the_automatic_split_has_the_least_regret_of_those(drawn: tuple[list[LayerTimes], int]) -> None:
    pair, num_stages = drawn
    even = even_split(len(pair[0].layers), num_stages)
    bests = [slowest(times, best_split(times, num_stages)) for times in pair]

    def regret(split: list[int]) -> float:
        if any(slowest(times, split) > slowest(times, even) * (1 + 1e-9) for times in pair):
            return float("inf")
        return max(slowest(times, split) / best for times, best in zip(pair, bests, strict=True))

    split = automatic_split(pair, num_stages)
    lowest = least(num_stages, pair[0], regret)
    assert regret(split) == pytest.approx(lowest) or (split == even and regret(even) <= lowest / 0.97 * (1 + 1e-9))


def test_the_automatic_split_relieves_the_heads_stage_where_that_is_free() -> None:
    decode, prefill = alike(12, 2.2), alike(12, 0.05)
    assert automatic_split([decode, prefill], 5) == [3, 3, 3, 2, 1]


def test_the_automatic_split_takes_nothing_from_prompts() -> None:
    decode, prefill = alike(6, 4.3), alike(6, 0.0)
    assert automatic_split([decode, prefill], 2) == [3, 3]
    assert best_split(decode, 2) == [5, 1]
    assert mixed_split([decode, prefill], 2) == [4, 2]


@pytest.mark.parametrize("num_stages", [2, 16, 42, 100, 126])
def test_deep_models_are_split_in_no_time(num_stages: int) -> None:
    decode, prefill = alike(126, 9.0), alike(126, 0.1)
    began = time.process_time()
    assert sum(automatic_split([decode, prefill], num_stages)) == 126
    assert time.process_time() - began < 1.0
