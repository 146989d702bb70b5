"""Balanced micro-batches over a grid of pipelines on the virtual clock: against the best greedy budget of each cell,
and against the published rule (vLLM PR #19873) with the same budget.

    python -m benchmarks.pipeline_grid

Every cell is simulated with ``greedy`` under every budget, with ``balanced`` and the published rule under the default
budget and an unlimited one. Memory is what the devices have. The tables go to the terminal and to
``benchmarks/results/pipeline-grid.{json,md}``; ``--only balanced`` keeps what is there of the others.

Asked is: within 5 % of the best greedy budget in nine of ten cells and nowhere 15 % behind, and never behind the
published rule, by more than the half percent within which two rules are level (``LEVEL``). The page says how many are
behind at all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.children import ROOT
from benchmarks.pipeline_cells import BUDGETS, DEFAULT_BUDGET, PUBLISHED, UNLIMITED, Cell, cells, simulate
from benchmarks.report import markdown_table

WITHIN, NEVER = 1.05, 1.15
LEVEL = 1.005
"""Up to this ratio of makespans two rules are level: what the last request's length decides."""
COMPARED = (DEFAULT_BUDGET, UNLIMITED)
SCHEDULERS = {"greedy": BUDGETS, "balanced": COMPARED, PUBLISHED: COMPARED}
RESULTS = ROOT / "benchmarks" / "results" / "pipeline-grid"
Run = tuple[Cell, str, int]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=2, help="simulations at a time (default: 2)")
    parser.add_argument("--only", choices=("balanced",), help="run only this one; the others from the kept result")
    parser.add_argument("--quick", action="store_true", help="a few cells; writes only files that are named")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"(default: {RESULTS.name}.json)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help=f"(default: {RESULTS.name}.md)")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes {args.processes}: must be 1 or more")
    if not args.quick:
        args.json = args.json or RESULTS.with_suffix(".json")
        args.markdown = args.markdown or RESULTS.with_suffix(".md")
    if args.only and not (args.json and args.json.is_file()):
        parser.error(f"--only {args.only}: needs a kept result, --json FILE")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, print, write; returns 1 if the grid does not show what it should."""
    args = parse_args(argv)
    chosen = [cell for cell in cells() if not args.quick or (cell.stages, cell.link, cell.mix) == (4, "none", "few")]
    kept = json.loads(args.json.read_text(encoding="utf-8"))["cells"] if args.only else {}
    found = run_all(chosen, args.only, args.processes)
    for cell in chosen:
        kept.setdefault(cell.key, {"cell": asdict(cell)}).update(found[cell.key])
    verdicts = [verdict for entry in kept.values() if (verdict := judge(entry))]
    text = page(verdicts)
    print(text)
    if args.json:
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in kept.items())
        args.json.write_text(f'{{"cells": {{\n{lines}\n}}}}\n', encoding="utf-8")  # a line for each cell
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    return 0 if holds(verdicts) else 1


def run_all(chosen: Sequence[Cell], only: str | None, processes: int) -> dict[str, dict[str, Any]]:
    """By cell, then by scheduler, then by budget: figures."""
    runs: list[Run] = [
        (cell, name, budget)
        for cell in chosen
        for name, budgets in SCHEDULERS.items()
        if only in (None, name)
        for budget in budgets
    ]
    found: dict[str, dict[str, Any]] = {cell.key: {} for cell in chosen}
    with ProcessPoolExecutor(processes) as pool, tqdm(total=len(runs), desc="Grid", unit="run") as bar:
        for (cell, name, budget), figures in zip(runs, pool.map(_simulate, runs, chunksize=4), strict=True):
            found[cell.key].setdefault(name, {})[str(budget)] = figures
            bar.update()
    return found


def _simulate(run: Run) -> dict[str, Any]:
    return simulate(*run)


def judge(entry: dict[str, Any]) -> dict[str, Any] | None:
    """What a cell shows, or ``None`` where nobody can run there."""
    greedy = {int(budget): run for budget, run in entry["greedy"].items() if "makespan_s" in run}
    if not greedy:
        return None
    best = min(greedy, key=lambda budget: float(greedy[budget]["makespan_s"]))
    verdict = {"cell": Cell(**entry["cell"]), "best_budget": best, "best": greedy[best]["makespan_s"], "greedy": greedy}
    for budget in COMPARED:
        run, rule = entry["balanced"][str(budget)], entry[PUBLISHED][str(budget)]
        if "makespan_s" in run:
            verdict[budget] = {
                "run": run,
                "to_best": run["makespan_s"] / greedy[best]["makespan_s"],
                "to_rule": run["makespan_s"] / rule["makespan_s"],
                "to_greedy": run["makespan_s"] / greedy[budget]["makespan_s"],
            }
    return verdict


def ratios(verdicts: Sequence[dict[str, Any]], budget: int, key: str) -> list[float]:
    """Of the cells that run with this budget."""
    return [verdict[budget][key] for verdict in verdicts if budget in verdict]


def holds(verdicts: Sequence[dict[str, Any]]) -> bool:
    """Whether it is within 5 % of the best greedy budget in nine of ten cells and nowhere 15 % behind it, and nowhere
    behind the published rule by more than two that are level differ."""
    found = [ratios(verdicts, budget, "to_best") for budget in COMPARED]
    near = all(share(values, WITHIN) >= 0.9 and max(values) <= NEVER for values in found)
    return near and all(max(ratios(verdicts, budget, "to_rule")) <= LEVEL for budget in COMPARED)


def against_rule(verdicts: Sequence[dict[str, Any]]) -> str:
    """How often it is behind the published rule, and how far."""
    values = [value for budget in COMPARED for value in ratios(verdicts, budget, "to_rule")]
    counts = [sum(value > limit for value in values) for limit in (1.0, LEVEL)]
    return (
        f"Behind the published rule with the same budget: {counts[0]} of {len(values)} comparisons at all, {counts[1]} "
        f"by more than {LEVEL - 1:.1%}; the largest ratio is {max(values):.4f}."
    )


def share(values: Sequence[float], limit: float) -> float:
    """Of the values, how many are within the limit."""
    return sum(value <= limit for value in values) / len(values)


def page(verdicts: Sequence[dict[str, Any]]) -> str:
    """The Markdown."""
    parts = [
        "# Balanced micro-batches over a grid of pipelines",
        f"{len(verdicts)} cells on the virtual clock, memory as the devices have it; ratios of makespans, below 1 is "
        "`balanced` ahead. Written by `python -m benchmarks.pipeline_grid`.",
        markdown_table(*summary(verdicts)),
        against_rule(verdicts),
        "By kind of cell, with the default budget: median and largest ratio to the best greedy budget.",
        markdown_table(*by_kind(verdicts)),
        "Cells more than 5 % behind the best greedy budget:",
        markdown_table(*losers(verdicts, "to_best", WITHIN)),
        f"Cells more than {LEVEL - 1:.1%} behind the published rule with the same budget:",
        markdown_table(*losers(verdicts, "to_rule", LEVEL)),
    ]
    return "\n\n".join(parts) + "\n"


def summary(verdicts: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what the whole grid comes to."""
    rows = []
    for budget in COMPARED:
        best, rule, greedy = (ratios(verdicts, budget, key) for key in ("to_best", "to_rule", "to_greedy"))
        rows += [
            [named(budget), "the best greedy budget of the cell", *spread(best), f"{share(best, WITHIN):.1%}"],
            [named(budget), "greedy, same budget", *spread(greedy), f"{share(greedy, WITHIN):.1%}"],
            [named(budget), "the published rule, same budget", *spread(rule), f"{share(rule, WITHIN):.1%}"],
        ]
    return ["budget", "balanced against", "least", "median", "largest", "within 5 %"], rows


