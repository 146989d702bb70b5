"""Every bad request gets a clear error with the field named; the engine and its other requests never notice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from .conftest import Server

USER = [{"role": "user", "content": "hello"}]
MB = 1024 * 1024


@pytest.fixture(scope="module", autouse=True)
def bystander(server: Server) -> Iterator[None]:
    """Requests that run all the while; each must end as if nothing had happened."""
    client, stop, failures = server.client(), threading.Event(), []

    def ask() -> None:
        expected = None
        while not stop.is_set():
            answer = client.completions.create(model="demo", prompt="Once upon a time", max_tokens=32, temperature=0)
            expected = expected or answer.choices[0].text
            if answer.choices[0].text != expected:
                failures.append(answer.choices[0].text)

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert failures == []


COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "at least one token"),
    ({"prompt": []}, "prompt", "not empty"),
    ({"prompt": [-1]}, "prompt", "token ids from 0 to"),
    ({"prompt": [10**9]}, "prompt", "1000000000"),
    ({"prompt": {"a": 1}}, "prompt", "a text"),
    ({"prompt": [5] * 3000}, "prompt", "3000 tokens"),
    ({"prompt": [5] * 1000, "max_tokens": 1500}, "max_tokens", "at most 1048"),
    ({"prompt": [5] * 1700, "max_tokens": 10}, "max_tokens", "KV cache"),
    ({"n": 0}, "n", "n is 0"),
    ({"n": 1000}, "n", "1000"),
    ({"temperature": -1}, "temperature", "temperature is -1"),
    ({"temperature": float("nan")}, "temperature", "temperature is nan"),
    ({"temperature": "hot"}, "temperature", "temperature is 'hot'"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0"),
    ({"max_tokens": 2.5}, "max_tokens", "a whole number"),
    ({"min_tokens": 20, "max_tokens": 10}, "min_tokens", "min_tokens is 20"),
    ({"top_p": 1.5}, "top_p", "top_p is 1.5"),
    ({"logprobs": 21}, "logprobs", "logprobs is 21"),
    ({"top_k": 2**64}, "top_k", "a whole number from 0 to 9223372036854775807"),
    ({"stop": [1]}, "stop", "a list of strings"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias", "99999999"),
    ({"allowed_token_ids": [10**9]}, "allowed_token_ids", "1000000000"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    ({"priority": "high"}, "priority", "a whole number"),
    ({"priority": 2**31 + 1}, "priority", "from -2147483648 to 2147483648"),
    ({"priority": 3}, "priority", "0, since the ordering in use does not go by it (those that do: priority"),
    ({"deadline_ms": "soon"}, "deadline_ms", "a number"),
    ({"deadline_ms": 0}, "deadline_ms", "a finite number of milliseconds above 0"),
    ({"deadline_ms": float("nan")}, "deadline_ms", "deadline_ms is nan"),
    ({"deadline_ms": 500}, "deadline_ms", "none, since the ordering in use does not go by it (those that do: deadline"),
    ({"user": ""}, "user", "a text of 1 to 256 characters"),
    ({"user": "x" * 257}, "user", "a text of 1 to 256 characters"),
    ({"user": 5}, "user", "a string"),
    ({"tools": [{}]}, "tools", "not supported"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param", "says"), COMPLETIONS)
def test_completions(server: Server, fields: dict[str, Any], param: str, says: str, stream: bool) -> None:
    if stream and fields.keys() & {"stream", "stream_options"}:
        pytest.skip("the row is about stream itself")
    body = {"model": "demo", "prompt": "hello", **({"stream": True} if stream else {}), **fields}
    check(*server.request("POST", "/v1/completions", body), 400, param, says)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hello"}, "messages", "a list of messages"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "text"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages", "tokens"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens", "at most"),
        ({"max_tokens": 5000}, "max_tokens", "at most"),
        ({"min_tokens": 2**70}, "min_tokens", "at most"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs", "top_logprobs is 50"),
        ({"logprobs": 2}, "logprobs", "true or false"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text"),
    ],
)
def test_chat(server: Server, fields: dict[str, Any], param: str, says: str) -> None:
    body = {"model": "demo", "messages": USER, **fields}
    check(*server.request("POST", "/v1/chat/completions", body), 400, param, says)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_malformed_json(server: Server, path: str) -> None:
    check(*server.request("POST", path, b'{"prompt": '), 400, None, "not valid JSON")


def test_unknown_model(server: Server, client: openai.OpenAI) -> None:
    body = {"model": "gpt-9", "prompt": "hello"}
    check(*server.request("POST", "/v1/completions", body), 404, "model", "'gpt-9' is not served here; served: demo")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=USER)  # type: ignore[arg-type]


def test_the_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="x", temperature=-1)
    assert caught.value.param == "temperature"


def test_unknown_route_and_wrong_method(server: Server) -> None:
    check(*server.request("GET", "/v2/nothing"), 404, None, "/v2/nothing")
    status, headers, body = server.request("GET", "/v1/completions")
    check(status, headers, body, 405, None, "does not take GET")
    assert "POST" in headers["Allow"]


def test_a_body_of_fifty_megabytes(server: Server) -> None:
    body = b'{"prompt": "' + b"x" * (50 * MB) + b'"}'
    check(*server.request("POST", "/v1/completions", body), 413, None, "16 MB")


def test_a_chunked_body_over_the_limit(server: Server) -> None:
    pieces = (b"x" * MB for _ in range(18))
    check(*server.request("POST", "/v1/completions", pieces), 413, None, "16 MB")


def test_the_engine_is_unharmed(server: Server, client: openai.OpenAI) -> None:
    assert client.completions.create(model="demo", prompt="Once", max_tokens=2).choices[0].text
    assert server.metric("requests_finished_total", reason="error") == 0
    assert server.metric("requests_rejected_total", reason="invalid") > 0
    assert server.request("GET", "/health")[0] == 200


def check(status: int, headers: dict[str, str], body: bytes, expected: int, param: str | None, says: str) -> None:
    assert status == expected, body
    assert headers["Content-Type"] == "application/json"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, expected)
    assert says in error["message"]
    assert len(error["message"]) < 400
