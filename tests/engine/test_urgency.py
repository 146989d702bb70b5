"""Priorities and deadlines through a whole engine: who goes first, who is shed, and what each caller is told."""

from __future__ import annotations

import time
from typing import Any

import pytest

from llm_engine import LLM, FinishReason, InvalidParamsError, RequestShedError, SamplingParams
from llm_engine.core.step import StepPlan
from llm_engine.schedulers.base import Scheduler
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.micro_batches.greedy import GreedyMicroBatch
from llm_engine.schedulers.orderings.deadline import DeadlineOrdering
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from tests.engine.core_driver import CoreDriver
from tests.engine.engines import SECONDS, Valve, await_state, await_true, greedy, tokens_of, toy_llm
from tests.toy_model_engine import expected_tokens

pytestmark = pytest.mark.usefixtures("no_thread_left")
TO_THE_END = SamplingParams(temperature=0.0, ignore_eos=True)


def finished(llm: LLM, reason: str) -> float | None:
    labels = {"model_name": llm.model_name, "engine": "0", "reason": reason}
    return llm.registry.get_sample_value("llm_engine_requests_finished_total", labels)


# -- deadlines


def test_who_waits_past_its_deadline_is_shed_and_everybody_else_is_served() -> None:
    valve = Valve()
    with toy_llm(scheduler="deadline", max_num_seqs=1, on_forward=valve) as llm:
        first = llm.submit([1, 2, 3], greedy(8))
        valve.await_arrival(1)
        stream = llm.stream([5], greedy(4), deadline_ms=20.0)
        future = llm.submit([6], greedy(4), deadline_ms=20.0)
        patient = llm.submit([7], greedy(4), deadline_ms=60_000.0)
        careless = llm.submit([8], greedy(4))
        await_state(llm.engine, lambda: llm.engine.state.core.num_waiting == 4)
        passed = time.monotonic() + 0.021
        await_true(lambda: time.monotonic() > passed)
        valve.open()
        with pytest.raises(RequestShedError, match=r"^deadline_ms 20 passed while it waited$"):
            next(stream)
        with pytest.raises(RequestShedError, match=r"^deadline_ms 20 passed while it waited$"):
            future.result(SECONDS)
        assert tokens_of(first.result(SECONDS)) == expected_tokens([1, 2, 3], 8)
        assert tokens_of(patient.result(SECONDS)) == expected_tokens([7], 4)
        assert tokens_of(careless.result(SECONDS)) == expected_tokens([8], 4)
        assert llm.dead_cause is None
        assert [finished(llm, reason) for reason in ("shed", "error", "length")] == [2, 0, 3]


def test_generate_tells_of_what_was_shed_beside_the_answers() -> None:
    with toy_llm(scheduler="deadline") as llm:
        (shed,) = llm.generate([1, 2], greedy(4), use_tqdm=False, deadline_ms=1e-3)
        (answered,) = llm.generate([1, 2], greedy(4), use_tqdm=False, deadline_ms=60_000.0)
    assert shed.outputs[0].finish_reason is FinishReason.ERROR
    assert shed.outputs[0].error == "deadline_ms 0.001 passed while it waited"
    assert tokens_of(shed) == []
    assert tokens_of(answered) == expected_tokens([1, 2], 4)


def test_each_choice_is_shed_and_the_caller_hears_it_once() -> None:
    with toy_llm(scheduler="deadline") as llm:
        with pytest.raises(RequestShedError):
            llm.submit([1], SamplingParams(n=3, max_tokens=4), deadline_ms=1e-3).result(SECONDS)
        await_true(lambda: finished(llm, "shed") == 3)


def test_where_shedding_is_off_the_late_are_answered() -> None:
    with toy_llm(scheduler="deadline", scheduler_options={"shed": False}) as llm:
        answer = llm.submit([1, 2], greedy(4), deadline_ms=1e-3).result(SECONDS)
    assert tokens_of(answer) == expected_tokens([1, 2], 4)


def under_deadlines(**books: Any) -> CoreDriver:
    limits = Limits(books["max_num_seqs"], books["max_num_seqs"], 16, 4)
    parts = DeadlineOrdering(), MaxUtilization(), GreedyMicroBatch()
    return CoreDriver(scheduler=Scheduler(*parts, limits), **books)


