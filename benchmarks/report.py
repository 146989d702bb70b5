"""Tables out of the runs that ``benchmarks.offline`` has measured.

    python -m benchmarks.report benchmarks/results/offline-small.json

prints a kept result again. The ratios are made per repeat, from runs that lie minutes apart, and then summed up: what
drifts on the machine from repeat to repeat cancels out of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

from benchmarks.workloads import WORKLOADS

ENGINE = "llm-engine"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a workload that is worth a row."""

    workload: str
    key: str
    title: str
    higher_is_better: bool
    digits: int


FIGURES = (
    Figure("W1", "output_throughput", "W1 output tok/s", True, 0),
    Figure("W2", "ttft_ms", "W2 first token, ms", False, 1),
    Figure("W2", "itl_ms", "W2 inter-token, ms", False, 2),
    Figure("W3", "total_s", "W3 s", False, 2),
    Figure("W4", "total_s", "W4 s", False, 2),
)


@dataclass(frozen=True, slots=True)
class Spread:
    """What repeats of one figure came to."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ``ValueError`` when there are none."""
        if not values:
            raise ValueError("values: none given, at least one needed")
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        """``median (min..max)``."""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}..{self.high:,.{digits}f})"


def contenders(report: dict[str, Any]) -> list[str]:
    """Names in the order they ran, the engine first."""
    names = dict.fromkeys(run["contender"] for run in report["runs"])
    return sorted(names, key=lambda name: name != ENGINE)


def values(report: dict[str, Any], name: str, figure: Figure) -> dict[int, float]:
    """A contender's figure by repeat."""
    return {
        run["repeat"]: run[figure.key]
        for run in report["runs"]
        if run["contender"] == name and run["workload"] == figure.workload
    }


def best_peer(report: dict[str, Any], figure: Figure) -> str | None:
    """The peer with the best median; ``None`` without peers."""
    medians = {
        name: statistics.median(found.values())
        for name in contenders(report)
        if name != ENGINE and (found := values(report, name, figure))
    }
    if not medians:
        return None
    choose = max if figure.higher_is_better else min
    return choose(medians, key=lambda name: medians[name])


def ratio(report: dict[str, Any], figure: Figure) -> Spread | None:
    """Engine / best peer, over the repeats that both finished."""
    peer = best_peer(report, figure)
    if peer is None:
        return None
    ours, theirs = values(report, ENGINE, figure), values(report, peer, figure)
    both = [ours[repeat] / theirs[repeat] for repeat in ours if repeat in theirs]
    return Spread.of(both) if both else None


def speed_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row per figure, a column per contender, the ratio last."""
    names = contenders(report)
    rows = []
    for figure in FIGURES:
        found = [values(report, name, figure) for name in names]
        if not any(found):
            continue
        cells = [Spread.of(list(one.values())).text(figure.digits) if one else "-" for one in found]
        spread = ratio(report, figure)
        arrow = "higher" if figure.higher_is_better else "lower"
        against = f"{spread.text(2)} of {best_peer(report, figure)}" if spread else "-"
        rows.append([f"{figure.title} ({arrow} is better)", *cells, against])
    return ["median (min..max)", *names, "engine / best peer"], rows


def memory_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: peak memory per workload, the engine's against what it needs.

    What it needs: weights + KV + 600 MiB, with the KV cache that the workload fills, not the pool that was allowed.
    """
    names = contenders(report)
    rows = []
    for workload, shape in WORKLOADS.items():
        peaks = {
            name: [
                run["peak_rss_mb"] for run in report["runs"] if run["contender"] == name and run["workload"] == workload
            ]
            for name in names
        }
        if not any(peaks.values()):
            continue
        kv = shape.kv_tokens * report["model"]["kv_bytes_per_token"] / 2**20
        needed = report["model"]["weight_bytes"] / 2**20 + kv + 600
        ours = f"{max(peaks[ENGINE]) / needed:.2f} x {needed:,.0f}" if peaks.get(ENGINE) else "-"
        rows.append([workload, *(f"{max(peaks[name]):,.0f}" if peaks[name] else "-" for name in names), ours])
    return ["peak MiB", *names, "engine / (weights + KV + 600)"], rows


def load_line(report: dict[str, Any]) -> str:
    """How busy the machine was with other things."""
    before = Spread.of([run["load_before"] for run in report["runs"]])
    others = Spread.of([run["other_cores"] for run in report["runs"]])
    return (
        f"Load average before a run {before.text(2)}; cores that other processes kept busy meanwhile {others.text(2)}."
    )


def machine_line(report: dict[str, Any]) -> str:
    """What was measured, where and when."""
    machine, model = report["machine"], report["model"]
    return (
        f"Model `{model['name']}` ({model['weight_bytes'] / 1e6:.0f} MB of weights), bf16, "
        f"{report['threads']} threads each, {report['repeats']} repeats in turn, {report['when']}. "
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']:.0f} GiB, {machine['system']}."
    )


def versions_line(report: dict[str, Any]) -> str:
    """What each contender is made of."""
    found = {run["contender"]: run["versions"] for run in report["runs"]}
    texts = [f"{name}: " + ", ".join(f"{k} {v}" for k, v in found[name].items()) for name in contenders(report)]
    return "Versions - " + "; ".join(texts) + "."


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Lines of a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def terminal_table(header: list[str], rows: list[list[str]]) -> Table:
    """The same for the terminal."""
    from rich.table import Table

    table = Table()
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        # What stands in brackets goes on a line of its own, so that several columns fit a terminal.
        table.add_row(*(cell.replace(" (", "\n(") for cell in row))
    return table


def markdown(report: dict[str, Any]) -> str:
    """The whole report as a page."""
    parts = [f"# Offline workloads, `{report['model']['name']}`", machine_line(report), load_line(report)]
    for header, rows in (speed_table(report), memory_table(report)):
        parts.append(markdown_table(header, rows))
    parts += [f"Failed: {one['contender']}, repeat {one['repeat'] + 1}: {one['error']}" for one in report["failures"]]
    return "\n\n".join([*parts, versions_line(report)]) + "\n"


def show(report: dict[str, Any]) -> None:
    """The same on the terminal."""
    from rich.console import Console

    console = Console()
    console.print(machine_line(report), load_line(report), sep="\n", highlight=False)
    for header, rows in (speed_table(report), memory_table(report)):
        console.print(terminal_table(header, rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print a kept result again.")
    parser.add_argument("file", type=Path)
    show(json.loads(parser.parse_args().file.read_text(encoding="utf-8")))
