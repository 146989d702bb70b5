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
            print(f"  {name:<{width}}  {summary}{_default(name) if flag == '--scheduler' else ''}")
    print("Each also takes package.module:Class.")
    return 0


def _default(preset: str) -> str:
    one, several = registry.default_preset(1), registry.default_preset(2)
    if preset == one:
        return " (default)" if one == several else " (default with one stage)"
    return " (default with several stages)" if preset == several else ""
