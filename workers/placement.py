"""Where each stage computes: how many threads, on which CPUs, on which CUDA device. Standard library only.

    place_stages(config.parallel, read_cores())[stage]

A stage process pins itself before it imports torch, since the threads that torch starts inherit the CPUs of the thread
that starts them. Stages that are threads of one process share its CPUs and take the number of threads alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from ..core.config import ParallelConfig
from ..core.errors import ConfigError
from ..core.stage_settings import parse_cpus, parse_stage_cpus, parse_stage_devices

_WITHIN_NODE = 0.75
"""Stages stay within a NUMA node while that leaves each this much of an even share."""


@dataclass(frozen=True, slots=True)
class Core:
    """A physical core, as far as this process may use it."""

    cpus: frozenset[int]
    """Its hardware threads."""
    node: int = 0
    """NUMA node it belongs to."""


@dataclass(frozen=True, slots=True)
class StagePlacement:
    """What a stage computes with on the CPU."""

    num_threads: int | None
    """``None``: as many as torch takes by itself."""
    cpus: frozenset[int] | None
    """To pin the stage's process to; ``None`` leaves it where the system puts it."""


def place_stages(parallel: ParallelConfig, cores: Sequence[Core]) -> list[StagePlacement]:
    """Threads and CPUs of every stage, by stage. Pure: looks at nothing but its arguments.

    With ``stage_cpus`` as ``auto`` one stage is left alone. Several take as many whole cores each, none shared,
    neighbours together, in one NUMA node where that costs little. What does not divide is left to the engine's own
    threads: a pipeline is no faster for one stage that has a core more. With fewer cores than stages each takes a
    hardware thread; with fewer of these too each has one thread that the system moves about. A stage computes with a
    thread a core, or with ``cpu_threads``; where these are more than its CPUs it is not pinned.
    Raises ``ConfigError`` for CPUs that this process may not use.
    """
    num_stages, threads = parallel.pipeline_parallel_size, parallel.cpu_threads
    given = parse_stage_cpus(parallel.stage_cpus, num_stages)
    if given is not None:
        allowed = frozenset[int]().union(*(core.cpus for core in cores))
        if not all(group <= allowed for group in given):
            raise ConfigError("stage_cpus", parallel.stage_cpus, f"CPUs this process may use: {show_cpus(allowed)}")
        return [StagePlacement(threads or sum(bool(core.cpus & group) for core in cores), group) for group in given]
    if num_stages == 1:
        return [StagePlacement(threads, None)]
    groups = list(_share_out(cores, num_stages))
    if parallel.stage_cpus == "none" or not groups:
        return [StagePlacement(threads or max(len(cores) // num_stages, 1), None)] * num_stages
    return [
        StagePlacement(threads or len(group), cpus if threads is None or threads <= len(cpus) else None)
        for group in groups
        for cpus in [frozenset[int]().union(*(core.cpus for core in group))]
    ]


def stage_device(parallel: ParallelConfig, stage: int, device_count: int) -> int:
    """Number of the CUDA device that a stage runs on: what ``stage_devices`` says, or one after the other.

    Raises ``ConfigError`` for a device that is not there.
    """
    given = parse_stage_devices(parallel.stage_devices, parallel.pipeline_parallel_size)
    if given is None:
        return stage % device_count
    if max(given) >= device_count:
        allowed = "0, the only device there is" if device_count == 1 else f"devices 0 to {device_count - 1}"
        raise ConfigError("stage_devices", parallel.stage_devices, allowed)
    return given[stage]


def read_cores(cpus: Collection[int] | None = None, root: Path = Path("/sys/devices/system")) -> list[Core]:
    """The cores of the given CPUs, of those the calling thread may use when absent.

    What the system does not tell is taken to be plain: each CPU a core, all in one node.
    """
    allowed = frozenset(os.sched_getaffinity(0) if cpus is None else cpus)
    nodes: dict[int, int] = {}
    for folder in root.glob("node/node[0-9]*"):
        nodes |= dict.fromkeys(_read_cpus(folder / "cpulist"), int(folder.name.removeprefix("node")))
    cores = {}
    for cpu in sorted(allowed):
        siblings = _read_cpus(root / f"cpu/cpu{cpu}/topology/thread_siblings_list")
        cores[cpu] = Core((siblings | {cpu}) & allowed, nodes.get(cpu, 0))
    return [core for cpu, core in cores.items() if cpu == min(core.cpus)]


def show_cpus(cpus: Collection[int]) -> str:
    """``0-3,8``"""
    runs = [[cpu for _, cpu in run] for _, run in groupby(enumerate(sorted(cpus)), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _share_out(cores: Sequence[Core], num_stages: int) -> Iterator[list[Core]]:
    """As many cores for each stage, neighbours together; nothing where there are too few."""
    if len(cores) < num_stages:
        cores = [Core(frozenset([cpu]), core.node) for core in cores for cpu in sorted(core.cpus)]
    ordered = sorted(cores, key=lambda core: (core.node, min(core.cpus)))
    nodes = [list(group) for _, group in groupby(ordered, lambda core: core.node)]
    even = len(ordered) // num_stages
    if not even:
        return
    within = range(even, math.ceil(_WITHIN_NODE * even) - 1, -1)
    size = next((size for size in within if sum(len(node) // size for node in nodes) >= num_stages), None)
    if size is None:
        size, nodes = even, [ordered]
    parts = (node[at : at + size] for node in nodes for at in range(0, len(node) - size + 1, size))
    yield from islice(parts, num_stages)


def _read_cpus(path: Path) -> frozenset[int]:
    """A list of CPUs as the system writes it; empty where it says nothing."""
    try:
        return parse_cpus(path.read_text(encoding="ascii").strip()) or frozenset()
    except (OSError, ValueError):
        return frozenset()
