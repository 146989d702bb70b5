"""Times between fill and drain, by hand."""

from __future__ import annotations

import pytest

from llm_engine.simulation.pipeline import Passage
from llm_engine.simulation.steady import SteadyTimes


def passage(*spans: tuple[float, float]) -> Passage:
    return Passage([begin for begin, _ in spans], [end for _, end in spans], spans[-1][1])


def test_what_stages_do_in_the_drain_is_taken_off_for_every_step_in_flight() -> None:
    """Three at a time, and a last stage ten times as slow: the fourth is pushed when the first is back."""
    steady = SteadyTimes(2, most_in_flight=3)
    steady.add(passage((0, 1), (1, 11)), after_idle=True)
    steady.add(passage((1, 2), (11, 21)), after_idle=False)
    steady.add(passage((2, 3), (21, 31)), after_idle=False)
    steady.add(passage((11, 12), (31, 41)), after_idle=False)
    steady.close()
    assert steady.loads == [(1, 12)]
    assert steady.stage_busy == [pytest.approx(3 / 11), pytest.approx(1.0)]


def test_what_stages_do_while_the_pipeline_fills_is_taken_off() -> None:
    steady = SteadyTimes(2, most_in_flight=2)
    steady.add(passage((0, 1), (4, 5)), after_idle=True)
    steady.add(passage((1, 6), (6, 7)), after_idle=False)
    steady.close()
    assert steady.loads == [(4, 6)]
    assert steady.stage_busy == [pytest.approx(1.0), pytest.approx(0.5)]


def test_loads_are_summed_and_one_that_never_filled_counts_nothing() -> None:
    steady = SteadyTimes(2, most_in_flight=2)
    steady.add(passage((0, 1), (1, 2)), after_idle=True)
    assert steady.stage_busy == [0.0, 0.0]
    for start in (10, 20):
        steady.add(passage((start, start + 1), (start + 1, start + 2)), after_idle=True)
        steady.add(passage((start + 2, start + 3), (start + 3, start + 4)), after_idle=False)
    steady.close()
    assert steady.loads == [(1, 1), (11, 13), (21, 23)]
    assert steady.full_seconds == 4
    assert steady.stage_busy == [0.5, 0.5]
