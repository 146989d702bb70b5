"""A scheduler of somebody else's that raises, returns what cannot be, or makes no progress is named; the books stand.

One bad scheduler per row. Each behaves for a while, so that prompts, decodes and waiting requests are there, and turns.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from llm_engine import BaseResourceManager, CapacityError, EngineDeadError, KVCacheManager, SchedulerError
from llm_engine.core.errors import KVCacheError
from llm_engine.core.outputs import FinishReason
from llm_engine.core.step import RequestStart, StepPlan
from llm_engine.core.views import TableView
from llm_engine.schedulers.base import Capacity, Scheduler, Verdict
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.micro_batches.greedy import GreedyMicroBatch
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from tests.engine.core_driver import CoreDriver
from tests.engine.engines import SECONDS, greedy, toy_llm

HERE = "tests.engine.test_bad_schedulers"
GOOD_CALLS = 4
"""Then there are decodes in the queue, a prompt in progress and one that waits."""


class Turning(Scheduler):
    """The default scheduler until its ``GOOD_CALLS`` plans are made."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(FcfsOrdering(), MaxUtilization(), GreedyMicroBatch(), limits)
        self.num_plans = 0
        self.last: StepPlan | None = None

    @property
    def has_turned(self) -> bool:
        return self.num_plans >= GOOD_CALLS

    def schedule(self, now: float, table: TableView, kv: Any) -> Any:
        if self.has_turned:
            return self.misbehave(now, table, kv)
        self.last = super().schedule(now, table, kv)
        self.num_plans += self.last is not None
        return self.last

    def misbehave(self, now: float, table: TableView, kv: Any) -> Any:
        return super().schedule(now, table, kv)


Misbehaviour = Callable[[Any, TableView], Any]


class Returning(Turning):
    """Returns what it is told to make of the table."""

    def __init__(self, limits: Limits, what: Misbehaviour) -> None:
        super().__init__(limits)
        self._what = what

    def misbehave(self, now: float, table: TableView, kv: Any) -> Any:
        return self._what(self, table)


def raising(scheduler: Any, table: TableView) -> Any:
    raise ZeroDivisionError("so it is")


def leaving(scheduler: Any, table: TableView) -> Any:
    raise SystemExit(3)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class PlanOfMine(StepPlan):
    pass


def start(request_id: int) -> RequestStart:
    return RequestStart(request_id, 0, [1], 1, [], None, 0, 0, [])  # type: ignore[arg-type]


def plan(**fields: Any) -> Misbehaviour:
    return lambda scheduler, table: StepPlan(**{"queue": 0, **fields})


def decoding(table: TableView) -> int:
    return int(table.queues[0].ids[0])


def prefilling(table: TableView) -> int:
    return next(iter(table.prefilling))


def waiting(table: Any) -> int:
    return next(i for i, request in table.requests.items() if not request.is_resident)


def of(make: Callable[[TableView], dict[str, Any]]) -> Misbehaviour:
    return lambda scheduler, table: StepPlan(queue=0, **make(table))


