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


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert resolved("--config", write(tmp_path, "# nothing\n")) == {}


def test_unknown_settings_keep_the_error_of_settings() -> None:
    error = UnknownSettingError("prot", "setting", ["port"])
    assert str(error) == "unknown setting prot; did you mean port?"
    assert error.field == "prot"
