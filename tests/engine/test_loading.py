"""Settings of stages against the model and the machine: refused before a weight is read, and followed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from llm_engine import LLM, SamplingParams
from llm_engine.core.config import EngineConfig, ModelConfig
from llm_engine.core.errors import ConfigError
from llm_engine.engine.loading import find_model
from llm_engine.workers.torch_model_engine import TorchModelEngine, pick_device

COMMON: dict[str, Any] = {"executor": "inproc", "device": "cpu", "num_kv_blocks": 50}


def test_the_config_says_how_many_layers_there_are() -> None:
    assert find_model(ModelConfig()).num_layers == 6


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pipeline_parallel_size": 7}, "pipeline_parallel_size is 7; allowed: at most the model's 6 layers"),
        (
            {"pipeline_parallel_size": 2, "pipeline_layer_partition": "3,4"},
            "pipeline_layer_partition is '3,4'; allowed: 2 numbers of 1 or more that sum to the model's 6 layers",
        ),
        ({"pipeline_parallel_size": 2, "stage_cpus": "0;65000"}, "stage_cpus is '0;65000'; allowed: CPUs this process"),
        (
            {"pipeline_parallel_size": 2, "stage_devices": "0,1"},
            "stage_devices is '0,1'; allowed: nothing where stages compute on the CPU",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(settings: dict[str, Any], says: str) -> None:
    threads = set(threading.enumerate())
    source = find_model(ModelConfig())
    with pytest.raises(ConfigError) as caught:
        source.model_engines(EngineConfig.of(**settings), on_cuda=False)
    assert str(caught.value).startswith(says)
    with pytest.raises(ConfigError):
        LLM(**COMMON, **settings)
    assert set(threading.enumerate()) == threads


def test_stages_take_the_layers_they_are_given_and_answer_alike() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    answers = []
    for settings in (
        {},
        {"pipeline_parallel_size": 2, "pipeline_layer_partition": "5,1"},
        {"pipeline_parallel_size": 3, "pipeline_layer_partition": "mixed"},
        {"pipeline_parallel_size": 4},
    ):
        with LLM(**COMMON, **settings) as llm:
            answers.append(llm.generate("What is 2 + 2?", params, use_tqdm=False)[0].outputs[0].token_ids)
            assert llm.engine.info.model.num_layers == 6
    assert answers == [answers[0]] * 4


def test_a_stage_holds_what_the_setting_says() -> None:
    path = find_model(ModelConfig()).path
    assert path is not None
    config = EngineConfig.of(pipeline_parallel_size=2, pipeline_layer_partition="5,1", cpu_threads=1)
    make = find_model(ModelConfig()).model_engines(config, on_cuda=False)
    before = torch.get_num_threads()
    try:
        assert [make(stage).load().num_layers for stage in range(2)] == [5, 1]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_devices_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch sees devices is the machine's business; which of them is taken is ours."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=f"device is '{name}'; allowed: auto or cpu; this torch sees no CUDA"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cuda") == pick_device("auto") == torch.device("cuda", 0)
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device is 'cuda:2'; allowed: cuda:0, cuda:1"):
        pick_device("cuda:2")
    for name in ("cuda:", "cuda:-1", "cuda:one", "tpu:0"):
        with pytest.raises(ConfigError, match="allowed: auto, cpu, cuda"):
            TorchModelEngine("anywhere", device=name)
