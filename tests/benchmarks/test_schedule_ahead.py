"""Two engines in turn for a moment, and what becomes of the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import schedule_ahead
from benchmarks.schedule_ahead_turn import figures, measure, open_engine
from llm_engine.core.trace import StepStats


def test_both_sides_answer_the_same_and_only_one_looks_ahead() -> None:
    found = {}
    for side, ahead in (("off", False), ("on", True)):
        with open_engine("demo", "inproc", 1, 3, ahead) as llm:
            found[side] = measure(llm, 3, 16, seed=1)
    assert found["off"]["tokens_digest"] == found["on"]["tokens_digest"]
    assert found["off"]["num_ahead"] == 0 < found["on"]["num_ahead"]
    assert set(schedule_ahead.FIGURES) < set(found["on"])


def step(begin: float, end: float) -> StepStats:
    return StepStats(**dict.fromkeys(StepStats.__dataclass_fields__, 0) | {"busy": ((begin, end),)})  # type: ignore[arg-type]


def test_gaps_are_between_the_end_of_a_step_and_the_begin_of_the_next() -> None:
    found = figures([step(0.0, 1.0), step(1.1, 2.1), step(2.2, 3.2), step(3.4, 4.4)], batch=8)
    assert found["step_p50_us"] == pytest.approx(1e6)
    assert found["gap_p50_us"] == pytest.approx(1e5)
    assert found["gap_p50_percent"] == pytest.approx(10)
    assert found["idle_percent"] == pytest.approx(100 * 0.4 / 3.4)
    assert found["tokens_per_s"] == pytest.approx(8 * 3 / 3.4)


def run(side: str, number: int, **changes: Any) -> dict[str, Any]:
    gap = 300.0 if side == "off" else 20.0 + number
    return {
        "model": "tiny", "threads": 1, "load_before": 0.1, "other_cores": 0.0, "side": side, "batch": 16,
        "round": number, "num_steps": 100, "num_ahead": 9, "tokens_digest": "same", "step_p50_us": 1000.0,
        "gap_p50_us": gap, "gap_p99_us": 2 * gap, "gap_p50_percent": gap / 10, "gap_p99_percent": gap / 5,
        "idle_percent": gap / 13, "itl_p50_us": 1000.0 + gap, "itl_p99_us": 2000.0,
        "tokens_per_s": 10000 / (1000 + gap), **changes,
    }  # fmt: skip


def result(*runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "when": "2026-01-02 03:04", "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 16.0, "system": "Linux"},
        "versions": {"python": "3.11"}, "repeats": 2, "executor": "inproc", "output_tokens": 128, "failures": [],
        "runs": list(runs),
    }  # fmt: skip


def test_tables_set_the_sides_of_a_round_against_each_other() -> None:
    # The second round began with the other side.
    found = result(run("off", 0), run("on", 0), run("on", 1), run("off", 1))
    _, rows = schedule_ahead.gap_table(found)
    assert [row[:2] for row in rows] == [
        ["tiny, 1 thread, 16", "after their tokens"], ["tiny, 1 thread, 16", "ahead"],
    ]  # fmt: skip
    assert rows[1][3] == "20.5 (20.0..21.0)"
    _, rows = schedule_ahead.gain_table(found)
    assert rows == [
        ["tiny, 1 thread, 16", "1.30", "1.02", "2.00", "2.00", "0.785 (0.785..0.785)", "1.274 (1.273..1.275)", "2 of 2"]
    ]
    assert "under 3 % of the step in 1 of 1 cases, at most 2.0 %." in schedule_ahead.section(found)


def test_a_gap_too_wide_and_other_tokens_are_named() -> None:
    found = result(run("off", 0), run("on", 0, gap_p50_percent=4.0, tokens_digest="other"))
    assert "in 0 of 1 cases; not in: tiny, 1 thread, 16 (4.0 %)." in schedule_ahead.about(found)
    assert schedule_ahead.differing(found) == ["tiny, 1 thread, 16"]


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    args = schedule_ahead.parse_args(["--model", "demo"])
    assert (args.batch, args.json.name) == ([1, 16, 64], "schedule-ahead.json")
    assert schedule_ahead.parse_args(["--model", "demo", "--quick"]).json is None
    for words in (
        ["--model", "nowhere"],
        ["--model", "demo", "--rounds", "0"],
        ["--model", "demo", "--output-tokens", "2"],
    ):
        with pytest.raises(SystemExit):
            schedule_ahead.parse_args(words)
        assert words[-2] in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_and_writes(tmp_path: Path) -> None:
    file, page = tmp_path / "s.json", tmp_path / "s.md"
    words = ["--model", "demo", "--threads", "1", "--quick", "--json", str(file), "--markdown", str(page)]
    assert schedule_ahead.main(words) == 0
    found = json.loads(file.read_text())
    assert found["failures"] == []
    assert {(one["batch"], one["side"]) for one in found["runs"]} == {(b, s) for b in (1, 4) for s in ("off", "on")}
    assert "| demo, 1 thread, 4 | ahead |" in page.read_text()