RETURNED: list[tuple[str, Misbehaviour, str]] = [
    ("raises", raising, r"raised ZeroDivisionError\('so it is'\)"),
    ("asks Python to exit", leaving, r"raised SystemExit\(3\)"),
    ("no plan at all", lambda s, t: "decode everybody", "it is 'decode everybody', not a StepPlan"),
    ("a dict", lambda s, t: {"queue": 0}, "it is {'queue': 0}, not a StepPlan"),
    ("what cannot be shown", lambda s, t: Unprintable(), "it is a Unprintable, not a StepPlan"),
    ("a class of its own", lambda s, t: PlanOfMine(queue=0), "not a StepPlan"),
    ("the class itself", lambda s, t: StepPlan, "not a StepPlan"),
    ("its last plan again", lambda s, t: s.last, "it was returned before"),
    (
        "what the engine fills in",
        of(lambda t: {"decode_ids": [decoding(t)], "starts": [start(0)]}),
        "fills in what the",
    ),
    ("no queue", plan(queue=None), "queue is None, not a whole number"),
    ("a queue of text", plan(queue="0"), "queue is '0', not a whole number"),
    ("a queue that is not there", plan(queue=7), "queue 7 of 1"),
    ("decodes of texts", plan(decode_ids=["0"]), r"decode_ids is \['0'\], not a list or array of whole numbers"),
    ("decodes as a text", plan(decode_ids="01"), "decode_ids is '01', not a list"),
    ("no decodes", plan(decode_ids=None), "decode_ids is None, not a list"),
    ("decodes of None", plan(decode_ids=[None]), r"decode_ids is \[None\], not a list"),
    ("decodes of fractions", of(lambda t: {"decode_ids": array("d", [decoding(t)])}), "decode_ids is array"),
    ("decodes that are true", plan(decode_ids=[True]), r"decode_ids is \[True\]"),
    ("a set of decodes", of(lambda t: {"decode_ids": {decoding(t)}}), "decode_ids is {"),
    ("decodes one by one", of(lambda t: {"decode_ids": iter([decoding(t)])}), "decode_ids is <list_iterator"),
    ("chunks of texts", plan(chunk_ids=["2"], chunk_tokens=[1]), r"chunk_ids is \['2'\], not a list of whole numbers"),
    ("no chunks", plan(chunk_ids=None), "chunk_ids is None"),
    ("a tuple of chunks", of(lambda t: {"chunk_ids": (prefilling(t),), "chunk_tokens": (1,)}), "chunk_ids is "),
    ("tokens of text", of(lambda t: {"chunk_ids": [prefilling(t)], "chunk_tokens": ["1"]}), "chunk_tokens is"),
    ("half a token", of(lambda t: {"chunk_ids": [prefilling(t)], "chunk_tokens": [0.5]}), r"chunk_tokens is \[0.5\]"),
    ("chunks without tokens", of(lambda t: {"chunk_ids": [prefilling(t)]}), "1 chunk ids with 0 token counts"),
    ("no pauses", plan(paused_ids=None), "paused_ids is None"),
    ("pauses of texts", plan(paused_ids=["a"]), "paused_ids is"),
    ("moves to nowhere", of(lambda t: {"moved_ids": [decoding(t)], "moved_queues": [None]}), "moved_queues is"),
    ("moves without queues", of(lambda t: {"moved_ids": [decoding(t)]}), "1 moved ids with 0 queues"),
    ("moves out of range", of(lambda t: {"moved_ids": [decoding(t)], "moved_queues": [3]}), "to queue 3 of 1"),
    ("sheds for no reason", of(lambda t: {"shed_ids": [waiting(t)]}), "1 shed ids with 0 reasons"),
    ("sheds for a number", of(lambda t: {"shed_ids": [waiting(t)], "shed_reasons": [5]}), r"shed_reasons is \[5\]"),
    ("sheds a resident", of(lambda t: {"shed_ids": [decoding(t)], "shed_reasons": ["x"]}), "which does not wait"),
    ("an unknown id", plan(decode_ids=[99]), "decodes request 99, which is not in queue 0"),
    ("an unknown chunk", plan(chunk_ids=[99], chunk_tokens=[1]), "a chunk of request 99"),
    ("pauses who is not there", plan(paused_ids=[99]), "pauses request 99"),
    ("an id beyond every number", plan(decode_ids=[1 << 80]), "decodes request 1208925819614629174706176"),
    ("a request twice", of(lambda t: {"decode_ids": [decoding(t)] * 2}), "stands in it twice"),
    ("a chunk twice", of(lambda t: {"chunk_ids": [prefilling(t)] * 2, "chunk_tokens": [1, 1]}), "stands in it twice"),
    ("over the token budget", of(lambda t: {"chunk_ids": [prefilling(t)], "chunk_tokens": [99]}), "99 tokens, max_num"),
    (
        "tokens that are not there",
        of(lambda t: {"chunk_ids": [prefilling(t)], "chunk_tokens": [0]}),
        "computes 0 tokens",
    ),
    ("nothing for ever", plan(), "makes no progress: .* plans without rows in a row"),
]


