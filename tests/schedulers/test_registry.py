"""Settings become a scheduler: presets, parts by themselves, somebody's own class."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any

import pytest

from llm_engine.core.config import SchedulerConfig
from llm_engine.core.errors import ConfigError
from llm_engine.kvcache.resources import ResourceManager
from llm_engine.schedulers.base import Scheduler
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.micro_batches.balanced import BalancedMicroBatch
from llm_engine.schedulers.micro_batches.greedy import GreedyMicroBatch
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from llm_engine.schedulers.registry import (
    CAPACITIES,
    MICRO_BATCHES,
    ORDERINGS,
    SCHEDULERS,
    make_scheduler,
    scheduler_name,
)
from tests.distributions import forget_modules, write_distribution

LIMITS = Limits(4, 4, 16, 4)
HERE = "tests.schedulers.test_registry"


class Lifo(FcfsOrdering):
    """An ordering of somebody's own."""


class Own:
    """A scheduler of somebody's own: five members."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    add = abort = schedule = update = lambda self, *_: None
    has_work = False


class OwnWithResources(Own):
    def __init__(self, limits: Limits, resources: ResourceManager) -> None:
        super().__init__(limits)
        self.resources = resources


class Half:
    def __init__(self, limits: Limits) -> None: ...

    add = abort = lambda self, *_: None


class Unfinished(FcfsOrdering, abc.ABC):
    @abc.abstractmethod
    def visit(self, step: Any) -> Any: ...


class OfTheFuture(FcfsOrdering):
    interface_version = 2


class WholeOfTheFuture(Own):
    interface_version = 2


class KnowsTooMuch(FcfsOrdering):
    knows = frozenset({"colour"})


class KnowsAText(FcfsOrdering):
    knows = "priority"  # type: ignore[assignment]


class OfNow(FcfsOrdering):
    interface_version = 1


class NoOrdering:
    def add(self, request: Any) -> None: ...


class Breaks(FcfsOrdering):
    def __init__(self) -> None:
        raise OSError("no such table")


class TakesMore(Own):
    def __init__(self, limits: Limits, owner: str) -> None: ...


def lifo() -> Lifo:
    return Lifo()


def nothing() -> None: ...


def own(limits: Limits) -> Own:
    return Own(limits)


def no_scheduler(limits: Limits) -> int:
    return 5


PRESET = (f"{HERE}:Lifo", "max-utilization", None)
HALF_A_PRESET = ("fcfs", "max-utilization")
NUMBER = 5


@pytest.mark.parametrize("name", ["default", "greedy"])
def test_with_one_stage_the_default_is_greedy(name: str) -> None:
    scheduler = make_scheduler(SchedulerConfig(scheduler=name), LIMITS)
    parts = (scheduler.ordering, scheduler.capacity, scheduler.micro_batch)
    assert [type(part) for part in parts] == [FcfsOrdering, MaxUtilization, GreedyMicroBatch]
    assert scheduler.limits is LIMITS
    assert not scheduler.has_work


@pytest.mark.parametrize("registry", [ORDERINGS, CAPACITIES, MICRO_BATCHES, SCHEDULERS])
def test_everything_listed_can_be_loaded_and_says_what_it_is(registry: Any) -> None:
    assert registry.names()
    for name, summary in registry.describe():
        assert callable(registry.get(name))
        assert summary


@pytest.mark.parametrize(("name", "num_stages"), [("balanced", 1), ("balanced", 4), ("default", 2)])
def test_with_several_stages_the_default_is_balanced(name: str, num_stages: int) -> None:
    scheduler = make_scheduler(SchedulerConfig(scheduler=name), LIMITS, num_stages=num_stages)
    parts = (scheduler.ordering, scheduler.capacity, scheduler.micro_batch)
    assert [type(part) for part in parts] == [FcfsOrdering, MaxUtilization, BalancedMicroBatch]


def test_the_default_with_one_part_replaced_keeps_the_others() -> None:
    scheduler = make_scheduler(SchedulerConfig(micro_batch="greedy"), LIMITS, num_stages=4)
    assert isinstance(scheduler.micro_batch, GreedyMicroBatch)
    assert [scheduler.num_queues(stages) for stages in (1, 4)] == [1, 4]


def test_one_part_alone_can_be_replaced() -> None:
    scheduler = make_scheduler(SchedulerConfig(ordering=f"{HERE}:Lifo"), LIMITS)
    assert type(scheduler.ordering).__name__ == "Lifo"
    assert isinstance(scheduler.micro_batch, GreedyMicroBatch)


def test_a_scheduler_of_ones_own_is_given_what_it_takes() -> None:
    resources = ResourceManager()
    own: Any = make_scheduler(SchedulerConfig(scheduler=f"{HERE}:Own"), LIMITS, resources)
    assert own.limits is LIMITS
    own = make_scheduler(SchedulerConfig(scheduler=f"{HERE}:OwnWithResources"), LIMITS, resources)
    assert own.resources is resources


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"scheduler": "gredy"}, "did you mean 'greedy'"),
        ({"ordering": "fifo"}, "ordering is 'fifo'; allowed: fcfs"),
        ({"capacity": "max-utilisation"}, "did you mean 'max-utilization'"),
        ({"micro_batch": "lazy"}, "allowed: greedy"),
        ({"scheduler": f"{HERE}:Missing"}, "Missing"),
        ({"scheduler": f"{HERE}:Half"}, "lacks schedule, update, has_work"),
        ({"scheduler": f"{HERE}:Own", "ordering": "fcfs"}, "is no preset"),
        ({"scheduler": f"{HERE}:HALF_A_PRESET"}, "names of ordering, capacity and micro-batch"),
        ({"scheduler": f"{HERE}:NUMBER"}, "a scheduler's class, or a preset; this is 5"),
        ({"scheduler": f"{HERE}:TakesMore"}, r"called as Class\(limits\): missing a required argument: 'owner'"),
        ({"scheduler": f"{HERE}:WholeOfTheFuture"}, "version 1 of the interface; this one is for 2"),
        ({"scheduler": f"{HERE}:no_scheduler"}, "lacks add, abort, schedule, update, has_work"),
        ({"ordering": f"{HERE}:KnowsTooMuch"}, "what knows of deadline_ms, priority, tenant, or of none"),
        ({"ordering": f"{HERE}:KnowsAText"}, "this one knows 'priority'"),
        ({"ordering": f"{HERE}:OfTheFuture"}, "version 1 of the interface; this one is for 2"),
        (
            {"ordering": f"{HERE}:NoOrdering"},
            "a subclass of Ordering; NoOrdering is none, and lacks __len__, remove, visit",
        ),
        ({"ordering": f"{HERE}:GreedyMicroBatch"}, "a subclass of Ordering; GreedyMicroBatch is none"),
        ({"ordering": f"{HERE}:Unfinished"}, "a whole Ordering; Unfinished lacks visit"),
        ({"ordering": f"{HERE}:Breaks"}, "it raised OSError"),
        ({"ordering": f"{HERE}:nothing"}, "what makes one of Ordering; it made None"),
        ({"ordering": f"{HERE}:NUMBER"}, "a subclass of Ordering; this is 5"),
        ({"capacity": f"{HERE}:Lifo"}, "a subclass of Capacity; Lifo is none, and lacks judge, make_room"),
        ({"micro_batch": f"{HERE}:Lifo"}, "a subclass of MicroBatch; Lifo is none, and lacks form"),
    ],
)
def test_what_cannot_be_is_refused_with_what_exists(settings: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_scheduler(SchedulerConfig(**settings), LIMITS)


def test_a_function_may_make_what_a_class_would() -> None:
    scheduler = make_scheduler(SchedulerConfig(ordering=f"{HERE}:lifo"), LIMITS)
    assert type(scheduler.ordering).__name__ == "Lifo"
    whole: Any = make_scheduler(SchedulerConfig(scheduler=f"{HERE}:own"), LIMITS)
    assert whole.limits is LIMITS


def test_a_part_may_say_which_interface_it_is_written_for() -> None:
    scheduler = make_scheduler(SchedulerConfig(ordering=f"{HERE}:OfNow"), LIMITS)
    assert type(scheduler.ordering).__name__ == "OfNow"


@pytest.mark.parametrize(("num_stages", "micro_batch"), [(1, GreedyMicroBatch), (2, BalancedMicroBatch)])
def test_a_triple_of_names_is_a_preset_of_somebodys_own(num_stages: int, micro_batch: type) -> None:
    config = SchedulerConfig(scheduler=f"{HERE}:PRESET")
    scheduler = make_scheduler(config, LIMITS, num_stages=num_stages)
    parts = (scheduler.ordering, scheduler.capacity, scheduler.micro_batch)
    assert [type(part).__name__ for part in parts] == ["Lifo", "MaxUtilization", micro_batch.__name__]
    config = SchedulerConfig(scheduler=f"{HERE}:PRESET", ordering="fcfs")
    assert type(make_scheduler(config, LIMITS).ordering) is FcfsOrdering


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "default"),
        ({"scheduler": "a:B"}, "a:B"),
        ({"ordering": "a:B", "micro_batch": "greedy"}, "default ordering=a:B micro-batch=greedy"),
    ],
)
def test_errors_name_what_was_chosen(settings: dict[str, str], name: str) -> None:
    assert scheduler_name(SchedulerConfig(**settings)) == name


def test_other_packages_register_parts_presets_and_schedulers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    text = (
        "from llm_engine.schedulers.orderings.fcfs import FcfsOrdering\n"
        "from llm_engine.schedulers.capacities.max_utilization import MaxUtilization\n"
        "from llm_engine.schedulers.micro_batches.greedy import GreedyMicroBatch\n"
        "class O(FcfsOrdering): ...\n"
        "class C(MaxUtilization): ...\n"
        "class M(GreedyMicroBatch): ...\n"
        "TRIPLE = ('their-ordering', 'their-capacity', 'their-micro-batch')\n"
    )
    points = {
        "llm_engine.ordering": {"their-ordering": "theirs:O", "broken": "theirs:Nowhere"},
        "llm_engine.capacity": {"their-capacity": "theirs:C"},
        "llm_engine.micro_batch": {"their-micro-batch": "theirs:M"},
        "llm_engine.schedulers": {"their-preset": "theirs:TRIPLE"},
    }
    write_distribution(tmp_path, "theirs", text, points)
    monkeypatch.syspath_prepend(tmp_path)
    request.addfinalizer(lambda: forget_modules(tmp_path))
    scheduler = make_scheduler(SchedulerConfig(scheduler="their-preset"), LIMITS)
    parts = (scheduler.ordering, scheduler.capacity, scheduler.micro_batch)
    assert [type(part).__name__ for part in parts] == ["O", "C", "M"]
    assert type(make_scheduler(SchedulerConfig(ordering="their-ordering"), LIMITS).ordering).__name__ == "O"
    with pytest.raises(ConfigError, match="ordering is 'theirs:Nowhere'; allowed: something that can be imported"):
        make_scheduler(SchedulerConfig(ordering="broken"), LIMITS)
    with pytest.raises(ConfigError, match="did you mean 'their-ordering'"):
        make_scheduler(SchedulerConfig(ordering="their-orderin"), LIMITS)
    # What cannot be imported has no options, and is no hindrance to finding whose they are.
    with pytest.raises(ConfigError, match="scheduler_options is 'zzz'"):
        make_scheduler(SchedulerConfig(scheduler_options={"zzz": 1}), LIMITS)


def test_the_public_scheduler_needs_no_resources() -> None:
    assert Scheduler(FcfsOrdering(), MaxUtilization(), GreedyMicroBatch(), LIMITS).has_work is False
