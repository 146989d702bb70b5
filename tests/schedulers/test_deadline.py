"""Deadline: the earliest first; who cannot make it, at the best pace seen of late, is shed while it waits."""

from __future__ import annotations

import itertools

import pytest

from llm_engine.core.errors import ConfigError
from llm_engine.core.request import Request
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.schedulers.orderings.deadline import DeadlineOptions, DeadlineOrdering
from llm_engine.schedulers.orderings.service_pace import NUM_REMEMBERED
from tests.schedulers.books import order
from tests.schedulers.requests import a_request, serve

Asked = tuple[float, float | None]
"""Arrival and deadline."""
TO_THE_END = SamplingParams(ignore_eos=True)


def made(*asked: Asked, **options: float | bool) -> DeadlineOrdering:
    ordering = DeadlineOrdering(DeadlineOptions(**options))  # type: ignore[arg-type]
    for number, (arrival, deadline) in enumerate(asked):
        ordering.add(a_request(number, arrival=arrival, deadline=deadline))
    return ordering


def paced(
    num_served: int = 1, *, num_tokens: int = 11, start: float = 0.0, **options: float | bool
) -> DeadlineOrdering:
    """One that has seen answers of 2 s to the first token and 0.1 s for each other, and has somebody running."""
    ordering = made()
    for number in range(1000, 1000 + num_served):
        serve(ordering, a_request(number, params=TO_THE_END), 0.0, 2.0, 3.0, 11)
    run(ordering, a_request(999, params=TO_THE_END), 3.0)
    return ordering


def run(ordering: DeadlineOrdering, request: Request, now: float) -> None:
    ordering.add(request)
    assert shed(ordering, now) == []
    ordering.remove(request.request_id)
    ordering.started(request)


def shed(ordering: DeadlineOrdering, now: float) -> list[int]:
    return [request.request_id for request, _ in ordering.shed(now)]


def reasons(ordering: DeadlineOrdering, now: float) -> list[str]:
    return [reason for _, reason in ordering.shed(now)]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param([(0.0, 9.0), (1.0, 5.0), (2.0, 7.0)], [1, 2, 0], id="the earliest deadline first"),
        pytest.param([(0.0, 5.0), (1.0, 4.0), (2.0, 5.0)], [1, 0, 2], id="ties go by arrival"),
        pytest.param([(0.0, None), (1.0, None), (2.0, None)], [0, 1, 2], id="without any by arrival"),
        pytest.param([(0.0, None), (1.0, 5.0)], [1, 0], id="without a deadline it waits for those with one"),
        pytest.param([(0.0, None), (30.0, 59.9)], [1, 0], id="due just before the 60 s of those without"),
        pytest.param([(0.0, None), (30.0, 60.0)], [0, 1], id="60 s tie, and the older goes first"),
        pytest.param([(0.0, None), (30.0, 60.1)], [0, 1], id="due after them"),
    ],
)
def test_visiting_order(asked: list[Asked], expected: list[int]) -> None:
    assert order(made(*asked)) == expected


def test_how_long_those_without_a_deadline_wait_can_be_set() -> None:
    assert order(made((0.0, None), (1.0, 5.0), default_deadline_ms=4_999.0)) == [0, 1]
    assert order(made((0.0, None), (1.0, 5.0), default_deadline_ms=5_001.0)) == [1, 0]


def test_a_paused_request_returns_to_its_place() -> None:
    ordering = made((0.0, 5.0), (0.0, 6.0), (0.0, 7.0))
    ordering.remove(1)
    ordering.add(a_request(1, deadline=6.0))
    assert order(ordering) == [0, 1, 2]


def test_the_latest_deadline_is_paused_first_and_of_equals_the_youngest() -> None:
    ordering = made()
    residents = [a_request(0, deadline=9.0), a_request(1), a_request(2, deadline=5.0), a_request(3, deadline=9.0)]
    paused = sorted(residents, key=ordering.pause_key, reverse=True)
    assert [request.request_id for request in paused] == [1, 3, 0, 2]


def test_nobody_is_displaced() -> None:
    urgent, other = a_request(1, deadline=1.0), a_request(0, deadline=100.0)
    assert not made().displaces(urgent, other, {})


