"""What a hop costs: that every figure is one, and that the tables hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import pipeline_hops
from benchmarks.pipeline_hops import FIGURES, LINKS, ROWS, STAGES, main, measure, stage_table


@pytest.mark.parametrize("executor", LINKS)
def test_a_step_is_divided_into_hops_and_stages(executor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pipeline_hops._VARIABLE, "0")  # so that it is put back
    measured = measure(executor, 8, 20)
    assert tuple(measured) == STAGES
    for stages, found in measured.items():
        assert set(FIGURES) <= set(found)
        assert all(found[name] > 0 for name in FIGURES)
        assert [len(found[name]) for name in ("hops_p50_us", "steps_p50_us")] == [stages - 1, stages]
    found = measured[3]
    assert min(*found["hops_p50_us"], *found["steps_p50_us"]) > 0
    assert sum(found["steps_p50_us"]) < found["way_p50_us"]
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
    page = (tmp_path / "hops.md").read_text()
    assert "| threads, 1 MB |" in page
    assert "| less its own step | a hop |" in page
    assert "threads," in capsys.readouterr().out


def test_one_more_stage_less_its_own_step_stands_beside_a_hop() -> None:
    about = {"executor": "zmq", "size": "1 MB"}
    few = {"stages": 2, "way_p50_us": 900.0, "hop_p50_us": 400.0, "hops_p50_us": [400.0], "steps_p50_us": [50.0, 90.0]}
    more = {
        "stages": 3, "way_p50_us": 1450.0, "hop_p50_us": 440.0, "hops_p50_us": [430.0, 450.0],
        "steps_p50_us": [50.0, 60.0, 95.0],
    }  # fmt: skip
    header, (row,) = stage_table({"runs": [about | few, about | more]})
    assert dict(zip(header, row, strict=True)) == {
        "link, activations": "processes, ipc, 1 MB",
        "one more stage p50, µs": "550",
        "its own step": "60.0",
        "less its own step": "490",
        "a hop": "420",
        "ratio": "1.17 (1.17..1.17)",
        "hop to the middle / to the last": "430 / 450",
    }


@pytest.mark.parametrize("words", [["--repeats", "0"], ["--steps", "5"], ["--steps", "100000"]])
def test_impossible_numbers_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
