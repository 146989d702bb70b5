"""Many requests at once, clients that leave, and the other routes meanwhile."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from .conftest import Server

LONG = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}


def send(server: Server, path: str, body: dict[str, Any]) -> socket.socket:
    """A request whose answer nobody has read yet."""
    text = json.dumps(body)
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    sock.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
    return sock


def read_until(sock: socket.socket, end: bytes) -> bytes:
    text = b""
    while end not in text:
        piece = sock.recv(65536)
        assert piece, text
        text += piece
    return text


def test_sixty_four_requests_at_once_are_answered_as_one_would_be(client: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        prompt = f"{number % 8} + {number % 5} ="
        if number % 2:
            answer = client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0)
            return answer.choices[0].text
        chunks = client.completions.create(model="demo", prompt=prompt, max_tokens=12, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)

    alone = {number: ask(number) for number in range(40)}
    with ThreadPoolExecutor(64) as threads:
        together = list(threads.map(ask, range(64)))
    assert together == [alone[number % 40] for number in range(64)]


def test_tokens_come_as_they_are_made(server: Server) -> None:
    sock = send(server, "/v1/completions", {**LONG, "max_tokens": 40, "stream": True})
    pieces = 0
    text = b""
    while b"[DONE]" not in text:
        text += sock.recv(65536)
        pieces += 1
    sock.close()
    assert pieces > 10


def test_the_other_routes_answer_while_streams_run(server: Server) -> None:
    socks = [send(server, "/v1/completions", {**LONG, "stream": True, "max_tokens": 400}) for _ in range(24)]
    for sock in socks:
        read_until(sock, b"data:")
    for path in ("/health", "/ready", "/v1/models", "/metrics"):
        start = time.monotonic()
        assert server.request("GET", path)[0] == 200
        assert time.monotonic() - start < 3
    for sock in socks:
        sock.close()
    server.wait_for("num_requests_running", 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server: Server, stream: bool) -> None:
    aborted = server.metric("requests_finished_total", reason="abort")
    sock = send(server, "/v1/completions", {**LONG, "stream": stream})
    if stream:
        read_until(sock, b"data:")
    server.wait_for("num_requests_running", 1)
    assert server.metric("kv_cache_usage_ratio") > 0
    sock.close()
    assert server.wait_for("num_requests_running", 0) < 2  # to the end it would take many seconds
    assert server.metric("kv_cache_usage_ratio") == 0
    assert server.metric("requests_finished_total", reason="abort") == aborted + 1


def test_clients_that_leave_in_prefill_and_in_the_queue(server: Server) -> None:
    """More long prompts than the cache holds: some are being computed, some wait; all their clients leave."""
    aborted = server.metric("requests_finished_total", reason="abort")
    body = {**LONG, "max_tokens": 50, "stream": True}
    socks = [send(server, "/v1/completions", {**body, "prompt": [5 + number] * 1400}) for number in range(4)]
    server.wait_for("num_requests_waiting", 3)
    for sock in socks:
        sock.close()
    server.wait_for("num_requests_waiting", 0, timeout=3)
    server.wait_for("num_requests_running", 0, timeout=3)
    assert server.metric("kv_cache_usage_ratio") == 0
    assert server.metric("requests_finished_total", reason="abort") == aborted + 4


def test_a_stream_the_client_closes_is_ended(server: Server, client: openai.OpenAI) -> None:
    aborted = server.metric("requests_finished_total", reason="abort")
    for _ in range(3):
        stream = client.completions.create(
            model="demo", prompt="Once", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    server.wait_for("num_requests_running", 0)
    assert server.metric("requests_finished_total", reason="abort") == aborted + 3


def test_a_pipelined_request_is_no_disconnect(server: Server) -> None:
    first = json.dumps({**LONG, "max_tokens": 30, "stream": True})
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: "
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(f"{head}{len(first)}\r\n\r\n{first}GET /version HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        text = read_until(sock, b'"version"')
    assert text.count(b"HTTP/1.1 200") == 2
    assert b'"finish_reason":"length"' in text


def test_clients_that_come_and_go_leave_nothing_behind(server: Server) -> None:
    def visit(number: int) -> None:
        sock = send(server, "/v1/completions", {**LONG, "stream": bool(number % 2), "n": 1 + number % 3})
        if number % 4 == 1:
            read_until(sock, b"data:")
        time.sleep(0.01 * (number % 5))
        sock.close()

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.wait_for("num_requests_waiting", 0)
    server.wait_for("num_requests_running", 0)
    assert server.metric("kv_cache_usage_ratio") == 0
    status, _, body = server.request("POST", "/v1/completions", {"prompt": "Once", "max_tokens": 2})
    assert (status, json.loads(body)["object"]) == (200, "text_completion")
