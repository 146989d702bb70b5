"""Plans made ahead of their tokens against plans made after them: how long a stage has nothing to do between steps.

    python -m benchmarks.schedule_ahead --model bench-models/tiny bench-models/small

One stage in the process of its engine. A process per model and number of threads holds both engines, which take turns;
ratios are made per round, between runs that lie seconds apart. The tables go to the terminal and to
``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import machine, published
from benchmarks.children import ROOT, ChildError, json_lines
from benchmarks.published import spread
from benchmarks.report import Spread, markdown_table, terminal_table

BATCHES = (1, 16, 64)
THREADS = (1, 2)
SIDES = {"off": "after their tokens", "on": "ahead"}
CHILD_TIMEOUT = 1800.0
GOAL_PERCENT = 3.0
"""What the gap is to stay under, of the step."""
FIGURES = {
    "step_p50_us": "step p50, µs",
    "gap_p50_us": "gap p50, µs",
    "gap_p50_percent": "of the step, %",
    "gap_p99_us": "gap p99, µs",
    "gap_p99_percent": "of the step, %",
    "idle_percent": "idle, %",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", nargs="+", required=True, metavar="DIR", help="folders of checkpoints, or demo")
    parser.add_argument("--executor", default="inproc", choices=("inproc", "zmq"), help="(default: inproc)")
    parser.add_argument("--threads", type=int, nargs="+", default=list(THREADS), help="a stage's (default: 1 2)")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), help="decodes (default: 1 16 64)")
    parser.add_argument("--output-tokens", type=int, default=128, help="of each request (default: 128)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    results = ROOT / "benchmarks" / "results"
    parser.add_argument("--json", type=Path, metavar="FILE", help="(default: benchmarks/results/schedule-ahead.json)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="(default: the same, .md)")
    parser.add_argument(
        "--quick", action="store_true", help="one hasty round to see that all works; writes only files that are named"
    )
    args = parser.parse_args(argv)
    for model in args.model:
        if model != "demo" and not (Path(model) / "config.json").is_file():
            parser.error(f"--model {model}: no config.json there")
    if args.quick:
        args.rounds, args.output_tokens, args.batch = 1, 16, [1, 4]
    else:
        args.json = args.json or results / "schedule-ahead.json"
        args.markdown = args.markdown or results / "schedule-ahead.md"
    if min([args.rounds, *args.threads, *args.batch]) < 1:
        parser.error("--rounds, --threads and --batch: 1 or more")
    if not 8 <= args.output_tokens <= 900:
        parser.error(f"--output-tokens {args.output_tokens}: must be from 8 to 900, which is what an engine keeps of")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns 1 if an engine failed or answered otherwise."""
    args = parse_args(argv)
    result = measure_all(args)
    for error in result["failures"]:
        print(f"{error['who']} failed: {error['error']}", file=sys.stderr)
    if not result["runs"]:
        return 1
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(f"# Plans ahead of their tokens\n\n{section(result)}\n", encoding="utf-8")
    return 1 if result["failures"] or differing(result) else 0


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Every model under every number of threads."""
    versions = {name: version(name) for name in ("torch", "xformers")}
    result = published.begin(args.rounds, versions) | {"executor": args.executor, "output_tokens": args.output_tokens}
    total = len(args.model) * len(args.threads) * len(args.batch) * args.rounds * len(SIDES)
    with tqdm(total=total, desc="Ahead", unit="run", dynamic_ncols=True) as bar:
        for model in args.model:
            for threads in args.threads:
                measure(args, model, threads, result, bar)
    return result


def measure(args: argparse.Namespace, model: str, threads: int, result: dict[str, Any], bar: tqdm[Any]) -> None:
    """Both engines' life; their runs, or their failure, go into the result."""
    command = [sys.executable, "-m", "benchmarks.schedule_ahead_turn", model, "--executor", args.executor]
    command += ["--threads", str(threads), "--rounds", str(args.rounds), "--output-tokens", str(args.output_tokens)]
    command += ["--batch", *map(str, args.batch)]
    load, others = os.getloadavg()[0], machine.OtherWork()
    lines = []
    try:
        with closing(json_lines(command, CHILD_TIMEOUT)) as found:
            for line in found:
                lines.append(line)
                bar.set_postfix_str(f"{Path(model).name}, {threads} threads, {line['batch']} decodes", refresh=False)
                bar.update()
    except ChildError as error:
        who = f"{Path(model).name}, {threads} threads"
        result["failures"].append({"who": who, "repeat": 0, "error": str(error)})
    about = {"model": Path(model).name, "threads": threads, "load_before": load, "other_cores": others.cores()}
    result["runs"] += [{**about, **line} for line in lines]


