"""Tables out of the rows that ``benchmarks.transport`` has measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.report import Spread, load_line, markdown_table, terminal_table
from benchmarks.transports.kinds import NEIGHBOURS, PAYLOADS, TRANSPORTS

NOT_QUIET = 0.1
"""Cores busy with other things above which a result is called provisional."""


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a row."""

    key: str
    title: str


COLUMNS = (
    Column("round_trips_per_s", "round trips/s"),
    Column("messages_per_s", "one-way messages/s"),
    Column("wake_p50_us", "wake-up p50, µs"),
    Column("wake_p99_us", "wake-up p99, µs"),
)
HEADER = ["transport", "payload", *(column.title for column in COLUMNS)]


def table(result: dict[str, Any], neighbour: str) -> list[list[str]]:
    """A row per payload and transport; a transport that could not be measured says why."""
    rows = []
    for payload in PAYLOADS:
        for name in dict.fromkeys([*TRANSPORTS, *(run["transport"] for run in result["runs"])]):
            runs = [
                run
                for run in result["runs"]
                if (run["transport"], run["payload"], run["neighbour"]) == (name, payload, neighbour)
            ]
            if runs:
                cells = [_spread([run[column.key] for run in runs]) for column in COLUMNS]
                rows.append([TRANSPORTS[name].title, payload, *cells])
            elif name in result["missing"]:
                rows.append([TRANSPORTS[name].title, payload, result["missing"][name], *[""] * (len(COLUMNS) - 1)])
    return rows


def _spread(values: list[float]) -> str:
    spread = Spread.of(values)
    text = spread.text(0 if spread.median >= 100 else 1)
    return text if len(values) > 1 else text.partition(" ")[0]


def about(result: dict[str, Any]) -> list[str]:
    """What was measured, where, when, and beside what."""
    machine = result["machine"]
    made_of = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        f"Median (min..max) over {result['repeats']} rounds of {result['seconds']:g} s per figure, {result['when']}. "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; {made_of}; the interpreter lock's switch "
        f"interval is {result['switch_interval_ms']:g} ms. {load_line(result)}"
    ]
    if Spread.of([run["other_cores"] for run in result["runs"]]).median > NOT_QUIET:
        lines.append("**Provisional:** the machine was not quiet.")
    for failure in result["failures"]:
        first = failure["error"].split("\n")[0]
        lines.append(f"Failed: {failure['transport']}, repeat {failure['repeat'] + 1}: {first}")
    return lines


def section(result: dict[str, Any]) -> str:
    """What goes into a page: both tables, and what they were measured on."""
    parts = []
    for neighbour in NEIGHBOURS:
        parts += [f"With {'an' if neighbour == 'idle' else 'a'} {neighbour} neighbour thread:"]
        parts += [markdown_table(HEADER, table(result, neighbour))]
    return "\n\n".join([*parts, *about(result)])


def markdown(result: dict[str, Any]) -> str:
    """The section as a page of its own."""
    return f"# Transports\n\n{section(result)}\n"


def show(result: dict[str, Any]) -> None:
    """The same on the terminal."""
    from rich.console import Console

    console = Console()
    for neighbour in NEIGHBOURS:
        shown = terminal_table(HEADER, table(result, neighbour))
        shown.title = f"{neighbour} neighbour"
        console.print(shown)
    console.print(*about(result), sep="\n", highlight=False, markup=False)
