"""What a client is told of tenants, and when the ordering gives its request up."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from werkzeug.test import TestResponse

from llm_engine import LLM
from llm_engine.core.views import RequestView
from llm_engine.schedulers.orderings.fcfs import FcfsOrdering
from llm_engine.server.tenants import tenant_of
from tests.server.conftest import serving
from tests.server.test_app import Site, error

TOO_SOON = 1e-3
PLAIN = {"prompt": "Once", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
KEY = "sk-my-own-secret"
DIGEST = "key-7ca6c70ecc71c8b8"


def post(llm: LLM, path: str, body: dict[str, Any], **headers: str) -> TestResponse:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environ = {"gunicorn.socket": ours}
        client = Site(llm).app.test_client()
        return client.post(path, json=body, headers=headers, environ_overrides=environ, buffered=True)


# -- deadlines


@pytest.fixture(scope="module")
def by_deadline() -> Iterator[LLM]:
    with LLM(scheduler="deadline", num_kv_blocks=100, cpu_threads=1) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", PLAIN), ("/v1/chat/completions", CHAT)])
def test_what_is_shed_is_a_503_that_says_why(by_deadline: LLM, path: str, body: dict[str, Any], stream: bool) -> None:
    response = post(by_deadline, path, {**body, "stream": stream, "deadline_ms": TOO_SOON})
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "5"
    assert error(response) == {
        "message": "deadline_ms 0.001 passed while it waited",
        "type": "ServiceUnavailableError",
        "param": None,
        "code": 503,
    }


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", PLAIN), ("/v1/chat/completions", CHAT)])
def test_what_can_be_in_time_is_answered(by_deadline: LLM, path: str, body: dict[str, Any]) -> None:
    assert post(by_deadline, path, {**body, "deadline_ms": 600_000}).status_code == 200


def test_a_priority_is_refused_where_the_ordering_goes_by_deadlines(by_deadline: LLM) -> None:
    response = post(by_deadline, "/v1/completions", {**PLAIN, "priority": 2})
    assert (response.status_code, error(response)["param"]) == (400, "priority")


def test_a_real_server_and_client(tmp_path: Path) -> None:
    with serving(tmp_path, "--scheduler", "deadline") as server:
        client = server.client()
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="demo", prompt="Once", extra_body={"deadline_ms": TOO_SOON})
        assert caught.value.status_code == 503
        assert "passed while it waited" in caught.value.message
        streamed = client.completions.create(
            model="demo", prompt="Once", max_tokens=2, stream=True, extra_body={"deadline_ms": 600_000}
        )
        assert len(list(streamed)) >= 2
        assert server.metric("requests_finished_total", reason="shed") == 1
        assert server.metric("requests_finished_total", reason="error") == 0
        assert server.stop() == 0


# -- tenants


@pytest.mark.parametrize(
    ("user", "authorization", "tenant"),
    [
        (None, None, None),
        ("anna", None, "anna"),
        ("anna", f"Bearer {KEY}", DIGEST),
        ("anna", "Basic YTpi", "anna"),
        (DIGEST, None, f"user-{DIGEST}"),
        (None, f"Bearer {KEY}", DIGEST),
        (None, f"bearer   {KEY} ", DIGEST),
        (None, "Bearer", None),
        (None, "Bearer ", None),
        (None, "Basic YTpi", None),
        (None, "", None),
    ],
)
def test_the_key_s_digest_or_else_the_user(user: str | None, authorization: str | None, tenant: str | None) -> None:
    assert tenant_of(user, authorization, "key") == tenant


@pytest.mark.parametrize(
    ("user", "authorization", "tenant"),
    [
        (None, None, None),
        ("anna", f"Bearer {KEY}", "anna"),
        (None, f"Bearer {KEY}", DIGEST),
        (DIGEST, f"Bearer {KEY}", f"user-{DIGEST}"),
    ],
)
def test_the_user_or_else_the_key_s_digest(user: str | None, authorization: str | None, tenant: str | None) -> None:
    assert tenant_of(user, authorization, "user") == tenant


SEEN: list[str | None] = []


class Attentive(FcfsOrdering):
    def add(self, request: RequestView) -> None:
        SEEN.append(request.tenant)
        super().add(request)


def test_the_scheduler_sees_the_tenant_and_never_the_key() -> None:
    SEEN.clear()
    with LLM(ordering=f"{__name__}:Attentive", num_kv_blocks=100, cpu_threads=1) as llm:
        for path, body in (("/v1/completions", PLAIN), ("/v1/chat/completions", CHAT)):
            assert post(llm, path, body).status_code == 200
            assert post(llm, path, {**body, "user": "anna"}, Authorization=f"Bearer {KEY}").status_code == 200
            assert post(llm, path, body, Authorization=f"Bearer {KEY}").status_code == 200
        refused = post(llm, "/v1/chat/completions", {**CHAT, "user": "x" * 257})
        assert (refused.status_code, error(refused)["param"]) == (400, "user")
        assert error(refused)["message"].startswith("user is 'xxx")
    assert SEEN == [None, DIGEST, DIGEST] * 2
    assert KEY not in json.dumps(SEEN)
