"""The parts and presets that exist, by name, and how settings become a scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..core.config import SchedulerConfig
from ..core.errors import ConfigError
from ..core.registry import Registry
from ..kvcache.resources import ResourceManager
from .base import Capacity, MicroBatch, Ordering, Scheduler
from .limits import Limits

ORDERINGS: Registry[Ordering] = Registry("ordering", "llm_engine.ordering")
for _name, _target, _summary in (
    ("fcfs", "fcfs:FcfsOrdering", "first come, first served"),
    ("priority", "priority:PriorityOrdering", "lowest priority number first, preemptive; who waits rises slowly"),
    ("fair", "fair:FairOrdering", "the tenant who has had the least work done, by weight"),
    ("deadline", "deadline:DeadlineOrdering", "earliest deadline first; what cannot make its own is shed"),
    ("shortest-job", "shortest_job:ShortestJobOrdering", "shortest expected answer first; who waits rises slowly"),
    ("longest-prefix", "longest_prefix:LongestPrefixOrdering", "most of its prompt in the prefix cache first"),
):
    ORDERINGS.add(_name, f".schedulers.orderings.{_target}", _summary)

CAPACITIES: Registry[Capacity] = Registry("capacity", "llm_engine.capacity")
for _name, _target, _summary in (
    ("max-utilization", "max_utilization:MaxUtilization", "admit what fits now; pause when memory runs short"),
    ("guaranteed-no-evict", "guaranteed_no_evict:GuaranteedNoEvict", "reserve to completion, so that nobody is paused"),
    ("static-batch", "static_batch:StaticBatch", "as guaranteed-no-evict, into an empty batch only"),
    ("max-requests", "max_requests:MaxRequests", "count requests; for a cache that holds everybody"),
):
    CAPACITIES.add(_name, f".schedulers.capacities.{_target}", _summary)

MICRO_BATCHES: Registry[MicroBatch] = Registry("micro_batch", "llm_engine.micro_batch")
MICRO_BATCHES.add(
    "greedy",
    ".schedulers.micro_batches.greedy:GreedyMicroBatch",
    "all decodes, then prompts up to the token budget",
)
MICRO_BATCHES.add(
    "balanced",
    ".schedulers.micro_batches.balanced:BalancedMicroBatch",
    "micro-batches of equal size, so that every stage of a pipeline stays busy",
)

PRESETS: dict[str, tuple[str, str, str | None]] = {
    "greedy": ("fcfs", "max-utilization", "greedy"),
    "balanced": ("fcfs", "max-utilization", "balanced"),
    "max-utilization": ("fcfs", "max-utilization", None),
    "guaranteed-no-evict": ("fcfs", "guaranteed-no-evict", None),
    "static-batch": ("fcfs", "static-batch", None),
    "max-requests": ("fcfs", "max-requests", None),
    "priority": ("priority", "max-utilization", None),
    "fair": ("fair", "max-utilization", None),
    "deadline": ("deadline", "max-utilization", None),
    "shortest-job": ("shortest-job", "max-utilization", None),
    "longest-prefix": ("longest-prefix", "max-utilization", None),
}
"""Name to (ordering, capacity, micro-batch); no micro-batch: greedy with one stage, balanced with several."""


def default_preset(num_stages: int) -> str:
    """What ``default`` means: one stage has nobody to wait for."""
    return "greedy" if num_stages == 1 else "balanced"


SCHEDULERS: Registry[Scheduler] = Registry("scheduler", "llm_engine.schedulers")
for _name, _parts in PRESETS.items():
    SCHEDULERS.add(_name, ".schedulers.base:Scheduler", " x ".join(part or "by stages" for part in _parts))

SchedulerFactory = Callable[[Limits, ResourceManager | None], Scheduler]


def find_scheduler(config: SchedulerConfig, num_stages: int = 1) -> SchedulerFactory:
    """Resolve the names of the settings, before anything is loaded. Raises ``ConfigError`` listing those that exist.

    A scheduler class of your own is called as ``Class(limits)`` or ``Class(limits, resources)``.
    """
    name = default_preset(num_stages) if config.scheduler == "default" else config.scheduler
    if name in PRESETS:
        preset = PRESETS[name]
        ordering = ORDERINGS.get(config.ordering or preset[0])
        capacity = CAPACITIES.get(config.capacity or preset[1])
        micro_batch = MICRO_BATCHES.get(config.micro_batch or preset[2] or default_preset(num_stages))
        return lambda limits, resources: Scheduler(ordering(), capacity(), micro_batch(), limits, resources)
    for part in ("ordering", "capacity", "micro_batch"):
        if getattr(config, part) is not None:
            raise ConfigError(part, getattr(config, part), f"nothing beside scheduler={name!r}, which is no preset")
    factory: Any = SCHEDULERS.get(name)
    missing = [member for member in ("add", "abort", "schedule", "update", "has_work") if not hasattr(factory, member)]
    if inspect.isclass(factory) and missing:
        raise ConfigError("scheduler", name, f"a scheduler; this one lacks {', '.join(missing)}")
    takes_resources = len(inspect.signature(factory).parameters) > 1
    return lambda limits, resources: factory(limits, resources) if takes_resources else factory(limits)


def make_scheduler(
    config: SchedulerConfig, limits: Limits, resources: ResourceManager | None = None, *, num_stages: int = 1
) -> Scheduler:
    """Build what the settings name; raises as ``find_scheduler``."""
    return find_scheduler(config, num_stages)(limits, resources)
