"""What every scheduler owes, whatever it is made of: each preset and each ordering x capacity x micro-batch.

Random lives run through the real books with stages that compute inline. After every action the books are checked
against each other, every plan against the limits, the blocks it takes against those that were predicted, and every
decision against what its capacity promises (``ContractDriver``).
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st

from llm_engine.core.errors import CapacityError
from llm_engine.core.outputs import FinishReason
from llm_engine.schedulers.chunking import CHUNKINGS
from llm_engine.schedulers.registry import MICRO_BATCHES, ORDERINGS, SCHEDULERS
from tests.engine.core_driver import CoreDriver
from tests.engine.test_core_properties import prompts
from tests.schedulers.lives import arrive, check_ends, live, lives, make_driver, mortal_lives, shapes, wishes
from tests.schedulers.triples import TRIPLES, ContractDriver, Triple, kept_by, random_examples

MAX_KEPT = 150
"""Entries of everything a scheduler keeps when nobody is left: means of the last few, turns by queue."""
every_triple = pytest.mark.parametrize("triple", TRIPLES, ids=str)
every_three = pytest.mark.parametrize("triple", [t for t in TRIPLES if t.chunking == CHUNKINGS[0]], ids=str)
"""For what does not hang on how prompts share a micro-batch."""


def quick_and_slow(quick: int, slow: int) -> Any:
    """So many examples for each; the slow marker runs many."""
    many = pytest.param(slow, marks=pytest.mark.slow, id="many")
    return pytest.mark.parametrize("examples", [pytest.param(quick, id="quick"), many])


def check_all(driver: ContractDriver, aborted: set[int]) -> None:
    check_ends(driver, aborted)
    driver.check_waits()
    requests, entries = kept_by(driver.core.scheduler)
    assert not requests, "it remembers requests that ended"
    assert entries <= MAX_KEPT, "it remembers more than a few"


@every_triple
@quick_and_slow(2, 60)
def test_any_life_ends_right(triple: Triple, examples: int) -> None:
    def check(shape: dict[str, Any], todo: list[Any]) -> None:
        driver = make_driver(triple, **shape)
        check_all(driver, live(driver, todo))

    random_examples(triple, examples, check, shapes, lives)


@every_triple
@quick_and_slow(2, 40)
def test_any_life_with_stages_that_die_ends_right(triple: Triple, examples: int) -> None:
    def check(shape: dict[str, Any], todo: list[Any]) -> None:
        driver = make_driver(triple, **shape)
        check_all(driver, live(driver, todo))

    random_examples(triple, examples, check, shapes, mortal_lives)


@pytest.mark.parametrize("name", SCHEDULERS.names())
@quick_and_slow(2, 60)
def test_any_life_under_a_registered_scheduler_ends_right(name: str, examples: int) -> None:
    def check(shape: dict[str, Any], todo: list[Any]) -> None:
        driver = make_driver(name, **shape)
        check_all(driver, live(driver, todo))

    random_examples(name, examples, check, shapes, lives)


@every_triple
@quick_and_slow(2, 40)
def test_everybody_who_fits_alone_is_served_from_a_tight_pool(triple: Triple, examples: int) -> None:
    """The pool holds the largest request alone and no more, so the others must take turns."""

    def check(shape: dict[str, Any], asked: list[Any]) -> None:
        size = shape["block_size"]
        blocks = max(-(-(len(prompt) + count - 1) // size) for prompt, count, _ in asked)
        driver = make_driver(triple, **{**shape, "num_tokens": size * blocks, "window": None})
        for prompt, count, wish in asked:
            arrive(driver, prompt, count, {**wish, "stop_ids": (), "within": None})
        driver.run()
        assert all(outcome.reason is FinishReason.LENGTH for outcome in driver.outcomes.values())
        check_all(driver, set())

    some = st.lists(st.tuples(prompts, st.integers(1, 10), wishes), min_size=2, max_size=8)
    random_examples(triple, examples, check, shapes, some)


@every_three
@quick_and_slow(1, 20)
def test_nobody_starves_under_a_stream(triple: Triple, examples: int) -> None:
    """Arrivals as fast as they are served, for a long while; everybody's wait is bounded by those it waited beside."""

    def check(shape: dict[str, Any], stream: list[Any], steps: int, lag: int) -> None:
        driver = make_driver(triple, **{**shape, "num_tokens": max(40, shape["num_tokens"])})
        for prompt, count, wish in stream:
            arrive(driver, prompt, count, {**wish, "within": None})
            for _ in range(steps):
                driver.schedule()
                if len(driver.results) > lag:
                    driver.retire()
        driver.run()
        check_all(driver, set())

    stream = st.lists(st.tuples(prompts, st.integers(1, 10), wishes), min_size=20, max_size=40)
    random_examples(triple, examples, check, shapes, stream, st.integers(2, 8), st.integers(0, 4))


