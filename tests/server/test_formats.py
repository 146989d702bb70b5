"""Answers in OpenAI's shapes, from outputs made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from llm_engine.core.errors import (
    CapacityError,
    EngineDeadError,
    InvalidParamsError,
    ModelNotFoundError,
    QueueFullError,
    RequestFailedError,
)
from llm_engine.core.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from llm_engine.core.step import TokenLogprobs
from llm_engine.server.formats import ChatFormat, CompletionFormat
from llm_engine.server.http_errors import api_error
from llm_engine.server.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from llm_engine.server.protocol import ChatRequest, CompletionRequest

TEXTS = {0: "a", 1: "bc", 2: "\ufffd", 3: "\ufffd"}


class Backend:
    def id_to_token(self, token_id: int) -> str:
        return {2: "Ã", 3: "<0xA9>"}[token_id]


class Words:
    backend = Backend()

    def token_text(self, token_id: int) -> str:
        return TEXTS[token_id]


def logprob(token_id: int, *top: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, 1, list(top), [-0.25] * len(top))


def output(*choices: CompletionOutput, **more: Any) -> RequestOutput:
    return RequestOutput("r", more.pop("prompt", "P"), [0, 1], list(choices), RequestMetrics(0.0), **more)


def chat(**fields: Any) -> ChatFormat:
    return ChatFormat(ChatRequest(messages=[], **fields), Words())


def completion(**fields: Any) -> CompletionFormat:
    return CompletionFormat(CompletionRequest(prompt="P", **fields), Words())


def test_chat_stream_brings_the_role_then_text_then_the_reason() -> None:
    shape = chat()
    (role, text) = shape.chunks(0, output(CompletionOutput(0, "hi", [1])))
    assert role["delta"] == {"role": "assistant", "content": ""}
    assert (text["delta"], text["finish_reason"]) == ({"content": "hi"}, None)
    (last,) = shape.chunks(0, output(CompletionOutput(0, "", [], finish_reason=FinishReason.STOP, stop_reason="x")))
    assert (last["delta"], last["finish_reason"], last["stop_reason"]) == ({}, "stop", "x")


def test_chat_stream_keeps_quiet_while_text_is_held_back() -> None:
    shape = chat()
    assert len(list(shape.chunks(0, output(CompletionOutput(0, "", [1]))))) == 1  # the role
    assert list(shape.chunks(0, output(CompletionOutput(0, "", [1])))) == []


def test_chat_stream_introduces_each_choice() -> None:
    shape = chat(n=2)
    chunks = list(shape.chunks(0, output(CompletionOutput(1, "b", [1]), CompletionOutput(0, "a", [0]))))
    assert [(c["index"], c["delta"].get("role")) for c in chunks] == [
        (1, "assistant"), (1, None), (0, "assistant"), (0, None),
    ]  # fmt: skip


def test_whole_chat() -> None:
    (choice,) = chat(logprobs=True).choices(
        0, output(CompletionOutput(0, "bc", [1], [logprob(1, 0)], finish_reason=FinishReason.LENGTH))
    )
    assert choice["message"] == {"role": "assistant", "content": "bc", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["content"][0]["token"] == "bc"


def test_completions_number_their_choices_over_all_prompts() -> None:
    shape = completion(n=2)
    ended = [CompletionOutput(i, "x", [1], finish_reason=FinishReason.STOP) for i in range(2)]
    choices = [choice for position in range(2) for choice in shape.choices(position, output(*ended))]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]


def test_echo_puts_the_prompt_before_the_text_once() -> None:
    shape = completion(echo=True, logprobs=0)
    first = output(CompletionOutput(0, "a", [0], [logprob(0)]), prompt_logprobs=[None, logprob(1)])
    (choice,) = shape.chunks(0, first)
    assert choice["text"] == "Pa"
    assert choice["logprobs"]["tokens"] == ["a", "bc", "a"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    (choice,) = shape.chunks(0, output(CompletionOutput(0, "bc", [1], [logprob(1)])))
    assert choice["text"] == "bc"
    assert choice["logprobs"]["text_offset"] == [2]


def test_echo_of_token_ids_shows_their_text() -> None:
    (choice,) = completion(echo=True).choices(0, output(CompletionOutput(0, "x", [1]), prompt=None))
    assert choice["text"] == "abcx"


def test_scoring_shows_the_prompt_alone() -> None:
    scored = output(CompletionOutput(0, "bc", [1], [logprob(1)]), prompt_logprobs=[None, logprob(1, 0)])
    (choice,) = completion(echo=True, max_tokens=0, logprobs=1).choices(0, scored)
    assert choice["text"] == "P"
    assert choice["logprobs"]["tokens"] == ["a", "bc"]
    assert choice["logprobs"]["top_logprobs"] == [None, {"a": -0.25, "bc": -0.5}]


def test_logprobs_show_bytes_even_of_parts_of_characters() -> None:
    entries = chat_logprobs(Words(), [logprob(0), logprob(2), logprob(3)])["content"]
    assert [entry["bytes"] for entry in entries] == [[97], [0xC3], [0xA9]]


def test_an_impossible_token_is_valid_json() -> None:
    entry = TokenLogprobs(0, float("-inf"), 9, [1], [float("-inf")])
    assert completion_logprobs(Words(), [0], [entry], 0)["token_logprobs"] == [-9999.0]


def test_prompt_logprobs_are_by_token_id() -> None:
    first, second = prompt_logprobs(Words(), [None, logprob(1, 0)])
    assert first is None
    assert second == {
        "0": {"logprob": -0.25, "rank": 1, "decoded_token": "a"},
        "1": {"logprob": -0.5, "rank": 1, "decoded_token": "bc"},
    }


@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (InvalidParamsError("max_tokens", 9, "fewer"), 400, "max_completion_tokens"),
        (InvalidParamsError("top_k", 9, "fewer"), 400, "top_k"),
        (ModelNotFoundError("no"), 404, "model"),
        (QueueFullError("full"), 429, None),
        (CapacityError("too large"), 400, None),
        (EngineDeadError("dead\n  secret.py, line 1"), 503, None),
        (RequestFailedError("failed\n  secret.py, line 1"), 500, None),
        (RuntimeError("secret"), 500, None),
    ],
)
def test_errors_have_their_status(error: Exception, status: int, param: str | None) -> None:
    made = api_error(error, {"max_tokens": "max_completion_tokens"})
    assert (made.status, made.param) == (status, param)
    assert "secret" not in made.message
