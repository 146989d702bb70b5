"""How much memory a stage may still take, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_CGROUPS = (
    (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.current",
        "/sys/fs/cgroup/memory.stat",
        ("inactive_file", "active_file"),
    ),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)


def available_memory() -> int:
    """Bytes this process could take: what the machine has left, or its control group where that is less."""
    free = _machine()
    for limit, usage, statistics, caches in _CGROUPS:
        left = _group(limit, usage, statistics, caches)
        if left is not None:
            free = min(free, left)
    return max(free, 0)


def return_freed_memory() -> None:
    """Hand memory that was freed but kept by the C library's allocator back to the system, where it can be asked to.

    Loading frees a buffer for every weight it lays out anew: a fifth of the model would stay resident for nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group(limit: str, usage: str, statistics: str, caches: tuple[str, ...]) -> int | None:
    """What a control group has left, counting file pages it can drop: weights that were read just now are of the active
    ones. ``None`` where it sets no limit."""
    try:
        ceiling = Path(limit).read_text().strip()
        if ceiling == "max" or int(ceiling) >= 1 << 60:
            return None
        used = int(Path(usage).read_text())
        for line in Path(statistics).read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in caches:
                used -= int(value)
        return int(ceiling) - used
    except (OSError, ValueError):
        return None
