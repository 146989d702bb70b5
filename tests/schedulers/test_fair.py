"""Who goes first under fair: the tenant with the least counter, and what counts."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.errors import ConfigError
from llm_engine.core.request import Request, RequestId, RequestState
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import StepPlan
from llm_engine.schedulers.orderings.fair import FairOptions, FairOrdering
from tests.engine.core_driver import CoreDriver
from tests.schedulers.books import Books, order


class Hall:
    """Requests that come to one ordering, numbered in turn, and what is done for them."""

    def __init__(self, **options: Any) -> None:
        self.ordering = FairOrdering(FairOptions(**options))
        self.requests: list[Request] = []

    def come(self, tenant: str | None, *prompts: int) -> list[int]:
        """A request for each of these lengths; their numbers."""
        return [self._come(tenant, length) for length in prompts]

    def _come(self, tenant: str | None, length: int) -> int:
        number = len(self.requests)
        request = Request(RequestId(number), str(number), [1] * length, SamplingParams(), 1000, 0.0, tenant=tenant)
        self.requests.append(request)
        self.ordering.add(request)
        return number

    def start(self, *numbers: int, cached: int = 0) -> None:
        for number in numbers:
            request = self.requests[number]
            self.ordering.remove(number)
            self.ordering.started(request)
            if request.num_cached_tokens is None:
                request.num_cached_tokens = cached

    def answer(self, number: int, num_tokens: int) -> None:
        """It grows by so many tokens, in as many steps."""
        for _ in range(num_tokens):
            self.requests[number].token_ids.append(1)
            self.ordering.retired(StepPlan(queue=0), ())

    def end(self, number: int) -> None:
        self.ordering.remove(number)
        self.ordering.ended(number)

    def pause(self, number: int) -> None:
        self.ordering.add(self.requests[number])
        self.requests[number].num_preemptions += 1

    def displaces(self, newcomer: int, resident: int, changes: Mapping[str | None, int] | None = None) -> bool:
        return self.ordering.displaces(self.requests[newcomer], self.requests[resident], changes or {})

    def order(self) -> list[int]:
        return order(self.ordering)

    def tenants(self) -> str:
        """Whose requests are visited, in order, by first letter."""
        return "".join((self.requests[number].tenant or "-")[0] for number in self.order())

    def served(self, tenant: str | None) -> float:
        self.ordering.counters.settle()
        known = self.ordering.counters.find(tenant)
        return 0.0 if known is None else known.served


# -- in which order


def test_one_tenants_requests_go_by_arrival() -> None:
    hall = Hall()
    hall.come("a", 5, 1, 9, 2)
    assert hall.order() == [0, 1, 2, 3]


def test_one_pass_takes_turns() -> None:
    hall = Hall()
    hall.come("a", 10, 10, 10, 10)
    hall.come("b", 10, 10)
    assert hall.order() == [0, 4, 1, 5, 2, 3]


def test_turns_go_by_tokens_not_by_requests() -> None:
    hall = Hall()
    hall.come("a", 30, 30)
    hall.come("b", 10, 10, 10, 10)
    assert hall.tenants() == "abbbab"


def test_equal_counters_go_by_who_began_to_wait_first() -> None:
    hall = Hall()
    hall.come("b", 7)
    hall.come("a", 7)
    hall.come("c", 7)
    hall.start(1)
    hall.end(1)
    hall.come("a", 7)  # came back, and is behind who waited meanwhile, were they equal
    assert hall.served("a") == 7
    assert hall.tenants() == "bca"


def test_twice_the_weight_is_twice_the_tokens() -> None:
    hall = Hall(weights="alice=2, bob=1")
    hall.come("alice", *[10] * 6)
    hall.come("bob", *[10] * 3)
    hall.come("carol", *[10] * 3)  # who is not named has 1
    assert hall.tenants() == "abcaabcaabca"


def test_those_without_a_name_are_one_tenant() -> None:
    hall = Hall()
    hall.come(None, 10)
    hall.come("a", 10)
    hall.come(None, 10)
    assert hall.tenants() == "-a-"


def test_a_look_changes_nothing_however_far_it_goes() -> None:
    hall = Hall()
    hall.come("a", 10, 10)
    hall.come("b", 10, 10)
    whole = hall.order()
    for count in range(5):
        visit = hall.ordering.visit(Books().a_pass(ordering=hall.ordering))
        assert [request.request_id for request, _ in zip(visit, range(count), strict=False)] == whole[:count]
    assert hall.order() == whole
    assert len(hall.ordering) == 4


# -- what counts


def test_a_prompt_counts_when_it_is_admitted() -> None:
    hall = Hall()
    hall.come("a", 10, 10)
    hall.come("b", 30)
    assert (hall.served("a"), hall.served("b")) == (0, 0)
    hall.start(0)
    assert (hall.served("a"), hall.served("b")) == (10, 0)
    assert hall.order() == [2, 1]


@pytest.mark.parametrize(
    ("options", "served"), [({}, 10 + 2 * 6), ({"prompt_weight": 0.5, "output_weight": 3.0}, 5 + 18)]
)
def test_output_tokens_count_as_they_come(options: dict[str, float], served: float) -> None:
    hall = Hall(**options)
    hall.come("a", 10, 10)
    hall.start(0)
    hall.answer(0, 6)
    assert hall.served("a") == served
    hall.end(0)
    assert hall.served("a") == served


def test_an_answer_counts_although_nobody_waits_while_it_grows() -> None:
    hall = Hall()
    hall.come("a", 10)
    hall.come("b", 10)
    hall.start(0, 1)
    hall.answer(0, 20)
    hall.answer(1, 1)
    assert (hall.served("a"), hall.served("b")) == (50, 12)
    hall.come("b", 10, 10)
    hall.come("a", 10)
    assert hall.tenants() == "bba"


def test_what_the_cache_holds_is_not_counted() -> None:
    hall = Hall()
    hall.come("a", 10)
    hall.start(0, cached=8)
    assert hall.served("a") == 2


def test_a_pass_counts_on_what_the_cache_holds() -> None:
    books, ordering = Books(), FairOrdering()
    books.prefilling(12, 8, first=7)
    for tenant, first in (("a", 7), ("a", 7), ("b", 1), ("b", 2)):
        request = books._make(9, 5, first)
        request.tenant = tenant
        ordering.add(request)
    visited = [request.request_id for request in ordering.visit(books.a_pass(ordering=ordering))]
    assert visited == [1, 3, 2, 4]  # each of the first two costs a token, each of the others nine


def test_what_is_computed_again_after_a_pause_is_not_counted() -> None:
    hall = Hall()
    hall.come("a", 10)
    hall.start(0)
    hall.answer(0, 5)
    hall.pause(0)
    assert hall.served("a") == 20
    hall.start(0)
    assert hall.served("a") == 20
    hall.answer(0, 1)
    hall.end(0)
    assert hall.served("a") == 22


def test_the_paused_return_to_the_place_of_their_arrival() -> None:
    hall = Hall()
    hall.come("a", 10, 10, 10)
    hall.start(0, 1)
    hall.pause(1)
    hall.pause(0)
    assert hall.order() == [0, 1, 2]


def test_the_aborted_count_for_what_they_got() -> None:
    hall = Hall()
    hall.come("a", 10, 10)
    hall.start(0)
    hall.answer(0, 3)
    hall.end(0)
    hall.end(1)  # never started
    hall.end(1)
    hall.end(77)
    assert hall.served("a") == 16
    assert len(hall.ordering) == 0


# -- coming back


def test_idling_earns_no_credit() -> None:
    hall = Hall()
    hall.come("a", *[10] * 8)
    hall.start(0, 1, 2, 3)
    hall.come("late", *[10] * 4)
    assert hall.served("late") == 40
    assert hall.tenants() == "alalalal"


def test_who_comes_back_is_lifted_to_the_least_of_those_who_wait() -> None:
    hall = Hall()
    hall.come("a", *[10] * 9)
    hall.come("b", *[10] * 9)
    hall.come("c", 10)
    hall.start(*range(5), *range(9, 12), 18)  # a had 50, b 30, c 10
    hall.end(18)
    hall.come("c", 10)
    assert (hall.served("a"), hall.served("b"), hall.served("c")) == (50, 30, 30)


def test_who_had_more_than_the_others_is_not_lowered() -> None:
    hall = Hall()
    hall.come("a", 10, 90)
    hall.start(0, 1)
    hall.come("b", 10)
    hall.end(0)
    assert hall.served("b") == 100  # the last who waited
    hall.come("a", 10)
    assert hall.tenants() == "ba"
    hall.start(2)
    hall.come("c", 10)
    assert (hall.served("a"), hall.served("b"), hall.served("c")) == (100, 110, 100)


def test_with_nobody_waiting_the_last_who_waited_is_the_measure() -> None:
    hall = Hall()
    hall.come("a", 50)
    hall.start(0)
    hall.end(0)
    hall.come("b", 10)
    assert hall.served("b") == 50


# -- who is paused


def test_the_largest_counter_loses_its_youngest() -> None:
    hall = Hall()
    hall.come("a", 30)
    hall.come("b", 10, 10)
    hall.come("a", 10)
    hall.come("b", 10)
    hall.start(0, 1, 2, 3, 4)
    chosen = sorted(hall.requests, key=hall.ordering.pause_key, reverse=True)
    assert [request.request_id for request in chosen] == [3, 0, 4, 2, 1]
    hall.answer(1, 30)
    chosen = sorted(hall.requests, key=hall.ordering.pause_key, reverse=True)
    assert [request.request_id for request in chosen] == [4, 2, 1, 3, 0]


# -- what it costs


class Watched(Request):
    """Counts how often it was asked for its tokens."""

    looks = 0

    @property
    def num_output_tokens(self) -> int:
        Watched.looks += 1
        return len(self.token_ids) - len(self.prompt_token_ids)


def many(count: int) -> FairOrdering:
    ordering = FairOrdering()
    for number in range(count):
        request = Watched(RequestId(number), str(number), [1], SamplingParams(), 100, 0.0, tenant="a")
        ordering.add(request)
        ordering.remove(number)
        ordering.started(request)
    Watched.looks = 0
    return ordering


def test_steps_with_nobody_waiting_look_at_nobody() -> None:
    ordering = many(200)
    for _ in range(500):
        ordering.retired(StepPlan(queue=0), ())
    assert Watched.looks == 0


@pytest.mark.parametrize(("count", "most"), [(10, 10), (200, 9), (4096, 64)])
def test_with_somebody_waiting_few_are_looked_at_in_a_step(count: int, most: int) -> None:
    ordering = many(count)
    ordering.add(Request(RequestId(9000), "x", [1], SamplingParams(), 100, 0.0, tenant="b"))
    for _ in range(128):
        assert order(ordering) == [9000]
        ordering.retired(StepPlan(queue=0), ())
    assert 0 < Watched.looks <= 128 * most


def test_tenants_that_are_gone_are_forgotten() -> None:
    hall = Hall()
    hall.come("a", *[10] * 3)
    for number in range(20_000):
        (first,) = hall.come(f"t{number}", 10)
        hall.start(first)
        hall.end(first)
        assert len(hall.ordering.counters) <= 2100
        assert len(hall.ordering._turns) <= 100
    hall.come("t0", 10)
    assert hall.served("t0") == 0  # forgotten, and lifted like anybody
    assert hall.served("t19999") == 10  # not yet


def test_who_has_work_here_is_never_forgotten() -> None:
    hall = Hall()
    waiting, resident = hall.come("waiting", 10, 10)
    (other,) = hall.come("resident", 500)
    hall.start(resident, other)
    hall.end(resident)
    for number in range(5000):
        hall.end(hall.come(f"t{number}", 10)[0])
    assert (hall.served("waiting"), hall.served("resident")) == (10, 500)
    assert waiting in hall.order()
    hall.answer(other, 5)
    hall.end(other)
    assert hall.served("resident") == 510


# -- options


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"weights": "alice"}, "weights"),
        ({"weights": "alice=0"}, "weights"),
        ({"weights": "alice=-1"}, "weights"),
        ({"weights": "alice=inf"}, "weights"),
        ({"weights": "alice=nan"}, "weights"),
        ({"weights": "alice=x"}, "weights"),
        ({"weights": "=2"}, "weights"),
        ({"weights": "alice=1,alice=2"}, "weights"),
        ({"weights": 3}, "weights"),
        ({"prompt_weight": -1.0}, "prompt_weight"),
        ({"displace_at": 0.5}, "displace_at"),
        ({"displace_at": float("nan")}, "displace_at"),
        ({"prompt_weight": "1"}, "prompt_weight"),
        ({"output_weight": float("nan")}, "output_weight"),
        ({"output_weight": float("inf")}, "output_weight"),
        ({"prompt_weight": 0.0, "output_weight": 0.0}, "output_weight"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        FairOptions(**options)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("", {}),
        ("alice=2,bob=0.5", {"alice": 2.0, "bob": 0.5}),
        (" alice = 2 , , bob=1 ", {"alice": 2.0, "bob": 1.0}),
        ("a=b=3", {"a=b": 3.0}),
    ],
)
def test_weights_are_read(text: str, weights: dict[str, float]) -> None:
    assert FairOptions(weights=text).parsed_weights() == weights


# -- random lives


class Model:
    """The rule, naively: counters brought up to date after everything, and a sort for each choice."""

    def __init__(self) -> None:
        self.served: dict[str, float] = {}
        self.since: dict[str, int] = {}
        self.waiting: dict[int, str] = {}
        self.spells = 0
        self.last: str | None = None

    def least(self) -> float:
        waiting = set(self.waiting.values())
        if waiting:
            return min(self.served[tenant] for tenant in waiting)
        return self.served[self.last] if self.last is not None else 0.0

    def come(self, number: int, tenant: str) -> None:
        if tenant not in self.waiting.values():
            self.served[tenant] = max(self.served.get(tenant, 0.0), self.least())
            self.spells += 1
            self.since[tenant] = self.spells
        self.waiting[number] = tenant

    def go(self, number: int) -> None:
        tenant = self.waiting.pop(number)
        if tenant not in self.waiting.values():
            self.last = tenant

    def order(self, price: Callable[[int], float]) -> list[int]:
        served, waiting, visited = dict(self.served), sorted(self.waiting), list[int]()
        while waiting:
            heads: dict[str, int] = {}
            for number in waiting:
                heads.setdefault(self.waiting[number], number)
            _, _, number = heapq.nsmallest(1, ((served[t], self.since[t], n) for t, n in heads.items()))[0]
            visited.append(number)
            waiting.remove(number)
            served[self.waiting[number]] += price(number)
        return visited


actions = st.one_of(
    st.tuples(st.just("come"), st.sampled_from("abcd"), st.integers(1, 12)),
    st.tuples(st.just("start"), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("answer"), st.integers(0, 5), st.integers(1, 9)),
    st.tuples(st.just("pause"), st.integers(0, 5), st.none()),
    st.tuples(st.just("end"), st.integers(0, 9), st.none()),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(actions, max_size=60))
def test_in_any_life_the_order_is_that_of_the_rule(todo: list[tuple[str, Any, Any]]) -> None:
    hall, model, residents = Hall(), Model(), list[int]()

    def price(number: int) -> float:
        return 0.0 if hall.requests[number].num_preemptions else float(hall.requests[number].num_prompt_tokens)

    for kind, which, much in todo:
        if kind == "come":
            model.come(*hall.come(which, much), which)
        elif kind == "start" and len(hall.ordering):
            number = hall.order()[which % len(hall.ordering)]
            cached = min(much, hall.requests[number].num_prompt_tokens - 1)
            if not hall.requests[number].num_preemptions:
                model.served[model.waiting[number]] += hall.requests[number].num_prompt_tokens - cached
            hall.start(number, cached=cached)
            model.go(number)
            residents.append(number)
        elif kind == "answer" and residents:
            number = residents[which % len(residents)]
            hall.answer(number, much)
            model.served[str(hall.requests[number].tenant)] += 2 * much
        elif kind == "pause" and residents:
            number = residents.pop(which % len(residents))
            hall.pause(number)
            model.come(number, str(hall.requests[number].tenant))
        elif kind == "end" and which < len(hall.requests):
            hall.end(which)
            if which in model.waiting:
                model.go(which)
            if which in residents:
                residents.remove(which)
        assert hall.order() == model.order(price)
        assert len(hall.ordering) == len(model.waiting)
        for tenant in model.served:
            assert hall.served(tenant) == model.served[tenant]


shapes = st.fixed_dictionaries(
    {
        "num_queues": st.integers(1, 3),
        "look_ahead": st.sampled_from([0, 1]),
        "num_blocks": st.integers(8, 40),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.integers(2, 16),
    }
)
sizes = st.lists(st.tuples(st.integers(1, 10), st.integers(1, 8)), min_size=12, max_size=20)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(shapes, sizes, sizes, st.sampled_from([1.0, 3.0]))
def test_while_both_wait_two_tenants_never_drift_apart(
    shape: dict[str, int], greedy: list[tuple[int, int]], modest: list[tuple[int, int]], weight: float
) -> None:
    """The paper's bound: twice the larger of a prompt and of what the residents may still be given."""
    driver = CoreDriver(**shape, preset="fair", parts={"scheduler_options": {"weights": f"b={weight}"}}, caching=False)
    for prompt, answer in greedy * 3:
        driver.add([1] * prompt, answer, tenant="a")
    for prompt, answer in modest:
        driver.add([2] * prompt, answer, tenant="b")
    bound = 2 * max(10, 2 * 8 * shape["max_num_seqs"])
    compared = 0
    for _ in range(5000):
        while driver.schedule() is not None:
            pass
        if not driver.results:
            break
        driver.retire()
        if {r.tenant for r in driver.requests.values() if r.state is RequestState.WAITING} == {"a", "b"}:
            got = {"a": 0.0, "b": 0.0}
            for request in driver.requests.values():
                if request.tenant is not None and (request.num_cached_tokens is not None):
                    got[request.tenant] += request.num_prompt_tokens + 2 * request.num_output_tokens
            assert abs(got["a"] - got["b"] / weight) <= bound
            compared += 1
    driver.check_all_given_back()
    assert compared
