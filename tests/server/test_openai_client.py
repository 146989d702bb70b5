"""The real ``openai`` client against a real server."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from .conftest import Server

ADD = [{"role": "user", "content": "What is 3 + 4?"}]


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="demo", messages=ADD, temperature=0, **more)  # type: ignore[call-overload]


def test_a_streamed_chat_is_the_plain_one_in_pieces(client: openai.OpenAI) -> None:
    plain = ask(client, max_tokens=12)
    chunks = list(ask(client, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert plain.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == plain.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == plain.choices[0].finish_reason
    assert {chunk.choices[0].finish_reason for chunk in chunks[:-2]} == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == plain.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    assert plain.id.startswith("chatcmpl-")


def test_usage_shows_cached_tokens(client: openai.OpenAI) -> None:
    words = "one two three four five six seven eight nine ten " * 4
    for expected in (False, True):
        answer = client.completions.create(model="demo", prompt=words, max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert bool(answer.usage.prompt_tokens_details.cached_tokens) is expected


def test_chat_may_use_the_whole_context(client: openai.OpenAI) -> None:
    assert ask(client).choices[0].finish_reason in ("stop", "length")


def test_completions_of_text_ids_and_many(client: openai.OpenAI) -> None:
    one = client.completions.create(model="demo", prompt="Once upon a time", max_tokens=5, temperature=0)
    assert one.object == "text_completion"
    assert one.id.startswith("cmpl-")
    ids = client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=3, extra_body={"ignore_eos": True})
    assert ids.usage is not None
    assert (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (3, 3)
    many = client.completions.create(
        model="demo", prompt=["Once upon a time", "Two cats"], n=2, max_tokens=5, temperature=0
    )
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text == one.choices[0].text
    nested = client.completions.create(model="demo", prompt=[[5, 6], [7, 8]], max_tokens=1)
    assert len(nested.choices) == 2


def test_many_prompts_stream_side_by_side(client: openai.OpenAI) -> None:
    prompts = ["Once upon a time", "Two cats", "7 + 8 ="]
    plain = client.completions.create(model="demo", prompt=prompts, max_tokens=8, temperature=0)
    texts = dict.fromkeys(range(3), "")
    for chunk in client.completions.create(model="demo", prompt=prompts, max_tokens=8, temperature=0, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in plain.choices}


def test_default_limit_of_completions_is_sixteen(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="Once", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    content = ask(client, max_tokens=4, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    for entry in content:
        assert entry.logprob <= 0
        assert bytes(entry.bytes).decode() == entry.token
        top = [one.logprob for one in entry.top_logprobs]
        assert top == sorted(top, reverse=True)
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)  # greedy takes the likeliest
        assert len(entry.top_logprobs) == 3
    streamed = [
        entry
        for chunk in ask(client, max_tokens=4, logprobs=True, top_logprobs=3, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in content], abs=1e-4)


def test_completion_logprobs_and_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt="Once upon", max_tokens=3, logprobs=2, echo=True, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    choice = answer.choices[0]
    assert choice.text.startswith("Once upon")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    tokens = choice.logprobs.tokens
    assert "".join(tokens) == choice.text
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs[1:])
    assert [choice.text[at:].startswith(token) for at, token in zip(choice.logprobs.text_offset, tokens, strict=True)]
    scored = client.completions.create(model="demo", prompt="Once upon", max_tokens=0, logprobs=2, echo=True)
    assert scored.choices[0].text == "Once upon"
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.token_logprobs == pytest.approx(
        choice.logprobs.token_logprobs[: len(scored.choices[0].logprobs.tokens or [])], abs=1e-4
    )


def test_prompt_logprobs(server: Server) -> None:
    body = {"prompt": "Once upon", "max_tokens": 1, "prompt_logprobs": 1}
    status, _, text = server.request("POST", "/v1/completions", body)
    assert status == 200
    entries = json.loads(text)["choices"][0]["prompt_logprobs"]
    assert entries[0] is None
    assert all(any(token["rank"] == 1 for token in entry.values()) for entry in entries[1:])


def test_several_choices(client: openai.OpenAI) -> None:
    plain = ask(client, max_tokens=6, n=2)
    assert [choice.index for choice in plain.choices] == [0, 1]
    texts = ["", ""]
    roles = [0, 0]
    for chunk in ask(client, max_tokens=6, n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
    assert texts == [choice.message.content for choice in plain.choices]
    assert roles == [1, 1]


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="Once upon a time", max_tokens=20, temperature=0)
    whole = answer.choices[0].text
    word = whole[6:9]
    cut = client.completions.create(model="demo", prompt="Once upon a time", max_tokens=20, temperature=0, stop=word)
    assert cut.choices[0].text == whole[: whole.index(word)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].model_dump()["stop_reason"] == word
    streamed = client.completions.create(
        model="demo", prompt="Once upon a time", max_tokens=20, temperature=0, stop=[word], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.choices[0].text


def test_a_seed_repeats_a_sampled_answer(client: openai.OpenAI) -> None:
    def sampled(seed: int) -> str:
        answer = client.completions.create(model="demo", prompt="Once", max_tokens=16, temperature=1.5, seed=seed)
        return answer.choices[0].text

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_vllms_fields_are_taken(client: openai.OpenAI) -> None:
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 4, "allowed_token_ids": [5, 6, 7]}
    answer = client.completions.create(
        model="demo", prompt="Once", max_tokens=4, logprobs=0, logit_bias={"6": 100},
        extra_body={**extra, "priority": 0, "cache_salt": "s", "ignore_eos": True, "unknown_field": {"a": 1}},
    )  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens is not None
    first = client.completions.create(
        model="demo", prompt="Once", max_tokens=1, logprobs=0, temperature=0,
        extra_body={"allowed_token_ids": [6], "ignore_eos": True},
    )  # fmt: skip
    assert first.choices[0].logprobs is not None
    assert set(answer.choices[0].logprobs.tokens[:1]) == set(first.choices[0].logprobs.tokens or [])


def test_no_model_named_means_the_served_one(server: Server) -> None:
    status, _, text = server.request("POST", "/v1/chat/completions", {"messages": ADD, "max_tokens": 1})
    assert (status, json.loads(text)["model"]) == (200, "demo")


def test_models_version_health_ready(server: Server, client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.model_dump()["max_model_len"]) == ("demo", 2048)
    assert set(json.loads(server.request("GET", "/version")[2])) == {"version"}
    for path in ("/health", "/ready"):
        status, _, body = server.request("GET", path)
        assert (status, body) == (200, b"")


def test_metrics_count_what_was_asked(server: Server, client: openai.OpenAI) -> None:
    before = {name: server.metric(name) for name in ("prompt_tokens_total", "generation_tokens_total")}
    finished = server.metric("requests_finished_total", reason="length")
    client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=4, extra_body={"ignore_eos": True})
    assert server.metric("prompt_tokens_total") == before["prompt_tokens_total"] + 3
    assert server.metric("generation_tokens_total") == before["generation_tokens_total"] + 4
    assert server.metric("requests_finished_total", reason="length") == finished + 1
    status, headers, text = server.request("GET", "/metrics", Accept="application/openmetrics-text")
    assert status == 200
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert text.rstrip().endswith(b"# EOF")


def test_a_connection_is_kept_for_the_next_request(server: Server) -> None:
    connection = server.connect()
    for stream in (True, False):
        body = json.dumps({"messages": ADD, "max_tokens": 2, "stream": stream})
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        assert response.status == 200
        text = response.read()
        assert text.endswith(b"data: [DONE]\n\n") is stream
    assert connection.sock is not None
    connection.close()
