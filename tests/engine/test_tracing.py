"""Engines that write a step trace: at their end however they end, at any time when asked; and their live numbers."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from llm_engine import LLM, ConfigError, EngineDeadError
from llm_engine.core.version import __version__
from llm_engine.metrics.pipeline_report import report
from llm_engine.metrics.step_parts import PARTS
from llm_engine.metrics.step_trace import TraceFile, read_trace
from tests.engine.engines import SECONDS, StageDeath, Valve, await_true, greedy, toy_llm

pytestmark = pytest.mark.usefixtures("no_thread_left")


def work(llm: LLM, requests: int = 5, tokens: int = 6) -> None:
    llm.generate([[number, 2, 3, 4, 5] for number in range(requests)], greedy(tokens), use_tqdm=False)


def value(llm: LLM, name: str, **labels: str) -> float:
    labels = {"model_name": llm.model_name, "engine": llm.engine.metrics.engine, **labels}
    found = llm.registry.get_sample_value(f"llm_engine_{name}", labels)
    assert found is not None, name
    return found


def await_idle(llm: LLM) -> None:
    """Until the last step is in the books and in the numbers."""
    await_true(lambda: llm.engine.state.core.is_idle)
    steps = llm.engine.state.core._step
    await_true(lambda: value(llm, "step_seconds_count") == steps)


def assert_in_order(trace: TraceFile, num_stages: int) -> None:
    """Every step's moments follow each other, and so do the steps at each place."""
    assert trace.records
    for record in trace.records:
        assert len(record.busy) == num_stages
        moments = [record.began_at, record.booked_at, *(t for span in record.busy for t in span)]
        moments += [record.collected_at, record.update_at, record.retired_at]
        assert moments == sorted(moments)
        assert record.booked_at <= record.pushed_at
    for before, after in zip(trace.records, trace.records[1:], strict=False):
        assert after.step == before.step + 1
        assert after.began_at >= before.pushed_at and after.collected_at >= before.retired_at
        assert all(b[0] >= a[1] for a, b in zip(before.busy, after.busy, strict=True))


@pytest.mark.parametrize("stages", [1, 2])
def test_a_trace_is_written_when_the_engine_is_closed(tmp_path: Path, stages: int) -> None:
    path = tmp_path / "trace.json"
    with toy_llm(stages=stages, trace=str(path)) as llm:
        work(llm)
        await_idle(llm)
        work(llm, requests=1)
        assert not path.exists()
    trace = read_trace(str(path))
    assert_in_order(trace, stages)
    assert trace.records == llm.get_stats()
    assert next(record.step for record in trace.records if record.after_idle) == 1
    assert sum(record.after_idle for record in trace.records) == 2
    about = trace.metadata
    assert (about.version, about.model, about.scheduler, about.num_stages) == (__version__, "custom", "default", stages)
    assert sum(about.layers_per_stage) == 3 and len(about.layers_per_stage) == stages
    assert about.limits["max_num_batched_tokens"] == 32
    assert (about.on_cuda, about.sliding_window) == (False, None)
    assert about.max_model_len == llm.max_model_len
    assert about.started_at == pytest.approx(time.time(), abs=60)
    assert about.clock <= trace.records[0].began_at
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_a_trace_can_be_written_at_any_time(tmp_path: Path) -> None:
    path = str(tmp_path / "now.json")
    with toy_llm() as llm:
        work(llm)
        llm.write_trace(path)
        first = read_trace(path).records
        assert first and first == llm.get_stats()[: len(first)]
        work(llm)
        await_idle(llm)
        llm.write_trace(path)
        assert read_trace(path).records == llm.get_stats()
        with pytest.raises(OSError, match="missing"):
            llm.write_trace(str(tmp_path / "missing" / "trace.json"))
    llm.write_trace(path)
    assert len(read_trace(path).records) > len(first)


def test_writing_while_the_engine_works_harms_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "now.json")
    with toy_llm(trace_steps=50, trace=path, num_kv_blocks=400) as llm:
        writers = [threading.Thread(target=lambda: [llm.write_trace(path) for _ in range(20)]) for _ in range(2)]
        for writer in writers:
            writer.start()
        work(llm, requests=8, tokens=100)
        for writer in writers:
            writer.join(SECONDS)
            assert not writer.is_alive()
    assert len(read_trace(path).records) == 50


def test_the_ring_holds_the_last_steps(tmp_path: Path) -> None:
    path = str(tmp_path / "trace.json")
    with toy_llm(trace=path, trace_steps=7) as llm:
        work(llm, tokens=30)
        await_idle(llm)
        last = llm.engine.state.core._step
        assert [record.step for record in llm.get_stats()] == list(range(last - 6, last + 1))
    assert [record.step for record in read_trace(path).records] == list(range(last - 6, last + 1))


