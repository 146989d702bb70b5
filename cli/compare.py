"""``llm-engine simulate --compare``: one workload under several schedulers; as a table, JSON, a page of pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..core.config import EngineConfig
from ..core.errors import ConfigError
from ..simulation.config import SimulationConfig
from .tables import new_table

if TYPE_CHECKING:
    from ..simulation.comparison import Compared

Column = tuple[str, Callable[[dict[str, Any]], str]]
"""Title, and the text from a run's figures."""

SPEED: tuple[Column, ...] = (
    ("tokens/s", lambda f: f"{f['output_throughput']:.0f}"),
    ("TTFT p50", lambda f: _seconds(f["ttft_s"]["p50"])),
    ("p99", lambda f: _seconds(f["ttft_s"]["p99"])),
    ("ITL p50", lambda f: _milliseconds(f["itl_s"]["p50"])),
    ("p99", lambda f: _milliseconds(f["itl_s"]["p99"])),
    ("good", lambda f: f"{100 * f['good_share']:.0f} %"),
    ("good/s", lambda f: f"{f['goodput']:.2f}"),
)
SHARING: tuple[Column, ...] = (
    ("Jain", lambda f: "-" if f["fairness"] is None else f"{f['fairness']:.3f}"),
    ("cache hits", lambda f: f"{100 * f['prefix_hit_rate']:.0f} %"),
    ("pauses", lambda f: str(f["preemptions"])),
    ("recomputed", lambda f: str(f["recomputed_tokens"])),
    ("shed", lambda f: str(f["shed_requests"])),
    ("KV mean", lambda f: f"{100 * f['kv_usage_mean']:.0f} %"),
    ("peak", lambda f: f"{100 * f['kv_usage_peak']:.0f} %"),
)


def run_comparison(
    simulation: SimulationConfig, engine: EngineConfig, text: str, *, json_path: str | None, plot_path: str | None
) -> int:
    """Run what ``--compare`` names, print the tables, write the files. Raises as ``simulation.comparison.compare``."""
    from ..simulation.comparison import compare
    from ..simulation.entries import parse_entries
    from .simulate import progress, settings_of

    if engine.observability.trace is not None:
        raise ConfigError("trace", engine.observability.trace, "nothing beside compare: a trace is of one run")
    entries = parse_entries(text, engine.scheduler)
    found: list[Compared] = []
    with progress(None) as on_finished:
        found.extend(compare(simulation, engine, entries, on_finished=on_finished))
    title = _title(found[0])
    _print(found, title)
    if json_path is not None:
        runs = [{"name": one.name, **one.figures, "settings": settings_of(one.setup, one.run)} for one in found]
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump({"runs": runs}, file, indent=1)
            file.write("\n")
    if plot_path is not None:
        from ..simulation.comparison_plot import plot_comparison

        plot_comparison(found, plot_path, title=title)
    return 0


def _title(one: Compared) -> str:
    setup = one.setup
    stages = "1 stage" if len(setup.split) == 1 else f"{len(setup.split)} stages"
    load = setup.simulation.workload or "the load of the settings"
    return f"{load}, {len(setup.arrivals)} requests; {setup.model}, {stages}, {setup.stages_are}, simulated"


def _print(found: Sequence[Compared], title: str) -> None:
    from rich.console import Console, Group

    parts: list[Any] = [title]
    for columns in (SPEED, SHARING):
        made = new_table("scheduler", *(name for name, _ in columns))
        for one in found:
            made.add_row(one.name, *(text(one.figures) for _, text in columns))
        parts.append(made)
    for key in ("tenants", "priorities"):
        if found[0].figures[key]:
            groups = list(group_columns(found, key))
            made = new_table("TTFT, p50 / p99", *(name for name, _ in groups))
            for index, one in enumerate(found):
                made.add_row(one.name, *(cells[index] for _, cells in groups))
            parts.append(made)
    failures = [f"{one.name}: {one.run.failure}" for one in found if one.run.failure is not None]
    if failures:
        parts.append("first of the requests that ended unserved:\n" + "\n".join(failures))
    # Where the output is no terminal, lines may be as long as they are.
    width = max(Console(width=1000).measure(part).maximum for part in parts)
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, width)
    console.print(Group(*parts))


MOST_GROUPS = 4
"""Tenants or priorities that are shown one by one; of more, the largest and what is worst among the others."""


def group_columns(found: Sequence[Compared], key: str) -> Iterator[tuple[str, list[str]]]:
    """Title and a cell for each run, of the groups ``key`` of the reports."""
    from ..simulation.comparison import largest_group

    groups = list(found[0].figures[key])
    shown = groups if len(groups) <= MOST_GROUPS else [largest_group(found[0].figures[key])]
    for name in shown:
        spreads = [one.figures[key][name]["ttft_s"] for one in found]
        title = f"priority {name}" if key == "priorities" else name
        yield title, [f"{_seconds(spread['p50'])} / {_seconds(spread['p99'])}" for spread in spreads]
    if rest := [name for name in groups if name not in shown]:
        cells = []
        for one in found:
            spreads = [one.figures[key][name]["ttft_s"] for name in rest]
            cells.append(" / ".join(_seconds(max(spread[p] for spread in spreads)) for p in ("p50", "p99")))
        yield f"worst of {len(rest)} others", cells


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:.0f} ms"
