"""Where a setting comes from, and what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from llm_engine.cli.settings import (
    ALL_SETTINGS,
    ENGINE_SETTINGS,
    SERVER_SETTINGS,
    UnknownSettingError,
    add_flags,
    resolve,
)
from llm_engine.core.config import EngineConfig
from llm_engine.core.errors import ConfigError


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    add_flags(parser, ALL_SETTINGS)
    return parser.parse_args(words)


def resolved(*words: str, environ: dict[str, str] | None = None) -> dict[str, Any]:
    return resolve(ALL_SETTINGS, flags(*words), environ or {})


def write(folder: Path, text: str) -> str:
    path = folder / "engine.yaml"
    path.write_text(text)
    return str(path)


def test_names_of_engine_and_server_settings_do_not_clash() -> None:
    assert not set(ENGINE_SETTINGS) & set(SERVER_SETTINGS)


def test_nothing_given_is_nothing_set() -> None:
    assert resolved() == {}


def test_flags_have_the_types_of_their_fields() -> None:
    values = resolved(
        "--max-num-seqs", "8", "--gpu-memory-utilization", "0.5", "--no-enable-prefix-caching", "--dtype", "float32",
        "--block-size", "none", "--served-model-name", "a", "b", "-pp", "2",
    )  # fmt: skip
    assert values == {
        "max_num_seqs": 8, "gpu_memory_utilization": 0.5, "enable_prefix_caching": False, "dtype": "float32",
        "block_size": None, "served_model_name": ("a", "b"), "pipeline_parallel_size": 2,
    }  # fmt: skip
    EngineConfig.of(**{name: value for name, value in values.items() if name in ENGINE_SETTINGS})


def test_precedence_is_flag_environment_file(tmp_path: Path) -> None:
    file = write(tmp_path, "max_num_seqs: 1\nblock-size: 4\nport: 9\n")
    environ = {"LLM_ENGINE_MAX_NUM_SEQS": "2", "LLM_ENGINE_BLOCK_SIZE": "8", "UNRELATED": "x"}
    assert resolved("--config", file, "--max-num-seqs", "3", environ=environ) == {
        "max_num_seqs": 3, "block_size": 8, "port": 9,
    }  # fmt: skip


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    assert resolved(environ={"LLM_ENGINE_CONFIG": write(tmp_path, "port: 9\n")}) == {"port": 9}


def test_another_commands_settings_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path, "port: 9\nmax_num_seqs: 1\n")
    environ = {"LLM_ENGINE_HOST": "::1"}
    assert resolve(ENGINE_SETTINGS, flags("--config", file), environ) == {"max_num_seqs": 1}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("ENABLE_PREFIX_CACHING", "no", False),
        ("ENABLE_PREFIX_CACHING", "True", True),
        ("SERVED_MODEL_NAME", "a, b", ("a", "b")),
        ("MAX_MODEL_LEN", "", None),
        ("GPU_MEMORY_UTILIZATION", "1", 1.0),
    ],
)
def test_variables_are_parsed(name: str, text: str, value: object) -> None:
    assert resolved(environ={"LLM_ENGINE_" + name: text}) == {name.lower(): value}


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"LLM_ENGINE_MAX_NUM_SEQ": "1"}, "LLM_ENGINE_MAX_NUM_SEQ; did you mean LLM_ENGINE_MAX_NUM_SEQS?"),
        ({"LLM_ENGINE_MAX_NUM_SEQS": "many"}, "max_num_seqs is 'many'; allowed: a whole number"),
        ({"LLM_ENGINE_ENABLE_PREFIX_CACHING": "maybe"}, "true or false"),
    ],
)
def test_bad_variables_are_refused(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(environ=environ)
    assert says in str(caught.value)


def test_variables_that_parts_read_themselves_are_no_settings() -> None:
    assert resolved(environ={"LLM_ENGINE_NATIVE": "0"}) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_num_seq: 1\n", "max_num_seq; did you mean max_num_seqs?"),
        ("max_num_seqs: many\n", "max_num_seqs is 'many'"),
        ("max_num_seqs: 1.5\n", "a whole number"),
        ("max_num_seqs: true\n", "a whole number"),
        ("enable_prefix_caching: 1\n", "true or false"),
        ("dtype: 16\n", "text"),
        ("max_num_seqs: null\n", "a whole number"),
        ("served_model_name: [1]\n", "a list of names"),
        ("- a\n", "'name: value'"),
        ("a: [\n", "a YAML file"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved("--config", write(tmp_path, text))
    assert says in str(caught.value)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/nowhere\.yaml"):
        resolved("--config", "/nowhere.yaml")


def test_good_files_give_typed_values(tmp_path: Path) -> None:
    text = "gpu_memory_utilization: 1\nserved_model_name: one\nmax_model_len: null\nscheduler: greedy\n"
    assert resolved("--config", write(tmp_path, text)) == {
        "gpu_memory_utilization": 1.0, "served_model_name": ("one",), "max_model_len": None, "scheduler": "greedy",
    }  # fmt: skip


# -- names with values, and flags that are not the names


def test_an_option_flag_may_be_repeated_and_its_values_stay_texts() -> None:
    words = (
        "--scheduler-option",
        "aging_s=5",
        "--scheduler-option",
        "ordering.weights=a=2,b=1",
        "--scheduler-option",
        "x=",
    )
    values = resolved(*words)
    assert values == {"scheduler_options": {"aging_s": "5", "ordering.weights": "a=2,b=1", "x": ""}}
    EngineConfig.of(**values)


@pytest.mark.parametrize("word", ["aging_s", "=5", " =5"])
def test_an_option_without_a_name_or_a_value_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flags("--scheduler-option", word)
    assert "allowed: NAME=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", {"a": "1"}),
        ("a=1, b.c = x,y", {"a": "1", "b.c": "x,y"}),
        ('{"a": 1, "weights": "x=2,y=1"}', {"a": 1, "weights": "x=2,y=1"}),
        ("none", None),
    ],
)
def test_a_variable_holds_pairs_or_json(text: str, value: object) -> None:
    assert resolved(environ={"LLM_ENGINE_SCHEDULER_OPTIONS": text}) == {"scheduler_options": value}


@pytest.mark.parametrize("text", ["a", "{", "=1"])
def test_a_variable_of_neither_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"scheduler_options is .*; allowed: NAME=VALUE"):
        resolved(environ={"LLM_ENGINE_SCHEDULER_OPTIONS": text})


def test_a_file_holds_a_mapping_with_types_of_its_own(tmp_path: Path) -> None:
    text = "scheduler_options:\n  aging_s: 5\n  shed: false\nresources: [a:B, c:D]\n"
    values = resolved("--config", write(tmp_path, text))
    assert values == {"scheduler_options": {"aging_s": 5, "shed": False}, "resources": ("a:B", "c:D")}
    EngineConfig.of(**values)
    with pytest.raises(ConfigError, match="scheduler_options is 5; allowed: NAME=VALUE pairs or null"):
        resolved("--config", write(tmp_path, "scheduler_options: 5\n"))


def test_flags_of_several_names_add_up() -> None:
    assert resolved("--resource", "a:B", "--resource", "c:D", "e:F") == {"resources": ("a:B", "c:D", "e:F")}
    assert resolved(environ={"LLM_ENGINE_RESOURCES": "a:B,c:D"}) == {"resources": ("a:B", "c:D")}


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert resolved("--config", write(tmp_path, "# nothing\n")) == {}


def test_unknown_settings_keep_the_error_of_settings() -> None:
    error = UnknownSettingError("prot", "setting", ["port"])
    assert str(error) == "unknown setting prot; did you mean port?"
    assert error.field == "prot"
