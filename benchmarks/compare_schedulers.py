"""The tables of docs/schedulers.md: the shipped workloads under the policies they tell apart, simulated.

    python -m benchmarks.compare_schedulers [--seed N]

prints them as markdown; the same for the same seed on every machine. Each is also ``llm-engine simulate --workload W
--compare ...``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks.report import markdown_table
from llm_engine.cli.compare import SHARING, SPEED, group_columns
from llm_engine.core.config import EngineConfig, SchedulerConfig
from llm_engine.simulation.comparison import compare
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.entries import parse_entries

CELLS = {
    "bursty-chat": "fcfs,priority,deadline,shortest-job,greedy",
    "long-documents": "fcfs,shortest-job,guaranteed-no-evict,static-batch,greedy",
    "many-tenants": "fcfs,fair,fair+guaranteed-no-evict,shortest-job",
    "shared-prefix": "fcfs,longest-prefix",
}
"""Workload to what ``--compare`` takes."""
SHOWN = ("Jain", "cache hits", "pauses", "recomputed", "KV mean")


def tables(seed: int = 0) -> Iterator[tuple[str, str]]:
    """Workload and table, one after the other."""
    for workload, entries in CELLS.items():
        found = list(
            compare(
                SimulationConfig(workload=workload),
                EngineConfig.of(seed=seed),
                parse_entries(entries, SchedulerConfig()),
            )
        )
        columns: list[tuple[str, list[str]]] = [("", [one.name for one in found])]
        for title, text in (*SPEED, *(column for column in SHARING if column[0] in SHOWN)):
            cells = [text(one.figures) for one in found]
            if any(cell not in ("-", "0 %") for cell in cells):
                columns.append((title, cells))
        for key in ("tenants", "priorities"):
            if found[0].figures[key]:
                columns += [(f"TTFT, {title}", cells) for title, cells in group_columns(found, key)]
        rows: list[Any] = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
        yield workload, markdown_table([title for title, _ in columns], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of docs/schedulers.md.")
    parser.add_argument("--seed", type=int, default=0)
    for workload, table in tables(parser.parse_args().seed):
        print(f"**{workload}**\n\n{table}\n", flush=True)


if __name__ == "__main__":
    main()
