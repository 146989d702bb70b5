"""Settings become a scheduler: presets, parts by themselves, somebody's own class."""

from __future__ import annotations

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
from llm_engine.schedulers.registry import CAPACITIES, MICRO_BATCHES, ORDERINGS, SCHEDULERS, make_scheduler

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
    ],
)
def test_what_cannot_be_is_refused_with_what_exists(settings: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_scheduler(SchedulerConfig(**settings), LIMITS)


def test_the_public_scheduler_needs_no_resources() -> None:
    assert Scheduler(FcfsOrdering(), MaxUtilization(), GreedyMicroBatch(), LIMITS).has_work is False