@every_three
def test_nothing_is_kept_of_those_who_ended(triple: Triple) -> None:
    """However many they were."""
    driver = ContractDriver(triple, num_blocks=200, max_num_seqs=32, max_num_batched_tokens=64, num_queues=2)
    pass_through(driver, 300, num_tenants=20)
    requests, entries = kept_by(driver.core.scheduler)
    assert not requests
    assert entries <= MAX_KEPT, entries


@pytest.mark.parametrize("ordering", [name for name in ORDERINGS.names() if "tenant" in ORDERINGS.get(name).knows])
def test_tenants_who_left_are_forgotten_in_time(ordering: str) -> None:
    """What they had is remembered for a while, or leaving would earn credit."""

    class Unchecked(CoreDriver):
        """Of so many, the books are not looked through at each step."""

        def check(self) -> None: ...

    parts = {"ordering": ordering}
    driver = Unchecked(parts=parts, num_blocks=200, max_num_seqs=64, max_num_batched_tokens=128, caching=False)
    pass_through(driver, 5000, num_tenants=5000)
    assert kept_by(driver.core.scheduler)[1] <= 3000


def pass_through(driver: CoreDriver, count: int, *, num_tenants: int) -> None:
    """So many requests of two tokens, some of them aborted."""
    for number in range(count):
        driver.add([number % 90, 1], 2, tenant=f"tenant {number % num_tenants}")
        if number % 50 == 0:
            driver.abort(number)
        if number % 20 == 0:
            driver.step()
    driver.run()


@every_three
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_who_can_never_fit_is_told_so_and_nobody_else_suffers(triple: Triple, first: bool) -> None:
    """One whose prompt is too large, and one that only its answer makes too large; both as urgent as can be."""
    driver = ContractDriver(triple, num_blocks=9, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, num_queues=2)
    wish = {"stop_ids": (), "salt": None, "tenant": "ann", "priority": -9, "within": None}
    usual = {**wish, "tenant": "bob", "priority": 0}
    smalls = [arrive(driver, [n] * 5, 6, usual) for n in range(3)] if not first else []
    driver.schedule()
    too_large = [arrive(driver, list(range(40)), 1, wish), arrive(driver, list(range(50, 60)), 40, wish)]
    smalls += [arrive(driver, [n] * 5, 6, usual) for n in range(10, 14)]
    driver.run()
    for number in too_large:
        error = driver.outcomes[number].ends[0].error
        assert isinstance(error, CapacityError), error
        assert "raise num_kv_blocks" in str(error)
    assert all(driver.outcomes[number].reason is FinishReason.LENGTH for number in smalls)


@pytest.mark.parametrize("ordering", ORDERINGS.names())
def test_who_was_paused_goes_before_an_equal_that_came_later(ordering: str) -> None:
    """Pausing costs time enough; it must not cost the place as well."""
    driver = CoreDriver(parts={"ordering": ordering, "capacity": "max-utilization"}, num_blocks=11, num_queues=1)
    equals = [driver.add([number] * 8, 16, tenant="ann") for number in range(4)]
    driver.run()
    assert driver.core.num_preemptions > 0
    ended = sorted(equals, key=lambda number: driver.outcomes[number].ends[0].at)
    assert ended == equals


@pytest.mark.parametrize("ordering", [name for name in ORDERINGS.names() if "priority" in ORDERINGS.get(name).knows])
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES.names())
@pytest.mark.parametrize("equals", [1, 3])
def test_displacement_comes_to_an_end(ordering: str, micro_batch: str, equals: int) -> None:
    """Each newcomer outranks all before it but its equals, so it displaces residents; an equal it never does."""
    triple = Triple(ordering, "max-utilization", micro_batch, CHUNKINGS[0])
    driver = ContractDriver(triple, num_blocks=9, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
    for number in range(12):
        driver.add([number] * 9, 12, priority=-(number // equals))
        driver.step()
        driver.step()
    driver.run()
    assert all(outcome.reason is FinishReason.LENGTH for outcome in driver.outcomes.values())
    assert 0 < driver.num_decided_pauses <= 12 * 11
    assert driver.went[11] < driver.went[0]
    check_all(driver, set())
