"""``llm-engine schedulers``: what ``--scheduler``, ``--ordering``, ``--capacity`` and ``--micro-batch`` may name."""

from __future__ import annotations

from ..schedulers import registry


def run() -> int:
    """Print each registered name with a line about it."""
    for flag, names in (
        ("--scheduler", registry.SCHEDULERS),
        ("--ordering", registry.ORDERINGS),
        ("--capacity", registry.CAPACITIES),
        ("--micro-batch", registry.MICRO_BATCHES),
    ):
        described = list(names.describe())
        width = max((len(name) for name, _ in described), default=0)
        print(f"{flag} NAME")
        for name, summary in described:
            default = " (default)" if flag == "--scheduler" and name == registry.DEFAULT_PRESET else ""
            print(f"  {name:<{width}}  {summary}{default}")
    print("Each also takes package.module:Class.")
    return 0