def turned_driver(scheduler: Callable[[Limits], Scheduler]) -> CoreDriver:
    """Two decodes, a prompt in progress, one that waits; the scheduler is about to turn."""
    driver = CoreDriver(num_blocks=14, max_num_batched_tokens=8, max_num_seqs=3)
    driver.core.scheduler = scheduler(driver.limits)
    for length in (3, 4, 40, 9):
        driver.add(list(range(1, length + 1)), 9)
    while driver.core.scheduler.num_plans < GOOD_CALLS - 1:  # type: ignore[attr-defined]
        driver.step()
    return driver


@pytest.mark.parametrize(("what", "rule"), [row[1:] for row in RETURNED], ids=[row[0] for row in RETURNED])
def test_what_cannot_be_is_refused_by_name_and_the_books_stand(what: Misbehaviour, rule: str) -> None:
    driver = turned_driver(lambda limits: Returning(limits, what))
    driver.step()
    for _ in range(2):  # and so it is when it is asked again
        with pytest.raises(SchedulerError, match=f"scheduler under-test .*{rule}"):
            driver.core.schedule(9.0)
        driver.check()
    assert len(driver.core.table) == 4, "nobody was lost"


class Hook:
    """A part's hook that breaks, in a scheduler that is good otherwise."""

    def __init__(self, part: str, hook: str) -> None:
        self.part, self.hook = part, hook

    def __call__(self, limits: Limits) -> Turning:
        scheduler = Turning(limits)

        def broken(*what: Any) -> Any:
            if scheduler.has_turned:
                raise ZeroDivisionError(f"in {self.hook}")
            return kept(*what)

        part = getattr(scheduler, self.part)
        kept = getattr(part, self.hook)
        setattr(part, self.hook, broken)
        return scheduler


@pytest.mark.parametrize(
    ("part", "hook"),
    [
        ("ordering", "shed"), ("ordering", "visit"), ("ordering", "add"), ("ordering", "added"), ("ordering", "remove"),
        ("ordering", "ended"), ("ordering", "retired"), ("ordering", "started"),
        ("capacity", "judge"), ("capacity", "make_way"), ("capacity", "make_room"), ("capacity", "retired"),
        ("capacity", "started"), ("capacity", "ended"), ("capacity", "added"),
        ("micro_batch", "visit"), ("micro_batch", "form"), ("micro_batch", "retired"), ("micro_batch", "ended"),
    ],
)  # fmt: skip
def test_whatever_hook_breaks_is_found_out_and_the_books_stand(part: str, hook: str) -> None:
    driver = turned_driver(Hook(part, hook))

    def go_on() -> None:
        for _ in range(100):
            if not driver.core.num_waiting:
                driver.add([1, 2, 3], 9)
            driver.step()

    says = rf"scheduler under-test raised ZeroDivisionError\('in {hook}'\)"
    with pytest.raises(SchedulerError, match=says) as caught:
        go_on()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    driver.core.check_integrity()
    assert all(len(outcome.ends) <= 1 for outcome in driver.outcomes.values())


def test_a_plan_that_is_changed_after_it_was_returned_is_what_it_was() -> None:
    def meddling(scheduler: Any, table: TableView) -> Any:
        plan = Scheduler.schedule(scheduler, 9.0, table, driver.view)
        if scheduler.kept is not None:
            for column in scheduler.kept:
                column.clear()
        scheduler.kept = None if plan is None else [plan.chunk_ids, plan.chunk_tokens, plan.paused_ids]
        return plan

    driver = turned_driver(lambda limits: Returning(limits, meddling))
    driver.core.scheduler.kept = None  # type: ignore[attr-defined]
    driver.run()
    assert [outcome.tokens for outcome in driver.outcomes.values()] == [driver.expected(i) for i in range(4)]


