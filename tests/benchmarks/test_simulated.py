"""The benchmark of simulation against reality: its mixes, its predictions, its page. No engine is started."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import simulated
from llm_engine.core.config import EngineConfig
from llm_engine.metrics.step_trace import TraceMetadata, write_trace
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.setup import set_up
from llm_engine.simulation.workload import Arrival, prompt

ARGS = argparse.Namespace(scheduler="greedy", model=Path("small"))


def test_mixes_repeat_with_their_round_and_change_with_it() -> None:
    for run in (simulated.TRACED, *simulated.PREDICTED):
        assert run.arrivals(1) == run.arrivals(1)
        assert len(run.arrivals(0)) == run.requests
    assert simulated.TRACED.arrivals(0) != simulated.TRACED.arrivals(1)


def test_what_was_traced_predicts_itself(tmp_path: Path) -> None:
    run = simulated.Run("two", 2, 24, 150, 30, sigma=0.5)
    arrivals = [Arrival(at, prompt(i, n), m) for i, (at, n, m) in enumerate(run.arrivals(0))]
    hardware = SimulationConfig(model_shape="llama-2-7b", num_layers=4, hardware="cpu-1core-avx512", stages=2)
    engine = EngineConfig.of(scheduler="greedy", enable_prefix_caching=False, max_num_batched_tokens=512)
    real = set_up(hardware, engine, arrivals=arrivals)
    happened = real.simulator(keep_stats=10_000).run(arrivals)
    path = str(tmp_path / "trace.json")
    metadata = TraceMetadata(
        version="0",
        model="m",
        scheduler="greedy",
        num_stages=2,
        num_queues=2,
        layers_per_stage=(2, 2),
        limits={"max_num_batched_tokens": 512},
        num_kv_blocks=5000,
        block_size=16,
    )
    write_trace(path, metadata, happened.stats)
    setup, predicted = simulated.predict(ARGS, run, 0, path)
    assert setup.split == (2, 2)
    assert predicted["seconds"] == pytest.approx(happened.makespan, rel=0.03)
    assert simulated.stage_seconds(path, path) == pytest.approx(1.0, rel=0.01)
    assert predicted["ttft_s"] == pytest.approx(sum(happened.ttfts) / len(happened.ttfts), rel=0.03)


def test_the_page_shows_every_run_and_how_far_off_it_was() -> None:
    runs = [
        {
            "name": run.name,
            "measured": {"seconds": 2.0, "ttft_s": 0.5, "other_cores": 0.01},
            "predicted": {"seconds": 2.1, "ttft_s": 0.45},
            "stage_seconds": 0.98,
        }
        for run in (simulated.TRACED, *simulated.PREDICTED)
    ]
    machine = {"cpu": "a CPU", "cores": 2}
    result = {"machine": machine, "model": "small", "scheduler": "s", "rounds": 1, "when": "now", "runs": runs}
    page = simulated.markdown(result)
    for run in (simulated.TRACED, *simulated.PREDICTED):
        assert run.name in page
    assert "1.050 (1.050..1.050)" in page
    assert "0.900 (0.900..0.900)" in page
