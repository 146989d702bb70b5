"""The routes on an engine in this process, in the states that a healthy server seldom shows."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from werkzeug.test import TestResponse

from llm_engine import LLM
from llm_engine.server.app import make_app
from llm_engine.server.config import RESERVED_THREADS, ServerConfig
from tests.engine.mortal import await_epoch, mortal

LONG = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True}
SHORT = {"prompt": "Once", "max_tokens": 1}


class Site:
    """An application, asked without a server between."""

    def __init__(self, llm: LLM, **config: Any) -> None:
        self.llm = llm
        self.draining = False
        self.app = make_app(llm, ServerConfig(**config), lambda: self.draining)
        self.client = self.app.test_client()

    def get(self, path: str) -> TestResponse:
        return self.client.get(path)

    def post(
        self, body: dict[str, Any], sock: socket.socket | None = None, path: str = "/v1/completions"
    ) -> TestResponse:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            environ = {"gunicorn.socket": sock or ours}
            client = self.app.test_client()
            return client.post(path, json=body, environ_overrides=environ, buffered=True)

    @contextlib.contextmanager
    def running(self, count: int) -> Iterator[None]:
        """One long request runs, the others wait; their clients leave at the end."""
        pairs = [socket.socketpair() for _ in range(count)]
        threads = [threading.Thread(target=self.post, args=(LONG, ours)) for ours, _ in pairs]
        for number, thread in enumerate(threads):
            thread.start()
            self._wait_for(running=1, waiting=number)
        yield
        for _, theirs in pairs:
            theirs.close()
        for thread in threads:
            thread.join()
        for ours, _ in pairs:
            ours.close()

    def _wait_for(self, **counts: int) -> None:
        deadline = time.monotonic() + 30
        labels = {"model_name": self.llm.model_name, "engine": "0"}
        for state, count in counts.items():
            while self.llm.registry.get_sample_value(f"llm_engine_num_requests_{state}", labels) != count:
                assert time.monotonic() < deadline, (state, count)
                time.sleep(0.002)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_num_seqs=1, max_num_waiting=1, num_kv_blocks=100, cpu_threads=1) as made:
        yield made


def error(response: TestResponse) -> dict[str, Any]:
    assert response.json is not None
    found = response.json["error"]
    assert isinstance(found, dict)
    return found


def test_a_full_queue_is_429_with_a_time_to_retry(llm: LLM) -> None:
    site = Site(llm)
    with site.running(2):
        response = site.post(SHORT)
    assert (response.status_code, error(response)["type"]) == (429, "RateLimitError")
    assert "max_num_waiting is 1" in error(response)["message"]
    assert int(response.headers["Retry-After"]) > 0
    assert site.post(SHORT).status_code == 200


def test_threads_are_kept_for_other_routes(llm: LLM) -> None:
    site = Site(llm, http_threads=RESERVED_THREADS + 1)
    with site.running(1):
        response = site.post(SHORT)
        assert site.get("/health").status_code == 200
    assert response.status_code == 429
    assert site.post(SHORT).status_code == 200


def test_a_refused_request_gives_its_thread_back(llm: LLM) -> None:
    site = Site(llm, http_threads=RESERVED_THREADS + 1)
    for _ in range(3):
        assert site.post({"prompt": [10**9]}).status_code == 400
    for _ in range(3):
        assert site.post({**SHORT, "stream": True}).data.endswith(b"data: [DONE]\n\n")


def test_draining_refuses_new_work_alone(llm: LLM) -> None:
    site = Site(llm)
    site.draining = True
    response = site.post(SHORT)
    assert (response.status_code, error(response)["code"]) == (503, 503)
    assert site.get("/ready").status_code == 503
    assert site.get("/health").status_code == 200


def test_served_names(llm: LLM) -> None:
    site = Site(llm, served_model_name=("one", "two"))
    models = site.get("/v1/models").json
    assert models is not None
    assert [card["id"] for card in models["data"]] == ["one", "two"]
    for name in ("one", "two"):
        answer = site.post({**SHORT, "model": name}).json
        assert answer is not None
        assert answer["model"] == "one"
    assert site.post({**SHORT, "model": llm.model_name}).status_code == 404


def test_an_unexpected_error_is_logged_and_gives_nothing_away(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret")

    site = Site(llm)
    monkeypatch.setattr(llm, "stream", fail)
    response = site.post(SHORT)
    assert (response.status_code, error(response)["type"]) == (500, "InternalServerError")
    assert b"secret" not in response.data
    assert "a secret" in caplog.text


def test_stages_that_are_away_are_told_by_ready_alone() -> None:
    with LLM(num_kv_blocks=16, cpu_threads=1, executor="tests.engine.mortal:MortalExecutor") as llm:
        site, stages = Site(llm), mortal(llm.engine)
        assert site.get("/ready").status_code == 200
        stages.hold()
        stages.kill("it ran away\nwith a traceback")
        await_epoch(llm.engine, 1, up=False)
        answer = site.get("/ready")
        assert (answer.status_code, answer.mimetype) == (503, "text/plain")
        assert answer.text == "stage 0 died: it ran away; the stages are being started again\n"
        assert site.get("/health").status_code == 200
        answers: list[TestResponse] = []
        asking = threading.Thread(target=lambda: answers.append(site.post(SHORT)))
        asking.start()
        site._wait_for(waiting=1)
        stages.release()
        asking.join(30)
        assert [response.status_code for response in answers] == [200], "it waited for the stages"
        assert site.get("/ready").status_code == 200


def test_a_dead_engine_says_so() -> None:
    with LLM(num_kv_blocks=16, cpu_threads=1) as llm:
        site = Site(llm)
        assert site.post(SHORT).status_code == 200
        llm.engine.state.die(RuntimeError("the machine burns"))
        response = site.post(SHORT)
        assert (response.status_code, error(response)["type"]) == (503, "ServiceUnavailableError")
        assert "the machine burns" in error(response)["message"]
        for path in ("/health", "/ready"):
            answer = site.get(path)
            assert (answer.status_code, answer.mimetype) == (503, "text/plain")
            assert answer.text == "the engine is dead: RuntimeError('the machine burns')\n"
        assert site.get("/metrics").status_code == 200
