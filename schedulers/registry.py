"""The parts and presets that exist, by name, and how settings become a scheduler."""

from __future__ import annotations

import inspect
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

PRESETS: dict[str, tuple[str, str, str]] = {
    "greedy": ("fcfs", "max-utilization", "greedy"),
}
"""Name to (ordering, capacity, micro-batch)."""
DEFAULT_PRESET = "greedy"

SCHEDULERS: Registry[Scheduler] = Registry("scheduler", "llm_engine.schedulers")
for _name, _parts in PRESETS.items():
    SCHEDULERS.add(_name, ".schedulers.base:Scheduler", " x ".join(_parts))


def make_scheduler(config: SchedulerConfig, limits: Limits, resources: ResourceManager | None = None) -> Scheduler:
    """Build what the settings name. Raises ``ConfigError`` listing the names that exist.

    A scheduler class of your own is called as ``Class(limits)`` or ``Class(limits, resources)``.
    """
    name = DEFAULT_PRESET if config.scheduler == "default" else config.scheduler
    if name in PRESETS:
        ordering, capacity, micro_batch = PRESETS[name]
        return Scheduler(
            ORDERINGS.get(config.ordering or ordering)(),
            CAPACITIES.get(config.capacity or capacity)(),
            MICRO_BATCHES.get(config.micro_batch or micro_batch)(),
            limits,
            resources,
        )
    for part in ("ordering", "capacity", "micro_batch"):
        if getattr(config, part) is not None:
            raise ConfigError(part, getattr(config, part), f"nothing beside scheduler={name!r}, which is no preset")
    factory: Any = SCHEDULERS.get(name)
    takes = inspect.signature(factory).parameters
    made: Scheduler = factory(limits, resources) if len(takes) > 1 else factory(limits)
    missing = [member for member in ("add", "abort", "schedule", "update", "has_work") if not hasattr(made, member)]
    if missing:
        raise ConfigError("scheduler", name, f"a scheduler; this one lacks {', '.join(missing)}")
    return made
