"""A simulation is quick: a million tokens on four stages, or a thousand stages, in under a minute.

Of the processor's time, so that a busy machine fails nobody.
"""

from __future__ import annotations

import time

import pytest

from llm_engine.core.config import EngineConfig
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.report import figures
from llm_engine.simulation.setup import set_up

MINUTE = 60.0


def seconds_of(simulation: SimulationConfig, engine: EngineConfig) -> float:
    began = time.process_time()
    setup = set_up(simulation, engine)
    run = setup.simulator().run(setup.arrivals)
    figures(run)
    assert len(run.e2es) == simulation.requests
    assert run.num_output_tokens == simulation.requests * simulation.output_len
    return time.process_time() - began


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["greedy", "balanced"])
def test_a_million_tokens_on_four_stages(scheduler: str) -> None:
    load = SimulationConfig(stages=4, requests=2000, input_len=128, output_len=500, unlimited_kv=True)
    assert seconds_of(load, EngineConfig.of(scheduler=scheduler)) < MINUTE


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["greedy", "balanced"])
def test_a_thousand_stages(scheduler: str) -> None:
    load = SimulationConfig(
        stages=1000, num_layers=1000, link="none", requests=2000, input_len=128, output_len=32, unlimited_kv=True
    )
    assert seconds_of(load, EngineConfig.of(scheduler=scheduler, max_num_seqs=2000)) < MINUTE


def test_the_headline_takes_a_moment() -> None:
    load = SimulationConfig(stages=4, requests=256, input_len=128, output_len=128, unlimited_kv=True)
    assert seconds_of(load, EngineConfig.of(scheduler="greedy")) < MINUTE / 10
