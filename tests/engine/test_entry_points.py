"""Executors, architectures, resources and KV managers of another distribution, found by their names alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llm_engine
from llm_engine import LLM, ConfigError, EngineDeadError, ModelLoadError, SamplingParams
from tests.distributions import forget_modules, write_distribution
from tests.engine.engines import greedy, toy_llm

ROOT = Path(__file__).parents[2]
DEMO = Path(llm_engine.__file__).parent / "models" / "demo_model"
PROMPT = "What is 47 + 85?"
TEXT = """
from llm_engine import BaseResourceManager, KVCacheManager
from llm_engine.engine.executors.registry import make_inproc
from llm_engine.models.architectures import llama

made = []

def noted(spec):
    made.append(make_inproc(spec))
    return made[-1]

def no_executor(spec):
    return "none"

def ours(config):
    return llama(config)

def broken(config):
    raise RuntimeError("no such layer")

def no_spec(config):
    return 5

class Slots(BaseResourceManager):
    name = "slots"
    def needed(self, request):
        return 0
    def available(self):
        return 1

class Keeping(KVCacheManager):
    def retention(self, seq_id, index, *, found):
        return 50

class Wrong(KVCacheManager):
    def retention(self, seq_id, index, *, found):
        return 1000
"""
POINTS = {
    "llm_engine.executors": {"noted": "everything_ours:noted", "no-executor": "everything_ours:no_executor"},
    "llm_engine.architectures": {
        "OursForCausalLM": "everything_ours:ours",
        "BrokenForCausalLM": "everything_ours:broken",
        "NothingForCausalLM": "everything_ours:no_spec",
    },
    "llm_engine.resources": {"slots": "everything_ours:Slots"},
    "llm_engine.kv_cache_managers": {"keeping": "everything_ours:Keeping", "wrong": "everything_ours:Wrong"},
}


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    write_distribution(folder, "everything_ours", TEXT, POINTS)
    monkeypatch.syspath_prepend(folder)
    yield folder
    forget_modules(folder)


def checkpoint(folder: Path, architecture: str) -> Path:
    """The demo model under another architecture's name."""
    copy = folder / architecture
    shutil.copytree(DEMO, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    return copy


def answer(**settings: Any) -> str:
    model = settings.pop("model", None)
    with LLM(model, num_kv_blocks=40, max_num_seqs=4, **settings) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=12)
        return llm.chat([{"role": "user", "content": PROMPT}], params, use_tqdm=False)[0].outputs[0].text


def test_everything_of_theirs_at_once(distribution: Path, tmp_path: Path) -> None:
    found = answer(
        model=str(checkpoint(tmp_path, "OursForCausalLM")), executor="noted", resources=["slots"],
        kv_cache_manager="keeping",
    )  # fmt: skip
    assert found == "47 + 85 = 132"
    (executor,) = sys.modules["everything_ours"].made
    assert executor.num_stages == 1


def test_stage_processes_find_their_architecture_too(distribution: Path, tmp_path: Path) -> None:
    code = (
        "from llm_engine import LLM, SamplingParams\n"
        f"with LLM({str(checkpoint(tmp_path, 'OursForCausalLM'))!r}, pipeline_parallel_size=2, num_kv_blocks=40,\n"
        "         max_num_seqs=4, cpu_threads=1, executor='zmq', resources=['slots'],\n"
        "         scheduler='priority', scheduler_options={'aging_s': 5}) as llm:\n"
        f"    question = [{{'role': 'user', 'content': {PROMPT!r}}}]\n"
        "    params = SamplingParams(temperature=0.0, max_tokens=12)\n"
        "    print(llm.chat(question, params, use_tqdm=False)[0].outputs[0].text)\n"
    )
    environ = {**os.environ, "PYTHONPATH": f"{distribution}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.strip() == "47 + 85 = 132", ended.stderr


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("BrokenForCausalLM", "does not describe a BrokenForCausalLM: no such layer"),
        ("NothingForCausalLM", "architecture 'NothingForCausalLM' makes 5, not a ModelSpec"),
        ("UnheardForCausalLM", "is not supported; known: BrokenForCausalLM, .*OursForCausalLM"),
    ],
)
def test_an_architecture_that_is_none_ends_the_start(
    distribution: Path, tmp_path: Path, architecture: str, says: str, no_thread_left: None
) -> None:
    with pytest.raises(ModelLoadError, match=says):
        answer(model=str(checkpoint(tmp_path, architecture)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"executor": "no-executor"}, "what makes one of Executor; it made 'none'"),
        ({"executor": "note"}, "did you mean 'noted'"),
        ({"executor": "everything_ours:Slots"}, "a subclass of Executor; Slots is none, and lacks"),
        ({"resources": ["slot"]}, "did you mean 'slots'"),
        ({"kv_cache_manager": "keepin"}, "did you mean 'keeping'"),
    ],
)
def test_what_is_none_is_refused_at_start(distribution: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        toy_llm(**settings)


def test_a_manager_that_breaks_its_rule_ends_the_engine_and_is_named(distribution: Path, no_thread_left: None) -> None:
    with toy_llm(kv_cache_manager="wrong") as llm:
        with pytest.raises(EngineDeadError, match=r"Wrong\.retention is 1000; allowed: 0 to 100"):
            llm.generate([1, 2, 3, 4, 5, 6, 7, 8], greedy(4), use_tqdm=False)
        assert not llm.is_ready
