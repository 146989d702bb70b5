"""What ``--compare`` names: schedulers, presets, parts, and settings of each, in one word.

An entry is words joined by ``+``. A word that is no ``NAME=VALUE`` names a scheduler, a preset or a part: an ordering,
a capacity or a micro-batch; parts that nobody names are those of the settings, then of the preset. ``NAME=VALUE`` sets
a field of ``SchedulerConfig``, and any other name an option of the chosen parts.

    fair    fair+guaranteed-no-evict    fcfs+balanced+num_queues=6    deadline+ordering=package.module:Class
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from ..core.config import SchedulerConfig
from ..core.errors import ConfigError
from ..core.setting import settings_of
from ..schedulers.registry import PART_REGISTRIES, SCHEDULERS, default_preset, preset_of

_SETTINGS = settings_of(SchedulerConfig)


def parse_entries(text: str, config: SchedulerConfig) -> dict[str, SchedulerConfig]:
    """Entries with commas between them, each as spelled, with the settings it stands for. Raises ``ConfigError``.

    ``config`` is what they have in common; the scheduler in it must be the default, since each entry names its own.
    """
    if config.scheduler != "default":
        raise ConfigError("scheduler", config.scheduler, "nothing beside compare, which names the schedulers")
    found: dict[str, SchedulerConfig] = {}
    for entry in (entry.strip() for entry in text.split(",")):
        if entry in found:
            raise ConfigError("compare", text, f"each entry once; {entry} is there twice")
        found[entry] = _parse(entry, config)
    return found


def resolved_names(config: SchedulerConfig, num_stages: int) -> dict[str, str | None]:
    """``scheduler``, ``ordering``, ``capacity`` and ``micro_batch`` as they come to run; no parts where a scheduler has
    none of ours."""
    name = default_preset(num_stages) if config.scheduler == "default" else config.scheduler
    preset = None
    with contextlib.suppress(ConfigError):  # what leads nowhere is refused where it is built
        preset = preset_of(name)
    if preset is None:
        return {"scheduler": name, "ordering": None, "capacity": None, "micro_batch": None}
    ordering, capacity, micro_batch = preset
    return {
        "scheduler": name,
        "ordering": config.ordering or ordering,
        "capacity": config.capacity or capacity,
        "micro_batch": config.micro_batch or micro_batch or default_preset(num_stages),
    }


def _parse(entry: str, config: SchedulerConfig) -> SchedulerConfig:
    settings: dict[str, Any] = {}
    options: dict[str, str] = {}
    for word in (word.strip() for word in entry.split("+")):
        name, equals, value = word.partition("=")
        if not equals:
            kind, value = _kind_of(entry, word), word
        elif (kind := name.replace("-", "_")) not in _SETTINGS:
            options[name] = value
            continue
        if kind in settings:
            raise ConfigError("compare", entry, f"one {kind}; it names {settings[kind]} and {value}")
        settings[kind] = _SETTINGS[kind].parse(value)
    if options:
        settings["scheduler_options"] = {**(config.scheduler_options or {}), **options}
    return replace(config, **settings)


def _kind_of(entry: str, word: str) -> str:
    """Which setting a name is for. What is both a preset and a part is that part: the other two are the usual ones."""
    for kind, (registry, _) in PART_REGISTRIES.items():
        if word in registry.names():
            return kind
    if ":" in word or word == "default" or word in SCHEDULERS.names():
        return "scheduler"
    parts = [name for registry, _ in PART_REGISTRIES.values() for name in registry.names()]
    known = list(dict.fromkeys(["default", *SCHEDULERS.names(), *parts]))
    raise ConfigError("compare", entry, f"{', '.join(known)}, package.module:Class, joined by +; {word!r} is none")
