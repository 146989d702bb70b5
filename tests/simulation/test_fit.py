"""What is learnt from one trace predicts other mixes and other stage counts. The "real" runs here are simulations too,
of a device whose costs the fit is not told, disturbed at random; the benchmark does the same with real engines."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_engine.core.config import EngineConfig
from llm_engine.core.cost_model import StepShape
from llm_engine.core.errors import ConfigError
from llm_engine.core.trace import StepStats
from llm_engine.engine.assembly import make_core
from llm_engine.metrics.step_trace import TraceMetadata, write_trace
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.delays import fit_delays
from llm_engine.simulation.fit import FittedPipeline, fit
from llm_engine.simulation.hardware import HARDWARE
from llm_engine.simulation.links import Link
from llm_engine.simulation.model_shapes import SHAPES
from llm_engine.simulation.pipeline import Delays, Pipeline
from llm_engine.simulation.roofline import roofline_costs
from llm_engine.simulation.run import SimulationRun
from llm_engine.simulation.setup import set_up
from llm_engine.simulation.simulator import HostCost, Simulator
from llm_engine.simulation.workload import Arrival, describe

SPEC = replace(SHAPES["llama-2-7b"], layers=SHAPES["llama-2-7b"].layers[:12], hidden_size=768, intermediate_size=3072)
CPU = HARDWARE["cpu-1core-avx512"]
HOST = HostCost(150e-6, 100e-6, 1e-6, 2e-6)
DELAYS = Delays(entry=150e-6, turnaround=200e-6, exit=120e-6, exit_per_row=3e-6)
LINK = Link(200e-6, 1e6)


class Disturbed:
    """A cost that is off by some percent, and once in a while by much."""

    def __init__(self, cost: Any, rng: random.Random) -> None:
        self._cost, self._rng = cost, rng

    def seconds(self, shape: StepShape) -> float:
        wild = 2.0 if self._rng.random() < 0.01 else 1.0
        return float(self._cost.seconds(shape)) * self._rng.lognormvariate(0.0, 0.05) * wild


def workload(
    requests: int, input_len: int, output_len: int, lengths: str = "lognormal", seed: int = 0
) -> list[Arrival]:
    config = SimulationConfig(requests=requests, input_len=input_len, output_len=output_len, lengths=lengths)
    return describe(config, seed, 4096)


def run(split: Sequence[int], arrivals: list[Arrival], *, noise: int | None = None) -> SimulationRun:
    """What the device does."""
    costs: list[Any] = list(roofline_costs(SPEC, split, CPU, 2))
    if noise is not None:
        rng = random.Random(noise)
        costs = [Disturbed(cost, rng) for cost in costs]
    return go(split, arrivals, Pipeline(costs, LINK, activation_bytes=1.0, delays=DELAYS), HOST)


def predict(fitted: FittedPipeline, split: Sequence[int], arrivals: list[Arrival]) -> SimulationRun:
    delays = fitted.delays
    pipeline = Pipeline(fitted.costs(split), delays.link, activation_bytes=1.0, delays=delays.delays)
    return go(split, arrivals, pipeline, delays.host)


def go(split: Sequence[int], arrivals: list[Arrival], pipeline: Pipeline, host: HostCost) -> SimulationRun:
    config = EngineConfig.of(scheduler="greedy", max_num_batched_tokens=512)
    core = make_core(config, num_kv_blocks=20_000, block_size=16, num_stages=len(split), on_cuda=False)
    return Simulator(core, pipeline, host, keep_stats=100_000).run(arrivals)


@pytest.fixture(scope="module")
def source() -> list[StepStats]:
    return list(run((6, 6), workload(48, 150, 60), noise=1).stats)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("split", "arrivals"),
    [
        ((6, 6), workload(32, 64, 128, "fixed")),
        ((6, 6), workload(32, 512, 16, "fixed")),
        ((12,), workload(40, 200, 60, seed=2)),
        ((12,), workload(32, 64, 128, "fixed")),
        ((3, 3, 3, 3), workload(64, 150, 60, seed=3)),
        ((3, 3, 3, 3), workload(32, 512, 16, "fixed")),
        ((7, 5), workload(48, 150, 60, seed=4)),
    ],
)
def test_other_mixes_and_stage_counts_are_predicted(
    source: list[StepStats], split: tuple[int, ...], arrivals: list[Arrival]
) -> None:
    happened, predicted = run(split, arrivals, noise=2), predict(fit(source, (6, 6)), split, arrivals)
    assert predicted.makespan == pytest.approx(happened.makespan, rel=0.06)
    assert mean(predicted.ttfts) == pytest.approx(mean(happened.ttfts), rel=0.06)


def test_layers_are_told_from_the_head() -> None:
    fitted = fit(list(run((6, 6), workload(48, 150, 60)).stats), (6, 6))
    assert fitted.error < 1e-3
    one, two = fitted.costs((1, 11)), roofline_costs(SPEC, (1, 11), CPU, 2)
    for num_tokens, sampled in ((8, 8), (24, 24), (512, 8)):
        shape = StepShape(num_tokens, 200 * num_tokens, sampled, sampled, 200 * sampled)
        for found, true in zip(one, two, strict=True):
            assert found.seconds(shape) == pytest.approx(true.seconds(shape), rel=0.08)


def test_delays_are_found_again() -> None:
    found = fit_delays(list(run((6, 6), workload(48, 150, 60)).stats))
    assert (found.host.push, found.host.push_per_row) == (pytest.approx(150e-6, rel=0.05), pytest.approx(1e-6, rel=0.1))
    assert (found.host.retire, found.host.retire_per_row) == (pytest.approx(100e-6), pytest.approx(2e-6))
    assert (found.hop, found.hop_per_token) == (pytest.approx(200e-6, rel=0.05), pytest.approx(1e-6, rel=0.1))
    assert found.delays.entry == pytest.approx(150e-6, rel=0.05)
    assert found.delays.turnaround == pytest.approx(200e-6, rel=0.05)
    assert found.delays.exit == pytest.approx(120e-6, rel=0.05)


def trace_file(tmp_path: Path, records: list[StepStats], **about: Any) -> str:
    path = str(tmp_path / "trace.json")
    known: dict[str, Any] = {
        "version": "1",
        "model": "m",
        "scheduler": "greedy",
        "num_stages": 2,
        "num_queues": 2,
        "layers_per_stage": (6, 6),
        "limits": {"max_num_batched_tokens": 512},
        "num_kv_blocks": 20_000,
        "block_size": 16,
    }
    write_trace(path, TraceMetadata(**(known | about)), records)
    return path


def test_a_simulation_is_set_up_from_a_trace_file(tmp_path: Path, source: list[StepStats]) -> None:
    path = trace_file(tmp_path, source)
    engine = EngineConfig.of(scheduler="greedy")
    setup = set_up(SimulationConfig(fit=path, stages=2, requests=32, input_len=64), engine)
    assert setup.split == (6, 6)
    assert (setup.num_kv_blocks, setup.block_size, setup.limits.max_num_batched_tokens) == (20_000, 16, 512)
    happened = run((6, 6), workload(32, 64, 128, "fixed"))
    assert setup.simulator().run(setup.arrivals).makespan == pytest.approx(happened.makespan, rel=0.06)
    deeper = set_up(SimulationConfig(fit=path, stages=5, requests=32, input_len=64), engine)
    assert sum(deeper.split) == 12
    assert len(deeper.split) == 5


def test_a_simulation_has_the_stages_of_its_trace(tmp_path: Path, source: list[StepStats]) -> None:
    path = trace_file(tmp_path, source)
    assert set_up(SimulationConfig(fit=path)).split == (6, 6)
    told = EngineConfig.of(pipeline_layer_partition="7,5", pipeline_parallel_size=2)
    assert set_up(SimulationConfig(fit=path), told).split == (7, 5)
    three = EngineConfig.of(pipeline_layer_partition="4,4,4", pipeline_parallel_size=3)
    with pytest.raises(ConfigError, match="2 numbers of 1 or more with commas"):
        set_up(SimulationConfig(fit=path), three)


@pytest.mark.parametrize(("block_size", "blocks"), [(16, 1452), (8, 2903), (64, 363), (128, 182), (16384, 2)])
def test_the_pool_of_a_trace_keeps_its_tokens(
    tmp_path: Path, source: list[StepStats], block_size: int, blocks: int
) -> None:
    """23,216 tokens."""
    path = trace_file(tmp_path, source, num_kv_blocks=1452)
    setup = set_up(SimulationConfig(fit=path), EngineConfig.of(block_size=block_size))
    assert (setup.block_size, setup.num_kv_blocks) == (block_size, blocks)
    told = EngineConfig.of(block_size=block_size, num_kv_blocks=3000)
    assert set_up(SimulationConfig(fit=path), told).num_kv_blocks == 3000


def test_a_block_larger_than_the_pool_is_refused(tmp_path: Path, source: list[StepStats]) -> None:
    path = trace_file(tmp_path, source, num_kv_blocks=1452)
    with pytest.raises(ConfigError, match="block_size is 32768; allowed: at most the 23216 tokens"):
        set_up(SimulationConfig(fit=path), EngineConfig.of(block_size=32768))


def test_a_fit_may_have_another_link(tmp_path: Path, source: list[StepStats]) -> None:
    path = trace_file(tmp_path, source)
    with pytest.raises(ConfigError, match="model_shape"):
        set_up(SimulationConfig(fit=path, stages=2, link="lan-1g"))
    setup = set_up(SimulationConfig(fit=path, stages=2, link="lan-1g", model_shape="llama-2-7b", requests=4))
    assert setup.link.latency == 200e-6


@pytest.mark.parametrize(
    ("settings", "engine", "field"),
    [
        ({"hardware": "rtx-4070"}, {}, "hardware"),
        ({"num_layers": 12}, {}, "num_layers"),
        ({"model_shape": "llama-2-7b"}, {}, "model_shape"),
        ({"model_shape": "llama-2-7b", "link": "ipc", "num_layers": 3}, {}, "num_layers"),
        ({}, {"dtype": "float32"}, "dtype"),
        ({}, {"gpu_memory_utilization": 0.5}, "gpu_memory_utilization"),
    ],
)
def test_what_a_trace_tells_is_not_told_beside_it(
    tmp_path: Path, source: list[StepStats], settings: dict[str, Any], engine: dict[str, Any], field: str
) -> None:
    with pytest.raises(ConfigError, match="nothing beside fit") as refused:
        set_up(SimulationConfig(fit=trace_file(tmp_path, source), stages=2, **settings), EngineConfig.of(**engine))
    assert refused.value.field == field


def test_the_type_sizes_what_crosses_another_link(tmp_path: Path, source: list[StepStats]) -> None:
    config = SimulationConfig(
        fit=trace_file(tmp_path, source), link="lan-1g", model_shape="llama-2-7b", requests=1, input_len=512
    )
    narrow, wide = (set_up(config, EngineConfig.of(dtype=dtype, scheduler="greedy")) for dtype in ("auto", "float32"))
    assert (narrow.dtype, wide.dtype) == ("bfloat16", "float32")
    narrow_time, wide_time = (made.simulator().run(made.arrivals).ttfts[0] for made in (narrow, wide))
    assert wide_time - narrow_time == pytest.approx(512 * 4096 * 2 / 125e6)


def test_device_window_and_context_are_those_of_the_trace(tmp_path: Path, source: list[StepStats]) -> None:
    path = trace_file(tmp_path, source, on_cuda=True, sliding_window=64, max_model_len=300, limits={})
    settings = SimulationConfig(fit=path, stages=2, input_len=200, output_len=100)
    setup = set_up(settings)
    assert (setup.on_cuda, setup.sliding_window, setup.max_model_len) == (True, 64, 300)
    assert setup.limits.max_num_batched_tokens == 2048
    assert setup.make_core().kv.layout.sliding_window == 64
    with pytest.raises(ConfigError, match="the context is 300 tokens"):
        set_up(replace(settings, output_len=101))
    assert "does not tell" not in setup.stages_are


def test_what_an_older_trace_does_not_tell_is_said(tmp_path: Path, source: list[StepStats]) -> None:
    setup = set_up(SimulationConfig(fit=trace_file(tmp_path, source), stages=2))
    assert (setup.on_cuda, setup.sliding_window) == (False, None)
    assert "does not tell its device and window" in setup.stages_are


@pytest.mark.parametrize(
    ("about", "steps", "said"),
    [
        ({"layers_per_stage": ()}, 100, "layers"),
        ({"num_kv_blocks": None}, 100, "pool"),
        ({}, 19, "20 steps or more"),
        ({"layers_per_stage": (4, 4, 4)}, 100, "20 steps or more"),
    ],
)
def test_a_trace_that_tells_too_little_is_refused(
    tmp_path: Path, source: list[StepStats], about: dict[str, Any], steps: int, said: str
) -> None:
    path = trace_file(tmp_path, source[:steps], **about)
    with pytest.raises(ConfigError, match=said) as refused:
        set_up(SimulationConfig(fit=path, stages=2))
    assert refused.value.field == "fit"


@pytest.mark.parametrize("name", ["num_tokens", "num_sampled"])
def test_times_that_have_nothing_to_do_with_the_steps_are_refused(source: list[StepStats], name: str) -> None:
    with pytest.raises(ConfigError, match="a trace of steps whose times go with what they computed"):
        fit([replace(step, **{name: 10**15}) for step in source], (6, 6))


def test_a_trace_at_the_limits_of_what_is_accepted_is_fitted_or_refused(
    tmp_path: Path, source: list[StepStats]
) -> None:
    late = [replace(step, busy=tuple((begin, 1e9) for begin, _ in step.busy)) for step in source]
    assert set_up(SimulationConfig(fit=trace_file(tmp_path, late))).split == (6, 6)
    later = [replace(step, busy=tuple((begin, 1e250) for begin, _ in step.busy)) for step in source]
    with pytest.raises(ConfigError, match=r"fit is .*; allowed: a step trace .* \(step 1 was at times that cannot be"):
        set_up(SimulationConfig(fit=trace_file(tmp_path, later)))


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"fit is .*a step trace"):
        set_up(SimulationConfig(fit=str(tmp_path / "other.json")))
    with pytest.raises(ConfigError, match=r"fit is .*none\.json'; allowed: a file that can be read"):
        set_up(SimulationConfig(fit=str(tmp_path / "none.json")))
