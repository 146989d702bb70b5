"""Reserve to completion: who is admitted, what is credited, and that nobody is ever paused. Blocks hold 4 tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.errors import CapacityError, ConfigError
from llm_engine.core.request import Request
from llm_engine.core.step import StepPlan
from llm_engine.schedulers.base import Verdict
from llm_engine.schedulers.capacities.guaranteed_no_evict import GuaranteedNoEvict, GuaranteedNoEvictOptions
from llm_engine.schedulers.scheduling_pass import SchedulingPass
from tests.engine.core_driver import CoreDriver
from tests.engine.test_core_properties import arrivals, check_outcomes, live, shapes
from tests.schedulers.books import Books, Places, chunks

ADMIT, SKIP, STOP = Verdict.ADMIT, Verdict.SKIP, Verdict.STOP


def books(num_blocks: int, **settings: Any) -> Books:
    return Books(num_blocks=num_blocks, scheduler="guaranteed-no-evict", **settings)


def judge(made: Books, request: Request, step: SchedulingPass | None = None) -> Verdict:
    return made.scheduler.capacity.judge(step or made.a_pass(), request)


# -- what a request reserves: blocks for its prompt and its whole answer, but for the last token, never computed


@pytest.mark.parametrize(
    ("num_blocks", "known", "max_tokens", "verdict"),
    [
        pytest.param(3, 8, 5, ADMIT, id="8 + 5 - 1 tokens fill three blocks"),
        pytest.param(3, 8, 6, STOP, id="one token more needs a fourth"),
        pytest.param(3, 12, 1, ADMIT, id="a prompt of whole blocks that samples one token"),
        pytest.param(3, 12, 2, STOP, id="its second token is computed in a new block"),
        pytest.param(3, 1, 50, STOP, id="a short prompt with a long answer"),
        pytest.param(1, 1, 4, ADMIT, id="all of a pool of one block"),
    ],
)
def test_a_request_alone(num_blocks: int, known: int, max_tokens: int, verdict: Verdict) -> None:
    made = books(num_blocks)
    assert judge(made, made.waiting(known, max_tokens=max_tokens)) is verdict


@pytest.mark.parametrize(
    ("num_blocks", "max_tokens", "verdict"),
    [
        pytest.param(7, 8, ADMIT, id="the resident holds 2 blocks and may grow to 4; 3 are left"),
        pytest.param(6, 8, STOP, id="free blocks are not enough where they are reserved"),
        pytest.param(7, 9, STOP, id="it may grow to one more"),
    ],
)
def test_what_a_resident_may_grow_to_is_not_given_away(num_blocks: int, max_tokens: int, verdict: Verdict) -> None:
    made = books(num_blocks)
    made.decoding(9, max_tokens=max_tokens)
    assert judge(made, made.waiting(8, max_tokens=5)) is verdict


def test_what_the_pass_admitted_is_reserved_whole_and_once() -> None:
    made = books(7)
    step = made.a_pass()
    step.start(made.waiting(9, max_tokens=8), 4)  # may grow to 4 blocks, takes one now
    assert (step.kv.free_blocks, step.reserved_blocks) == (6, 4)
    assert judge(made, made.waiting(8, max_tokens=5), step) is ADMIT
    assert judge(made, made.waiting(8, max_tokens=6), step) is STOP


def test_growth_within_a_reservation_changes_nothing() -> None:
    made = books(7)
    resident, fits, too_large = made.prefilling(9, 4, max_tokens=8), made.waiting(8, max_tokens=5), made.waiting(13)
    step = made.a_pass()
    step.add_chunk(resident, 5, 2)
    assert (judge(made, fits, step), judge(made, too_large, step)) == (ADMIT, STOP)
    made.kv.grow(resident.request_id, 16)
    assert (judge(made, fits), judge(made, too_large)) == (ADMIT, STOP)


def test_a_window_bounds_what_is_reserved() -> None:
    assert judge(books(20), books(20).waiting(400)) is STOP
    made = books(20, window=8, max_num_batched_tokens=16)
    assert judge(made, made.waiting(400)) is ADMIT


# -- the head of the line


def test_who_does_not_fit_holds_up_everybody_behind_it() -> None:
    made = books(10)
    made.waiting(4, max_tokens=40)
    made.waiting(4, max_tokens=1)
    assert made.plan() is None


def test_no_seat_is_left() -> None:
    made = books(100, max_num_seqs=1)
    made.decoding(4)
    assert judge(made, made.waiting(4)) is STOP


@pytest.mark.parametrize(("places", "verdict"), [(1, SKIP), (2, ADMIT)])
def test_who_lacks_a_resource_is_passed_over(places: int, verdict: Verdict) -> None:
    made = books(100, resources=[Places("rare", places, wanted=2)])
    assert judge(made, made.waiting(4)) is verdict


def test_blocks_are_asked_about_before_resources() -> None:
    made = books(2, resources=[Places("rare", 0)])
    assert judge(made, made.waiting(4)) is STOP


# -- prefix credit: blocks only where somebody holds them, tokens always


def test_a_hit_that_somebody_holds_is_credited() -> None:
    made = books(10)
    made.decoding(17, first=1, max_tokens=4)  # holds 4 blocks that can be found, may grow to 5
    assert judge(made, made.waiting(25, first=1, max_tokens=12)) is ADMIT  # 9 blocks, 4 of them shared
    assert judge(made, made.waiting(25, first=1, max_tokens=13)) is STOP
    assert judge(made, made.waiting(25, first=2, max_tokens=12)) is STOP


def test_a_hit_that_nobody_holds_costs_its_blocks_but_not_its_tokens() -> None:
    made = books(9)
    made.kv.free(made.decoding(17, first=1).request_id)
    made.scheduler.abort(0)
    assert judge(made, made.waiting(25, first=1, max_tokens=13)) is STOP
    made.scheduler.abort(1)
    made.waiting(25, first=1, max_tokens=12)
    assert chunks(made.plan()) == {2: 9}


def sharing(made: Books, known: int, max_tokens: int) -> None:
    """A resident that found what it could of the prompt that begins with 1."""
    request = made.waiting(known, first=1, max_tokens=max_tokens)
    found = made.kv.add_sequence(request.request_id, request.block_hashes, known)
    request.slot = request.request_id
    made.scheduler.ordering.remove(request.request_id)
    made.scheduler.capacity.started(request)
    made.table.start_prefill(request, found)


def test_what_two_residents_share_is_reserved_once_for_both() -> None:
    made = books(10)
    made.decoding(17, first=1, max_tokens=4)
    sharing(made, 18, max_tokens=3)
    # Both may grow to 5 blocks and share 4: 6 in all.
    assert judge(made, made.waiting(4, max_tokens=13)) is ADMIT
    assert judge(made, made.waiting(4, max_tokens=14)) is STOP


def test_with_a_window_sharing_is_no_credit() -> None:
    made = books(16, window=8, max_num_batched_tokens=4)
    made.decoding(9, first=1)
    newcomer = made.waiting(14, first=1)
    assert made.a_pass().blocks_to_end(newcomer) == 4
    step = made.a_pass()
    step.start(newcomer, 4)
    assert step.reserved_blocks == 4
    made = books(9, window=8, max_num_batched_tokens=4)
    made.decoding(9, first=1)
    sharing(made, 14, max_tokens=50)
    assert made.kv.pool.num_shares == 2
    assert judge(made, made.waiting(4, max_tokens=1)) is ADMIT
    assert judge(made, made.waiting(4, max_tokens=2)) is STOP


# -- what ends gives its reservation back


def test_who_ends_or_is_sent_back_reserves_nothing() -> None:
    made = books(4)
    resident = made.decoding(9, max_tokens=8)
    newcomer = made.waiting(9, max_tokens=8)
    assert judge(made, newcomer) is STOP
    made.kv.free(resident.request_id)
    made.scheduler.capacity.added(resident)  # its step failed
    assert judge(made, newcomer) is ADMIT
    made.scheduler.capacity.started(resident)
    assert judge(made, newcomer) is STOP
    made.scheduler.abort(resident.request_id)
    made.scheduler.abort(resident.request_id)
    assert judge(made, newcomer) is ADMIT


def test_a_pass_costs_the_same_however_many_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = books(1000, max_num_seqs=100)
    for _ in range(60):
        made.decoding(9)
    newcomer = made.waiting(4)
    assert judge(made, newcomer) is ADMIT
    asked: list[int] = []
    real = SchedulingPass.blocks_to_end

    def counted(step: SchedulingPass, request: Any) -> int:
        asked.append(request.request_id)
        return real(step, request)

    monkeypatch.setattr(SchedulingPass, "blocks_to_end", counted)
    assert judge(made, newcomer) is ADMIT
    assert asked == [newcomer.request_id]


def test_it_pauses_nobody() -> None:
    made = books(4)
    made.decoding(9)
    step = made.a_pass()
    assert made.scheduler.capacity.make_room(step, 2)
    assert not made.scheduler.capacity.make_room(step, 3)
    made.scheduler.capacity.make_way(step, made.scheduler.ordering)
    assert step.plan.paused_ids == []


# -- duplicates


def test_a_duplicate_waits_for_the_hit_and_takes_it_as_soon_as_it_is_there() -> None:
    driver = CoreDriver(preset="guaranteed-no-evict", num_queues=2, max_num_batched_tokens=64)
    driver.add(range(10))
    driver.add(range(10))
    driver.add([50, 51])
    assert chunks(driver.schedule()) == {0: 10, 2: 2}
    second = driver.schedule()  # the first one is in flight: its blocks were published when it was pushed
    assert chunks(second) == {1: 2}
    assert driver.requests[1].num_cached_tokens == 8
    driver.run()


def test_duplicates_run_together_where_that_is_wanted() -> None:
    options = {"scheduler_options": {"defer_duplicates": False}}
    driver = CoreDriver(preset="guaranteed-no-evict", max_num_batched_tokens=64, parts=options)
    driver.add(range(10))
    driver.add(range(10))
    assert chunks(driver.schedule()) == {0: 10, 1: 10}
    driver.run()


# -- what can never run


@pytest.mark.parametrize(("max_tokens", "refused"), [(9, False), (10, True)])
def test_who_may_grow_beyond_the_pool_is_told(max_tokens: int, refused: bool) -> None:
    driver = CoreDriver(preset="guaranteed-no-evict", num_blocks=5)  # 4 usable
    asked = driver.add(range(8), max_tokens)
    behind = driver.add([9], 2)
    driver.run()
    error = driver.outcomes[asked].ends[0].error
    assert isinstance(error, CapacityError) is refused
    if refused:
        assert str(error) == (
            "request r0 can never run: it needs room for up to 17 tokens and 4 of 4 blocks of 4 are free; "
            "raise num_kv_blocks or lower max_tokens"
        )
    assert driver.outcomes[behind].tokens == driver.expected(behind)


# -- random lives


class GuardedDriver(CoreDriver):
    """Holds the reservations against a count from scratch after every action."""

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self.capacity = self.core.scheduler.capacity
        assert isinstance(self.capacity, GuaranteedNoEvict)
        self.num_shortages = 0
        self._make_room = self.capacity.make_room
        self.capacity.make_room = self._note_shortage  # type: ignore[method-assign]

    def _note_shortage(self, step: SchedulingPass, num_blocks: int) -> bool:
        self.num_shortages += 1
        return self._make_room(step, num_blocks)

    def schedule(self) -> StepPlan | None:
        plan = super().schedule()
        assert not any(pushed.paused_ids for pushed in self.pushed[-1:])
        return plan

    def check(self) -> None:
        super().check()
        if not hasattr(self, "capacity"):
            return
        table, kv, chunk = self.core.table, self.kv, self.limits.max_num_batched_tokens
        to_end = {r.request_id: kv.peak_blocks(r.max_total_tokens - 1, chunk) for r in table.residents()}
        assert self.capacity._to_end.keys() | self.capacity._not_summed.keys() == to_end.keys()
        assert all(kv.num_held(i) <= most for i, most in to_end.items())
        if self.window is None:
            assert kv.num_free_blocks >= sum(most - kv.num_held(i) for i, most in to_end.items())
        else:
            assert sum(to_end.values()) <= kv.num_usable_blocks


peaceful = st.lists(
    st.one_of(
        *[arrivals, st.tuples(st.just("schedule"), st.integers(1, 8)), st.tuples(st.just("retire"), st.integers(1, 8))]
        * 5,
        st.tuples(st.just("abort"), st.integers(0, 20)),
    ),
    min_size=10,
    max_size=60,
)
queues = st.integers(1, 8)


def run_life(shape: dict[str, Any], num_queues: int, todo: list[Any], window: int | None, defer: bool) -> GuardedDriver:
    shape = {**shape, "num_queues": num_queues}
    blocks = max(2, 1 + shape.pop("num_tokens") // shape["block_size"])
    parts = {"micro_batch": shape.pop("preset"), "scheduler_options": {"defer_duplicates": defer}}
    driver = GuardedDriver(**shape, preset="guaranteed-no-evict", parts=parts, num_blocks=blocks, window=window)
    aborted = live(driver, todo)
    check_outcomes(driver, aborted)
    assert driver.core.num_preemptions == 0
    usable, chunk = driver.kv.num_usable_blocks, driver.limits.max_num_batched_tokens
    for request_id, outcome in driver.outcomes.items():
        fits = driver.kv.peak_blocks(driver.requests[request_id].max_total_tokens - 1, chunk) <= usable
        assert fits or request_id in aborted or isinstance(outcome.ends[0].error, CapacityError)
    assert not driver.capacity._to_end
    assert driver.capacity._sum == 0
    return driver


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shapes, queues, peaceful, st.booleans())
def test_nobody_is_paused_in_any_life(shape: dict[str, Any], num_queues: int, todo: list[Any], defer: bool) -> None:
    driver = run_life(shape, num_queues, todo, None, defer)
    assert not driver.num_shortages, "reserved blocks were not there"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shapes, queues, peaceful, st.integers(1, 9), st.booleans())
def test_nor_with_a_sliding_window(
    shape: dict[str, Any], num_queues: int, todo: list[Any], window: int, defer: bool
) -> None:
    run_life(shape, num_queues, todo, window, defer)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="defer_duplicates"):
        GuaranteedNoEvictOptions(defer_duplicates="yes")  # type: ignore[arg-type]
