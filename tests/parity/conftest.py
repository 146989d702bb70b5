"""Checkpoints and reference answers, made once per session and only for the architectures that are asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.models import tiny_models

NUM_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """One architecture: its checkpoint, prompts, and what transformers answers greedily in float32."""

    architecture: str
    path: Path
    max_model_len: int | None
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Case]:
    made: dict[tuple[str, int], Case] = {}

    def make(name: str, num_prompts: int) -> Case:
        if (name, num_prompts) not in made:
            made[name, num_prompts] = _make_case(name, num_prompts, tmp_path_factory.mktemp(name))
        return made[name, num_prompts]

    return make


def _make_case(name: str, num_prompts: int, folder: Path) -> Case:
    tiny_models.build(name, folder)
    row = tiny_models.ARCHITECTURES[name]
    longest = min(row.max_model_len or 200, 200) - NUM_TOKENS
    rng = random.Random(name)
    lengths = [longest, 1, *(rng.randint(2, longest) for _ in range(num_prompts - 2))][:num_prompts]
    prompts = [[rng.randrange(3, tiny_models.VOCAB) for _ in range(length)] for length in lengths]
    model = tiny_models.reference(name)
    with torch.inference_mode():
        answers = [_greedy(model, prompt) for prompt in prompts]
    return Case(name, folder, row.max_model_len, prompts, answers)


def _greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    tokens, cache, inputs = [], None, torch.tensor([prompt])
    for _ in range(NUM_TOKENS):
        output = model(inputs, past_key_values=cache, use_cache=True)
        inputs, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        tokens.append(int(inputs))
    return tokens
