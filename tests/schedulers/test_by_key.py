"""Orderings sorted by a key: the set is kept sorted whatever comes and goes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.views import RequestView
from llm_engine.schedulers.orderings.by_key import KeyedOrdering
from tests.schedulers.books import order
from tests.schedulers.requests import a_request


class ByPriority(KeyedOrdering):
    def key(self, request: RequestView) -> int:
        return request.priority


def test_the_least_key_goes_first_and_ties_go_by_arrival() -> None:
    ordering = ByPriority()
    for number, priority in ((3, 1), (2, 0), (0, 1), (1, 0)):
        ordering.add(a_request(number, priority=priority))
    assert order(ordering) == [1, 2, 0, 3]


def test_one_that_is_added_twice_stands_there_once() -> None:
    ordering = ByPriority()
    ordering.add(a_request(1, priority=5))
    ordering.add(a_request(2, priority=3))
    ordering.add(a_request(1, priority=1))
    assert order(ordering) == [1, 2]
    assert len(ordering) == 2


def test_removing_somebody_unknown_is_nothing() -> None:
    ordering = ByPriority()
    ordering.remove(3)
    ordering.add(a_request(3))
    ordering.remove(4)
    ordering.remove(3)
    ordering.remove(3)
    assert (order(ordering), len(ordering)) == ([], 0)


def test_the_first_may_be_taken_without_looking_at_the_others() -> None:
    ordering = ByPriority()
    for number in range(3):
        ordering.add(a_request(number))
    visit = ordering.visit(None)  # type: ignore[arg-type]
    assert next(visit).request_id == 0


def test_who_would_be_visited_last_is_paused_first() -> None:
    ordering = ByPriority()
    residents = [a_request(0, priority=2), a_request(1, priority=1), a_request(2, priority=2)]
    assert max(residents, key=ordering.pause_key) is residents[2]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.integers(-2, 2)), max_size=40))
def test_whatever_comes_and_goes_it_is_a_sorted_set(actions: list[tuple[bool, int, int]]) -> None:
    ordering, present = ByPriority(), dict[int, int]()
    for comes, number, priority in actions:
        if comes:
            ordering.add(a_request(number, priority=priority))
            present[number] = priority
        else:
            ordering.remove(number)
            present.pop(number, None)
        assert order(ordering) == sorted(present, key=lambda i: (present[i], i))
        assert len(ordering) == len(present)
