"""Which stage holds which layers: the names of splits, and estimates of real models' shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llm_engine.core.cost_model import StepShape
from llm_engine.core.errors import ConfigError
from llm_engine.core.stage_settings import SPLIT_NAMES
from llm_engine.models.architectures import model_spec
from llm_engine.models.config import CheckpointConfig
from llm_engine.models.decoder import StageRange
from llm_engine.models.layer_cost import DECODE, PREFILL, SPEEDS, layer_times
from llm_engine.models.spec import ExpertSpec, ModelSpec
from llm_engine.models.stages import choose_split, stage_range

TINY = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip
SMALL = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 4096,
}  # fmt: skip


def spec(shape: dict[str, Any], **changes: Any) -> ModelSpec:
    return model_spec(CheckpointConfig({**shape, **changes}))


@pytest.mark.parametrize(
    ("shape", "name", "split"),
    [
        # What benchmarks/layer_split.py measures to be best of all splits for its decode and prefill steps.
        (TINY, "decode", [5, 1]),
        (TINY, "prefill", [3, 3]),
        (SMALL, "decode", [7, 5]),
        (SMALL, "prefill", [6, 6]),
        (TINY, "mixed", [4, 2]),
        (TINY, "even", [3, 3]),
        (TINY, "auto", [3, 3]),
        (SMALL, "auto", [6, 6]),
        (SMALL, None, [6, 6]),
        (SMALL, [10, 2], [10, 2]),
        (SMALL, "10,2", [10, 2]),
    ],
)
def test_splits_of_two_stages(shape: dict[str, Any], name: Any, split: list[int]) -> None:
    assert choose_split(spec(shape), 2, name) == split


@pytest.mark.parametrize("name", SPLIT_NAMES)
@pytest.mark.parametrize("num_stages", [1, 2, 5, 12])
@pytest.mark.parametrize("device", SPEEDS)
def test_every_name_splits_all_layers(name: str, num_stages: int, device: str) -> None:
    split = choose_split(spec(SMALL), num_stages, name, device=device, itemsize=4)
    assert len(split) == num_stages
    assert sum(split) == 12
    assert min(split) >= 1


def test_more_stages_relieve_the_heads_where_that_costs_prompts_nothing() -> None:
    assert choose_split(spec(SMALL), 5, "even") == [3, 3, 2, 2, 2]
    assert choose_split(spec(SMALL), 5, "auto") == [2, 3, 3, 3, 1]
    assert choose_split(spec(TINY), 4, "auto") == [2, 2, 1, 1]


def test_stages_hold_neighbouring_layers() -> None:
    ranges = [stage_range(spec(SMALL), stage, 3, "7,4,1") for stage in range(3)]
    assert ranges == [StageRange(0, 7, 12), StageRange(7, 11, 12), StageRange(11, 12, 12)]
    assert [r.is_first for r in ranges] == [True, False, False]
    assert [r.is_last for r in ranges] == [False, False, True]


@pytest.mark.parametrize("split", ["6,5", [6, 7], "12", "12,0", "fast"])
def test_partitions_that_do_not_fit_are_refused(split: Any) -> None:
    with pytest.raises(ConfigError, match="pipeline_layer_partition is"):
        choose_split(spec(SMALL), 2, split)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 7; allowed: at most the model's 6 layers"):
        choose_split(spec(TINY), 7, None)


def test_the_head_weighs_in_decoding_and_not_in_prompts() -> None:
    for shape in (TINY, SMALL):
        decode, prefill = (layer_times(spec(shape), step, SPEEDS["cpu"], 2) for step in (DECODE, PREFILL))
        assert decode.head > 1.5 * decode.layers[0]
        assert prefill.head < 0.2 * prefill.layers[0]
        assert decode.embedding < 0.1 * decode.layers[0]
        assert prefill.embedding < 0.1 * prefill.layers[0]


def test_a_layers_time_grows_with_tokens_and_context_up_to_its_window() -> None:
    def seconds(model: ModelSpec, tokens: int, context: int) -> float:
        step = StepShape(tokens, tokens * context, tokens, tokens, tokens * context)
        return layer_times(model, step, SPEEDS["cpu"], 2).layers[0]

    small = spec(SMALL)
    assert seconds(small, 8, 100) < seconds(small, 16, 100) < seconds(small, 16, 1000)
    windowed = replace(small, layers=tuple(replace(layer, window=64) for layer in small.layers))
    assert seconds(windowed, 16, 1000) < seconds(small, 16, 100)
    assert seconds(windowed, 16, 1000) == pytest.approx(seconds(windowed, 16, 2000), rel=0.01)


def test_experts_are_read_as_far_as_tokens_touch_them() -> None:
    dense = spec(SMALL)
    experts = ExpertSpec(num_experts=8, top_k=1, intermediate_size=3072, normalize=True)
    sparse = replace(dense, layers=tuple(replace(layer, experts=experts) for layer in dense.layers))

    def ratio(tokens: int) -> float:
        step = StepShape(tokens, tokens, tokens, tokens, tokens)
        speed = replace(SPEEDS["cpu"], flops=1e18, attention_flops=1e18, activation_bytes=1e18, layer_seconds=0.0)
        mine, theirs = (layer_times(model, step, speed, 2).layers[0] for model in (sparse, dense))
        return mine / theirs

    assert ratio(1) == pytest.approx(1.0, rel=0.01)
    assert 5.0 < ratio(64) < 8.0
