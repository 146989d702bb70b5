"""What no message to a stage's process can carry is refused at the door: the engine behind it lives on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llm_engine import LLM
from tests.server.test_app import Site

PROMPT = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with LLM(executor="zmq", num_kv_blocks=64, cpu_threads=1) as llm:
        yield Site(llm)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {**PROMPT, "top_k": 2**64}, "top_k"),
        ("/v1/completions", {**PROMPT, "min_tokens": 2**64}, "min_tokens"),
        ("/v1/completions", {**PROMPT, "stop_token_ids": [2**64]}, "stop_token_ids"),
        ("/v1/completions", {**PROMPT, "logit_bias": {str(2**64): 1}}, "logit_bias"),
        ("/v1/chat/completions", {**CHAT, "min_tokens": 2**70}, "min_tokens"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 2**70}, "max_tokens"),
        ("/v1/chat/completions", {**CHAT, "seed": 2**64}, "seed"),
        ("/v1/completions", {**PROMPT, "stop": "\ud800"}, None),
        ("/v1/completions", {**PROMPT, "cache_salt": "\ud800"}, None),
        ("/v1/completions", {**PROMPT, "user": "\ud800"}, None),
    ],
)
def test_a_request_that_cannot_travel_is_refused(
    site: Site, path: str, body: dict[str, Any], param: str | None
) -> None:
    answer = site.post(body, path=path)
    assert answer.status_code == 400, answer.text
    assert answer.json is not None
    assert answer.json["error"]["param"] == param
    assert site.get("/health").status_code == 200
    assert site.post(PROMPT).status_code == 200


def test_the_largest_numbers_that_are_allowed_are_served(site: Site) -> None:
    answer = site.post({**PROMPT, "top_k": 2**63 - 1, "seed": 2**64 - 1, "min_tokens": 4, "temperature": 1})
    assert answer.status_code == 200, answer.text