def test_a_plan_that_is_kept_is_not_the_engines() -> None:
    """Neither its attributes nor what is appended to its columns, those that were empty included."""

    def meddling(scheduler: Any, table: TableView) -> Any:
        for kept in scheduler.kept:
            spoil(kept)
        plan = Scheduler.schedule(scheduler, 9.0, table, driver.view)
        if plan is not None:
            scheduler.kept.append(plan)
        return plan

    def spoil(kept: StepPlan) -> None:
        for column in (kept.chunk_ids, kept.chunk_tokens, kept.paused_ids, kept.moved_ids, kept.moved_queues):
            column.append(99)
        for column in (kept.starts, kept.chunk_slots, kept.chunk_starts, kept.grown_slots, kept.grown_blocks):
            column.append(99)  # type: ignore[attr-defined]
        kept.queue, kept.decode_ids, kept.epoch, kept.step = 7, [99], 7, 700
        kept.decode_slots = kept.decode_positions = kept.decode_tokens = [99]
        kept.chunk_samples, kept.finished_ids, kept.resumed_ids, kept.feeds_from = [True], [99], [99], 99

    driver = turned_driver(lambda limits: Returning(limits, meddling))
    driver.core.scheduler.kept = []  # type: ignore[attr-defined]
    for _ in range(100):
        if driver.core.is_idle:
            break
        pushed = driver.schedule()
        for kept in driver.core.scheduler.kept:  # type: ignore[attr-defined]
            assert kept is not pushed
            spoil(kept)
        driver.core.check_integrity()
        driver.retire()
    assert [outcome.tokens for outcome in driver.outcomes.values()] == [driver.expected(i) for i in range(4)]


def test_decodes_that_are_moved_to_and_fro_for_ever_are_no_progress() -> None:
    def to_and_fro(scheduler: Any, table: TableView) -> Any:
        source = next(queue for queue in table.queues if queue.ids)
        return StepPlan(queue=source.index, moved_ids=[source.ids[0]], moved_queues=[1 - source.index])

    driver = CoreDriver(num_queues=2, num_blocks=14)
    driver.core.scheduler = Returning(driver.limits, to_and_fro)
    driver.add([1, 2, 3], 9)
    for _ in range(GOOD_CALLS):
        driver.step()
    with pytest.raises(SchedulerError, match=r"makes no progress: .* plans without rows in a row"):
        driver.core.schedule(9.0)
    driver.check()


class Licences(BaseResourceManager):
    """So many, held by residents."""

    name = "licences"

    def __init__(self, count: int) -> None:
        self.count = count
        self.held: set[int] = set()
        self.broken_for: int | None = None

    def needed(self, request: Any) -> int:
        if request.request_id == self.broken_for:
            raise LookupError("who is that")
        return 0 if request.request_id in self.held else 1

    def available(self) -> int:
        return self.count - len(self.held)

    def prepare_resources(self, plan: StepPlan) -> None:
        self.held.update(start.request_id for start in plan.starts)

    def free_resources(self, request: Any) -> None:
        self.held.discard(request.request_id)


