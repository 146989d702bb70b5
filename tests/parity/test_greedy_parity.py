"""Greedy tokens equal transformers' in float32: every architecture under every setting that must not change answers.

The table is ``ARCHITECTURES`` x ``SETTINGS``. The quick suite runs every architecture once under the harshest setting,
and every setting on Llama; the slow marker runs all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from llm_engine import LLM, SamplingParams
from tests.models.tiny_models import ARCHITECTURES

from .conftest import NUM_TOKENS, Case

GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@dataclass(frozen=True)
class Setting:
    """How the engine is set up, how the prompts are given, and what proves that the setting did something."""

    engine: dict[str, Any] = field(default_factory=dict)
    alone: bool = False
    twice: bool = False
    proof: Callable[[LLM, list[Any]], bool] = lambda llm, outputs: True


def _paused(llm: LLM, outputs: list[Any]) -> bool:
    return any(output.metrics.num_preemptions for output in outputs)


def _hit(llm: LLM, outputs: list[Any]) -> bool:
    return any(output.num_cached_tokens for output in outputs)


def _chunked(llm: LLM, outputs: list[Any]) -> bool:
    return max(stats.num_tokens - stats.num_decodes for stats in llm.get_stats()) > 0 and all(
        (stats.num_tokens - stats.num_decodes) <= 7 * stats.num_chunks for stats in llm.get_stats()
    )


CHUNKS = {"chunk_unit": 1, "long_prefill_token_threshold": 7}
SCARCE = {"num_kv_blocks": 60, "block_size": 8, "max_num_batched_tokens": 48}
SETTINGS = {
    "alone": Setting(alone=True),
    "batch": Setting(),
    "chunks-of-7": Setting(CHUNKS, proof=_chunked),
    "prefix-hit": Setting({"block_size": 4}, twice=True, proof=_hit),
    "preemption": Setting(SCARCE, proof=_paused),
    "2-stages": Setting({"pipeline_parallel_size": 2}),
    "3-stages": Setting({"pipeline_parallel_size": 3}),
    "everything": Setting({**CHUNKS, **SCARCE, "pipeline_parallel_size": 3}, twice=True, proof=_paused),
}


SCARCER = {"mistral": 12}
"""Blocks where a window in every layer lets requests live on fewer than ``SCARCE`` has."""


def check(case: Case, setting: Setting) -> None:
    settings = {"device": "cpu", "num_kv_blocks": 800, "max_model_len": case.max_model_len, **setting.engine}
    if settings["num_kv_blocks"] == SCARCE["num_kv_blocks"]:
        settings["num_kv_blocks"] = SCARCER.get(case.architecture, settings["num_kv_blocks"])
    with LLM(str(case.path), **settings) as llm:
        for _ in range(2 if setting.twice else 1):
            if setting.alone:
                outputs = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in case.prompts]
            else:
                outputs = llm.generate(case.prompts, GREEDY, use_tqdm=False)
            for output, answer in zip(outputs, case.answers, strict=True):
                assert output.outputs[0].token_ids == answer
        assert setting.proof(llm, outputs), "the setting did not do what it is here for"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str, case_of: Callable[[str, int], Case]) -> None:
    check(case_of(architecture, 6), SETTINGS["everything"])


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting(setting: str, case_of: Callable[[str, int], Case]) -> None:
    check(case_of("llama-3", 16), SETTINGS[setting])


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_table(architecture: str, setting: str, case_of: Callable[[str, int], Case]) -> None:
    check(case_of(architecture, 16), SETTINGS[setting])
