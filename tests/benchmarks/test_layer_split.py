"""The layer split's benchmark: real stages of the bundled model, and speeds found again from times made of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import layer_split, stage_times
from llm_engine.models.architectures import model_spec
from llm_engine.models.config import CheckpointConfig, read_config
from llm_engine.models.layer_cost import SPEEDS, layer_times
from tests.models.test_stages import SMALL, TINY

DEMO = Path(__file__).parents[2] / "models" / "demo_model"


def test_every_split_of_a_real_model_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_times, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(stage_times, "MIN_REPEATS", 1)
    monkeypatch.setattr(layer_split, "NOISE", 10.0)
    console, spec = Console(record=True, width=140), model_spec(read_config(DEMO))
    splits = layer_split.candidates(spec, 2, 4)
    stages = layer_split.measure_all(DEMO, spec, splits, 1, console)
    assert set(stages) == {"0-6"} | {f"0-{n}" for n in range(1, 6)} | {f"{n}-6" for n in range(1, 6)}
    steps = {"decode 1", "decode 16", "decode 64", "prefill 256", "prefill 512"}
    assert all(set(times) == steps and min(times.values()) > 0 for times in stages.values())
    assert list(layer_split.show("demo", spec, {"splits": splits, "itemsize": 4, "stages": stages}, console)) == []
    rows = re.findall(r"│ +(\d,\d) │", console.export_text())
    assert rows == ["1,5", "2,4", "3,3", "4,2", "5,1"]


def test_an_automatic_split_that_loses_is_reported() -> None:
    spec = model_spec(CheckpointConfig(SMALL))
    splits = layer_split.candidates(spec, 5, 2)
    assert {(3, 3, 2, 2, 2), (2, 3, 3, 3, 1)} <= set(map(tuple, splits))
    alike = {step.name: 1.0 for step in stage_times.STEPS}
    stages = {name: dict(alike) for split in splits for name in layer_split.names(split)} | {"0-12": dict(alike)}
    measured: dict[str, Any] = {"splits": splits, "itemsize": 2, "stages": stages}
    assert list(layer_split.show("small", spec, measured, Console(quiet=True))) == []
    stages["11-12"]["decode 16"] = 2.0
    assert list(layer_split.show("small", spec, measured, Console(quiet=True))) == [
        "small, decode 16: the automatic split takes 2.00 of the even"
    ]


def test_speeds_are_found_again() -> None:
    specs = {name: model_spec(CheckpointConfig(shape)) for name, shape in (("tiny", TINY), ("small", SMALL))}
    models: dict[str, Any] = {}
    for name, spec in specs.items():
        stages: dict[str, dict[str, float]] = {}
        for start, end in ((0, 2), (2, spec.num_layers), (0, spec.num_layers)):
            for step in stage_times.STEPS:
                costs = layer_times(spec, step.shape, SPEEDS["cpu"], 2)
                seconds = sum(costs.layers[start:end]) + (start == 0) * costs.embedding
                seconds += (end == spec.num_layers) * costs.head + 50e-6
                stages.setdefault(f"{start}-{end}", {})[step.name] = seconds
        models[name] = {"itemsize": 2, "stages": stages}
    found = layer_split.fit(specs, models)
    assert "50 us a step beside" in found
    assert "met within 0.0%" in found
    for part in (
        "weight_bytes=2.8e+10",
        "flops=2.6e+11",
        "kv_bytes=1.8e+10",
        "layer_seconds=6e-05",
        "logit_seconds=8.5e-10",
    ):
        assert part in found