def test_a_dead_engine_writes_what_it_did(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def die(number: int, batch: object) -> None:
        if number == 3:
            raise StageDeath("killed")

    with toy_llm(trace=str(path), on_forward=die) as llm:
        with pytest.raises(EngineDeadError):
            work(llm, tokens=30)
        await_true(path.exists)  # before it is closed: it may be long until somebody looks
        assert [record.step for record in read_trace(str(path)).records] == [1, 2, 3]


def test_a_forgotten_engine_writes_its_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    llm = toy_llm(trace=str(path))
    work(llm)
    del llm
    gc.collect()
    await_true(path.exists)
    assert read_trace(str(path)).records


def test_an_engine_that_does_not_start_writes_none(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(ConfigError, match="kv_cache_memory"):
        toy_llm(trace=str(path), num_kv_blocks=None, kv_cache_memory=1)
    assert not path.exists()


@pytest.mark.parametrize("where", ["", "missing/trace.json"])
def test_what_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path: Path, where: str) -> None:
    loaded: list[int] = []

    def make(stage: int) -> object:
        loaded.append(stage)
        raise AssertionError

    with pytest.raises(ConfigError, match=r"trace is .*; allowed: a file that can be written"):
        LLM(model_engine=make, trace=f"{tmp_path}/{where}")  # type: ignore[arg-type]
    assert loaded == []


@pytest.mark.parametrize("how", ["exit", "term"])
def test_a_process_that_ends_writes_its_trace(tmp_path: Path, how: str) -> None:
    """At its exit without ``close``; SIGTERM ends it as a host's handler would, by ``SystemExit``."""
    path = tmp_path / "trace.json"
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "from tests.engine.engines import toy_llm, greedy\n"
        f"llm = toy_llm(trace={str(path)!r})\n"
        "llm.generate([[1, 2, 3]], greedy(5), use_tqdm=False)\n"
        "print('done', flush=True)\n" + ("signal.pause()\n" if how == "term" else "")
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        if how == "term":
            process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    assert len(read_trace(str(path)).records) == 5


# -- the live numbers


@pytest.mark.parametrize("stages", [1, 2])
def test_the_live_numbers_are_those_of_the_trace(stages: int) -> None:
    with toy_llm(stages=stages) as llm:
        for _ in range(3):
            work(llm, tokens=20)
            await_idle(llm)
        work(llm, requests=1, tokens=1)  # counts how the load before it drained
        await_idle(llm)
        records = llm.get_stats()
        found, last = report(records), report(records[-1:])
        assert found.num_loads == 4
        for stage in range(stages):
            label = {"stage": str(stage)}
            busy, ratio = value(llm, "stage_busy_seconds_total", **label), value(llm, "stage_busy_ratio", **label)
            assert busy == pytest.approx(found.stages[stage].busy_seconds)
            assert 0.0 < ratio <= 1.0
            drain = records[-1].retired_at - records[-1].busy[stage][1]
            bubbles = value(llm, "stage_bubble_seconds_total", **label)
            assert bubbles == pytest.approx(found.stages[stage].bubble_seconds - drain)
            assert bubbles > last.stages[stage].bubble_seconds - drain
        for part in PARTS:
            assert value(llm, "step_part_seconds_count", part=part) == len(records)
            spread = found.parts[part]
            assert value(llm, "step_part_seconds_sum", part=part) == pytest.approx(spread.mean * spread.count)
        assert value(llm, "micro_batch_imbalance_ratio") >= 1.0
        assert value(llm, "micro_batches_in_flight") == 0


def test_micro_batches_in_flight_are_counted_now() -> None:
    valve = Valve()
    with toy_llm(stages=2, on_forward=valve, schedule_ahead=False) as llm:
        futures = [llm.submit([number] * 20, greedy(2)) for number in range(6)]
        await_true(lambda: value(llm, "micro_batches_in_flight") == 2)
        valve.open()
        for future in futures:
            future.result(SECONDS)
        await_true(lambda: value(llm, "micro_batches_in_flight") == 0)


def test_two_engines_of_one_registry_keep_their_numbers_apart() -> None:
    registry = CollectorRegistry()
    with toy_llm(stages=2, registry=registry) as first, toy_llm(registry=registry, engine_label="blue") as second:
        work(first)
        await_idle(first)
        assert value(first, "stage_busy_seconds_total", stage="1") > 0
        assert value(second, "stage_busy_seconds_total", stage="0") == 0
        gone = {"model_name": "custom", "engine": "blue", "stage": "1"}
        assert registry.get_sample_value("llm_engine_stage_busy_seconds_total", gone) is None
        work(second)
        await_idle(second)
        assert value(second, "stage_busy_seconds_total", stage="0") > 0
