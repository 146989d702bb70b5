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
ORDERINGS.add("fcfs", ".schedulers.orderings.fcfs:FcfsOrdering", "first come, first served")

CAPACITIES: Registry[Capacity] = Registry("capacity", "llm_engine.capacity")
CAPACITIES.add(
    "max-utilization",
    ".schedulers.capacities.max_utilization:MaxUtilization",
    "admit what fits now; pause the youngest when memory runs short",
)

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

PRESETS: dict[str, tuple[str, str, str]] = {
    "greedy": ("fcfs", "max-utilization", "greedy"),
    "balanced": ("fcfs", "max-utilization", "balanced"),
}
"""Name to (ordering, capacity, micro-batch)."""


def default_preset(num_stages: int) -> str:
    """What ``default`` means: one stage has nobody to wait for."""
    return "greedy" if num_stages == 1 else "balanced"


SCHEDULERS: Registry[Scheduler] = Registry("scheduler", "llm_engine.schedulers")
for _name, _parts in PRESETS.items():
    SCHEDULERS.add(_name, ".schedulers.base:Scheduler", " x ".join(_parts))

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
        micro_batch = MICRO_BATCHES.get(config.micro_batch or preset[2])
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
