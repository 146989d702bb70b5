"""The grid and the headline, a little of each; what becomes of the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pipeline_grid, pipeline_headline
from benchmarks.pipeline_cells import BUDGETS, DEFAULT_BUDGET, PUBLISHED, UNLIMITED, Cell, cells, requests, simulate


def test_the_grid_has_every_stage_count_link_and_mix() -> None:
    grid = list(cells())
    assert len(grid) == len({cell.key for cell in grid})
    assert {1, 2, 4, 8, 16} == {cell.stages for cell in grid}
    assert {"none", "pcie4", "lan-10g", "lan-1g"} == {cell.link for cell in grid}
    assert len({cell.mix for cell in grid}) == 7


def test_a_cells_requests_are_the_same_every_time() -> None:
    for cell in list(cells())[:7]:
        assert requests(cell) == requests(cell)
    stream = next(cell for cell in cells() if cell.mix == "stream")
    times = [arrival.at for arrival in requests(stream)]
    assert times == sorted(times) and times[0] < times[-1]


def test_devices_that_cannot_hold_the_model_are_told_apart() -> None:
    assert "cannot hold" in simulate(Cell("rtx-4070", "llama-2-13b", 2, "none", "few"), "greedy", 512)["error"]


def test_a_few_cells_stand_where_the_grid_should(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, page = tmp_path / "grid.json", tmp_path / "grid.md"
    arguments = ["--quick", "--processes", "1", "--json", str(kept), "--markdown", str(page)]
    assert pipeline_grid.main(arguments) == 0
    found = json.loads(kept.read_text())["cells"]
    assert len(found) == 5
    for entry in found.values():
        assert list(map(int, entry["greedy"])) == list(BUDGETS)
        assert list(map(int, entry["balanced"])) == list(map(int, entry[PUBLISHED])) == [DEFAULT_BUDGET, UNLIMITED]
        assert entry["balanced"][str(UNLIMITED)]["failed_requests"] == 0
    assert page.read_text() in capsys.readouterr().out
    assert pipeline_grid.main([*arguments, "--only", "balanced"]) == 0
    assert json.loads(kept.read_text())["cells"] == found, "the same again"


def verdict(ratio: float, *, rule: float = 1.0) -> dict[str, Any]:
    run = {"makespan_s": 10.0 * ratio, "ttft_s": 1.0, "itl_p99_s": 0.1}
    compared = {"run": run, "to_best": ratio, "to_rule": rule, "to_greedy": ratio}
    greedy = {64: {"makespan_s": 10.0, "ttft_s": 1.0, "itl_p99_s": 0.1}}
    return {
        "cell": Cell("h100", "llama-2-7b", 2, "none", "few"), "best_budget": 64, "best": 10.0, "greedy": greedy,
        DEFAULT_BUDGET: compared, UNLIMITED: compared,
    }  # fmt: skip


def test_one_cell_in_ten_may_be_five_percent_behind_and_none_fifteen() -> None:
    assert pipeline_grid.holds([verdict(1.0)] * 9 + [verdict(1.1)])
    assert not pipeline_grid.holds([verdict(1.0)] * 8 + [verdict(1.1)] * 2)
    assert not pipeline_grid.holds([verdict(1.0)] * 99 + [verdict(1.2)])


def test_no_cell_may_be_behind_the_published_rule_by_more_than_two_that_are_level_differ() -> None:
    allowed = pipeline_grid.LEVEL
    assert pipeline_grid.holds([verdict(1.0)] * 9 + [verdict(1.0, rule=allowed)])
    assert not pipeline_grid.holds([verdict(1.0)] * 99 + [verdict(1.0, rule=allowed + 0.001)])
    one_budget = verdict(1.0) | {UNLIMITED: verdict(1.0, rule=1.03)[UNLIMITED]}
    assert not pipeline_grid.holds([verdict(1.0), one_budget]), "the other budget's comparison counts too"


def test_the_page_says_how_often_it_is_behind_the_published_rule() -> None:
    text = pipeline_grid.page([verdict(1.0, rule=rule) for rule in (0.9, 1.0, 1.001, 1.01, 1.03)])
    assert "6 of 10 comparisons at all, 4 by more than 0.5%; the largest ratio is 1.0300." in text


def test_losers_are_named_the_worst_first() -> None:
    text = pipeline_grid.page([verdict(1.0), verdict(1.07), verdict(1.1, rule=1.02)])
    lines = [line for line in text.splitlines() if line.startswith("| llama-2-7b on 2 x h100")]
    assert [line.split("|")[3].strip() for line in lines] == ["1.100", "1.100", "1.070", "1.070", "1.020", "1.020"]


def test_no_result_to_keep_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        pipeline_grid.parse_args(["--only", "balanced", "--json", str(tmp_path / "missing.json")])


@pytest.mark.slow
def test_the_headline_says_which_pair_comes_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "headline.json"
    assert pipeline_headline.main(["--quick", "--processes", "1", "--json", str(kept)]) == 0
    found = json.loads(kept.read_text())
    errors = [entry["error"] for entry in found["scan"]]
    assert errors == sorted(errors)
    nearest = found["nearest"]
    there = nearest.pop("balanced_s")
    assert nearest == found["scan"][0]
    assert 0 < there < nearest["unified_s"]
    greedy, *_, balanced = (entry for entry in found["contest"] if entry["unlimited_kv"])
    assert greedy["makespan_s"] / balanced["makespan_s"] >= 2.08
    assert {entry["preemptions"] for entry in found["contest"] if entry["unlimited_kv"]} == {0}
    printed = capsys.readouterr().out
    assert "earest" in printed
    assert f"`balanced` takes {there:.1f} s there" in printed


def test_a_pair_reproduces_both_times_or_none_does() -> None:
    entry = {
        "budget": UNLIMITED,
        "unlimited_kv": False,
        "host_ms": 1.0,
        "gbit": 0.5,
        "unified_s": 146.0,
        "rule_s": 70.0,
        "balanced_s": 60.04,
    }
    reproduced = pipeline_headline.verdict(entry | {"error": 0.01})
    assert "come about with 1 ms" in reproduced
    assert reproduced.endswith("146.0 and 70.0 s. `balanced` takes 60.0 s there.")
    assert pipeline_headline.verdict(entry | {"error": 0.3}).startswith("No pair")
