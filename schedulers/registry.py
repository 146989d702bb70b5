"""The parts and presets that exist, by name, and how settings become a scheduler."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ..core.config import SchedulerConfig
from ..core.errors import ConfigError
from ..core.registry import Registry, check_class, make
from ..kvcache.resources import ResourceManager
from .base import INTERFACE_VERSION, Capacity, MicroBatch, Ordering, Part, Scheduler
from .limits import Limits
from .options import Chosen, make_options, sort_options

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

PART_REGISTRIES: dict[str, tuple[Registry[Any], type[Part]]] = {
    "ordering": (ORDERINGS, Ordering),
    "capacity": (CAPACITIES, Capacity),
    "micro_batch": (MICRO_BATCHES, MicroBatch),
}
MEMBERS = ("add", "abort", "schedule", "update", "has_work")
"""What every scheduler has."""
WORDS = frozenset({"priority", "deadline_ms", "tenant"})
"""What of a request an ordering may go by."""

SchedulerFactory = Callable[[Limits, ResourceManager | None], Scheduler]


def orderings_that_know(field: str) -> list[str]:
    """The orderings that go by this field of a request, for one who brought it to another."""
    found = []
    for name in ORDERINGS.names():
        with contextlib.suppress(ConfigError):  # somebody else's, which cannot be imported
            if field in getattr(ORDERINGS.get(name), "knows", ()):
                found.append(name)
    return found


def scheduler_name(config: SchedulerConfig) -> str:
    """How errors and traces call it: the preset, and the parts that are not the preset's."""
    replaced = {kind: name for kind in PART_REGISTRIES if (name := getattr(config, kind)) is not None}
    return " ".join([config.scheduler, *(f"{kind.replace('_', '-')}={name}" for kind, name in replaced.items())])


def find_scheduler(config: SchedulerConfig, num_stages: int = 1) -> SchedulerFactory:
    """Resolve names and options, before anything is loaded. Raises ``ConfigError`` saying what there is.

    A preset of somebody else's is a triple of names like ours. A scheduler class of theirs is called as
    ``Class(limits)``, with ``resources=`` and ``options=`` where it takes these.
    """
    name = default_preset(num_stages) if config.scheduler == "default" else config.scheduler
    target = _target_of(name)
    if isinstance(target, tuple):
        return _compose(config, name, target, num_stages)
    for kind in PART_REGISTRIES:
        if getattr(config, kind) is not None:
            raise ConfigError(kind, getattr(config, kind), f"nothing beside scheduler={name!r}, which is no preset")
    return _whole(config, Chosen("scheduler", name, target))


def preset_of(name: str) -> tuple[str, str, str | None] | None:
    """The triple that a scheduler's name stands for, ours or somebody else's; ``None`` for a whole scheduler. Raises
    ``ConfigError`` for a name that leads nowhere."""
    target = _target_of(name)
    return target if isinstance(target, tuple) else None


def _target_of(name: str) -> Any:
    return PRESETS[name] if name in PRESETS else SCHEDULERS.get(name)


def chosen_parts(config: SchedulerConfig, preset: Sequence[Any], num_stages: int = 1) -> list[Chosen]:
    """The three parts of a preset, less those that the settings replace. Raises ``ConfigError``."""
    parts = []
    for (kind, (registry, base)), default in zip(PART_REGISTRIES.items(), preset, strict=True):
        name = getattr(config, kind) or default or default_preset(num_stages)
        factory = registry.get(name)
        check_class(factory, base, kind, name)
        _check_version(factory, kind, name)
        _check_knows(factory, kind, name)
        parts.append(Chosen(kind, name, factory))
    return parts


def make_scheduler(
    config: SchedulerConfig, limits: Limits, resources: ResourceManager | None = None, *, num_stages: int = 1
) -> Scheduler:
    """Build what the settings name; raises as ``find_scheduler``."""
    return find_scheduler(config, num_stages)(limits, resources)


def _compose(config: SchedulerConfig, name: str, preset: tuple[Any, ...], num_stages: int) -> SchedulerFactory:
    kinds = (str, str, str | None)
    if len(preset) != 3 or not all(isinstance(part, kind) for part, kind in zip(preset, kinds, strict=True)):
        raise ConfigError("scheduler", name, f"names of ordering, capacity and micro-batch; this one is {preset!r}")
    parts = chosen_parts(config, preset, num_stages)
    given = sort_options(config.scheduler_options or {}, parts, _other_owner)
    ready = [(part, make_options(part, given[part.kind])) for part in parts]

    def make_composed(limits: Limits | None, resources: ResourceManager | None) -> Any:
        ordering, capacity, micro_batch = (
            make(part.factory, PART_REGISTRIES[part.kind][1], part.kind, part.name, *(() if own is None else (own,)))
            for part, own in ready
        )
        return limits and Scheduler(ordering, capacity, micro_batch, limits, resources)

    make_composed(None, None)  # what cannot be made is told now
    return make_composed


def _whole(config: SchedulerConfig, chosen: Chosen) -> SchedulerFactory:
    factory, name = chosen.factory, chosen.name
    if not callable(factory):
        raise ConfigError("scheduler", name, f"a scheduler's class, or a preset; this is {factory!r}")
    _check_version(factory, "scheduler", name)
    if inspect.isclass(factory):
        _check_members(factory, name)
    given = sort_options(config.scheduler_options or {}, [chosen], _other_owner)["scheduler"]
    options = make_options(chosen, given)
    takes = inspect.signature(factory).parameters
    optional: dict[str, Any] = {} if options is None else {"options": options}
    if "resources" in takes:
        optional["resources"] = None
    try:
        inspect.signature(factory).bind(None, **optional)
    except TypeError as error:
        call = ", ".join(["limits", *optional])
        raise ConfigError("scheduler", name, f"a class that is called as Class({call}): {error}") from error

    def make_whole(limits: Limits, resources: ResourceManager | None) -> Scheduler:
        if "resources" in optional:
            optional["resources"] = resources
        made: Any = make(factory, object, "scheduler", name, limits, **optional)
        _check_members(made, name)
        return made  # type: ignore[no-any-return]

    return make_whole


def _check_members(scheduler: Any, name: str) -> None:
    lacking = [member for member in MEMBERS if not hasattr(scheduler, member)]
    if lacking:
        raise ConfigError("scheduler", name, f"a scheduler; this one lacks {', '.join(lacking)}")


def _check_version(factory: Any, field: str, name: str) -> None:
    written_for = getattr(factory, "interface_version", INTERFACE_VERSION)
    if written_for != INTERFACE_VERSION:
        raise ConfigError(
            field,
            name,
            f"what is written for version {INTERFACE_VERSION} of the interface; this one is for {written_for}",
        )


def _check_knows(factory: Any, field: str, name: str) -> None:
    knows: Any = getattr(factory, "knows", WORDS)
    if not isinstance(knows, set | frozenset) or not knows <= WORDS:
        allowed = f"what knows of {', '.join(sorted(WORDS))}, or of none; this one knows {knows!r}"
        raise ConfigError(field, name, allowed)


def _other_owner(option: str) -> str | None:
    """Which registered part has an option of that name; those that cannot be loaded have none."""
    for kind, (registry, _) in PART_REGISTRIES.items():
        for name in registry.names():
            try:
                if option in Chosen(kind, name, registry.get(name)).options:
                    return f"{kind} {name}"
            except ConfigError:
                continue
    return None
