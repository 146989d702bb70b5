"""What the figures were measured on, and what else ran there meanwhile. Linux only."""

from __future__ import annotations

import os
import platform
import resource
import time
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """The machine, in a few facts."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": platform.system(),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


class OtherWork:
    """Cores that processes other than this one and its children keep busy, from its making to ``cores()``."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cores(self) -> float:
        """Call it when the children have been waited for: only then is their time known."""
        start, busy, own = self._start
        others = (_busy_seconds() - busy) - (_own_seconds() - own)
        return max(others, 0.0) / (time.perf_counter() - start)


def _busy_seconds() -> float:
    with open("/proc/stat", encoding="utf-8") as file:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