class Unaware(Scheduler):
    """Knows nothing of resources."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(FcfsOrdering(), MaxUtilization(), GreedyMicroBatch(), limits)


def unaware_driver(licences: Licences) -> CoreDriver:
    driver = CoreDriver(resources=[licences], max_num_seqs=3)
    driver.core.scheduler = Unaware(driver.limits)
    for length in (3, 4, 5):
        driver.add(range(length, 2 * length), 5)
    return driver


def test_who_ignores_a_resource_is_refused_naming_it_and_the_books_stand() -> None:
    licences = Licences(2)
    driver = unaware_driver(licences)
    says = "scheduler under-test returned an impossible plan: it starts request 2, and resource licences has too little"
    with pytest.raises(SchedulerError, match=says):
        driver.core.schedule(0.0)
    driver.check()
    assert (len(driver.core.table), driver.core.table.num_resident, licences.held) == (3, 0, set())


def test_who_ignores_a_resource_that_has_enough_runs() -> None:
    driver = unaware_driver(Licences(3))
    driver.run()
    assert [outcome.tokens for outcome in driver.outcomes.values()] == [driver.expected(i) for i in range(3)]


def test_a_resource_that_cannot_be_asked_fails_the_request_and_nobody_else() -> None:
    licences = Licences(3)
    licences.broken_for = 1
    driver = unaware_driver(licences)
    driver.run()
    assert licences.held == set()
    assert [outcome.reason for outcome in driver.outcomes.values()].count(FinishReason.ERROR) == 1
    assert "resource licences could not be asked" in str(driver.outcomes[1].ends[0].error)
    assert [driver.outcomes[i].tokens for i in (0, 2)] == [driver.expected(i) for i in (0, 2)]


def test_what_a_pause_gives_back_may_be_taken_by_a_newcomer() -> None:
    """The composed schedulers do not count on it; one of somebody else's may."""

    def swapping(scheduler: Any, table: Any) -> Any:
        return StepPlan(queue=0, paused_ids=[0], chunk_ids=[1], chunk_tokens=[4])

    licences = Licences(1)
    driver = CoreDriver(resources=[licences], max_num_seqs=2)
    driver.core.scheduler = Returning(driver.limits, swapping)
    driver.add(range(3), 9)
    for _ in range(GOOD_CALLS):
        driver.step()
    driver.add(range(4), 9)
    assert driver.core.schedule(9.0) is not None
    assert licences.held == {1}


# -- through a whole engine

SUBMITTED = 5


