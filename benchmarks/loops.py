"""One thread that schedules and collects in turn, against the engine's own two, with one plan in flight.

    python -m benchmarks.loops

One stage in a thread of the process. A repeat runs every model once under each, every time in a new process; then comes
the next repeat. The tables go to the terminal, to ``benchmarks/results`` and into ``docs/transport.md``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import machine, published
from benchmarks.children import ROOT, ChildError, json_lines
from benchmarks.published import spread
from benchmarks.report import markdown_table, terminal_table

LOOPS = {"two": "two threads", "one": "one thread"}
REQUESTS = (1, 64)
QUICK_TOKENS = 8
MAX_TOKENS = 900
"""What the engine keeps of its steps is a thousand."""
CHILD_TIMEOUT = 300.0
FIGURES = {
    "steps_per_s": "steps/s",
    "tokens_per_s": "output tok/s",
    "wait_p50_us": "wait p50, µs",
    "wait_p99_us": "wait p99, µs",
    "gap_p50_us": "gap p50, µs",
    "gap_p99_us": "gap p99, µs",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--model", nargs="+", default=["demo", "tiny"], metavar="DIR",
        help="folders of checkpoints; demo is the bundled one, tiny is made for the occasion (default: demo tiny)",
    )  # fmt: skip
    parser.add_argument("--output-tokens", type=int, default=128, help="of each request (default: 128)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5)")
    published.add_arguments(parser, "loops", "transport.md")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: must be 1 or more")
    if not 2 <= args.output_tokens <= MAX_TOKENS:
        parser.error(f"--output-tokens {args.output_tokens}: must be from 2 to {MAX_TOKENS}")
    for model in args.model:
        if model not in ("demo", "tiny") and not (Path(model) / "config.json").is_file():
            parser.error(f"--model {model}: no config.json there")
    if args.quick:
        args.repeats, args.output_tokens = 1, QUICK_TOKENS
    published.settle_arguments(parser, args, "loops", "transport.md", whole=args.model == ["demo", "tiny"])
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 1 if an engine failed."""
    args = parse_args(argv)
    result = measure_all(args.model, args.repeats, args.output_tokens)
    for error in result["failures"]:
        print(f"{error['who']} failed, repeat {error['repeat'] + 1}: {error['error']}", file=sys.stderr)
    if not result["runs"]:
        return 1
    show(result)
    published.publish(args, "loops", result, "One thread or two", section(result))
    return 1 if result["failures"] else 0


def measure_all(models: Sequence[str], repeats: int, output_tokens: int) -> dict[str, Any]:
    """Every model once per repeat under each loop; which of the two comes first changes from repeat to repeat."""
    versions = {name: version(name) for name in ("torch", "xformers")}
    result = published.begin(repeats, versions) | {"output_tokens": output_tokens}
    total = repeats * len(models) * len(LOOPS) * len(REQUESTS)
    with folders(models) as found, tqdm(total=total, desc="Loops", unit="run", dynamic_ncols=True) as bar:
        for repeat in range(repeats):
            for name, folder in found.items():
                for loop in LOOPS if repeat % 2 == 0 else reversed(LOOPS):
                    measure(name, folder, loop, repeat, result, bar)
    return result


@contextmanager
def folders(models: Sequence[str]) -> Iterator[dict[str, str]]:
    """Each model's name in the table, and what the engine is given."""
    with tempfile.TemporaryDirectory(prefix="loops-") as made:
        found = {}
        for model in models:
            if model == "tiny":
                make_tiny(made)
            found[Path(model).name] = f"{made}/tiny" if model == "tiny" else model
        yield found


def make_tiny(folder: str) -> None:
    """In a process of its own, so that this one never holds torch."""
    command = [sys.executable, "-m", "benchmarks.make_models", folder, "tiny"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CHILD_TIMEOUT)
    if made.returncode:
        sys.exit(f"tiny could not be made:\n{made.stderr}")


def measure(name: str, folder: str, loop: str, repeat: int, result: dict[str, Any], bar: tqdm[Any]) -> None:
    """One engine's life; its rows, or its failure, go into the result."""
    command = [sys.executable, "-m", "benchmarks.loops_turn", loop, folder, "--seed", str(repeat)]
    command += ["--requests", *map(str, REQUESTS), "--output-tokens", str(result["output_tokens"])]
    load, others = os.getloadavg()[0], machine.OtherWork()
    lines = []
    try:
        with closing(json_lines(command, CHILD_TIMEOUT)) as found:
            for line in found:
                lines.append(line)
                bar.set_postfix_str(f"{name}, {line['requests']} requests, {LOOPS[loop]}", refresh=False)
                bar.update()
    except ChildError as error:
        result["failures"].append({"who": f"{name}, {LOOPS[loop]}", "repeat": repeat, "error": str(error)})
    about = {"model": name, "loop": loop, "repeat": repeat, "load_before": load, "other_cores": others.cores()}
    result["runs"] += [{**about, **line} for line in lines]


def grouped(result: dict[str, Any]) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """The first cells of each row, and the runs behind it."""
    for model in dict.fromkeys(run["model"] for run in result["runs"]):
        for requests in dict.fromkeys(run["requests"] for run in result["runs"]):
            for loop, title in LOOPS.items():
                key = (model, requests, loop)
                runs = [run for run in result["runs"] if (run["model"], run["requests"], run["loop"]) == key]
                if runs:
                    yield [f"{model}, {requests}", title], runs


def speed_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what each loop comes to."""
    rows = [[*first, *(spread([run[key] for run in runs]) for key in FIGURES)] for first, runs in grouped(result)]
    return ["model, requests", "driven by", *FIGURES.values()], rows


def gap_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: where the gap goes."""
    rows, parts = [], list(result["runs"][0]["gap_parts_us"])
    for first, runs in grouped(result):
        medians = [
            [statistics.median(run["gap_parts_us"][part][which] for run in runs) for which in (0, 1)] for part in parts
        ]
        rows.append([*first, *(f"{p50:,.0f} / {p99:,.0f}" for p50, p99 in medians)])
    return ["p50 / p99, µs", "driven by", *parts], rows


def about(result: dict[str, Any]) -> str:
    """What the figures were measured on, and beside what."""
    nothing = statistics.median(run["nothing_us"] for run in result["runs"])
    preempted = statistics.median(run["preempted_percent"] for run in result["runs"])
    return published.circumstances(
        result,
        f"{result['output_tokens']} tokens per request; of the waits {nothing:.1f} µs are the measuring itself, and in "
        f"{preempted:.1f} % of the steps the kernel took the core away",
    )


def section(result: dict[str, Any]) -> str:
    """What goes into a page."""
    return "\n\n".join([markdown_table(*speed_table(result)), markdown_table(*gap_table(result)), about(result)])


def show(result: dict[str, Any]) -> None:
    """The same on the terminal."""
    from rich.console import Console

    console = Console()
    console.print(terminal_table(*speed_table(result)), terminal_table(*gap_table(result)))
    console.print(about(result), highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
