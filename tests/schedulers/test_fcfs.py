"""First come, first served: by arrival, wherever one has been in between."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.request import Request, RequestId
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from tests.schedulers.books import order


def request(number: int) -> Request:
    return Request(RequestId(number), str(number), [1], SamplingParams(), 4, 0.0)


def test_by_arrival() -> None:
    ordering = FcfsOrdering()
    for number in range(5):
        ordering.add(request(number))
    assert order(ordering) == [0, 1, 2, 3, 4]


def test_the_paused_return_to_the_place_of_their_arrival() -> None:
    ordering = FcfsOrdering()
    for number in range(5):
        ordering.add(request(number))
    for admitted in (0, 1, 2):
        ordering.remove(admitted)
    ordering.add(request(1))
    assert order(ordering) == [1, 3, 4]
    ordering.add(request(0))
    assert order(ordering) == [0, 1, 3, 4]


def test_removing_somebody_unknown_is_nothing() -> None:
    ordering = FcfsOrdering()
    ordering.remove(3)
    ordering.add(request(3))
    ordering.remove(4)
    assert order(ordering) == [3]
    ordering.remove(3)
    ordering.remove(3)
    assert len(ordering) == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_whatever_comes_and_goes_it_is_a_sorted_set(actions: list[tuple[bool, int]]) -> None:
    ordering, present = FcfsOrdering(), set[int]()
    for comes, number in actions:
        if comes and number not in present:
            ordering.add(request(number))
            present.add(number)
        elif not comes:
            ordering.remove(number)
            present.discard(number)
        assert order(ordering) == sorted(present)
        assert len(ordering) == len(present)
