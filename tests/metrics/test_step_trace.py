"""The trace file: what goes in comes out, it keeps the format's rules, and it is there whole or not at all."""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from llm_engine.core.errors import ConfigError
from llm_engine.core.trace import StepStats
from llm_engine.metrics.step_trace import StepTrace, TraceMetadata, check_writable, read_trace, write_trace
from llm_engine.metrics.trace_events import FIRST_STAGE, OUTPUT, PID, SCHEDULING, computes
from tests.metrics.records import PLAIN, step

METADATA = TraceMetadata(
    version="1.2.3", model="toy", scheduler="balanced", num_stages=2, num_queues=3, layers_per_stage=(5, 7),
    limits={"max_num_seqs": 8, "long_prefill_token_threshold": None}, num_cores=4, started_at=1.7e9, clock=12.5,
)  # fmt: skip
SHORT = TraceMetadata(version="1", model="m", scheduler="s", num_stages=1, num_queues=1)


def odd_records(count: int, num_stages: int = 2) -> list[StepStats]:
    """Two-stage steps one behind the other, every field different, times of no round number."""
    source = random.Random(7)
    records, at = [], 1234.5678901234567
    for number in range(1, count + 1):
        times = [at := at + source.uniform(1e-5, 3e-3) for _ in range(6 + 2 * num_stages)]
        busy = tuple(zip(times[3 : 3 + 2 * num_stages : 2], times[4 : 4 + 2 * num_stages : 2], strict=True))
        sizes = {f.name: source.randrange(1000) for f in fields(StepStats) if f.type == "int"}
        flags = {f.name: source.random() < 0.5 for f in fields(StepStats) if f.type == "bool"}
        moments = {"began_at": times[0], "booked_at": times[1], "pushed_at": times[2]}
        moments |= {"collected_at": times[-3], "update_at": times[-2], "retired_at": times[-1]}
        record = StepStats(**sizes, **flags, **moments, busy=busy, kv_usage=source.random())
        records.append(replace(record, step=number, num_chunks=number % 2))
    return records