def grouped(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """The name of each case, and both sides' runs round by round."""
    cases: dict[tuple[str, int, int], dict[str, list[dict[str, Any]]]] = {}
    for run in result["runs"]:
        case = cases.setdefault((run["model"], run["threads"], run["batch"]), {side: [] for side in SIDES})
        case[run["side"]].append(run)
    for (model, threads, batch), sides in cases.items():
        name = f"{model}, {threads} {'thread' if threads == 1 else 'threads'}, {batch}"
        yield name, {side: sorted(runs, key=lambda run: run["round"]) for side, runs in sides.items()}


def gap_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what a stage waits between steps, plans made after their tokens and ahead."""
    rows = [
        [name, SIDES[side], *(spread([run[key] for run in runs]) for key in FIGURES)]
        for name, sides in grouped(result)
        for side, runs in sides.items()
        if runs
    ]
    return ["model, threads, decodes", "plans made", *FIGURES.values()], rows


def gain_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what it comes to."""
    rows = []
    for name, sides in grouped(result):
        pairs = list(zip(sides["off"], sides["on"], strict=False))
        if not pairs:
            continue
        row = [name]
        for key, unit in (("itl_p50_us", 1000), ("itl_p99_us", 1000)):
            row += [f"{Spread.of([run[key] / unit for run in sides[side]]).median:,.2f}" for side in SIDES]
        for key in ("itl_p50_us", "tokens_per_s"):
            row.append(Spread.of([on[key] / off[key] for off, on in pairs]).text(3))
        same = sum(off["tokens_digest"] == on["tokens_digest"] for off, on in pairs)
        rows.append([*row, f"{same} of {len(pairs)}"])
    header = [
        "model, threads, decodes", "ITL p50 after, ms", "ahead", "ITL p99 after, ms", "ahead", "ITL p50, ahead / after",
        "tok/s, ahead / after", "rounds with the same tokens",
    ]  # fmt: skip
    return header, rows


def differing(result: dict[str, Any]) -> list[str]:
    """Cases in which a round's answers were not the same."""
    return [
        name
        for name, sides in grouped(result)
        if any(a["tokens_digest"] != b["tokens_digest"] for a, b in zip(sides["off"], sides["on"], strict=False))
    ]


def verdict(result: dict[str, Any]) -> str:
    """Whether the goal is met, and where not."""
    medians = {
        name: Spread.of([run["gap_p50_percent"] for run in sides["on"]]).median
        for name, sides in grouped(result)
        if sides["on"]
    }
    over = [f"{name} ({percent:.1f} %)" for name, percent in medians.items() if percent >= GOAL_PERCENT]
    words = f"Gap p50 under {GOAL_PERCENT:.0f} % of the step in {len(medians) - len(over)} of {len(medians)} cases"
    return f"{words}; not in: {', '.join(over)}." if over else f"{words}, at most {max(medians.values()):.1f} %."


def about(result: dict[str, Any]) -> str:
    """What the figures were measured on, and beside what."""
    where = {"inproc": "one stage, a thread of the engine's process", "zmq": "one stage, a process of its own"}
    said = f"bf16, {where[result['executor']]}, {result['output_tokens']} tokens per request, in turn"
    return f"{verdict(result)}\n\n{published.circumstances(result, said)}"


def section(result: dict[str, Any]) -> str:
    """What goes into a page."""
    return "\n\n".join([markdown_table(*gap_table(result)), markdown_table(*gain_table(result)), about(result)])


def show(result: dict[str, Any]) -> None:
    """The same on the terminal."""
    from rich.console import Console

    console = Console()
    console.print(terminal_table(*gap_table(result)), terminal_table(*gain_table(result)))
    console.print(about(result), highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
