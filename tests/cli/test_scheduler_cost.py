"""What a step costs, counted in calls: how many wait does not matter, and rows cost no more where there are many."""

from __future__ import annotations

import gc
import sys
from types import FrameType
from typing import Any

import pytest

from llm_engine.cli.bench_scheduler import distinct_presets
from llm_engine.cli.scheduler_cost import MIXES, PARTS, HostLoad, NoSuchLoad, StepTimes, Stopwatch, measure
from tests.quick import some_quick

STEPS = 64
"""A multiple of the block size, in which every row opens as many blocks, and in a mixed load everybody ends once."""
LOOKS_AROUND = {"longest-prefix"}
"""Orderings that compare some of the waiting whenever one is to be admitted; how many is bounded."""


QUICK = {"balanced", "fair", "longest-prefix"}
"""Presets that differ in what the quick suite looks at."""


def calls_per_step(load: HostLoad) -> float:
    """Python and C functions called in ``schedule`` and ``retire``: what grows with the work and never with the
    machine's mood."""
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    def counted(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            before = sys.getprofile()
            sys.setprofile(note)
            try:
                return method(*arguments)
            finally:
                sys.setprofile(before)

        return call

    core: Any = load.core
    core.schedule, core.retire = counted(core.schedule), counted(core.retire)
    gc.collect()
    gc.disable()  # what a collection calls is nobody's cost here
    try:
        load.run(STEPS)
    finally:
        gc.enable()
        del core.schedule, core.retire
    return count / STEPS


def calls(scheduler: str, running: int, mix: str, *waiting: int) -> list[float]:
    load, found = HostLoad(scheduler, running, mix, steps=(STEPS + 10) * len(waiting)), []
    for number in waiting:
        load.set_waiting(number)
        load.run(10)
        found.append(calls_per_step(load))
    return found


@pytest.mark.parametrize("scheduler", some_quick(distinct_presets(), QUICK))
def test_a_step_in_which_nobody_comes_or_goes_costs_the_same_however_many_wait(scheduler: str) -> None:
    nobody, hundred, thousand = calls(scheduler, 64, "decode", 0, 100, 1000)
    # But for how many sizes and histories the cost model has seen by then.
    assert thousand == pytest.approx(hundred, rel=0.01)
    assert thousand <= nobody + 200  # who is first, and whom it may displace


@pytest.mark.parametrize(
    "scheduler", some_quick([name for name in distinct_presets() if name != "static-batch"], QUICK)
)
def test_a_step_in_which_somebody_is_admitted_costs_the_same_however_many_wait(scheduler: str) -> None:
    nobody, hundred, thousand = calls(scheduler, 64, "mixed", 0, 100, 1000)
    if scheduler not in LOOKS_AROUND:
        assert thousand == pytest.approx(nobody, rel=0.05)
        assert thousand == pytest.approx(hundred, rel=0.05)
    assert thousand < 10 * nobody


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("scheduler", some_quick(["greedy", "balanced", "guaranteed-no-evict", "fair"], QUICK))
def test_cost_grows_no_faster_than_what_is_scheduled(scheduler: str, mix: str) -> None:
    few, many = (calls(scheduler, running, mix, 20)[0] for running in (256, 1024))
    # Four times the rows and, in the mixed load, four times as many who come and go.
    assert few < many < 4 * few


def test_waiting_requests_really_wait() -> None:
    load = HostLoad("greedy", 16, "decode", steps=20)
    load.set_waiting(30)
    load.run(10)
    assert (load.num_waiting, load.core.table.num_decoding) == (30, 16)
    load.core.check_integrity()


def test_in_a_mixed_load_somebody_ends_and_somebody_begins_in_each_step() -> None:
    load = HostLoad("greedy", 16, "mixed", steps=60)
    load.set_waiting(5)
    before = list(load.core.table.requests)
    load.run(32)
    after = list(load.core.table.requests)
    assert load.num_waiting == 5
    assert len(after) == len(before)
    assert 28 <= max(after) - max(before) <= 36
    load.core.check_integrity()


def test_a_scheduler_that_admits_nobody_into_a_running_batch_has_no_mixed_load() -> None:
    with pytest.raises(NoSuchLoad, match="of 64 became resident"):
        HostLoad("static-batch", 64, "mixed", steps=10)


class FakePeer:
    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def set_waiting(self, count: int) -> None:
        self.asked.append(("wait", count))

    def run(self, steps: int) -> list[Any]:
        self.asked.append(("run", steps))
        return [StepTimes(4_000_000, 6_000_000)] * steps


def test_a_row_sums_up_its_rounds_and_sets_them_against_the_peers() -> None:
    load, peer = HostLoad("greedy", 16, "decode", steps=100), FakePeer()
    row = measure(load, 3, 5, 3, peer)
    assert (row["scheduler"], row["running"], row["waiting"], row["mix"]) == ("greedy", 16, 3, "decode")
    assert 0 < row["best_us"] <= row["p50_us"] <= row["p99_us"]
    assert set(row["parts_us"]) == set(PARTS)
    assert row["parts_us"]["book"] > 0
    assert row["vllm"]["p50_us"] == 10_000
    assert len(row["vllm"]["ratios"]) == 3
    assert peer.asked == [("wait", 3), ("run", 20), ("run", 5), ("run", 5), ("run", 5)]


def test_the_stopwatch_leaves_no_trace() -> None:
    load = HostLoad("greedy", 16, "decode", steps=20)
    with Stopwatch(load) as watch:
        load.run(2)
        assert "retire" in vars(load.core)
        assert watch.take()["retire"] > 0
        assert not watch.spent
    assert not {"retire", "_book", "_check"} & vars(load.core).keys()