def test_a_flood_of_deadlines_starves_nobody() -> None:
    """One a second comes, each due in 3 s, and one a second is served."""
    ordering = made((0.0, None), default_deadline_ms=20_000.0)
    for second in itertools.count(1):
        ordering.add(a_request(second, arrival=float(second), deadline=second + 3.0))
        served = order(ordering)[0]
        ordering.remove(served)
        if served == 0:
            assert second == 17
            return
        assert second < 17


# -- shedding


def test_who_has_no_deadline_is_never_shed() -> None:
    assert shed(made((0.0, None), (0.0, None)), 1e9) == []


def test_a_deadline_is_passed_when_it_lies_before_now() -> None:
    ordering = made((0.0, 5.0), (0.0, 6.0))
    assert shed(ordering, 4.9) == []
    assert shed(ordering, 5.0) == []
    assert reasons(ordering, 5.1) == ["deadline_ms 5000 passed while it waited"]
    assert shed(ordering, 5.2) == []
    assert shed(ordering, 6.1) == [1]


def test_a_deadline_is_named_as_it_was_asked_for_on_a_host_that_runs_for_months() -> None:
    started, asked = 1e7, 0.001e-3
    ordering = made((0.0, None))
    ordering.add(a_request(1, arrival=started, deadline=started + asked))
    assert reasons(ordering, started + 1.0) == ["deadline_ms 0.001 passed while it waited"]


def test_all_that_are_late_are_shed_at_once_by_their_deadlines() -> None:
    assert shed(made((0.0, 3.0), (0.0, 1.0), (0.0, 9.0), (0.0, 2.0)), 4.0) == [1, 3, 0]


def test_who_has_left_is_not_shed() -> None:
    ordering = made((0.0, 1.0), (0.0, 1.0))
    ordering.remove(0)
    assert shed(ordering, 2.0) == [1]


def test_who_has_output_already_is_not_shed() -> None:
    ordering = made()
    ordering.add(a_request(0, deadline=1.0, produced=1))
    ordering.add(a_request(1, deadline=1.0))
    assert shed(ordering, 2.0) == [1]
    assert order(ordering) == [0, 1]  # the engine ends what is shed


def test_paused_while_its_prompt_was_computed_it_may_still_be_shed_and_once() -> None:
    request = a_request(0, deadline=5.0)
    ordering = made()
    run(ordering, request, 0.0)
    ordering.add(request)
    assert shed(ordering, 6.0) == [0]
    assert shed(ordering, 7.0) == []


def test_where_shedding_is_off_nobody_is() -> None:
    ordering = made((0.0, 1.0), (0.0, 2.0), shed=False)
    assert shed(ordering, 100.0) == []
    assert order(ordering) == [0, 1]


def test_at_the_pace_seen_it_must_start_in_time() -> None:
    """2 s to the first token, 0.1 s for each of ten others, less a tenth: 2.7 s."""
    ordering = paced()
    ordering.add(a_request(0, params=TO_THE_END, max_tokens=11, arrival=4.0, deadline=10.0))
    assert shed(ordering, 7.29) == []
    assert reasons(ordering, 7.31) == [
        "deadline_ms 6000 cannot be met: 2690 ms are left and at the best pace of late it takes 2700 ms"
    ]


def test_a_longer_answer_must_start_sooner() -> None:
    ordering = paced()
    for number, tokens in enumerate((11, 111)):
        ordering.add(a_request(number, params=TO_THE_END, max_tokens=tokens, deadline=20.0))
    assert shed(ordering, 8.2) == []
    assert shed(ordering, 8.4) == [1]
    assert shed(ordering, 17.2) == []
    assert shed(ordering, 17.4) == [0]


