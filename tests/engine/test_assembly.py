"""Limits from settings: what the token budget has no room for is refused, and defaults are fitted to it."""

from __future__ import annotations

from typing import Any

import pytest

from llm_engine import LLM
from llm_engine.core.config import EngineConfig
from llm_engine.core.errors import ConfigError
from llm_engine.engine.assembly import make_limits


@pytest.mark.parametrize(
    ("settings", "on_cuda", "complaint"),
    [
        ({"chunk_unit": 65, "max_num_batched_tokens": 64}, False, "chunk_unit is 65; allowed: at most max_num_batched"),
        ({"chunk_unit": 513}, False, "at most max_num_batched_tokens, 512, the default here"),
        ({"chunk_unit": 2049}, True, "at most max_num_batched_tokens, 2048, the default here"),
        (
            {"max_micro_batch_seqs": 9, "max_num_batched_tokens": 8},
            False,
            "max_micro_batch_seqs is 9; allowed: at",
        ),
        ({"max_micro_batch_seqs": 600}, False, "512, the default here"),
    ],
)
def test_what_the_token_budget_has_no_room_for_is_refused(
    settings: dict[str, Any], on_cuda: bool, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_limits(EngineConfig.of(**settings), 16, on_cuda=on_cuda)


@pytest.mark.parametrize(
    ("settings", "rows", "tokens", "unit"),
    [
        ({}, 256, 512, 16),
        ({"max_num_batched_tokens": 64}, 64, 64, 16),
        ({"max_num_batched_tokens": 8}, 8, 8, 16),
        ({"max_num_batched_tokens": 64, "max_micro_batch_seqs": 64, "chunk_unit": 64}, 64, 64, 64),
        ({"max_num_seqs": 1000}, 512, 512, 16),
        ({"max_num_seqs": 4, "max_micro_batch_seqs": 300}, 300, 512, 16),
        ({"long_prefill_token_threshold": 9999}, 256, 512, 16),
        ({"long_prefill_token_threshold": 5}, 256, 512, 16),
    ],
)
def test_what_was_not_said_is_fitted_to_what_was(settings: dict[str, Any], rows: int, tokens: int, unit: int) -> None:
    limits = make_limits(EngineConfig.of(**settings), 16, on_cuda=False)
    assert (limits.max_micro_batch_seqs, limits.max_num_batched_tokens, limits.chunk_unit) == (rows, tokens, unit)


@pytest.mark.parametrize(
    ("chunk_unit", "threshold", "unit"), [(16, None, 16), (16, 32, 16), (16, 16, 16), (16, 7, 7), (1, 7, 1)]
)
def test_the_unit_is_no_longer_than_a_chunk_may_be(chunk_unit: int, threshold: int | None, unit: int) -> None:
    config = EngineConfig.of(chunk_unit=chunk_unit, long_prefill_token_threshold=threshold)
    assert make_limits(config, 4, on_cuda=False).unit == unit


def test_an_engine_refuses_it_before_it_loads_anything() -> None:
    with pytest.raises(ConfigError, match="chunk_unit is 64; allowed: at most max_num_batched_tokens, 32"):
        LLM(chunk_unit=64, max_num_batched_tokens=32)
