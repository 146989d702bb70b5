"""``llm-engine simulate``: a workload on a virtual pipeline, as a table, JSON, a picture, a trace."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from typing import Any

from ..core.config import CacheConfig, EngineConfig, SchedulerConfig
from ..simulation.config import SimulationConfig
from .settings import ENGINE_SETTINGS, SIMULATION_SETTINGS, resolve

ENGINE_NAMES = (
    *(field.name for field in fields(SchedulerConfig)),
    *(field.name for field in fields(CacheConfig) if field.name != "kv_cache_memory"),
    "dtype",
    "seed",
)
"""Settings of an engine that mean something here."""


def run(args: argparse.Namespace) -> int:
    """The command."""
    wanted = {**SIMULATION_SETTINGS, **{name: ENGINE_SETTINGS[name] for name in ENGINE_NAMES}}
    values = resolve(wanted, args)
    simulation = SimulationConfig(**{name: values.pop(name) for name in list(values) if name in SIMULATION_SETTINGS})
    engine = EngineConfig.of(**values)

    from ..simulation.report import figures
    from ..simulation.setup import set_up

    setup = set_up(simulation, engine)
    found: dict[str, Any] = figures(setup.simulator().run(setup.arrivals))
    found["settings"] = {
        **asdict(simulation),
        **{name: getattr(part, name) for part in (engine.scheduler, engine.cache) for name in _names(part)},
        "num_kv_blocks": setup.num_kv_blocks,
        "block_size": setup.block_size,
    }
    if args.json is not None:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2)
            file.write("\n")
    for name, value in found.items():
        if name != "settings":
            print(f"{name:20} {value}")
    return 0


def _names(part: Any) -> list[str]:
    return [field.name for field in fields(part) if field.name in ENGINE_NAMES]