@pytest.mark.parametrize(
    ("params", "takes"),
    [
        pytest.param(SamplingParams(), 1.8 + 8.9 * 0.09, id="it may end after as few tokens as the others"),
        pytest.param(SamplingParams(max_tokens=101, min_tokens=61), 1.8 + 60 * 0.09, id="not before min_tokens"),
        pytest.param(SamplingParams(ignore_eos=True, stop=["."]), 1.8 + 8.9 * 0.09, id="a stop string may come"),
        pytest.param(SamplingParams(ignore_eos=True, stop_token_ids=[3]), 1.8 + 8.9 * 0.09, id="a stop token may"),
        pytest.param(TO_THE_END, 1.8 + 100 * 0.09, id="one that cannot end early takes its hundred and one"),
    ],
)
def test_an_answer_that_may_end_early_gets_the_benefit(params: SamplingParams, takes: float) -> None:
    """The others had eleven tokens, which is taken for 9.9: every part of the pace is a tenth better than seen."""
    ordering = paced()
    ordering.add(a_request(0, params=params, max_tokens=101, deadline=20.0))
    assert shed(ordering, 20.0 - takes - 0.001) == []
    assert shed(ordering, 20.0 - takes + 0.001) == [0]


def test_while_nobody_runs_only_what_is_passed_is_shed() -> None:
    """The next one may have the engine to itself: a pace learnt under load is no reason to refuse it."""
    ordering = paced()
    hopeless = a_request(0, params=TO_THE_END, max_tokens=11, arrival=9.0, deadline=10.0)
    ordering.ended(999)
    ordering.add(hopeless)
    assert shed(ordering, 9.5) == []
    run(ordering, a_request(1, params=TO_THE_END), 9.5)
    assert shed(ordering, 9.6) == [0]


def test_the_pace_is_the_best_of_late_and_follows_the_load() -> None:
    ordering = paced(1)
    slow = [a_request(number, params=TO_THE_END, max_tokens=11) for number in range(2000, 2000 + NUM_REMEMBERED)]
    *most, last = slow
    ordering.add(a_request(0, params=TO_THE_END, max_tokens=11, deadline=1000.0))
    for request in most:
        serve(ordering, request, 10.0, 30.0, 40.0, 11)
    assert shed(ordering, 997.2) == []
    serve(ordering, last, 10.0, 30.0, 40.0, 11)  # the fast one is forgotten: now 20 s and 1 s a token, less a tenth
    assert shed(ordering, 972.9) == []
    assert shed(ordering, 973.1) == [0]


def test_one_faster_answer_is_enough_to_hope() -> None:
    ordering = paced(5)
    ordering.add(a_request(0, params=TO_THE_END, max_tokens=11, deadline=20.0))
    serve(ordering, a_request(1, params=TO_THE_END, max_tokens=11), 5.0, 5.5, 6.0, 11)
    assert shed(ordering, 19.0) == []
    assert shed(ordering, 19.2) == [0]


def test_aborted_and_resumed_requests_teach_nothing() -> None:
    ordering = made()
    aborted, resumed = a_request(1, params=TO_THE_END), a_request(2, params=TO_THE_END, produced=3)
    run(ordering, aborted, 0.0)
    ordering.ended(1)
    serve(ordering, resumed, 0.0, 50.0, 100.0, 9)
    run(ordering, a_request(3), 100.0)
    ordering.add(a_request(0, params=TO_THE_END, deadline=110.0))
    assert shed(ordering, 109.9) == []


def test_entries_of_those_who_left_do_not_pile_up() -> None:
    ordering = made((0.0, 1e6))
    for number in range(1, 2000):
        ordering.add(a_request(number, deadline=1e6 + number))
        ordering.remove(number)
        assert shed(ordering, 0.0) == []
        assert len(ordering._latest_starts) < 100
    assert shed(ordering, 1e6 + 0.5) == [0]


def test_it_knows_deadlines() -> None:
    assert DeadlineOrdering.knows == {"deadline_ms"}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"default_deadline_ms": 0.0}, "default_deadline_ms"),
        ({"default_deadline_ms": -5.0}, "default_deadline_ms"),
        ({"default_deadline_ms": float("nan")}, "default_deadline_ms"),
        ({"default_deadline_ms": float("inf")}, "default_deadline_ms"),
        ({"default_deadline_ms": "soon"}, "default_deadline_ms"),
        ({"shed": 1}, "shed"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DeadlineOptions(**options)  # type: ignore[arg-type]
    assert caught.value.field == field