def document(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def spans_by_track(path: Path) -> dict[int, list[tuple[float, float, str]]]:
    """(begin, end, name) by tid, in order of time."""
    tracks: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
    for event in document(path)["traceEvents"]:
        if event["ph"] == "X":
            tracks[event["tid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    return {tid: sorted(spans) for tid, spans in tracks.items()}


def test_what_was_written_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    path, records = str(tmp_path / "trace.json"), odd_records(50)
    write_trace(path, METADATA, records)
    trace = read_trace(path)
    assert trace.records == records
    assert trace.metadata == METADATA


def test_steps_without_stage_times_and_no_steps_at_all_are_read_back_too(tmp_path: Path) -> None:
    path = str(tmp_path / "trace.json")
    for records in ([], [PLAIN, replace(PLAIN, step=2, busy=((1.0, 2.0),))]):
        write_trace(path, SHORT, records)
        assert read_trace(path).records == records


def test_the_file_keeps_the_rules_of_the_trace_event_format(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(str(path), METADATA, odd_records(40))
    whole = document(path)
    assert set(whole) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert whole["displayTimeUnit"] in ("ms", "ns")
    for event in whole["traceEvents"]:
        assert event["ph"] in ("X", "C", "M")
        assert event["pid"] == PID and event["name"]
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["cat"]
            assert event["tid"] in (SCHEDULING, OUTPUT, FIRST_STAGE, FIRST_STAGE + 1)
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
    names = {e["tid"]: e["args"]["name"] for e in whole["traceEvents"] if e["name"] == "thread_name"}
    assert names == {SCHEDULING: "scheduling thread", OUTPUT: "output thread", 10: "stage 0", 11: "stage 1"}
    assert min(event["ts"] for event in whole["traceEvents"] if event["ph"] != "M") == 0


def test_spans_of_one_track_follow_each_other(tmp_path: Path) -> None:
    """The format asks for nesting; ours need none, so none may begin before the last has ended."""
    path = tmp_path / "trace.json"
    write_trace(str(path), METADATA, odd_records(60))
    tracks = spans_by_track(path)
    assert len(tracks) == 4
    for spans in tracks.values():
        assert all(after[0] >= before[1] - 1e-6 for before, after in itertools.pairwise(spans))


def test_a_clock_that_jumps_back_makes_no_spans_overlap(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    records = [step(1, (3.0, 10.0)), step(2, (9.5, 20.0), began=6.0), step(3, (19.0, 19.5), began=16.0)]
    write_trace(str(path), SHORT, records)
    spans = [(begin, end) for begin, end, _ in spans_by_track(path)[FIRST_STAGE]]
    assert spans == [(3e6, 10e6), (10e6, 20e6), (20e6, 20e6)]
    assert read_trace(str(path)).records == records


def test_times_are_microseconds_since_the_first_step_began(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    record = replace(
        PLAIN, num_decodes=64, num_tokens=64, began_at=1000.0, booked_at=1000.000_25, pushed_at=1000.000_3,
        busy=((1000.001, 1000.002_5),), collected_at=1000.002_6, update_at=1000.002_605, retired_at=1000.002_7,
    )  # fmt: skip
    write_trace(str(path), SHORT, [record])
    assert spans_by_track(path) == {
        SCHEDULING: [(0.0, 250.0, "schedule"), (250.0, 300.0, "push")],
        FIRST_STAGE: [(1000.0, 2500.0, "decode 64")],
        OUTPUT: [(2500.0, 2600.0, "collect"), (2605.0, 2700.0, "update")],
    }
    write_trace(str(path), SHORT, [replace(record, update_at=1000.002_65)])
    output = [(2500.0, 2600.0, "collect"), (2600.0, 2650.0, "wait for the lock"), (2650.0, 2700.0, "update")]
    assert spans_by_track(path)[OUTPUT] == output


def test_a_result_that_comes_during_an_update_is_collected_behind_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    # The first updates until 14 s and the second ends at 12; on the clock of the third's host, it ends after all.
    first, second, third = step(1, (3.0, 10.0)), step(2, (10.0, 12.0)), step(3, (12.0, 30.0))
    second = replace(second, collected_at=14.5, update_at=14.5, retired_at=15.0)
    third = replace(third, collected_at=29.0, update_at=29.0, retired_at=31.0)
    write_trace(str(path), SHORT, [first, second, third])
    assert [(begin / 1e6, end / 1e6, name) for begin, end, name in spans_by_track(path)[OUTPUT]] == [
        (10.0, 11.0, "collect"), (11.0, 12.0, "wait for the lock"), (12.0, 14.0, "update"),
        (14.0, 14.5, "collect"), (14.5, 15.0, "update"), (29.0, 31.0, "update"),
    ]  # fmt: skip


def test_an_arrow_leads_from_the_plan_through_its_stages_to_its_update(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(str(path), METADATA, odd_records(3))
    chains: dict[str, list[tuple[str, bool, bool]]] = defaultdict(list)
    for event in document(path)["traceEvents"]:
        if "bind_id" in event:
            ends = (event.get("flow_in", False), event.get("flow_out", False))
            chains[event["bind_id"]].append((event["cat"], *ends))
    assert list(chains) == ["0x1", "0x2", "0x3"]
    for chain in chains.values():
        stages = [("stage", True, True)] * 2
        assert chain == [("schedule", False, True), *stages, ("update", True, False)]


def test_counters_say_how_many_are_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    first, second = step(1, (3.0, 10.0), tokens=8), step(2, (10.0, 20.0), began=4.0, tokens=5, num_waiting=2)
    write_trace(str(path), SHORT, [first, second])
    counted = [e for e in document(path)["traceEvents"] if e["ph"] == "C"]
    booked = [(e["ts"], e["args"]["in flight"], e["args"]["micro-batch tokens"]) for e in counted[::2]]
    assert booked == [(2e6, 1, 8), (6e6, 2, 5)]
    retired = [(e["ts"], e["args"]["in flight"], e["args"]["waiting"]) for e in counted[1::2]]
    assert retired == [(14e6, 1, 0), (24e6, 0, 2)]


@pytest.mark.parametrize(
    ("tokens", "chunk", "name"), [(64, 0, "decode 64"), (512, 512, "prefill 512"), (524, 512, "prefill 512+12")]
)
def test_a_span_is_named_by_what_it_computes(tokens: int, chunk: int, name: str) -> None:
    assert computes(step(1, (0.0, 1.0), tokens=tokens, chunk=chunk)) == name


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"traceEvents": []}',
        b'{"traceEvents": [], "otherData": {"format": "llm-engine step trace", "format_version": 99}}',
        b'{"traceEvents": [{"ph": "X", "name": "a"}], "otherData": {"version": "somebody else\'s"}}',
        b'{"traceEvents": [{"cat": "schedule", "args": {"step": 1}}], "otherData": {"format": "llm-engine step trace",'
        b' "format_version": 1, "version": "1", "model": "", "scheduler": "", "num_stages": 1, "num_queues": 1}}',
    ],
)  # fmt: skip
def test_any_other_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"trace is '.*other\.json'; allowed: a step trace of this version") as caught:
        read_trace(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"num_tokens": 0}, "step 1 counts what cannot be"),
        ({"num_tokens": -5}, "step 1 counts"),
        ({"context_tokens": -1}, "step 1 counts"),
        ({"kv_tokens": 1 << 60}, "step 1 counts"),
        ({"num_sampled": -1}, "step 1 counts"),
        ({"step": -1}, "step -1 counts"),
        ({"retired_at": 1e290}, "step 1 was at times that cannot be"),
        ({"began_at": -1e10}, "step 1 was at times"),
        ({"busy": ((0.0, 1.0), (1.0, 1e200))}, "step 1 was at times"),
        ({"busy": ((0.0, 1.0), (2.0, 1.0))}, "step 1 was at times"),
    ],
)
def test_a_step_that_cannot_be_is_refused(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    path = str(tmp_path / "trace.json")
    write_trace(path, SHORT, [replace(PLAIN, **record)])
    with pytest.raises(ConfigError, match=rf"a step trace of this version of llm-engine \({said}"):
        read_trace(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers_per_stage", (0, 0)),
        ("layers_per_stage", (6, -6)),
        ("num_stages", 0),
        ("num_queues", -1),
        ("num_kv_blocks", -3),
        ("block_size", 0),
        ("max_model_len", 0),
        ("sliding_window", -1),
        ("limits", {"max_num_batched_tokens": -1}),
    ],
)
def test_a_run_that_cannot_be_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    path = str(tmp_path / "trace.json")
    write_trace(path, replace(SHORT, **{field: value}), [PLAIN])
    with pytest.raises(ConfigError, match=rf"Expected `int` >= [01] - at `\$\.{field}"):
        read_trace(path)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match=r"trace is .*; allowed: a file that can be read"):
            read_trace(str(path))


