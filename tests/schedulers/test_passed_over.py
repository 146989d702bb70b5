"""Who is passed over costs a bounded look, however many there are, and hides nobody behind it for ever."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest

from llm_engine.cli.bench_scheduler import distinct_presets
from llm_engine.core.errors import CapacityError
from llm_engine.core.request import Request
from llm_engine.core.step import StepPlan
from llm_engine.kvcache.resources import BaseResourceManager
from llm_engine.schedulers.base import Verdict
from llm_engine.schedulers.registry import MICRO_BATCHES, ORDERINGS
from tests.engine.core_driver import CoreDriver
from tests.schedulers.books import Books, Places, chunks

MOST = 32
SCHEDULERS = distinct_presets()


class Licences(BaseResourceManager):
    """So many places, for who has a tenant."""

    name = "licences"

    def __init__(self, count: int) -> None:
        self.count = count
        self.wanting: set[int] = set()
        self.held: set[int] = set()

    def needed(self, request: Any) -> int:
        if request.tenant is None or request.request_id in self.held:
            return 0
        self.wanting.add(request.request_id)
        return 1

    def available(self) -> int:
        return self.count - len(self.held)

    def prepare_resources(self, plan: StepPlan) -> None:
        self.held.update(start.request_id for start in plan.starts if start.request_id in self.wanting)

    def free_resources(self, request: Request) -> None:
        self.held.discard(request.request_id)


def calls_of(books: Books) -> tuple[int, int]:
    """Python and C functions called while one plan is made, in which nobody is admitted; and verdicts asked for."""
    count, judged, judge = 0, 0, books.scheduler.capacity.judge

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    def counted(*arguments: Any) -> Verdict:
        nonlocal judged
        judged += 1
        verdict = judge(*arguments)
        assert verdict is not Verdict.ADMIT
        return verdict

    capacity: Any = books.scheduler.capacity
    capacity.judge = counted
    before = sys.getprofile()
    gc.collect()
    gc.disable()  # what a collection calls is nobody's cost here
    sys.setprofile(note)
    try:
        plan = books.plan()
    finally:
        sys.setprofile(before)
        gc.enable()
        del capacity.judge
    assert plan is not None and not plan.starts
    return count, judged


def a_used_up_resource(scheduler: str, waiting: int, **of_the_waiting: Any) -> Books:
    books = Books(scheduler=scheduler, num_blocks=1000, resources=[Places("rare", 0)])
    books.decoding(6, priority=1)
    for _ in range(waiting):
        books.waiting(20, priority=1, **of_the_waiting)
    return books


def a_duplicated_prompt(scheduler: str, waiting: int) -> Books:
    books = Books(scheduler=scheduler, num_blocks=1000, max_num_batched_tokens=64, threshold=8)
    books.prefilling(200, 8, first=1)
    for _ in range(waiting):
        books.waiting(200, first=1)
    return books


LOADS = [(name, a_used_up_resource) for name in SCHEDULERS if name != "static-batch"]
LOADS += [(name, a_duplicated_prompt) for name in SCHEDULERS if name not in ("static-batch", "max-requests")]


@pytest.mark.parametrize(("scheduler", "load"), LOADS)
def test_a_pass_over_many_who_are_passed_over_costs_the_same_however_many_wait(scheduler: str, load: Any) -> None:
    few, many = load(scheduler, 200), load(scheduler, 800)
    for books in (few, many):
        books.plan()  # what each finds in the cache is looked up once
    few_calls, many_calls = calls_of(few), calls_of(many)
    assert many_calls == few_calls
    assert MOST < many_calls[1] <= 2 * MOST + 1  # the micro-batch that looks at what is outstanding asks as many again


def test_nor_does_it_where_they_would_displace_somebody() -> None:
    few, many = (a_used_up_resource("priority", waiting) for waiting in (200, 2000))
    for books in (few, many):
        for _ in range(300):
            books.waiting(20, priority=0)
        books.plan()
    assert calls_of(few) == calls_of(many)


@pytest.mark.parametrize(("skipped", "found"), [(MOST, True), (MOST + 1, False)])
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES.names())
def test_beside_a_resident_so_many_are_passed_over_and_no_more(micro_batch: str, skipped: int, found: bool) -> None:
    books = Books(num_blocks=1000, max_num_batched_tokens=64, threshold=8, parts={"micro_batch": micro_batch})
    running = books.prefilling(60, 8, first=1)
    for _ in range(skipped):
        books.waiting(60, first=1)
    stranger = books.waiting(8)
    wanted = {running.request_id: 8} | ({stranger.request_id: 8} if found else {})
    assert chunks(books.plan()) == wanted


def test_they_are_counted_anew_behind_each_that_is_admitted() -> None:
    books = Books(num_blocks=1000, max_num_batched_tokens=64, threshold=8, parts={"micro_batch": "greedy"})
    running = books.prefilling(60, 8, first=1)
    admitted = []
    for _ in range(3):
        for _ in range(MOST):
            books.waiting(60, first=1)
        admitted.append(books.waiting(8).request_id)
    assert list(chunks(books.plan())) == [running.request_id, *admitted]


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES.names())
def test_where_nobody_is_resident_everybody_is_looked_at(micro_batch: str) -> None:
    driver = CoreDriver(resources=[Licences(0)], max_num_batched_tokens=64, parts={"micro_batch": micro_batch})
    for number in range(100):
        driver.add([number] * 4, tenant="somebody")
    stranger = driver.add([7] * 9, 3)
    assert chunks(driver.schedule()) == {stranger: 9}
    assert not any(outcome.ends for outcome in driver.outcomes.values()), "nobody is told that it can never run"


@pytest.mark.parametrize(("num_queues", "look_ahead"), [(1, 0), (3, 1)])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_who_is_behind_many_that_never_run_runs(scheduler: str, num_queues: int, look_ahead: int) -> None:
    driver = CoreDriver(resources=[Licences(0)], preset=scheduler, num_queues=num_queues, look_ahead=look_ahead)
    served = [driver.add([3] * 9, 12)]
    driver.step()
    hopeless = [driver.add([number] * 4, tenant="somebody") for number in range(80)]
    served += [driver.add([number] * 9, 3) for number in range(4)]
    while not all(driver.outcomes[request_id].ends for request_id in served):
        assert not any(driver.outcomes[request_id].ends for request_id in hopeless), "others can still run"
        while driver.schedule() is not None:
            pass
        driver.retire()
    driver.run()
    for request_id in served:
        assert driver.outcomes[request_id].tokens == driver.expected(request_id)
    for request_id in hopeless:
        assert isinstance(driver.outcomes[request_id].ends[0].error, CapacityError)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_who_waits_for_a_scarce_resource_gets_it_in_turn(scheduler: str) -> None:
    driver = CoreDriver(resources=[Licences(1)], preset=scheduler)
    for number in range(50):
        driver.add([number] * 4, 3, tenant="somebody")
    for number in range(10):
        driver.add([number] * 9, 3)
    driver.run()
    assert all(outcome.tokens == driver.expected(i) for i, outcome in driver.outcomes.items())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_who_is_behind_many_duplicates_runs_when_they_do_at_the_latest(scheduler: str) -> None:
    driver = CoreDriver(preset=scheduler, threshold=4, num_blocks=60)
    driver.add(range(40), 3)
    driver.step()
    for _ in range(2 * MOST):
        driver.add(range(40), 3)
    stranger = driver.add([9] * 9, 3)
    driver.run()
    assert all(outcome.tokens == driver.expected(i) for i, outcome in driver.outcomes.items())
    assert driver.requests[stranger].num_cached_tokens == 0


@pytest.mark.parametrize("ordering", ORDERINGS.names())
def test_a_static_batch_comes_in_whole_whoever_is_put_before_it_meanwhile(ordering: str) -> None:
    driver = CoreDriver(
        preset="static-batch", parts={"ordering": ordering}, num_queues=3, num_blocks=100, max_num_seqs=8,
        max_num_batched_tokens=4,
    )  # fmt: skip
    for number in range(6):
        driver.add([number] * 4, 9, priority=5)
    assert [chunks(driver.schedule()) for _ in range(3)] == [{0: 4}, {1: 4}, {2: 4}]
    for number in range(2 * MOST):
        driver.add([20 + number] * 4, 1, priority=0, deadline=driver.now + 40, tenant="another")
    started: list[int] = []
    while len(started) < 3:
        driver.retire()
        while (plan := driver.schedule()) is not None:
            started += [start.request_id for start in plan.starts]
    assert started == [3, 4, 5]
    assert not any(driver.outcomes[number].ends for number in range(6)), "beside the first of them"
    driver.run()
