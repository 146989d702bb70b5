"""Requests on their way to the engine: texts with the bundled model's tokenizer, and what is said beside the prompt."""

from __future__ import annotations

import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest

import llm_engine
from llm_engine import InvalidParamsError, ModelInfo, SamplingParams
from llm_engine.core.request import Request
from llm_engine.engine.input_processor import InputProcessor
from llm_engine.engine.stream import QueueSink
from llm_engine.engine.tokenizer import Tokenizer
from llm_engine.kvcache.kv_cache_manager import KVCacheManager

TOKENIZER = Tokenizer(str(Path(llm_engine.__file__).parent / "models" / "demo_model"))
HALF_A_PAIR = "a\ud800"


def made(knows: Container[str] | None = None) -> InputProcessor:
    model = ModelInfo("Toy", vocab_size=100_000, max_model_len=64, dtype="float32")
    return InputProcessor(model, KVCacheManager(20, 4), TOKENIZER, max_chunk=16, seed=0, knows=knows)


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [(HALF_A_PAIR, SamplingParams(), "prompt"), ("a", SamplingParams(bad_words=[HALF_A_PAIR]), "bad_words")],
)
def test_half_a_surrogate_pair_is_refused(prompt: str, params: SamplingParams, field: str) -> None:
    inputs = made()
    with pytest.raises(InvalidParamsError, match="surrogates not allowed") as caught:
        inputs.make_requests(prompt, params, QueueSink())
    assert caught.value.field == field


def test_half_a_surrogate_pair_in_a_conversation_is_refused() -> None:
    with pytest.raises(InvalidParamsError, match="surrogates not allowed") as caught:
        TOKENIZER.render_chat([{"role": "user", "content": HALF_A_PAIR}])
    assert caught.value.field == "messages"


def test_the_first_choice_scores_the_prompt_for_all() -> None:
    requests = made().make_requests([1, 2], SamplingParams(n=3, prompt_logprobs=2, logprobs=1), QueueSink())
    assert [request.params.prompt_logprobs for request in requests] == [2, None, None]
    assert [request.params.logprobs for request in requests] == [1, 1, 1]
    assert [request.reads_prefix_cache for request in requests] == [False, True, True]


def request_with(knows: Container[str] | None = None, **said: Any) -> Request:
    return made(knows).make_requests([1, 2], SamplingParams(), QueueSink(), **said)[0]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("priority", "high", "a whole number from -2147483648 to 2147483648"),
        ("priority", True, "a whole number"),
        ("priority", 1.0, "a whole number"),
        ("priority", None, "a whole number"),
        ("priority", 2**31 + 1, "from -2147483648 to 2147483648"),
        ("priority", -(2**31) - 1, "from -2147483648 to 2147483648"),
        ("deadline_ms", "soon", "a finite number of milliseconds above 0"),
        ("deadline_ms", True, "a finite number"),
        ("deadline_ms", 0, "a finite number"),
        ("deadline_ms", -0.5, "a finite number"),
        ("deadline_ms", float("nan"), "a finite number"),
        ("deadline_ms", float("inf"), "a finite number"),
        ("deadline_ms", 10**400, "a finite number"),
        ("tenant", "", "a text of 1 to 256 characters"),
        ("tenant", "x" * 257, "a text of 1 to 256 characters"),
        ("tenant", 7, "a text"),
        ("tenant", HALF_A_PAIR, "valid Unicode"),
    ],
)
def test_a_wrong_type_or_range_names_the_field(field: str, value: Any, says: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        request_with(None, **{field: value})
    assert caught.value.field == field
    assert says in caught.value.allowed


def test_the_ends_of_the_ranges_are_taken() -> None:
    for priority in (-(2**31), 2**31):
        assert request_with(priority=priority).priority == priority
    for tenant in ("x", "x" * 256):
        assert request_with(tenant=tenant).tenant == tenant
    assert request_with(deadline_ms=1e-9).deadline is not None


def test_a_deadline_counts_from_arrival() -> None:
    before = time.monotonic()
    request = request_with(deadline_ms=1500)
    assert before <= request.arrival <= time.monotonic()
    assert request.deadline == request.arrival + 1.5
    assert request_with().deadline is None


@pytest.mark.parametrize(
    ("knows", "said", "refused"),
    [
        pytest.param((), {"priority": 3}, "0, since the ordering in use does not go by it (those that do: priority"),
        pytest.param(
            (), {"deadline_ms": 5}, "none, since the ordering in use does not go by it (those that do: deadline"
        ),
        pytest.param(("priority",), {"deadline_ms": 5}, "none, since"),
        pytest.param(("deadline_ms",), {"priority": -1}, "0, since"),
        pytest.param((), {"priority": 0, "deadline_ms": None}, None, id="not given"),
        pytest.param((), {"tenant": "somebody"}, None, id="a tenant is for anybody"),
        pytest.param(("priority",), {"priority": 3}, None, id="known"),
        pytest.param(("deadline_ms",), {"deadline_ms": 5}, None, id="known too"),
        pytest.param(None, {"priority": 3, "deadline_ms": 5}, None, id="a scheduler that does not say"),
    ],
)
def test_what_the_ordering_does_not_know_is_refused(
    knows: Container[str] | None, said: dict[str, Any], refused: str | None
) -> None:
    if refused is None:
        request_with(knows, **said)
        return
    with pytest.raises(InvalidParamsError) as caught:
        request_with(knows, **said)
    assert caught.value.field == next(iter(said))
    assert caught.value.allowed.startswith(refused)
