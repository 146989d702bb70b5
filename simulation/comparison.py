"""One workload under several schedulers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..core.config import EngineConfig, SchedulerConfig
from ..core.errors import CapacityError
from .config import SimulationConfig
from .report import figures
from .run import SimulationRun
from .setup import Setup, set_up


@dataclass(frozen=True, slots=True)
class Compared:
    """One scheduler's run."""

    name: str
    """As the entry is spelled."""
    setup: Setup
    run: SimulationRun
    figures: dict[str, Any]


def compare(
    simulation: SimulationConfig,
    engine: EngineConfig,
    entries: Mapping[str, SchedulerConfig],
    *,
    on_finished: Callable[[int], None] | None = None,
) -> Iterator[Compared]:
    """Run each entry, in their order; all get the same arrivals. ``on_finished`` hears how many requests have ended.

    Every name is resolved before the first run. Raises as ``set_up``, and ``CapacityError`` where one serves nobody.
    """
    first: Setup | None = None
    setups = {}
    for name, config in entries.items():
        own = replace(engine, scheduler=config)
        setups[name] = set_up(simulation, own, arrivals=first.arrivals if first else None)
        first = first or setups[name]
    for name, setup in setups.items():
        run = setup.simulator(on_finished=on_finished).run(setup.arrivals)
        if not run.e2es:
            raise CapacityError(f"{name}: nobody could be served: {run.failure}")
        yield Compared(name, setup, run, figures(run, setup.slo))


def largest_group(groups: Mapping[str, Any]) -> str:
    """Of a report's tenants or priorities, the one with the most requests."""
    return max(groups, key=lambda name: int(groups[name]["requests"]))
