"""Settings of each stage: how they are spelled, and what is refused."""

from __future__ import annotations

import pytest

from llm_engine.core.config import EngineConfig, ParallelConfig
from llm_engine.core.errors import ConfigError
from llm_engine.core.stage_settings import (
    SPLIT_NAMES,
    check_pipeline_address,
    check_split,
    parse_layer_partition,
    parse_remote_stages,
    parse_stage_cpus,
    parse_stage_devices,
)


def test_a_layer_partition_is_numbers_or_a_name() -> None:
    assert parse_layer_partition("6,6", 2) == [6, 6]
    assert parse_layer_partition(" 10 , 1,1", 3) == [10, 1, 1]
    assert parse_layer_partition("12", 1) == [12]
    assert parse_layer_partition(None, 2) is None
    assert [parse_layer_partition(name, 2) for name in SPLIT_NAMES] == list(SPLIT_NAMES)


@pytest.mark.parametrize(
    "text", ["", ",", "6", "6,6,6", "6,", "6;6", "6,0", "12,-1", "6,6.0", "6,+6", "6,1_0", "6,٦", "Even", "6 6"]
)
def test_other_layer_partitions_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.of(pipeline_parallel_size=2, pipeline_layer_partition=text)
    assert (caught.value.field, caught.value.value) == ("pipeline_layer_partition", text)
    assert caught.value.allowed == ("2 numbers of 1 or more with commas between, or auto, decode, prefill, mixed, even")


def test_a_split_is_checked_against_the_model() -> None:
    assert check_split(12, 2, "7,5") == [7, 5]
    assert check_split(12, 2, [7, 5]) == [7, 5]
    assert check_split(12, 2, "decode") == "decode"
    assert check_split(12, 2, None) is None


@pytest.mark.parametrize("split", ["6,7", [6, 7], "12,1", [12, 0], [12], [13, -1], []])
def test_a_partition_that_does_not_add_up_is_refused(split: list[int] | str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_split(12, 2, split)
    assert caught.value.field == "pipeline_layer_partition"
    assert caught.value.value == (split if isinstance(split, str) else ",".join(map(str, split)))
    assert caught.value.allowed == "2 numbers of 1 or more that sum to the model's 12 layers"


@pytest.mark.parametrize("split", [None, "even", "1,1,1,1,1"])
def test_more_stages_than_layers_are_refused(split: str | None) -> None:
    with pytest.raises(ConfigError, match="pipeline_parallel_size is 5; allowed: at most the model's 4 layers"):
        check_split(4, 5, split)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("0;1", [{0}, {1}]),
        ("0-3;4-7", [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        (" 0-1, 8 ; 3 ", [{0, 1, 8}, {3}]),
        ("0;0", [{0}, {0}]),
        ("auto", None),
        ("none", None),
    ],
)
def test_stage_cpus(text: str, groups: list[set[int]] | None) -> None:
    assert parse_stage_cpus(text, 2) == groups


@pytest.mark.parametrize("text", ["", "0", "0;1;2", "0;", "0;1-", "0;3-1", "0;-1", "0;a", "0:1", "0;0-99999999", "0,1"])
def test_other_stage_cpus_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.of(pipeline_parallel_size=2, stage_cpus=text)
    assert (caught.value.field, caught.value.value) == ("stage_cpus", text)
    assert caught.value.allowed == "auto, none, or 2 groups of CPUs like 0-3,8 with semicolons between"


def test_stage_devices() -> None:
    assert parse_stage_devices("1, 0", 2) == [1, 0]
    assert parse_stage_devices("0,0", 2) == [0, 0]
    assert parse_stage_devices(None, 2) is None


@pytest.mark.parametrize("text", ["", "0", "0,1,2", "0;1", "cuda:0,cuda:1", "0,-1"])
def test_other_stage_devices_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.of(pipeline_parallel_size=2, stage_devices=text)
    assert (caught.value.field, caught.value.value) == ("stage_devices", text)
    assert caught.value.allowed == "2 device numbers, from 0, with commas between"


def test_remote_stages_are_numbers_of_stages() -> None:
    assert parse_remote_stages(None, 4) == frozenset()
    assert parse_remote_stages("1,3", 4) == {1, 3}


@pytest.mark.parametrize("text", ["", "4", "-1", "a", "1,", "1;2"])
def test_other_remote_stages_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="numbers of stages, from 0 to 3"):
        parse_remote_stages(text, 4)


@pytest.mark.parametrize("address", [None, "tcp://10.0.0.1:5600", "tcp://host.example:1", "tcp://[::1]:5600"])
def test_addresses_that_others_can_reach(address: str | None) -> None:
    check_pipeline_address(address)


@pytest.mark.parametrize(
    "address",
    ["", "5600", "host:5600", "ipc:///tmp/x", "tcp://host", "tcp://*:5600", "tcp://0.0.0.0:5600", "tcp://[::]:5600",
     "tcp://host:0", "tcp://host:99999", "tcp://:5600"],
)  # fmt: skip
def test_other_addresses_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"tcp://HOST:PORT"):
        check_pipeline_address(address)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"remote_stages": "1"}, "pipeline_address"),
        ({"pipeline_address": "tcp://10.0.0.1:5600"}, "pipeline_key"),
        ({"remote_stages": "1", "pipeline_address": "tcp://10.0.0.1:5600"}, "pipeline_key"),
        (
            {
                "remote_stages": "1",
                "pipeline_address": "tcp://10.0.0.1:5600",
                "pipeline_key": "key",
                "executor": "inproc",
            },
            "executor",
        ),
    ],
)
def test_what_remote_stages_need(settings: dict[str, str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelConfig(pipeline_parallel_size=2, **settings)  # type: ignore[arg-type]
    assert caught.value.field == field
