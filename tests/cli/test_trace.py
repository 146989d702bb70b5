"""``llm-engine trace`` in this process: tables, JSON, pictures, and what each mistake says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llm_engine.cli.main import main
from llm_engine.cli.outputs import check_outputs
from llm_engine.metrics.step_parts import PARTS
from llm_engine.metrics.step_trace import TraceMetadata, write_trace
from tests.metrics.records import step

SECONDS = 100
"""Two stages in turn for so long: a step each second, half a second on either stage."""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("traces") / "trace.json")
    records = [
        step(n + 1, (1.0 * n, n + 0.5), (n + 0.5, n + 1.0), began=n - 0.25, tokens=n % 7 + 1, chunk=n % 7)
        for n in range(SECONDS)
    ]
    about = TraceMetadata(
        version="9", model="toy", scheduler="balanced", num_stages=2, num_queues=1, layers_per_stage=(3, 4)
    )
    write_trace(path, about, records)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["trace", *words])
    out, err = capsys.readouterr()
    return code, out, err


def figures(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> dict[str, object]:
    target = tmp_path / "figures.json"
    assert run(capsys, *words, "--json", str(target))[0] == 0
    return json.loads(target.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_the_tables_tell_who_was_busy_and_where_time_went(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    code, out, err = run(capsys, trace)
    assert (code, err) == (0, "")
    lines = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line.split()}
    assert out.startswith("toy, 2 stages (3+4 layers), scheduler balanced\n100 steps, ")
    for stage in ("0", "1"):
        assert lines[stage].startswith(f"{stage} 50.0 % 50.000 54.250 500 ms 500 ms 50.0 % ")
    assert lines["bubble"] == "bubble fraction 50.0 %"
    assert lines["stage"] == "stage 100 1.00 s 1.00 s 1.00 s 1.00 s 1.00 s"
    assert lines.keys() >= set(PARTS)
    # Of two in a row, in turn 1 to 7: 7/1 at the most.
    assert lines["imbalance"].startswith("imbalance of 2, max/mean 97 ")
    assert "imbalance of 2, max/min 97 1.17 2.21 1.33 7.00 7.00" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 110


def test_the_figures_as_json(capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path) -> None:
    found = figures(capsys, tmp_path, trace)
    assert found["stage_busy"] == [0.5, 0.5]
    assert (found["model"], found["scheduler"], found["layers_per_stage"]) == ("toy", "balanced", [3, 4])
    assert found["num_steps"] == SECONDS
    assert found["micro_batch_tokens"]["max"] == 7  # type: ignore[index]


@pytest.mark.parametrize(
    ("words", "steps"),  # each is booked 1.75 after its first stage begins, and retires 4 after its end
    [(("--last", "10"), 7), (("--from", "20", "--to", "30"), 10), (("--from", "90"), 12), (("--to", "0"), None)],
)
def test_a_stretch_can_be_chosen(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path, words: tuple[str, ...], steps: int | None
) -> None:
    if steps is None:
        code, out, err = run(capsys, trace, *words)
        assert (code, out) == (2, "")
        assert "from and to is '0 to 0'; allowed: a stretch with steps, of" in err
        return
    found = figures(capsys, tmp_path, trace, *words)
    assert found["num_steps"] == steps


def test_a_picture_is_drawn(capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path) -> None:
    for words in ((), ("--from", "20", "--to", "25")):
        target = tmp_path / "timeline.png"
        assert run(capsys, trace, "--plot", str(target), *words)[0] == 0
        assert target.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--last", "-1"), "last is -1.0; allowed: seconds, 0 or more"),
        (("--from", "nan"), "from is nan"),
        (("--last", "5", "--to", "7"), "last is 5.0; allowed: either last, or from and to"),
        (("--from", "1e9"), "from and to is '1e+09 to the end'; allowed: a stretch with steps"),
        (("--plot", "picture.doc"), "plot is 'picture.doc'; allowed: a file name that ends in one of"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], trace: str, words: tuple[str, ...], says: str
) -> None:
    code, _, err = run(capsys, trace, *words)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1


def test_a_file_that_would_be_overwritten_or_cannot_be_written_is_refused_before_the_tables(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path
) -> None:
    before, one = Path(trace).read_bytes(), str(tmp_path / "one.png")
    for words, says in (
        (("--json", trace), f"json is {trace!r}; allowed: another file than that of trace"),
        (("--json", one, "--plot", one), f"plot is {one!r}; allowed: another file than that of json"),
        (("--json", "/nowhere/at/all.json"), "json is '/nowhere/at/all.json'; allowed: a file that can be written"),
        (("--plot", "picture.doc"), "plot is 'picture.doc'"),
    ):
        code, out, err = run(capsys, trace, *words)
        assert (code, out) == (2, "")
        assert says in err
    assert Path(trace).read_bytes() == before
    assert not list(tmp_path.iterdir())


def test_what_nobody_keeps_may_be_written_twice() -> None:
    check_outputs({"json": os.devnull, "trace": os.devnull}, {})


def test_what_is_no_trace_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"traceEvents": []}')
    code, out, err = run(capsys, str(other))
    assert (code, out) == (2, "")
    assert "allowed: a step trace of this version of llm-engine" in err
    code, out, err = run(capsys, str(tmp_path / "none.json"))
    assert (code, out) == (2, "")
    assert "none.json'; allowed: a file that can be read (No such file or directory)" in err
    empty = str(tmp_path / "empty.json")
    about = TraceMetadata(version="1", model="m", scheduler="s", num_stages=1, num_queues=1)
    write_trace(empty, about, [])
    assert "a trace of at least one step" in run(capsys, empty)[2]
    write_trace(empty, about, [step(1, (0.0, 1.0), tokens=0)])
    code, out, err = run(capsys, empty)
    assert (code, out) == (2, "")
    assert "(step 1 counts what cannot be)" in err
