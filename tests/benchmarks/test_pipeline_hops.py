"""What a hop costs: that every figure is one, and that the tables hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import pipeline_hops
from benchmarks.pipeline_hops import FIGURES, LINKS, ROWS, STAGES, main, measure


@pytest.mark.parametrize("executor", LINKS)
def test_a_step_is_divided_into_hops_and_stages(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pipeline_hops._VARIABLE, "0")  # so that it is put back
    found = measure(executor, 8, 2, 20)
    assert set(FIGURES) <= set(found)
    assert all(figure > 0 for figure in found.values())
    assert found["hop_p50_us"] <= found["hop_p99_us"]
    assert found["hop_p50_us"] < found["way_p50_us"]


def test_a_quick_run_writes_what_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(pipeline_hops._VARIABLE, "0")
    monkeypatch.setattr(pipeline_hops, "EXECUTORS", ("inproc",))
    monkeypatch.setattr(pipeline_hops, "WARM_UP", 2)
    assert main(["--quick", "--json", str(tmp_path / "hops.json"), "--markdown", str(tmp_path / "hops.md")]) == 0
    runs = json.loads((tmp_path / "hops.json").read_text())["runs"]
    assert {(run["size"], run["stages"]) for run in runs} == {(size, stages) for size in ROWS for stages in STAGES}
    assert "| threads, 1 MB |" in (tmp_path / "hops.md").read_text()
    assert "one more stage" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--repeats", "0"], ["--steps", "5"], ["--steps", "100000"]])
def test_impossible_numbers_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
