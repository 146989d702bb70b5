"""What a body may say: every mistake is a 400 that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_engine.core.errors import InvalidParamsError
from llm_engine.server.http_errors import ApiError
from llm_engine.server.protocol import MAX_PROMPTS, ChatRequest, CompletionRequest, parse
from llm_engine.server.sampling import chat_params, chat_spelling, completion_params

USER = {"role": "user", "content": "hello"}


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "x", **fields}).encode())


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": [USER], **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": "0.5"}, "temperature", "temperature is '0.5'; allowed: a number"),
        ({"temperature": True}, "temperature", "a number"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens is 1.5; allowed: a whole number"),
        ({"max_tokens": "4"}, "max_tokens", "a whole number"),
        ({"n": True}, "n", "a whole number"),
        ({"stream": "yes"}, "stream", "stream is 'yes'; allowed: true or false"),
        ({"stop": 3}, "stop", "stop is 3; allowed: a string or a list of strings"),
        ({"stop": ["a", 1]}, "stop", "a list of strings"),
        ({"logit_bias": {"3": "a"}}, "logit_bias", "token id"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids", "stop_token_ids[0] is 'a'; allowed: a whole number"),
        ({"model": 3}, "model", "a string"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", "stream_options.include_usage"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only together with stream=true"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "only without stream"),
        ({"response_format": {"type": "json_object"}}, "response_format", "allowed: text"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"prompt_logprobs": "all"}, "prompt_logprobs", "a whole number"),
    ],
)
def test_wrong_types_and_combinations_name_the_field(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"prompt": "x",}', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b'"x"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 10_000, "not valid JSON"),
    ],
)
def test_bodies_that_are_no_object(body: bytes, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, body)
    assert caught.value.status == 400
    assert says in caught.value.message


def test_a_missing_field_is_named() -> None:
    for kind, field in ((CompletionRequest, "prompt"), (ChatRequest, "messages")):
        with pytest.raises(ApiError) as caught:
            parse(kind, b"{}")
        assert (caught.value.param, caught.value.message) == (field, f"{field} is missing")


def test_the_error_has_openais_shape() -> None:
    assert ApiError(400, "m", "p").body() == {
        "error": {"message": "m", "type": "BadRequestError", "param": "p", "code": 400}
    }


def test_unknown_fields_and_nulls_are_accepted() -> None:
    assert completion(metadata={"a": 1}, store=False, temperature=None, tools=[], tool_choice=None).temperature is None


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ("", [""]),
    ],
)
def test_prompts_of_every_form(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts() == prompts


@pytest.mark.parametrize("prompt", [None, 3, [], ["a", 1], [1, "a"], [[1], "a"], [[1.5]], [True], {"a": 1}])
def test_prompts_of_no_form(prompt: Any) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        completion(prompt=prompt).prompts()
    assert caught.value.field == "prompt"


def test_too_many_prompts() -> None:
    assert len(completion(prompt=["a"] * MAX_PROMPTS).prompts()) == MAX_PROMPTS
    with pytest.raises(InvalidParamsError, match=f"at most {MAX_PROMPTS}"):
        completion(prompt=["a"] * (MAX_PROMPTS + 1)).prompts()


def test_content_parts_become_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(messages=[{"role": "user", "content": parts, "name": "n"}, {"role": "assistant", "content": None}])
    assert asked.plain_messages() == [
        {"role": "user", "content": "a\nb", "name": "n"}, {"role": "assistant", "content": None},
    ]  # fmt: skip
    with pytest.raises(InvalidParamsError) as caught:
        chat(messages=[USER, {"role": "user", "content": [{"type": "image_url"}]}]).plain_messages()
    assert caught.value.field == "messages[1].content[0]"


def test_completion_defaults_are_openais_unless_the_model_has_its_own() -> None:
    params = completion_params(completion(), {})
    assert (params.max_tokens, params.temperature, params.top_p, params.n) == (16, 1.0, 1.0, 1)
    params = completion_params(completion(temperature=0.5), {"temperature": 0.7, "top_k": 20})
    assert (params.temperature, params.top_k) == (0.5, 20)


def test_every_sampling_field_arrives() -> None:
    fields: dict[str, Any] = {
        "n": 2, "max_tokens": 9, "min_tokens": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "allowed_token_ids": [5, 6],
        "bad_words": ["no"], "stop": ["end"], "stop_token_ids": [7], "include_stop_str_in_output": True,
        "ignore_eos": True, "skip_special_tokens": False, "seed": 3, "prompt_logprobs": 1, "logprobs": 2,
    }  # fmt: skip
    params = completion_params(completion(**fields, logit_bias={"5": 1}), {})
    for name, value in fields.items():
        got = getattr(params, name)
        assert (list(got) if isinstance(got, tuple) else got) == value, name
    assert params.logit_bias == {5: 1.0}


def test_chat_fills_the_context_and_takes_either_limit() -> None:
    assert chat_params(chat(), {}).max_tokens is None
    assert chat_params(chat(max_tokens=3), {}).max_tokens == 3
    assert chat_params(chat(max_tokens=3, max_completion_tokens=4), {}).max_tokens == 4


def test_chat_logprobs() -> None:
    assert chat_params(chat(), {}).logprobs is None
    assert chat_params(chat(logprobs=False), {}).logprobs is None
    assert chat_params(chat(logprobs=True), {}).logprobs == 0
    assert chat_params(chat(logprobs=True, top_logprobs=3), {}).logprobs == 3
    with pytest.raises(InvalidParamsError, match="only together with logprobs=true"):
        chat_params(chat(top_logprobs=3), {})


def test_chat_errors_use_the_clients_spelling() -> None:
    assert chat_spelling(chat(max_tokens=1))["max_tokens"] == "max_tokens"
    assert chat_spelling(chat(max_completion_tokens=1))["max_tokens"] == "max_completion_tokens"


def test_scoring_a_prompt_asks_for_its_logprobs() -> None:
    params = completion_params(completion(echo=True, max_tokens=0, logprobs=2), {})
    assert (params.max_tokens, params.prompt_logprobs) == (1, 2)
    with pytest.raises(InvalidParamsError, match="max_tokens is 0"):
        completion_params(completion(max_tokens=0), {})


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"n": 0}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_values_out_of_range_name_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        completion_params(completion(**fields), {})
    assert caught.value.field == field


def test_a_nan_is_no_temperature() -> None:
    asked = parse(CompletionRequest, b'{"prompt": "x", "temperature": NaN}')
    with pytest.raises(InvalidParamsError, match="temperature is nan"):
        completion_params(asked, {})