def test_a_plan_that_sheds_is_carried_out_and_not_pushed() -> None:
    """The driver's clock ticks once for each schedule and once for each retirement."""
    driver = under_deadlines(max_num_seqs=1)
    running = driver.add([1, 2, 3], 8)
    driver.step()
    late, later = driver.add([4], 4, deadline=driver.now + 3.5), driver.add([5], 4, deadline=driver.now + 1e6)
    driver.step()
    driver.step()
    plan = driver.schedule()
    assert plan is not None
    assert (list(plan.decode_ids), plan.shed_ids) == ([running], [])
    assert driver.outcomes[late].reason is FinishReason.ERROR
    assert isinstance(driver.outcomes[late].ends[0].error, RequestShedError)
    driver.retire()
    driver.run()
    assert driver.outcomes[running].tokens == expected_tokens([1, 2, 3], 8)
    assert driver.outcomes[later].tokens == expected_tokens([5], 4)
    assert not any(pushed.shed_ids for pushed in driver.pushed)


def test_at_the_pace_of_the_others_one_that_cannot_be_in_time_is_shed_before_its_deadline() -> None:
    """A step takes two ticks, so ten tokens take twenty, less the tenth that is granted."""
    driver = under_deadlines(max_num_seqs=1)
    driver.add([1, 2, 3], 10, params=TO_THE_END)
    while len(driver.core.table):
        driver.step()
    driver.step()
    began = driver.now
    driver.add([7], 10, params=TO_THE_END)
    driver.step()
    hopeless = driver.add([4], 10, params=TO_THE_END, deadline=began + 30.0)
    hopeful = driver.add([5], 10, params=TO_THE_END, deadline=began + 45.0)
    while driver.outcomes[hopeless].reason is None:
        assert driver.now - began <= 12.0
        driver.step()
    assert driver.now - began == 14.0  # asked at 11 and at 13, and 12 was the last moment
    assert str(driver.outcomes[hopeless].ends[0].error) == (
        "deadline_ms 28000 cannot be met: 17000 ms are left and at the best pace of late it takes 18000 ms"
    )
    driver.run()
    assert driver.outcomes[hopeful].tokens == expected_tokens([5], 10)


# -- priorities


def test_the_urgent_take_the_place_of_the_others_who_go_on_afterwards() -> None:
    valve = Valve()
    with toy_llm(scheduler="priority", max_num_seqs=1, on_forward=valve, schedule_ahead=False) as llm:
        low = llm.submit([1, 2, 3], greedy(8), priority=5)
        valve.await_arrival(1)
        equal = llm.submit([4], greedy(2), priority=5)
        urgent = llm.submit([5], greedy(2), priority=-1)
        await_state(llm.engine, lambda: llm.engine.state.core.num_waiting == 2)
        valve.open()
        answers = [future.result(SECONDS) for future in (low, equal, urgent)]
    assert [tokens_of(answer) for answer in answers] == [
        expected_tokens([1, 2, 3], 8), expected_tokens([4], 2), expected_tokens([5], 2),
    ]  # fmt: skip
    assert [answer.metrics.num_preemptions for answer in answers] == [1, 0, 0]
    ends = [answer.metrics.last_token for answer in answers]
    assert ends[2] < ends[0] < ends[1]  # type: ignore[operator]


# -- who knows what


class Whole:
    """A scheduler without parts, which says nothing of what it knows."""

    def __init__(self, limits: Limits) -> None:
        self._inner = Scheduler(FcfsOrdering(), MaxUtilization(), GreedyMicroBatch(), limits)

    @property
    def has_work(self) -> bool:
        return self._inner.has_work

    def add(self, request: Any) -> None:
        self._inner.add(request)

    def abort(self, request_id: int) -> None:
        self._inner.abort(request_id)

    def schedule(self, now: float, table: Any, kv: Any) -> StepPlan | None:
        return self._inner.schedule(now, table, kv)

    def update(self, plan: StepPlan, finished_ids: Any) -> None:
        self._inner.update(plan, finished_ids)


class Outspoken(Whole):
    knows = frozenset({"deadline_ms"})


@pytest.mark.parametrize(
    ("scheduler", "refused"),
    [
        ("greedy", {"priority", "deadline_ms"}),
        ("priority", {"deadline_ms"}),
        ("deadline", {"priority"}),
        ("shortest-job", {"priority", "deadline_ms"}),
        ("tests.engine.test_urgency:Whole", set()),
        ("tests.engine.test_urgency:Outspoken", {"priority"}),
    ],
)
def test_a_request_may_bring_what_its_scheduler_knows(scheduler: str, refused: set[str]) -> None:
    with toy_llm(scheduler=scheduler) as llm:
        assert tokens_of(llm.submit([1], greedy(2), tenant="somebody").result(SECONDS)) == expected_tokens([1], 2)
        for field, value in (("priority", 3), ("deadline_ms", 60_000.0)):
            said: Any = {field: value}
            if field in refused:
                with pytest.raises(InvalidParamsError, match=f"^{field} is "):
                    llm.submit([1], greedy(2), **said)
            else:
                assert tokens_of(llm.submit([1], greedy(2), **said).result(SECONDS)) == expected_tokens([1], 2)
