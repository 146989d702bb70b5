"""Priority: the lower number first, who waits rises, and the urgent displace the less urgent, never the other way."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.errors import ConfigError
from llm_engine.core.request import Request
from llm_engine.schedulers.orderings.priority import PriorityOptions, PriorityOrdering
from tests.schedulers.books import order
from tests.schedulers.requests import a_request

Asked = tuple[int, float]
"""Priority and arrival; numbered in the order they are listed, which is that of their arrivals."""


def made(*asked: Asked, aging_s: float = 300.0) -> tuple[PriorityOrdering, list[Request]]:
    ordering = PriorityOrdering(PriorityOptions(aging_s=aging_s))
    requests = [a_request(number, priority=priority, arrival=at) for number, (priority, at) in enumerate(asked)]
    for request in requests:
        ordering.add(request)
    return ordering, requests


@pytest.mark.parametrize(
    ("asked", "aging_s", "expected"),
    [
        pytest.param([(2, 0.0), (0, 1.0), (1, 2.0)], 300, [1, 2, 0], id="the lower number first"),
        pytest.param([(0, 0.0), (-3, 1.0), (0, 2.0)], 300, [1, 0, 2], id="below zero is before zero"),
        pytest.param([(1, 0.0), (0, 1.0), (1, 1.0), (0, 1.0)], 300, [1, 3, 0, 2], id="ties go by arrival"),
        pytest.param([(0, 0.0), (0, 5.0), (0, 9.0)], 300, [0, 1, 2], id="all alike is first come first served"),
        pytest.param([(1, 0.0), (0, 299.0)], 300, [1, 0], id="a second short of a step"),
        pytest.param([(1, 0.0), (0, 300.0)], 300, [0, 1], id="a whole step ties, and the older goes first"),
        pytest.param([(1, 0.0), (0, 301.0)], 300, [0, 1], id="more than a step"),
        pytest.param([(2, 0.0), (1, 150.0), (0, 599.0)], 300, [1, 2, 0], id="two steps take twice as long"),
        pytest.param([(1, 0.0), (0, 1e6)], 0, [1, 0], id="without aging no wait is long enough"),
        pytest.param([(2**31, 0.0), (2**31 - 1, 0.0), (-(2**31), 0.0)], 300, [2, 1, 0], id="the ends of the range"),
    ],
)
def test_visiting_order(asked: list[Asked], aging_s: float, expected: list[int]) -> None:
    assert order(made(*asked, aging_s=aging_s)[0]) == expected


def test_a_paused_request_returns_to_its_place() -> None:
    ordering, requests = made((0, 0.0), (1, 1.0), (1, 2.0), (2, 3.0))
    ordering.remove(0)
    ordering.remove(1)
    ordering.add(requests[1])
    assert order(ordering) == [1, 2, 3]


@pytest.mark.parametrize(
    ("resident", "newcomer", "aging_s", "displaced"),
    [
        pytest.param((1, 0.0), (0, 5.0), 300, True, id="a lower number displaces"),
        pytest.param((1, 0.0), (1, 5.0), 300, False, id="the same number does not"),
        pytest.param((0, 0.0), (1, 5.0), 300, False, id="a higher number does not"),
        pytest.param((1, 0.0), (0, 299.0), 300, True, id="a second before the resident has aged by the step"),
        pytest.param((1, 0.0), (0, 300.0), 300, False, id="from then on it would be visited first again"),
        pytest.param((1, 0.0), (0, 1e6), 0, True, id="without aging it is displaced at any age"),
        pytest.param((3, 0.0), (0, 800.0), 300, True, id="three steps protect only after three times as long"),
    ],
)
def test_who_is_displaced(resident: Asked, newcomer: Asked, aging_s: float, displaced: bool) -> None:
    ordering, (there, comes) = made(resident, newcomer, aging_s=aging_s)
    assert ordering.displaces(comes, there, {}) is displaced


def test_age_wins_a_free_place_and_takes_none() -> None:
    ordering, (aged, urgent) = made((3, 0.0), (0, 5000.0))
    assert order(ordering) == [0, 1]
    assert not ordering.displaces(aged, urgent, {})
    assert not ordering.displaces(urgent, aged, {})


def test_the_least_urgent_is_paused_first_and_of_those_the_youngest() -> None:
    ordering, requests = made((1, 0.0), (0, 1.0), (1, 2.0), (0, 3.0))
    paused = sorted(requests, key=ordering.pause_key, reverse=True)
    assert [request.request_id for request in paused] == [2, 0, 3, 1]


PEOPLE = st.lists(st.tuples(st.integers(-2, 3), st.integers(0, 8)), min_size=2, max_size=6)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(PEOPLE, st.sampled_from([0.0, 0.5, 2.0, 100.0]))
def test_displacing_is_a_strict_order_that_agrees_with_the_visits(asked: list[tuple[int, int]], aging_s: float) -> None:
    asked.sort(key=lambda one: one[1])
    ordering, requests = made(*asked, aging_s=aging_s)
    visited = {request_id: place for place, request_id in enumerate(order(ordering))}
    displaces = ordering.displaces
    for one, other in itertools.product(requests, repeat=2):
        if displaces(one, other, {}):
            assert not displaces(other, one, {})
            assert visited[one.request_id] < visited[other.request_id]
    for one, other, third in itertools.permutations(requests, 3):
        if displaces(one, other, {}) and displaces(other, third, {}):
            assert displaces(one, third, {})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(PEOPLE, st.sampled_from([0.0, 0.5, 2.0, 100.0]), st.integers(1, 3))
def test_nobody_is_displaced_for_ever(asked: list[tuple[int, int]], aging_s: float, num_seats: int) -> None:
    """The first of the waiting takes a free seat, or that of whom it displaces and who is paused first."""
    asked.sort(key=lambda one: one[1])
    ordering, requests = made(*asked, aging_s=aging_s)
    # The worst start: the last to be visited sit already.
    residents = [requests[request_id] for request_id in order(ordering)[-num_seats:]]
    for resident in residents:
        ordering.remove(resident.request_id)
    for _ in range(len(requests) ** 2):
        if not (waiting := order(ordering)):
            break
        newcomer = requests[waiting[0]]
        displaced = [resident for resident in residents if ordering.displaces(newcomer, resident, {})]
        if not displaced:
            break
        paused = max(displaced, key=ordering.pause_key)
        residents.remove(paused)
        ordering.remove(newcomer.request_id)
        residents.append(newcomer)
        ordering.add(paused)
        assert order(ordering)[0] != paused.request_id or not ordering.displaces(paused, newcomer, {})
    else:
        raise AssertionError("they displace each other for ever")


@pytest.mark.parametrize(("priority", "aging_s"), [(1, 60.0), (3, 60.0), (2, 10.0)])
def test_a_flood_of_the_urgent_starves_nobody(priority: int, aging_s: float) -> None:
    """One a second comes, one a second is served."""
    ordering = PriorityOrdering(PriorityOptions(aging_s=aging_s))
    ordering.add(a_request(0, priority=priority))
    for second in itertools.count(1):
        ordering.add(a_request(second, arrival=float(second)))
        served = order(ordering)[0]
        ordering.remove(served)
        if served == 0:
            assert second == priority * aging_s
            return
        assert second <= priority * aging_s


def test_it_knows_priorities() -> None:
    assert PriorityOrdering.knows == {"priority"}


@pytest.mark.parametrize("aging_s", [-1.0, 0.0001, float("nan"), float("inf"), "slow", None, True])
def test_options_out_of_range_are_refused(aging_s: object) -> None:
    with pytest.raises(ConfigError, match="aging_s"):
        PriorityOptions(aging_s=aging_s)  # type: ignore[arg-type]
