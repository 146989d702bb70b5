"""``llm-engine simulate --compare``, in process."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from llm_engine.cli.main import main

SMALL = ["--requests", "40", "--input-len", "64", "--output-len", "16", "--rate", "20"]


def compare(tmp_path: Path, entries: str, *words: str) -> list[dict[str, Any]]:
    target = tmp_path / "out.json"
    assert main(["simulate", *words, "--compare", entries, "--json", str(target)]) == 0
    runs: list[dict[str, Any]] = json.loads(target.read_text(), parse_constant=pytest.fail)["runs"]
    return runs


def test_each_run_is_what_the_same_scheduler_gives_alone(tmp_path: Path) -> None:
    runs = compare(tmp_path, "greedy,static-batch", *SMALL)
    assert [run["name"] for run in runs] == ["greedy", "static-batch"]
    alone = tmp_path / "alone.json"
    assert main(["simulate", *SMALL, "--scheduler", "greedy", "--json", str(alone)]) == 0
    expected = json.loads(alone.read_text())
    found = {key: value for key, value in runs[0].items() if key not in ("name", "settings")}
    assert found == {key: value for key, value in expected.items() if key != "settings"}


def test_all_get_the_same_requests(tmp_path: Path) -> None:
    runs = compare(tmp_path, "fcfs,shortest-job", *SMALL, "--lengths", "lognormal", "--tenants", "3", "--seed", "5")
    assert len({run["output_tokens"] for run in runs}) == 1
    assert all(run["finished_requests"] == 40 for run in runs)
    assert all(list(run["tenants"]) == ["tenant-0", "tenant-1", "tenant-2"] for run in runs)


def test_the_tables_show_what_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "--priority-levels", "2", "--slo-ttft-ms", "300"]
    runs = compare(tmp_path, "priority,fcfs+greedy+max_num_seqs=8", *words)
    printed = capsys.readouterr().out
    for run in runs:
        lines = [line.split() for line in printed.splitlines() if line.split()[:1] == [run["name"]]]
        assert len(lines) == 3, printed
        assert f"{run['output_throughput']:.0f}" in lines[0]
        assert f"{run['ttft_s']['p99']:.2f}" in lines[0]
        assert f"{1e3 * run['itl_s']['p50']:.0f}" in lines[0]
        assert f"{100 * run['good_share']:.0f}" in lines[0]
        assert str(run["recomputed_tokens"]) in lines[1]
        assert f"{100 * run['kv_usage_peak']:.0f}" in lines[1]
        assert f"{run['priorities']['0']['ttft_s']['p50']:.2f}" in lines[2]
    assert runs[1]["settings"]["max_num_seqs"] == 8
    assert runs[0]["settings"]["slo_ttft_ms"] == 300
    assert "…" not in printed


def test_of_many_tenants_the_largest_stands_beside_the_worst_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = compare(tmp_path, "fcfs", "--workload", "many-tenants")
    printed = capsys.readouterr().out
    assert "greedy" in printed
    assert "worst of 8 others" in printed
    assert f"{run['fairness']:.3f}" in printed
    worst = max(group["ttft_s"]["p99"] for name, group in run["tenants"].items() if name != "greedy")
    assert f"{worst:.2f} s" in printed


def test_a_plug_in_is_compared_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "newest_first.py").write_text(
        textwrap.dedent("""
            from llm_engine.schedulers.orderings.fcfs import FcfsOrdering

            class NewestFirst(FcfsOrdering):
                def visit(self, step):
                    return iter(reversed(list(super().visit(step))))
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--requests", "60", "--max-num-seqs", "4", "--lengths", "lognormal"]
    runs = compare(tmp_path, "fcfs,ordering=newest_first:NewestFirst", *words)
    assert runs[1]["settings"]["ordering"] == "newest_first:NewestFirst"
    assert runs[0]["ttft_s"] != runs[1]["ttft_s"]


@pytest.mark.parametrize("words", [[], ["--tenants", "5"], ["--priority-levels", "3"]])
def test_the_page_is_drawn(tmp_path: Path, words: list[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "page.png"
    compare(tmp_path, "fcfs,greedy", *SMALL, *words, "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compare", "farr"], "'farr' is none"),
        (["--compare", "fcfs", "--trace", "t.json"], "nothing beside compare"),
        (["--compare", "fcfs", "--plot", "t.doc"], "plot is 't.doc'"),
        (["--compare", "fcfs,nobody:Nothing"], "nobody"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *SMALL, *words]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1
    assert not told.out
