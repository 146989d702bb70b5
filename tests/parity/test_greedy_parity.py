"""Greedy tokens equal transformers' in float32: every architecture under every setting that must not change answers.

The table is ``ARCHITECTURES`` x ``SETTINGS`` and ``PROCESSES``. The quick suite runs every architecture once under the
harshest setting, and every setting on Llama, of the processes some; the slow marker runs all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from llm_engine import LLM, SamplingParams
from tests.models.tiny_models import ARCHITECTURES
from tests.quick import some_quick

from .conftest import NUM_TOKENS, Case

FAMILIES = {
    *("llama", "llama-3", "smollm3", "mistral", "qwen2", "qwen2-window", "qwen3", "phi3", "phi3-longrope"),
    *("gemma2", "gemma3", "mixtral", "qwen3-moe"),
}
"""The others differ in how they read their config and in a factor; tests/models/ compares the logits of all."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


Proof = Callable[[LLM, list[Any]], bool]


@dataclass(frozen=True)
class Setting:
    """How the engine is set up, how the prompts are given, and what proves that the setting did something."""

    engine: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    twice: bool = False
    again: bool = False
    """Where memory is too scarce for a second round to find anything: a short prompt is then asked for twice, alone."""
    proof: Proof = lambda llm, outputs: True


def _paused(llm: LLM, outputs: list[Any]) -> bool:
    return any(output.metrics.num_preemptions for output in outputs)


def _hit(llm: LLM, outputs: list[Any]) -> bool:
    return any(output.num_cached_tokens for output in outputs)


def _chunked(llm: LLM, outputs: list[Any]) -> bool:
    return max(stats.num_tokens - stats.num_decodes for stats in llm.get_stats()) > 0 and all(
        (stats.num_tokens - stats.num_decodes) <= 7 * stats.num_chunks for stats in llm.get_stats()
    )


def _ahead(llm: LLM, outputs: list[Any]) -> bool:
    return any(stats.ahead for stats in llm.get_stats())


def _all_queues(llm: LLM, outputs: list[Any]) -> bool:
    return {stats.queue for stats in llm.get_stats()} == set(range(len(llm.engine.state.core.table.queues)))


def _both(*proofs: Proof) -> Proof:
    return lambda llm, outputs: all(proof(llm, outputs) for proof in proofs)


def stages(count: int, executor: str = "inproc") -> dict[str, Any]:
    """So many of them, a thread or a process each."""
    return {"pipeline_parallel_size": count, "executor": executor}


CHUNKS = {"chunk_unit": 1, "long_prefill_token_threshold": 7}
BLOCK_SIZE = 8
SCARCE = {"num_kv_blocks": 60, "block_size": BLOCK_SIZE, "max_num_batched_tokens": 48}
SPREAD = {"max_num_batched_tokens": 64}
"""So little that every running queue gets some of the requests."""
SETTINGS = {
    "alone": Setting(alone=True, proof=_ahead),
    "batch": Setting(proof=_ahead),
    "no-look-ahead": Setting({"schedule_ahead": False}, proof=lambda llm, outputs: not _ahead(llm, outputs)),
    "chunks-of-7": Setting(CHUNKS, proof=_both(_chunked, _ahead)),
    "prefix-hit": Setting({"block_size": 4}, twice=True, proof=_hit),
    "preemption": Setting(SCARCE, proof=_both(_paused, _ahead)),
    "balanced": Setting({"scheduler": "balanced"}, proof=_ahead),
    **{
        f"{count}-queues": Setting({"num_queues": count, **SPREAD}, proof=_both(_all_queues, _ahead))
        for count in (2, 3, 4)
    },
    "2-stages": Setting({**stages(2), **SPREAD}, proof=_ahead),
    "3-stages": Setting({**stages(3), **SPREAD}, proof=_ahead),
    "4-stages": Setting({**stages(4), **SPREAD}, proof=_ahead),
    "3-stages-no-look-ahead": Setting({**stages(3), **SPREAD, "schedule_ahead": False}),
    "1-queue-on-2-stages": Setting({**stages(2), "num_queues": 1}),
    "4-queues-on-2-stages": Setting(
        {**stages(2), "num_queues": 4, "scheduler": "greedy", **SPREAD}, proof=_both(_all_queues, _ahead)
    ),
    "balanced-3-stages": Setting({**stages(3), "scheduler": "balanced"}, proof=_ahead),
    "everything": Setting({**CHUNKS, **SCARCE, **stages(3)}, twice=True, proof=_paused),
}
"""Stages are threads here: a model loads in a moment."""
PROCESSES = {
    f"zmq-{count}{'' if ahead else '-no-look-ahead'}": Setting(
        {**CHUNKS, **SCARCE, **stages(count, "zmq"), "scheduler": "balanced", "schedule_ahead": ahead},
        again=True,
        proof=_both(_paused, _hit),
    )
    for count in (1, 2, 3, 4)
    for ahead in (True, False)
}
"""Stages are processes, which take seconds to start: one engine cuts prompts up, pauses and finds prefixes."""


SCARCER = {"mistral": 12}
"""Blocks where a window in every layer lets requests live on fewer than ``SCARCE`` has."""


def check(case: Case, setting: Setting) -> None:
    settings = {"device": "cpu", "num_kv_blocks": 800, "max_model_len": case.max_model_len, **setting.engine}
    if settings["num_kv_blocks"] == SCARCE["num_kv_blocks"]:
        settings["num_kv_blocks"] = SCARCER.get(case.architecture, settings["num_kv_blocks"])
    with LLM(str(case.path), **settings) as llm:
        rounds = [([prompt], GREEDY) for prompt in case.prompts] if setting.alone else [(case.prompts, GREEDY)]
        if setting.twice:
            rounds *= 2
        if setting.again:
            short = min((prompt for prompt in case.prompts if len(prompt) > 2 * BLOCK_SIZE), key=len)
            rounds += [([short], replace(GREEDY, max_tokens=4))] * 2
        answers = {tuple(prompt): answer for prompt, answer in zip(case.prompts, case.answers, strict=True)}
        outputs = []
        for prompts, params in rounds:
            for output in llm.generate(prompts, params, use_tqdm=False):
                assert output.outputs[0].token_ids == answers[tuple(output.prompt_token_ids)][: params.max_tokens]
                outputs.append(output)
        assert setting.proof(llm, outputs), "the setting did not do what it is here for"


def test_the_families_are_architectures() -> None:
    assert set(ARCHITECTURES) >= FAMILIES


@pytest.mark.parametrize("architecture", some_quick(ARCHITECTURES, FAMILIES))
def test_every_architecture(architecture: str, case_of: Callable[[str, int], Case]) -> None:
    check(case_of(architecture, 6), SETTINGS["everything"])


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting(setting: str, case_of: Callable[[str, int], Case]) -> None:
    check(case_of("llama-3", 8), SETTINGS[setting])


@pytest.mark.parametrize("setting", ["zmq-3", "zmq-1-no-look-ahead"])
def test_processes(setting: str, case_of: Callable[[str, int], Case]) -> None:
    check(case_of("llama-3", 8), PROCESSES[setting])


@pytest.mark.slow
@pytest.mark.parametrize("setting", [*SETTINGS, *PROCESSES])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_table(architecture: str, setting: str, case_of: Callable[[str, int], Case]) -> None:
    check(case_of(architecture, 16), {**SETTINGS, **PROCESSES}[setting])
