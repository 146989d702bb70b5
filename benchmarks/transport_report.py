"""Tables out of the rows that ``benchmarks.transport`` has measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.published import circumstances, spread
from benchmarks.report import markdown_table, terminal_table
from benchmarks.transports.kinds import NEIGHBOURS, PAYLOADS, TRANSPORTS


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
                cells = [spread([run[column.key] for run in runs]) for column in COLUMNS]
                rows.append([TRANSPORTS[name].title, payload, *cells])
            elif name in result["missing"]:
                rows.append([TRANSPORTS[name].title, payload, result["missing"][name], *[""] * (len(COLUMNS) - 1)])
    return rows


def about(result: dict[str, Any]) -> str:
    """What the figures were measured on, and beside what."""
    lock = f"the interpreter lock's switch interval is {result['switch_interval_ms']:g} ms"
    return circumstances(result, f"{result['seconds']:g} s per figure, {lock}")


def section(result: dict[str, Any]) -> str:
    """What goes into a page: both tables, and what they were measured on."""
    parts = []
    for neighbour in NEIGHBOURS:
        parts += [f"With {'an' if neighbour == 'idle' else 'a'} {neighbour} neighbour thread:"]
        parts += [markdown_table(HEADER, table(result, neighbour))]
    return "\n\n".join([*parts, about(result)])


def show(result: dict[str, Any]) -> None:
    """The same on the terminal."""
    from rich.console import Console

    console = Console()
    for neighbour in NEIGHBOURS:
        shown = terminal_table(HEADER, table(result, neighbour))
        shown.title = f"{neighbour} neighbour"
        console.print(shown)
    console.print(about(result), highlight=False, markup=False)
