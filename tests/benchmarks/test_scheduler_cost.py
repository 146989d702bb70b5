"""The tables of what a decision costs, from rows as ``llm-engine bench scheduler`` gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scheduler_cost
from llm_engine.cli.scheduler_cost import PARTS


def run(part: str, scheduler: str, waiting: int, p50: float, **more: Any) -> dict[str, Any]:
    return {
        "part": part, "load_before": 0.1, "other_cores": 0.0, "scheduler": scheduler, "running": 256,
        "waiting": waiting, "mix": "decode", "p50_us": p50, "p99_us": 2 * p50, "best_us": p50 / 2,
        "schedule_us": 0.75 * p50, "update_us": 0.25 * p50, "parts_us": dict.fromkeys(PARTS, 10.0), **more,
    }  # fmt: skip


def result(*runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "when": "2026-01-02 03:04", "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 16.0, "system": "Linux"},
        "versions": {"python": "3.11"}, "repeats": 3, "steps": 40, "failures": [], "runs": list(runs),
    }  # fmt: skip


def test_ratios_are_of_rounds_with_their_range() -> None:
    peer = {"p50_us": 3000.0, "ratios": [25.0, 30.0, 27.0]}
    found = result(run("beside", "greedy", 0, 110.0, vllm=peer), run("beside", "greedy", 1000, 120.0))
    header, rows = scheduler_cost.beside_table(found)
    assert header[-2:] == ["vLLM p50", "vLLM / ours"]
    assert rows[0] == ["decode", "256", "0", "110", "220", "82", "28", "3,000", "27.0 (25.0..30.0)"]
    assert rows[1][-2:] == ["-", "-"]
    assert scheduler_cost.parts_table(found)[1] == [["decode", "256", *[f"{100 / len(PARTS):.0f}"] * len(PARTS)]]


def test_each_preset_is_set_against_itself_with_nobody_waiting() -> None:
    found = result(
        run("each", "greedy", 0, 100.0), run("each", "greedy", 1000, 104.0), run("each", "fair", 1000, 130.0)
    )
    header, rows = scheduler_cost.each_table(found)
    assert header == ["p50, µs", "decode, 0 waiting", "decode, 1,000 waiting"]
    assert rows == [["`greedy`", "100", "104 (+4 %)"], ["`fair`", "-", "130"]]


def test_a_page_without_its_marks_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Nothing here\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        scheduler_cost.parse_args(["--page", str(page)])


def test_the_page_has_its_marks() -> None:
    args = scheduler_cost.parse_args(["--vllm", "python"])
    assert args.page.name == "schedulers.md"
    assert args.json.name == "scheduler-cost.json"


def test_a_quick_round_measures_and_writes_what_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cost.json"
    assert scheduler_cost.main(["--quick", "--json", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert {row["part"] for row in found["runs"]} == {"beside", "each"}
    assert {row["running"] for row in found["runs"]} == {16}
