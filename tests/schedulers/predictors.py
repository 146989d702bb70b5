"""Guesses at the length of an answer, to be plugged in by name."""

from __future__ import annotations

from typing import Any

from llm_engine.core.views import RequestView

ASKED: list[int] = []


def twice_the_prompt(request: RequestView) -> float:
    ASKED.append(request.request_id)
    return 2.0 * request.num_prompt_tokens


def nonsense(request: RequestView) -> Any:
    """What the tenant says."""
    return {"negative": -1, "endless": float("inf"), "no number": float("nan"), "text": "long", "yes": True}.get(
        str(request.tenant)
    )


def broken(request: RequestView) -> float:
    raise LookupError("the model of lengths is gone")


NOT_CALLABLE = 5