class TurningLater(Turning):
    """Turns when everybody is there, or the last would come to a dead engine."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.num_added = 0

    def add(self, request: Any) -> None:
        super().add(request)
        self.num_added += 1

    @property
    def has_turned(self) -> bool:
        return self.num_added >= SUBMITTED and super().has_turned


class RaisingLater(TurningLater):
    def misbehave(self, now: float, table: TableView, kv: Any) -> Any:
        raise ZeroDivisionError("so it is")


class RaisingWhenTold(TurningLater):
    def update(self, plan: StepPlan, finished_ids: Any) -> None:
        if self.has_turned:
            raise ZeroDivisionError("so it is")


class RaisingWhenAborting(TurningLater):
    def abort(self, request_id: int) -> None:
        if self.has_turned:
            raise ZeroDivisionError("so it is")
        super().abort(request_id)


class Texts(TurningLater):
    def misbehave(self, now: float, table: TableView, kv: Any) -> Any:
        return StepPlan(queue=0, decode_ids=["0"])  # type: ignore[list-item]


class Strangers(TurningLater):
    def misbehave(self, now: float, table: TableView, kv: Any) -> Any:
        return StepPlan(queue=0, paused_ids=[99])


class Circles(TurningLater):
    def misbehave(self, now: float, table: TableView, kv: Any) -> Any:
        return StepPlan(queue=0)


class Leaving(TurningLater):
    def misbehave(self, now: float, table: TableView, kv: Any) -> Any:
        raise SystemExit(3)


class Refusing(Capacity):
    """Admits nobody, ever."""

    def make_room(self, step: Any, num_blocks: int) -> bool:
        return False

    def judge(self, step: Any, request: Any) -> Verdict:
        return Verdict.STOP


class NoVerdict(MaxUtilization):
    def judge(self, step: Any, request: Any) -> Any:
        return None


class ForgetfulKV(KVCacheManager):
    """Its ``retention`` raises from the third block on."""

    num_asked = 0

    def retention(self, seq_id: int, index: int, *, found: bool) -> int:
        self.num_asked += 1
        if self.num_asked > 2:
            raise LookupError("no such rank")
        return 50


@pytest.mark.parametrize("stages", [1, 2])
def test_a_kv_manager_that_raises_ends_the_engine_and_everybody_is_told(stages: int, no_thread_left: None) -> None:
    says = r"ForgetfulKV\.retention raised LookupError\('no such rank'\)"
    with toy_llm(stages=stages, kv_cache_manager=f"{HERE}:ForgetfulKV", max_num_seqs=2) as llm:
        futures = [llm.submit([number, *range(7)], greedy(40)) for number in range(2)]
        for future in futures:
            error = future.exception(SECONDS)
            assert isinstance(error, EngineDeadError)
            assert re.search(says, str(error))
        assert llm.dead_cause is not None
        assert isinstance(llm.dead_cause.__cause__, KVCacheError)
        with pytest.raises(EngineDeadError, match=says):
            llm.generate([1, 2], greedy(1), use_tqdm=False)


class TooManyQueues(Turning):
    def num_queues(self, num_stages: int) -> int:
        return 1 << 40


class QueuesOfText(Turning):
    def num_queues(self, num_stages: int) -> Any:
        return "two"


class NoQueues(Turning):
    def num_queues(self, num_stages: int) -> Any:
        raise ZeroDivisionError("so it is")


BROKEN = [
    (RaisingLater, "raised ZeroDivisionError"),
    (RaisingWhenTold, "raised ZeroDivisionError"),
    (RaisingWhenAborting, "raised ZeroDivisionError"),
    (Texts, "decode_ids is"),
    (Strangers, "pauses request 99, which holds no blocks"),
    (Circles, "makes no progress"),
    (Leaving, r"raised SystemExit\(3\)"),
]


@pytest.mark.parametrize(("kind", "rule"), BROKEN, ids=[kind.__name__ for kind, _ in BROKEN])
@pytest.mark.parametrize("stages", [1, 2])
def test_an_engine_ends_with_the_error_and_everybody_is_told(
    kind: type, rule: str, stages: int, no_thread_left: None
) -> None:
    name = f"{HERE}:{kind.__name__}"
    with toy_llm(stages=stages, scheduler=name, max_num_seqs=2) as llm:
        futures = [llm.submit([number, 7, 8], greedy(40)) for number in range(SUBMITTED)]
        told = [future.exception(SECONDS) for future in futures]
        assert llm.dead_cause is not None
        assert isinstance(llm.dead_cause.__cause__, SchedulerError)
        for error in (error for error in told if error is not None):
            assert isinstance(error, EngineDeadError)
            with pytest.raises(EngineDeadError, match=f"scheduler {name} .*{rule}"):
                raise error
        # Who had its whole answer before may keep it; nobody else ends in silence.
        assert any(told)
        with pytest.raises(EngineDeadError, match=rule):
            llm.generate([1, 2], greedy(1), use_tqdm=False)
        assert not llm.is_ready
        llm.close()


@pytest.mark.parametrize("kind", [Refusing, NoVerdict])
def test_who_runs_nobody_is_named_and_nobody_waits_for_ever(kind: type, no_thread_left: None) -> None:
    with toy_llm(capacity=f"{HERE}:{kind.__name__}") as llm:
        futures = [llm.submit([number, 7, 8], greedy(4)) for number in range(1, 6)]
        for future in futures:
            error = future.exception(SECONDS)
            assert isinstance(error, CapacityError)
            assert f"scheduler default capacity={HERE}:{kind.__name__} runs nobody" in str(error)
        assert llm.is_ready, "only they failed"


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (TooManyQueues, "wants 1099511627776 queues; allowed: 1 to 65536"),
        (QueuesOfText, "wants 'two' queues"),
        (NoQueues, r"raised ZeroDivisionError\('so it is'\) when asked for its number of queues"),
    ],
)
def test_a_wish_for_queues_that_cannot_be_ends_the_start(kind: type, rule: str, no_thread_left: None) -> None:
    with pytest.raises(SchedulerError, match=f"scheduler {HERE}:{kind.__name__} {rule}"):
        toy_llm(scheduler=f"{HERE}:{kind.__name__}")
