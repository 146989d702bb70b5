"""Static batches: who is admitted when, and when a batch opens and closes. Blocks hold 4 tokens."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.step import StepPlan
from llm_engine.kvcache.resources import BaseResourceManager
from tests.engine.core_driver import CoreDriver
from tests.engine.test_core_properties import check_outcomes, live, lives, shapes
from tests.schedulers.books import Books, Places, chunks


def a_driver(**settings: Any) -> CoreDriver:
    return CoreDriver(preset="static-batch", **{"num_blocks": 40, "max_num_batched_tokens": 64, **settings})


def test_all_who_wait_are_admitted_into_an_empty_batch() -> None:
    driver = a_driver()
    for length in (5, 3, 9):
        driver.add(range(length))
    assert chunks(driver.schedule()) == {0: 5, 1: 3, 2: 9}
    driver.run()


def test_who_comes_later_waits_until_all_of_them_have_ended() -> None:
    driver = a_driver()
    driver.add([1, 2], 2)
    driver.add([3, 4], 6)
    driver.step()
    driver.add([5, 6], 1)
    admitted = []
    while not driver.core.is_idle:
        plan = driver.step()
        assert plan is not None
        if plan.chunk_ids:
            admitted.append((plan.chunk_ids, [o.reason is not None for o in driver.outcomes.values()][:2]))
    assert admitted == [([2], [True, True])]


def test_a_seat_that_comes_free_is_not_given_again() -> None:
    driver = a_driver(max_num_seqs=2)
    driver.add([1, 2], 1)
    driver.add([3, 4], 5)
    driver.add([5, 6], 1)
    driver.step()
    assert driver.core.table.num_resident == 1
    plan = driver.step()
    assert plan is not None and plan.chunk_ids == []
    driver.run()


def test_chunks_of_the_batch_go_on() -> None:
    driver = a_driver(max_num_batched_tokens=8)
    driver.add(range(20), 2)
    assert [chunks(driver.step()) for _ in range(3)] == [{0: 8}, {0: 8}, {0: 4}]
    driver.run()


def test_all_of_it_comes_in_however_many_passes_that_takes() -> None:
    driver = a_driver(num_queues=3, max_num_seqs=8, max_num_batched_tokens=4)
    for number in range(5):
        driver.add([number] * 4, 8)
    assert [chunks(driver.schedule()) for _ in range(3)] == [{0: 4}, {1: 4}, {2: 4}]
    driver.add([9] * 4, 8)
    started: list[int] = []
    while driver.core.table.num_resident:
        driver.retire()
        plan = driver.schedule()
        if plan is not None and driver.core.table.num_resident:
            started += [start.request_id for start in plan.starts]
    assert started == [3, 4, 5], "who waited when it was chosen, and in a batch of its own who came since"
    assert all(driver.outcomes[number].ends for number in range(5))
    driver.run()


def test_a_batch_of_one_that_has_ended_before_the_next_comes_in_is_a_batch() -> None:
    driver = a_driver(max_num_batched_tokens=4)
    driver.add([0] * 4, 1)
    driver.add([1] * 4, 8)
    driver.step()
    assert driver.outcomes[0].ends
    driver.add([2] * 4, 8)
    driver.step()
    plan = driver.step()
    assert plan is not None and plan.chunk_ids == []  # 2 came when it was empty, but the budget was spent on 1
    driver.run()


def test_who_was_aborted_is_no_candidate_any_more() -> None:
    driver = a_driver(num_queues=2, max_num_batched_tokens=4)
    for number in (0, 1):
        driver.add([number] * 4, 8)
    assert chunks(driver.schedule()) == {0: 4}
    driver.abort(1)
    driver.add([2] * 4, 8)
    assert driver.schedule() is None, "the batch is whole, and who comes later waits"
    driver.run()


def test_a_batch_is_as_large_as_may_grow_to_completion() -> None:
    made = Books(num_blocks=6, scheduler="static-batch")
    for _ in range(3):
        made.waiting(4, max_tokens=9)  # 3 blocks each
    assert list(chunks(made.plan())) == [0, 1]


def test_who_does_not_fit_holds_up_the_rest() -> None:
    made = Books(num_blocks=6, scheduler="static-batch")
    made.waiting(4, max_tokens=9)
    made.waiting(4, max_tokens=40)
    made.waiting(4, max_tokens=1)
    assert list(chunks(made.plan())) == [0]


def test_who_lacks_a_resource_is_passed_over() -> None:
    made = Books(scheduler="static-batch", resources=[Places("rare", 1)])
    made.waiting(4)
    made.waiting(4)
    assert list(chunks(made.plan())) == [0], "each wants one"


def test_duplicates_are_not_deferred() -> None:
    driver = a_driver()
    driver.add(range(10))
    driver.add(range(10))
    assert chunks(driver.schedule()) == {0: 10, 1: 10}
    driver.run()


def test_a_batch_that_died_with_its_stages_opens_again() -> None:
    driver = a_driver()
    driver.add([1, 2], 8)
    driver.step()
    driver.add([3, 4], 8)
    driver.step()
    driver.die()
    driver.come_back()
    assert chunks(driver.schedule()) == {0: 4, 1: 2}
    driver.run()


class BatchDriver(CoreDriver):
    """Watches who is admitted beside whom."""

    waited: frozenset[int] = frozenset()
    """Who waited when the batch was opened."""

    def schedule(self) -> StepPlan | None:
        table = self.core.table
        if not table.num_resident:
            self.waited = frozenset(table.requests)
        plan = super().schedule()
        if plan is not None:
            assert {start.request_id for start in plan.starts} <= self.waited, "admitted into a running batch"
        return plan


@settings(max_examples=100, deadline=None, derandomize=True)
@given(shapes, st.integers(1, 8), lives)
def test_in_any_life_only_an_empty_batch_opens(shape: dict[str, Any], num_queues: int, todo: list[Any]) -> None:
    shape = {**shape, "num_queues": num_queues}
    blocks = max(2, 1 + shape.pop("num_tokens") // shape["block_size"])
    driver = BatchDriver(
        **shape | {"preset": "static-batch"}, parts={"micro_batch": shape["preset"]}, num_blocks=blocks
    )
    check_outcomes(driver, live(driver, todo))


class HeldPlaces(BaseResourceManager):
    """Two, held by residents."""

    name = "places"

    def __init__(self) -> None:
        self.held: set[int] = set()

    def needed(self, request: Any) -> int:
        return 0 if request.request_id in self.held else 1

    def available(self) -> int:
        return 2 - len(self.held)

    def prepare_resources(self, plan: StepPlan) -> None:
        self.held.update(start.request_id for start in plan.starts)

    def free_resources(self, request: Any) -> None:
        self.held.discard(request.request_id)


def test_no_more_are_chosen_than_a_resource_allows() -> None:
    """Nor does choosing them leave less of it for their start: both come in at once."""
    driver = a_driver(resources=[HeldPlaces()])
    for number, count in enumerate((1, 6, 1)):
        driver.add([number, number], count)
    started = []
    while not driver.core.is_idle:
        ended = [number for number, outcome in driver.outcomes.items() if outcome.ends]
        plan = driver.step()
        assert plan is not None
        if plan.starts:
            started.append(([start.request_id for start in plan.starts], ended))
    assert started == [([0, 1], []), ([2], [0, 1])]
