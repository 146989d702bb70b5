"""Whom a newcomer displaces under fair, and that nobody is swapped to and fro."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.core_driver import CoreDriver
from tests.schedulers.books import Books, chunks
from tests.schedulers.test_fair import Hall


@pytest.mark.parametrize(
    ("held", "own", "options", "makes_way"),
    [
        (3, 0, {}, False),  # exactly three times what the newcomer's tenant would hold
        (4, 0, {}, True),
        (6, 1, {}, False),
        (7, 1, {}, True),
        (1, 0, {"displace_at": 1.0}, False),  # or two would change places for ever
        (2, 0, {"displace_at": 1.0}, True),
        (50, 0, {"displace_at": 0.0}, False),
        (7, 0, {"weights": "greedy=2"}, True),
        (6, 0, {"weights": "greedy=2"}, False),
        (2, 0, {"weights": "modest=2"}, True),
    ],
)
def test_a_newcomer_displaces_whoever_holds_several_times_as_many(
    held: int, own: int, options: dict[str, Any], makes_way: bool
) -> None:
    hall = Hall(**options)
    residents = hall.come("greedy", *[50] * held)
    hall.start(*residents)
    hall.start(*hall.come("modest", *[1] * own))
    hall.answer(residents[0], 5)
    (newcomer,) = hall.come("modest", 1)
    assert [hall.displaces(newcomer, number) for number in residents] == [makes_way] * held
    assert not any(hall.displaces(number, newcomer) for number in residents)


@pytest.mark.parametrize(
    ("granted", "paused", "makes_way"), [(0, 0, True), (1, 0, True), (2, 0, False), (0, 5, True), (0, 6, False)]
)
def test_places_granted_and_residents_paused_in_the_same_pass_count(granted: int, paused: int, makes_way: bool) -> None:
    hall = Hall()
    residents = hall.come("greedy", *[50] * 9)
    hall.start(*residents)
    (newcomer,) = hall.come("modest", 1)
    assert hall.displaces(newcomer, residents[0], {"modest": granted, "greedy": -paused, "other": 5}) is makes_way


def test_an_answer_that_the_counters_change_is_not_kept() -> None:
    hall = Hall()
    (early,) = hall.come("b", 50)
    residents = hall.come("a", *[1] * 4)
    hall.start(early, *residents)
    hall.end(early)
    (newcomer,) = hall.come("b", 1)
    assert hall.served("b") > hall.served("a")
    standing = hall.ordering.standing
    assert not hall.displaces(newcomer, residents[0])
    hall.answer(residents[0], 40)
    assert hall.served("b") < hall.served("a")
    assert hall.displaces(newcomer, residents[0])
    assert hall.ordering.standing > standing
    standing = hall.ordering.standing
    hall.come("a", 1)  # lifted, or not: somebody who begins to wait may be
    assert hall.ordering.standing > standing


def test_who_has_had_more_displaces_nobody() -> None:
    hall = Hall()
    residents = hall.come("a", *[1] * 9)
    (long,) = hall.come("b", 50)
    hall.start(long, *residents)
    hall.end(long)
    (newcomer,) = hall.come("b", 1)
    assert hall.served("b") > hall.served("a")
    assert not hall.displaces(newcomer, residents[0])


def test_nobody_displaces_their_own() -> None:
    hall = Hall()
    residents = hall.come("a", *[1] * 9)
    hall.start(*residents)
    (newcomer,) = hall.come("a", 1)
    assert not hall.displaces(newcomer, residents[0])


TENANTS = st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0.5, 1.0, 3.0])), min_size=2, max_size=5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TENANTS, st.sampled_from([1.0, 1.5, 3.0]), st.data())
def test_no_chain_of_displacements_comes_back_to_where_it_began(
    tenants: list[tuple[int, float]], displace_at: float, data: st.DataObject
) -> None:
    """Whoever displaces next, as often as anybody can; all have had the same."""
    weights = {str(number): weight for number, (_, weight) in enumerate(tenants)}
    hall = Hall(weights=",".join(f"{name}={weight}" for name, weight in weights.items()), displace_at=displace_at)
    resident = {name: hall.come(name, *[0] * held) for name, (held, _) in zip(weights, tenants, strict=True)}
    for numbers in resident.values():
        hall.start(*numbers)
    waiting = {name: hall.come(name, 0)[0] for name in weights}
    held, changes = {name: len(numbers) for name, numbers in resident.items()}, dict.fromkeys(weights, 0)
    seen = {tuple(held.values())}
    while pairs := [
        (own, other)
        for own in weights
        for other in weights
        if resident[other] and hall.displaces(waiting[own], resident[other][0], changes)
    ]:
        own, other = data.draw(st.sampled_from(pairs))
        for name, change in ((own, 1), (other, -1)):
            held[name] += change
            changes[name] += change
        assert tuple(held.values()) not in seen
        seen.add(tuple(held.values()))


class Backlog(CoreDriver):
    """Tenant a fills the engine and has as many more waiting; then b comes with the same."""

    def __init__(self, num_seqs: int, displace_at: float, **settings: Any) -> None:
        parts = {"ordering": "fair", "scheduler_options": {"displace_at": displace_at}}
        blocks = 1 + num_seqs * 52
        super().__init__(parts=parts, max_num_seqs=num_seqs, num_blocks=blocks, max_num_batched_tokens=256, **settings)
        for tenant in "ab":
            for number in range(2 * num_seqs):
                self.add([number, ord(tenant), 1, 1], 200, tenant=tenant)
            self.step()

    def check(self) -> None:
        """Once, at the end, is enough here."""

    @property
    def num_computed(self) -> int:
        return sum(plan.num_tokens for plan in self.pushed)

    def held(self) -> dict[str | None, int]:
        held: dict[str | None, int] = {"a": 0, "b": 0}
        for resident in self.core.table.residents():
            held[resident.tenant] += 1
        return held

    def run(self, limit: int = 5000) -> None:
        """Every displacement leaves the loser with more than it would let the winner have."""
        while not self.core.is_idle:
            while (plan := self.schedule()) is not None:
                if plan.paused_ids:
                    (loser,) = {self.requests[number].tenant for number in plan.paused_ids}
                    held = self.held()
                    assert held["b" if loser == "a" else "a"] * 3 <= held[loser], held
            self.retire()
        super().check()
        self.check_all_given_back()


@pytest.mark.parametrize(
    ("num_seqs", "shape"),
    [
        (16, {}),
        pytest.param(32, {}, marks=pytest.mark.slow),
        pytest.param(32, {"caching": False}, marks=pytest.mark.slow),
        (16, {"num_queues": 2, "look_ahead": 1}),
    ],
    ids=["16", "32", "nothing is cached", "two queues, ahead"],
)
def test_of_two_tenants_with_a_backlog_neither_is_swapped_to_and_fro(num_seqs: int, shape: dict[str, Any]) -> None:
    driver, without = Backlog(num_seqs, 3.0, **shape), Backlog(num_seqs, 0.0, **shape)
    for one in (driver, without):
        one.run()
    assert without.core.num_preemptions == 0
    # When all that one of them holds end at once, the other takes the seats and a quarter of them changes hands again.
    assert 0 < driver.core.num_preemptions <= 2 * num_seqs
    assert driver.num_computed <= 1.1 * without.num_computed


@pytest.mark.parametrize(
    ("known", "paused"),
    [(7, [3]), (8, [3]), pytest.param(9, [], id="not two: without the first the greedy one holds no more than three")],
)
def test_the_youngest_of_the_greedy_one_is_paused_for_a_newcomer(known: int, paused: list[int]) -> None:
    books = Books(scheduler="fair", num_blocks=8)
    greedy = [books.waiting(7) for _ in range(4)]
    for request in greedy:
        request.tenant = "greedy"
        books.scheduler.ordering.remove(request.request_id)
        books.scheduler.ordering.add(request)
    assert chunks(books.plan()) == {0: 7, 1: 7, 2: 7, 3: 7}
    for request in greedy:
        books.hold(request, 6)
    modest = books._make(known, 5, None)
    modest.tenant = "modest"
    books.scheduler.add(modest)
    plan = books.plan()
    assert plan is not None
    assert plan.paused_ids == paused
    assert chunks(plan) == ({0: 1, 1: 1, 2: 1, 4: known} if paused else dict.fromkeys(range(4), 1))
