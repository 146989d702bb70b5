"""The bundled model's score, end to end through the chat template: high, and the same under every setting that must not
change answers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from examples.demo_score import addition_questions, is_correct
from llm_engine import LLM, SamplingParams

from .test_greedy_parity import CHUNKS, SETTINGS

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
QUESTIONS = addition_questions(200, seed=7)
SCARCE = {"num_kv_blocks": 24, "max_num_seqs": 64, "max_model_len": 256}


def answers_under(settings: dict[str, Any]) -> list[str]:
    with LLM(device="cpu", **{"num_kv_blocks": 2000, **settings}) as llm:
        outputs = llm.chat([messages for messages, _ in QUESTIONS], GREEDY, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


@cache
def answers() -> list[str]:
    return answers_under({})


def test_score() -> None:
    correct = sum(is_correct(reply, expected) for reply, (_, expected) in zip(answers(), QUESTIONS, strict=True))
    assert correct >= 0.95 * len(QUESTIONS), f"{correct} of {len(QUESTIONS)}"


@pytest.mark.parametrize(
    "settings",
    [
        {"pipeline_parallel_size": 2},
        pytest.param({"pipeline_parallel_size": 3, **CHUNKS, **SCARCE}, marks=pytest.mark.slow),
        {"enable_prefix_caching": False, "max_num_seqs": 3},
        {"block_size": 4, "max_num_batched_tokens": 32},
    ],
    ids=["2 stages", "3 stages, chunks of 7, scarce memory", "no prefix cache, 3 at a time", "small blocks and budget"],
)
def test_same_answers(settings: dict[str, Any]) -> None:
    assert answers_under(settings) == answers()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_same_answers_under_every_setting(name: str) -> None:
    settings = dict(SETTINGS[name].engine)
    if "num_kv_blocks" in settings:
        settings |= {"max_model_len": 256}
    assert answers_under(settings) == answers()
