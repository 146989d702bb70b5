"""The real engine under one thread and under two, for a moment each; and what becomes of the figures."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import loops
from benchmarks.loops_turn import PARTS, BothLoops, Sections, gap_parts, measure, open_engine
from benchmarks.loops_turn import loops as driven_by
from benchmarks.transports.driver import BusyNeighbour
from llm_engine import SamplingParams
from llm_engine.core.step import StepPlan
from llm_engine.engine import engine as engine_module


@pytest.mark.parametrize("number", sorted(loops.LOOPS))
def test_a_step_is_retired_before_the_next_is_made(number: str) -> None:
    with driven_by(number), open_engine("demo") as (llm, sections):
        threads = [t.name for t in threading.enumerate() if t.name.startswith(llm.engine.name)]
        assert any(name.endswith("scheduling") for name in threads) == (number == "two")
        found = measure(llm, sections, requests=3, output_tokens=10, seed=0)
        steps = llm.get_stats()[-found["steps"] :]
        assert found["steps"] >= 10
        assert set(sections.waits) == {step.step for step in steps}
        assert all(this.retired_at <= after.began_at for this, after in pairwise(steps))
        for parts in gap_parts(steps):
            assert len(parts) == len(PARTS) and min(parts) >= 0.0
        assert all(found[key] > 0 for key in loops.FIGURES)
        assert found["tokens_per_s"] == pytest.approx(3 * 10 / found["steps"] * found["steps_per_s"])


def test_both_give_the_same_tokens() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    answers = []
    for number in loops.LOOPS:
        with driven_by(number), open_engine("demo") as (llm, _):
            prompts = [[5, 6, 7], list(range(20, 60)), [9] * 11]
            answers.append([output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)])
            # An engine that idles and is asked again wakes up, whoever drives it.
            assert llm.generate(prompts[0], params, use_tqdm=False)[0].outputs[0].token_ids == answers[-1][0]
    assert answers[0] == answers[1]


def test_engines_are_ordinary_again_afterwards() -> None:
    kept = engine_module.OutputThread, engine_module.SchedulingThread
    broken = driven_by("one")
    broken.__enter__()
    assert engine_module.OutputThread is BothLoops
    assert not broken.__exit__(KeyError, KeyError(), None)
    assert (engine_module.OutputThread, engine_module.SchedulingThread) == kept


class Computing:
    """Schedules by computing for a while, and retires at once."""

    def schedule(self, now: float) -> StepPlan | None:
        end = time.thread_time() + 0.03
        while time.thread_time() < end:
            pass
        return StepPlan(queue=0, step=int(now))

    def retire(self, plan: StepPlan, now: float) -> None:
        return None


def test_waiting_for_the_interpreter_lock_is_seen() -> None:
    sections, core = Sections(), Computing()
    sections.attach(core)  # type: ignore[arg-type]
    with BusyNeighbour():
        plan = core.schedule(1.0)
        core.retire(plan, 1.0)  # type: ignore[arg-type]
    # 30 ms of computing; a thread that wants the lock too gets it for 5 ms every 5 ms.
    assert set(sections.waits) == {1}
    assert sections.waits[1] > 5_000
    assert sections.of_nothing() < 1_000


def run(loop: str, repeat: int, **changes: Any) -> dict[str, Any]:
    return {
        "model": "demo", "loop": loop, "repeat": repeat, "load_before": 0.5, "other_cores": 0.0, "requests": 1,
        "steps": 10, "steps_per_s": 500.0 + repeat, "tokens_per_s": 500.0, "wait_p50_us": 2.0, "wait_p99_us": 3.0,
        "preempted_percent": 1.0, "gap_p50_us": 200.0, "gap_p99_us": 400.0, "nothing_us": 1.5,
        "gap_parts_us": {part: [10.0 + repeat, 20.0] for part in PARTS}, **changes,
    }  # fmt: skip


def test_tables() -> None:
    result: dict[str, Any] = {
        "when": "2026-01-02 03:04", "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 16.0, "system": "Linux"},
        "versions": {"python": "3.11"}, "repeats": 3, "output_tokens": 128, "failures": [],
        "runs": [run(loop, repeat) for repeat in range(3) for loop in ("one", "two")],
    }  # fmt: skip
    _, rows = loops.speed_table(result)
    assert [row[:3] for row in rows] == [
        ["demo, 1", "two threads", "501 (500..502)"], ["demo, 1", "one thread", "501 (500..502)"],
    ]  # fmt: skip
    _, rows = loops.gap_table(result)
    assert rows[0] == ["demo, 1", "two threads", *["11 / 20"] * len(PARTS)]
    page = loops.section(result)
    assert "1.5 µs are the measuring itself" in page and "128 tokens per request" in page


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = loops.parse_args([])
    assert (args.model, args.page.name) == (["demo", "tiny"], "transport.md")
    assert loops.parse_args(["--model", "demo"]).page is None
    for words in (["--repeats", "0"], ["--output-tokens", "1"], ["--model", "nowhere"], ["--page", str(tmp_path)]):
        with pytest.raises(SystemExit):
            loops.parse_args(words)
        assert words[0] in capsys.readouterr().err


@pytest.mark.slow
def test_every_row_is_measured_and_written(tmp_path: Path) -> None:
    file, page = tmp_path / "l.json", tmp_path / "page.md"
    page.write_text("# A page\n<!-- loops: written by benchmarks.loops -->\n<!-- loops: end -->\n")
    assert loops.main(["--quick", "--json", str(file), "--page", str(page)]) == 0
    result = json.loads(file.read_text())
    assert result["failures"] == []
    found = {(run["model"], run["loop"], run["requests"]) for run in result["runs"]}
    assert found == {(m, loop, n) for m in ("demo", "tiny") for loop in loops.LOOPS for n in loops.REQUESTS}
    assert page.read_text().count("| tiny, 64 | one thread |") == 2
