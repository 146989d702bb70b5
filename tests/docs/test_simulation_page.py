"""``docs/simulation.md`` quotes the published run's figures as they are in the kept result."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from benchmarks.pipeline_cells import PUBLISHED, UNLIMITED
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "simulation.md").read_text(encoding="utf-8")
SECTION = " ".join(PAGE[PAGE.index("## A published run, taken apart") : PAGE.index("## Fitted to a real run")].split())


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    text = (ROOT / "benchmarks" / "results" / "pipeline-headline.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def test_the_place_and_both_times_are_those_of_the_scan(kept: dict[str, Any]) -> None:
    best = kept["scan"][0]
    assert best["budget"] == UNLIMITED and not best["unlimited_kv"]
    place = f"{best['host_ms']:.1f} ms of host time a micro-batch and {best['gbit']:.3f} Gbit/s"
    assert f"{place} give {best['unified_s']:.1f} s and {best['rule_s']:.1f} s" in SECTION


def test_the_time_of_balanced_at_that_place_is_the_kept_one(kept: dict[str, Any]) -> None:
    if "nearest" not in kept:
        pytest.skip("the kept result is older than this figure")
    assert f"`balanced` takes {kept['nearest']['balanced_s']:.1f} s there" in SECTION


@pytest.mark.parametrize("unlimited_kv", [False, True])
def test_the_table_is_the_contest_with_an_unlimited_budget(unlimited_kv: bool, kept: dict[str, Any]) -> None:
    runs = {
        entry["scheduler"]: entry
        for entry in kept["contest"]
        if entry["unlimited_kv"] == unlimited_kv and entry["budget"] == UNLIMITED
    }
    begins = "for everybody" if unlimited_kv else f"{runs['greedy']['kv_tokens']:,} tokens"
    (row,) = re.findall(rf"\| {re.escape(begins)}[^|]*\|([^|]+)\|([^|]+)\|([^|]+)\|([^|]+)\|", SECTION)
    times = [float(cell.split()[0]) for cell in row[:3]]
    assert times == [round(runs[name]["makespan_s"], 2) for name in ("greedy", PUBLISHED, "balanced")]
    faster = runs["greedy"]["makespan_s"] / runs["balanced"]["makespan_s"]
    assert f"({faster:.1f} times" in row[2]
    assert row[3].strip() == f"{max(runs['balanced']['stage_busy']) * 100:.0f} %"
