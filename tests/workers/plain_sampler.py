"""The sampler's definition, one row at a time in plain Python: slow, and short enough to believe."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llm_engine.core.sampling_params import SamplingParams

_MASK = 2**64 - 1


def uniform(seed: int, choice: int, position: int) -> float:
    def finalize(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    state = finalize((seed + 0x9E3779B97F4A7C15) & _MASK)
    state = finalize(((state ^ choice) + 0x9E3779B97F4A7C15) & _MASK)
    state = finalize(((state ^ position) + 0x9E3779B97F4A7C15) & _MASK)
    return (state >> 11) / 2**53


def edited(
    logits: NDArray[np.float32],
    params: SamplingParams,
    prompt: Sequence[int],
    outputs: Sequence[int],
    stop_ids: Sequence[int] = (),
    bad_words_ids: Sequence[Sequence[int]] = (),
) -> list[float]:
    x = [np.float32(value) for value in logits]
    if params.allowed_token_ids:
        x = [value if i in params.allowed_token_ids else np.float32(-np.inf) for i, value in enumerate(x)]
    for word in bad_words_ids:
        before = list(word[:-1])
        if len(before) <= len(outputs) and list(outputs[len(outputs) - len(before) :]) == before:
            x[word[-1]] = np.float32(-np.inf)
    if len(outputs) < params.min_tokens:
        for i in stop_ids:
            x[i] = np.float32(-np.inf)
    for i, bias in params.logit_bias.items():
        x[i] += np.float32(bias)
    for i in {*prompt, *outputs}:
        penalty = np.float32(params.repetition_penalty)
        x[i] = x[i] / penalty if x[i] > 0 else x[i] * penalty
    for i in set(outputs):
        count = np.float32(list(outputs).count(i))
        x[i] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * count
    return x


def kept(x: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """Weight of every token that may be drawn, by id, ascending."""
    largest, temperature = max(x), np.float32(params.temperature)
    weights = [float(np.exp((np.float32(value) - largest) / temperature)) for value in x]
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    order = [i for i in order if np.float32(weights[i]) >= np.float32(params.min_p)]
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        share, reached, nucleus = params.top_p * math.fsum(weights[i] for i in order), 0.0, []
        for i in order:
            if reached >= share:
                break
            nucleus.append(i)
            reached += weights[i]
        order = nucleus
    return {i: weights[i] for i in sorted(order)}


def draw(x: Sequence[float], params: SamplingParams, noise: float) -> int:
    if params.is_greedy:
        return min(range(len(x)), key=lambda i: (-x[i], i))
    weights = kept(x, params)
    target, reached = noise * math.fsum(weights.values()), 0.0
    for i, weight in weights.items():
        reached += weight
        if reached > target:
            return i
    raise AssertionError("nothing was drawn")


def log_softmax(logits: NDArray[np.float32]) -> list[float]:
    largest = float(logits.max())
    norm = largest + math.log(math.fsum(math.exp(float(value) - largest) for value in logits))
    return [float(value) - norm for value in logits]
