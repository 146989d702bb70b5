"""A KV manager that keeps what was found once longer than what nobody asked for again.

    PYTHONPATH=examples llm-engine serve --kv-cache-manager keep_shared:KeepShared

Under plain LRU a flood of prompts that come once pushes out the system prompts that come again and again. Here a block
is on probation until somebody finds it, and is lost only when no block on probation is left: the two segments of SLRU
(Karedla, Love and Wherry 1994), without a bound for the second one.
"""

from __future__ import annotations

from llm_engine import KVCacheManager

ON_PROBATION, FOUND_AGAIN = 20, 60


class KeepShared(KVCacheManager):
    """Two segments by retention priority; within each, what was freed longest ago is lost first."""

    def retention(self, seq_id: int, index: int, *, found: bool) -> int:
        return FOUND_AGAIN if found else ON_PROBATION