def spread(values: Sequence[float]) -> list[str]:
    return [f"{value:.3f}" for value in (min(values), statistics.median(values), max(values))]


def named(budget: int) -> str:
    return "unlimited" if budget == UNLIMITED else str(budget)


def by_kind(verdicts: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: stages, links and mixes each by themselves."""
    rows = []
    kinds: dict[str, Callable[[Cell], Any]] = {
        "stages": lambda cell: cell.stages,
        "link": lambda cell: cell.link,
        "mix": lambda cell: cell.mix,
        "device": lambda cell: f"{cell.model}, {cell.hardware}",
    }
    for kind, of in kinds.items():
        for value in sorted({of(verdict["cell"]) for verdict in verdicts}):
            here = [verdict for verdict in verdicts if of(verdict["cell"]) == value]
            best, rule = (ratios(here, DEFAULT_BUDGET, key) for key in ("to_best", "to_rule"))
            cells_of = [str(len(here)), *(f"{statistics.median(r):.3f}, {max(r):.3f}" for r in (best, rule))]
            rows.append([f"{kind} {value}", *cells_of])
    return ["", "cells", "to the best greedy budget", "to the published rule"], rows


def losers(verdicts: Sequence[dict[str, Any]], key: str, limit: float) -> tuple[list[str], list[list[str]]]:
    """Header and rows, the worst first."""
    rows = []
    for verdict, budget in sorted(behind(verdicts, key, limit), key=lambda pair: -pair[0][pair[1]][key]):
        found, best = verdict[budget], verdict["greedy"][verdict["best_budget"]]
        rows.append(
            [
                str(verdict["cell"]), named(budget), f"{found[key]:.3f}", f"{found['run']['makespan_s']:.2f}",
                f"{verdict['best']:.2f} ({named(verdict['best_budget'])})",
                f"{found['run']['ttft_s']:.2f} / {best['ttft_s']:.2f}",
                f"{found['run']['itl_p99_s'] * 1e3:.0f} / {best['itl_p99_s'] * 1e3:.0f}",
            ]
        )  # fmt: skip
    header = ["cell", "budget", "ratio", "balanced, s", "best greedy, s (budget)", "TTFT, s", "ITL p99, ms"]
    return header, rows


def behind(verdicts: Sequence[dict[str, Any]], key: str, limit: float) -> Iterator[tuple[dict[str, Any], int]]:
    """Cells and budgets beyond the limit."""
    for verdict in verdicts:
        for budget in COMPARED:
            if budget in verdict and verdict[budget][key] > limit:
                yield verdict, budget


if __name__ == "__main__":
    sys.exit(main())