def test_a_file_that_is_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(str(path), SHORT, [PLAIN])
    before = path.read_bytes()

    class Unwritable:
        began_at = booked_at = retired_at = 0.0

    with pytest.raises(AttributeError):
        write_trace(str(path), SHORT, [PLAIN, Unwritable()])  # type: ignore[list-item]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bad = [tmp_path, tmp_path / "missing" / "trace.json", tmp_path / "file" / "trace.json"]
    for path in [*map(str, bad), "", f"{tmp_path}/"]:
        with pytest.raises(ConfigError, match=r"trace is .*; allowed: a file that can be written"):
            check_writable(path)
        with pytest.raises(ConfigError):
            StepTrace(10, path)
    check_writable(str(tmp_path / "trace.json"))
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_the_last_steps_are_kept_and_written(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = StepTrace(3, str(path))
    trace.records.extend(odd_records(10))
    trace.write_at_end()
    assert not path.exists(), "the engine never started"
    trace.metadata = METADATA
    trace.write_at_end()
    assert [record.step for record in read_trace(str(path)).records] == [8, 9, 10]


def test_a_disk_that_fails_in_the_end_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    trace = StepTrace(3, str(folder / "trace.json"))
    trace.metadata = SHORT
    folder.rmdir()
    trace.write_at_end()
    assert "the step trace could not be written" in caplog.text
