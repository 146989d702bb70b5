"""Stages and links on the virtual clock, against times worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.cost_model import LinearCost, StepShape
from llm_engine.core.errors import ConfigError
from llm_engine.simulation import pipeline as module
from llm_engine.simulation.links import LINKS, Link, parse_link
from llm_engine.simulation.pipeline import Delays, Pipeline
from tests.simulation.pipelines import constant, shape


def test_each_stage_works_first_in_first_out() -> None:
    stages = Pipeline([constant(1.0), constant(3.0)])
    first, second = stages.push(1, shape(1), 0.0), stages.push(2, shape(1), 0.5)
    assert (list(first.begins), list(first.ends)) == ([0.0, 1.0], [1.0, 4.0])
    assert (list(second.begins), list(second.ends)) == ([1.0, 4.0], [2.0, 7.0])
    assert (first.result_at, second.result_at) == (4.0, 7.0)
    assert stages.busy_seconds == [2.0, 6.0]


def test_a_plan_that_comes_late_finds_the_stages_waiting() -> None:
    stages = Pipeline([constant(1.0), constant(1.0)])
    stages.push(1, shape(1), 0.0)
    assert list(stages.push(2, shape(1), 10.0).begins) == [10.0, 11.0]


def test_a_link_delays_and_carries_one_message_after_the_other() -> None:
    # 4 bytes a token at 2 bytes a second, and half a second on the way; stages take one second.
    stages = Pipeline([constant(1.0), constant(1.0)], Link(0.5, 2.0), activation_bytes=4.0)
    first, second = stages.push(1, shape(2), 0.0), stages.push(2, shape(1), 0.0)
    assert list(first.begins) == [0.0, 1.0 + 4.0 + 0.5]
    assert first.result_at == 6.5 + 0.5
    # The second is computed at 2, waits until the link is free at 5, and is sent for two seconds.
    assert list(second.begins) == [1.0, 5.0 + 2.0 + 0.5]
    assert second.result_at == 8.5 + 0.5


def test_a_single_stage_has_no_link() -> None:
    assert Pipeline([constant(1.0)], Link(0.5, 2.0), activation_bytes=4.0).push(1, shape(2), 0.0).result_at == 1.0


def test_a_plan_ahead_of_its_tokens_waits_for_them_at_the_first_stage() -> None:
    stages = Pipeline([constant(1.0), constant(4.0)], Link(0.25, 1e9))
    assert stages.push(1, shape(1), 0.0).result_at == 1.25 + 4.0 + 0.25
    assert stages.push(2, shape(1), 0.0, feeds_from=1).begins[0] == 5.5
    stages.forget(1)
    with pytest.raises(KeyError):
        stages.push(3, shape(1), 0.0, feeds_from=1)


def test_costs_follow_the_shape() -> None:
    stages = Pipeline([LinearCost(1.0, 0.5, 0.25)])
    assert stages.push(1, StepShape(num_tokens=2, context_tokens=8), 0.0).result_at == 1.0 + 1.0 + 2.0


def test_a_real_pipeline_also_loses_time_between_its_parts() -> None:
    delays = Delays(entry=0.5, entry_per_token=0.25, turnaround=0.125, exit=2.0, exit_per_row=1.0)
    stages = Pipeline([constant(1.0), constant(1.0)], Link(0.5, 1e12), delays=delays)
    first, second = stages.push(1, shape(2), 0.0), stages.push(2, shape(2), 0.0)
    assert (list(first.begins), list(first.ends)) == ([1.0, 2.5], [2.0, 3.5])
    assert list(second.begins) == [2.125, 3.625]
    assert first.result_at == 3.5 + 2.0 + 2 * 1.0
    assert stages.busy_seconds == [2.0, 2.0]
    # The ring is a link, and asks nothing of the host.
    assert stages.push(3, shape(2), 0.0, feeds_from=2).begins[0] == 4.625 + 0.5


PUSHES = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.integers(0, 9), min_size=2, max_size=6),
    latency=st.integers(0, 5),
    sending=st.integers(0, 3),
    turnaround=st.integers(0, 2),
    pushes=PUSHES,
)
def test_many_stages_are_walked_as_few_are(
    costs: list[int], latency: int, sending: int, turnaround: int, pushes: list[tuple[int, int]]
) -> None:
    def made() -> Pipeline:
        delays = Delays(turnaround=float(turnaround))
        stages = [constant(float(seconds)) for seconds in costs]
        return Pipeline(stages, Link(float(latency), 1.0), activation_bytes=float(sending), delays=delays)

    one_by_one, at_once = made(), made()
    at = 0.0
    for step, (wait, num_tokens) in enumerate(pushes):
        at += wait
        expected = one_by_one.push(step, shape(num_tokens), at)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_VECTORS_FROM", 0)
            found = at_once.push(step, shape(num_tokens), at)
        assert list(found.begins) == list(expected.begins)
        assert list(found.ends) == list(expected.ends)
        assert found.result_at == expected.result_at
    assert at_once.busy_seconds == one_by_one.busy_seconds


def test_links_are_named_or_spelled() -> None:
    assert parse_link("lan-1g") is LINKS["lan-1g"]
    assert parse_link("200,1") == LINKS["lan-1g"]
    assert parse_link("0,inf") == LINKS["none"]


@pytest.mark.parametrize("text", ["lan", "1", "1,2,3", "-1,1", "1,0", "nan,1", "1,nan", "inf,1", ""])
def test_another_spelling_of_a_link_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"lan-10g.*LATENCY_US,GBIT"):
        parse_link(text)
