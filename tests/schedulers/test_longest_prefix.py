"""Who goes first under longest-prefix: by what the cache holds, within bounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.errors import ConfigError
from llm_engine.core.request import Request
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.kvcache.prefix_cache import PrefixMatch
from llm_engine.schedulers.orderings.longest_prefix import LongestPrefixOptions, LongestPrefixOrdering
from llm_engine.schedulers.scheduling_pass import SchedulingPass
from tests.engine.core_driver import CoreDriver
from tests.schedulers.books import Books, chunks

LENGTH = 33
"""Of every prompt here: eight full blocks and a token."""


class Hall:
    """A cache that holds prefixes, and those who wait for them."""

    def __init__(self, *, max_num_seqs: int = 8, **options: Any) -> None:
        self.books = Books(max_num_seqs=max_num_seqs)
        self.ordering = LongestPrefixOrdering(LongestPrefixOptions(**options))

    def cached(self, first: int, num_tokens: int) -> Request:
        """So many tokens of the prompts that begin with ``first`` can be found; somebody computes them."""
        return self.books.prefilling(LENGTH, num_tokens, first=first)

    def come(self, *firsts: int) -> list[int]:
        """A request with each of these first tokens; their numbers."""
        requests = [self.books._make(LENGTH, 5, first) for first in firsts]
        for request in requests:
            self.ordering.add(request)
        return [request.request_id for request in requests]

    def start(self, *numbers: int) -> None:
        for number in numbers:
            self.ordering.remove(number)
            self.ordering.started(self.books.table[number])

    def a_pass(self) -> SchedulingPass:
        return self.books.a_pass(ordering=self.ordering)

    def order(self) -> list[int]:
        return [request.request_id for request in self.ordering.visit(self.a_pass())]


# -- in which order


def test_who_finds_most_goes_first() -> None:
    hall = Hall()
    for first, num_tokens in ((100, 8), (101, 24), (102, 16)):
        hall.cached(first, num_tokens)
    nothing, little, most, some = hall.come(99, 100, 101, 102)
    assert hall.order() == [most, some, little, nothing]


def test_equal_finds_go_by_arrival() -> None:
    hall = Hall()
    hall.cached(100, 8)
    hall.cached(101, 11)  # two full blocks as well
    a, b, c, d = hall.come(101, 100, 101, 99)
    assert hall.order() == [a, b, c, d]


def test_with_nothing_cached_it_is_by_arrival() -> None:
    hall = Hall()
    assert hall.come(3, 2, 2, 1) == hall.order()


def test_tokens_count_not_their_share_of_the_prompt() -> None:
    hall = Hall()
    hall.cached(100, 8)
    hall.cached(101, 12)
    whole = hall.books._make(9, 5, 100)  # all but the last token
    hall.ordering.add(whole)
    (longer,) = hall.come(101)
    assert hall.order() == [longer, whole.request_id]


def test_a_prefix_that_is_published_meanwhile_counts_at_once() -> None:
    hall = Hall()
    first, second = hall.come(100, 101)
    assert hall.order() == [first, second]
    hall.cached(101, 4)
    assert hall.order() == [second, first]


def test_a_prefix_that_is_lost_counts_no_more() -> None:
    hall = Hall()
    hall.cached(101, 8)
    first, second = hall.come(100, 101)
    assert hall.order() == [second, first]
    hall.books.kv.reset_prefix_cache()
    assert hall.order() == [first, second]


def test_who_must_compute_every_position_finds_nothing() -> None:
    hall = Hall()
    hall.cached(100, 8)
    (plain,) = hall.come(99)
    scored = hall.books._make(LENGTH, 5, 100)
    scored.params = replace(scored.params, prompt_logprobs=0)
    hall.ordering.add(scored)
    (finder,) = hall.come(100)
    assert hall.order() == [finder, plain, scored.request_id]


def test_the_paused_keep_the_age_of_their_arrival() -> None:
    hall = Hall()
    a, b, c = hall.come(1, 2, 3)
    hall.start(a, b)
    hall.ordering.add(hall.books.table[b])
    assert hall.order() == [b, c]


def test_the_youngest_is_paused() -> None:
    hall = Hall()
    hall.cached(100, 8)
    hall.come(100, 99, 100)
    chosen = max(hall.books.table.requests.values(), key=hall.ordering.pause_key)
    assert chosen.request_id == 3


# -- the window


@pytest.mark.parametrize(("window", "order"), [(1, [0, 1, 2]), (2, [0, 1, 2]), (3, [2, 0, 1]), (4, [2, 0, 1])])
def test_only_the_first_by_arrival_are_compared(window: int, order: list[int]) -> None:
    hall = Hall(window=window)
    ids = hall.come(1, 2, 100)
    hall.cached(100, 8)
    assert hall.order() == [ids[number] for number in order]


def test_behind_the_window_it_is_by_arrival() -> None:
    hall = Hall(window=2)
    hall.cached(100, 8)
    a, b, c, d = hall.come(1, 100, 2, 100)
    assert hall.order() == [b, a, c, d]
    hall.start(b)
    assert hall.order() == [a, c, d]  # now c is compared
    hall.start(a)
    assert hall.order() == [d, c]


# -- the bound


def test_the_oldest_is_overtaken_so_many_times_and_not_once_more() -> None:
    hall = Hall(max_overtaken=3)
    hall.cached(100, 8)
    ids = hall.come(1, 2, *[100] * 8)
    # Three go before the oldest, then three before the next.
    assert hall.order() == [ids[i] for i in (2, 3, 4, 0, 5, 6, 7, 1, 8, 9)]


def test_overtaking_is_counted_over_passes() -> None:
    hall = Hall(max_overtaken=3)
    hall.cached(100, 8)
    old, next_old, *others = hall.come(1, 2, *[100] * 6)
    hall.start(others[0])
    hall.start(others[1])
    assert hall.order()[:3] == [others[2], old, others[3]]
    hall.start(others[2])
    assert hall.order()[:2] == [old, others[3]]
    hall.start(old)
    assert hall.order() == [others[3], others[4], others[5], next_old]


def test_a_start_in_turn_overtakes_nobody() -> None:
    hall = Hall(max_overtaken=1)
    hall.cached(100, 8)
    a, b, c, d = hall.come(1, 2, 100, 100)
    hall.start(a)
    assert hall.order() == [c, b, d]


def test_an_older_one_that_was_paused_is_counted_for_itself() -> None:
    hall = Hall(max_overtaken=1)
    hall.cached(100, 8)
    a, b, c, d = hall.come(1, 2, 100, 100)
    hall.start(a, c)  # b was overtaken once
    assert hall.order() == [b, d]
    hall.ordering.add(hall.books.table[a])
    assert hall.order() == [d, a, b]


def test_none_to_overtake_is_by_arrival() -> None:
    hall = Hall(max_overtaken=0)
    hall.cached(100, 8)
    assert hall.come(1, 100, 2, 100) == hall.order()


prefixes = st.lists(st.integers(0, 5), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(prefixes, st.integers(1, 9), st.integers(0, 4), st.data())
def test_everybody_is_visited_once_and_nobody_is_overtaken_too_often(
    firsts: list[int], window: int, most: int, data: st.DataObject
) -> None:
    hall = Hall(window=window, max_overtaken=most)
    for first in range(6):
        hall.cached(first, 4 * first + 1)
    waiting = hall.come(*firsts)
    overtaken = 0
    while waiting:
        order = hall.order()
        assert sorted(order) == waiting
        number = order[0]
        assert number in waiting[:window]
        overtaken = 0 if number == waiting[0] else overtaken + 1
        assert overtaken <= most
        hall.start(number)
        waiting.remove(number)
        if waiting and data.draw(st.booleans()):
            waiting += hall.come(data.draw(st.integers(0, 5)))


# -- what it costs


def test_nothing_is_looked_up_while_nobody_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    hall = Hall(max_num_seqs=1)
    hall.cached(100, 8)
    ids = hall.come(1, 100)
    looked_up: list[int] = []
    prefix = SchedulingPass.prefix

    def watched(step: SchedulingPass, request: Request) -> PrefixMatch:
        looked_up.append(request.request_id)
        return prefix(step, request)

    monkeypatch.setattr(SchedulingPass, "prefix", watched)
    assert hall.order() == ids
    assert looked_up == []
    roomy = Hall(max_num_seqs=2)
    roomy.cached(100, 8)
    roomy.come(1, 100)
    assert roomy.order() == [2, 1]
    assert sorted(looked_up) == [1, 2]


# -- with the other parts


def test_duplicates_of_a_new_prefix_wait_for_the_first_and_then_go_before_others() -> None:
    books = Books(scheduler="longest-prefix", max_num_batched_tokens=40)
    leader = books.waiting(17, first=100)
    books.waiting(17, first=100)
    other, later = books.waiting(17, first=101), books.waiting(17, first=102)
    assert chunks(books.plan()) == {leader.request_id: 17, other.request_id: 17, later.request_id: 4}

    books = Books(scheduler="longest-prefix", max_num_batched_tokens=2)
    leader = books.prefilling(17, 16, first=100)
    books.waiting(17, first=101)
    duplicate = books.waiting(17, first=100)
    assert chunks(books.plan()) == {leader.request_id: 1, duplicate.request_id: 1}


def hits(preset: str) -> tuple[int, int]:
    """Tokens looked up and found, where requests of four prefixes come by turns and memory holds about one."""
    driver = CoreDriver(num_blocks=22, max_num_seqs=3, max_num_batched_tokens=40, preset=preset)
    for number in range(40):
        driver.add([number % 4 + 1] * 32 + [number, 0, 0], 4, params=SamplingParams(temperature=0.0))
    driver.run()
    assert all(
        outcome.tokens == driver.expected(request_id)[: len(outcome.tokens)]
        for request_id, outcome in driver.outcomes.items()
    )
    return driver.kv.prefix_queries, driver.kv.prefix_hits


def test_more_is_found_than_by_arrival() -> None:
    queries, found = hits("longest-prefix")
    by_arrival = hits("greedy")
    assert queries == by_arrival[0]
    assert found >= 1.5 * by_arrival[1]


# -- options


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"window": 0}, "window"),
        ({"window": 1025}, "window"),
        ({"window": 1.5}, "window"),
        ({"max_overtaken": -1}, "max_overtaken"),
        ({"max_overtaken": "3"}, "max_overtaken"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        LongestPrefixOptions(**options)
