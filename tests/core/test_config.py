"""Settings: flat names find their owner, and what cannot be is refused by name."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from llm_engine.core.config import PARTS, EngineConfig, EngineSettings
from llm_engine.core.errors import ConfigError, EngineError


def test_flat_names_are_sorted_to_their_owners() -> None:
    config = EngineConfig.of(model="a", block_size=32, max_num_seqs=7, pipeline_parallel_size=2)
    assert config.model.model == "a"
    assert config.cache.block_size == 32
    assert config.scheduler.max_num_seqs == 7
    assert config.parallel.pipeline_parallel_size == 2
    assert EngineConfig.of() == EngineConfig()


def test_no_two_parts_own_one_name_and_every_setting_has_help() -> None:
    owned = [field for part in PARTS.values() for field in fields(part)]
    assert len({field.name for field in owned}) == len(owned)
    assert all(field.metadata["help"] for field in owned)


def test_settings_are_read_only() -> None:
    with pytest.raises(FrozenInstanceError):
        EngineConfig().model.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "meant"),
    [("max_num_sequences", "max_num_seqs"), ("blocksize", "block_size"), ("tokeniser", "tokenizer")],
)
def test_an_unknown_name_is_refused_with_the_nearest_known_one(given: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        EngineConfig.of(**{given: 1})


def test_a_name_like_no_other_is_refused_without_a_guess() -> None:
    with pytest.raises(ConfigError, match=r"no such setting$") as caught:
        EngineConfig.of(zzzzzz=1)
    assert (caught.value.field, caught.value.value) == ("zzzzzz", 1)
    assert isinstance(caught.value, EngineError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("model", 5, "a text"),
        ("dtype", "int8", "auto, float32, bfloat16, float16"),
        ("dtype", None, "auto, float32"),
        ("device", "tpu", "auto, cpu, cuda"),
        ("max_model_len", 0, "1 or more"),
        ("max_model_len", True, "a whole number"),
        ("seed", None, "a whole number"),
        ("seed", 1.5, "a whole number"),
        ("block_size", 12, "a power of two"),
        ("block_size", 0, "a power of two"),
        ("block_size", "16", "a whole number"),
        ("num_kv_blocks", 1, "2 or more"),
        ("kv_cache_memory", 0, "1 or more"),
        ("gpu_memory_utilization", 0, "above 0"),
        ("gpu_memory_utilization", 1.1, "at most 1"),
        ("gpu_memory_utilization", float("nan"), "above 0"),
        ("gpu_memory_utilization", "all", "a number"),
        ("enable_prefix_caching", "yes", "true or false"),
        ("enable_prefix_caching", 1, "true or false"),
        ("max_num_seqs", 0, "1 or more"),
        ("max_num_seqs", "8", "a whole number"),
        ("max_num_seqs", None, "a whole number"),
        ("max_micro_batch_seqs", -1, "1 or more"),
        ("max_num_batched_tokens", 0, "1 or more"),
        ("long_prefill_token_threshold", 0, "1 or more"),
        ("chunk_unit", 0, "1 or more"),
        ("max_num_waiting", 0, "1 or more"),
        ("scheduler", None, "a text"),
        ("pipeline_parallel_size", 0, "1 or more"),
        ("cpu_threads", 0, "1 or more"),
        ("max_stage_restarts", -1, "0 or more"),
        ("max_stage_restarts", None, "a whole number"),
        ("on_stage_death", "retry", "replay, fail"),
        ("pipeline_layer_partition", "6,6", "1 number of 1 or more with commas between, or auto, decode"),
        ("pipeline_layer_partition", 12, "a text"),
        ("stage_cpus", "0;1", "auto, none, or 1 group of CPUs like 0-3,8"),
        ("stage_cpus", None, "a text"),
        ("stage_devices", "0,1", "1 device number, from 0"),
        ("scheduler_options", ["aging_s=5"], "names with their values"),
        ("scheduler_options", {5: 1}, "names with their values"),
        ("resources", ["a:B"], "names in a tuple"),
        ("resources", (5,), "names in a tuple"),
        ("kv_cache_manager", None, "a text"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_name(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.of(**{name: value})
    error = caught.value
    assert error.field == name
    assert error.value is value
    assert allowed in error.allowed
    assert str(error) == f"{name} is {value!r}; allowed: {error.allowed}"


def test_a_schedulers_options_are_plain_values() -> None:
    plain = {"a": 1, "b": 1.5, "c": True, "d": "x", "e": None, "f": ["x", 1]}
    assert EngineConfig.of(scheduler_options=plain).scheduler.scheduler_options == plain
    with pytest.raises(ConfigError, match=r"scheduler_options\['a'\] is <object"):
        EngineConfig.of(scheduler_options={"a": object()})


def test_the_typed_settings_are_the_fields() -> None:
    """``LLM`` takes ``EngineSettings`` as keywords: the type must not fall behind the dataclasses."""
    fields_of = {f.name: f.type for part in PARTS.values() for f in fields(part)}
    typed = {name: ref.__forward_arg__ for name, ref in EngineSettings.__annotations__.items()}
    assert {"model": "str | None", "resources": "tuple[str, ...]", **typed} == fields_of
