"""Key files, and who is let in with which key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from llm_engine.core.errors import ConfigError
from llm_engine.workers.handshakes import HandshakeMonitor
from llm_engine.workers.links import data_socket
from llm_engine.workers.pipeline_key import PipelineKey, ZapThread, new_key, read_key, write_key
from llm_engine.workers.stage_sockets import bind_tcp, connected, host_towards

MILLISECONDS = 10_000


def test_a_key_file_is_its_owners_alone_and_reads_as_it_was_written(tmp_path: Path) -> None:
    key, path = new_key(), tmp_path / "key"
    write_key(path, key)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key(path) == key
    assert new_key() != key
    with pytest.raises(ConfigError, match="not there yet"):
        write_key(path, key)
    assert read_key(path) == key
    with pytest.raises(ConfigError, match="No such file"):
        write_key(tmp_path / "nowhere" / "key", key)


def test_the_secret_shows_in_no_log() -> None:
    key = new_key()
    assert key.secret not in repr(key) and key.secret.encode() not in key.token


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"public": "a", "secret": "b"}', '{"public": 1, "secret": 2}', "ä"]
)
def test_what_is_no_key_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"pipeline_key is .*--new-key"):
        read_key(path)


def test_halves_of_two_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key(path, PipelineKey(new_key().public, new_key().secret))
    with pytest.raises(ConfigError, match="do not belong together"):
        read_key(path)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key(path, new_key())
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_key(tmp_path / "other")


class Server:
    """A PULL socket behind a key, on the loopback."""

    def __init__(self) -> None:
        self.key = new_key()
        self.context: zmq.Context[Any] = zmq.Context()
        self.zap = ZapThread(self.context, self.key)
        self.zap.start()
        self.socket = data_socket(self.context, zmq.PULL)
        self.key.secure(self.socket, server=True)
        self.address = bind_tcp(self.socket, "127.0.0.1")

    def close(self) -> None:
        self.zap.stop()
        self.context.destroy(linger=0)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()
    assert not made.zap.is_alive()


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.destroy(linger=0)


def test_the_same_key_is_let_in(server: Server, context: zmq.Context[Any]) -> None:
    with connected(context, server.address, server.key) as push:
        push.send(b"hello")
        assert server.socket.poll(MILLISECONDS)
        assert server.socket.recv() == b"hello"


@pytest.mark.parametrize("knows", ["nothing", "another key", "the public key alone"])
def test_nobody_else_is(server: Server, context: zmq.Context[Any], knows: str) -> None:
    other = new_key()
    push = data_socket(context, zmq.PUSH)
    monitor = HandshakeMonitor(push)
    if knows == "another key":
        other.secure(push, server=False)
    elif knows == "the public key alone":
        other.secure(push, server=False)
        push.set(zmq.CURVE_SERVERKEY, server.key.public.encode())
    push.connect(server.address)
    push.send(b"let me in")
    assert monitor.socket.poll(MILLISECONDS)
    assert next(monitor.take())
    assert monitor.is_refused == (knows == "the public key alone")
    monitor.close()
    push.close(0)
    with connected(context, server.address, server.key) as honest:
        honest.send(b"hello")
        assert server.socket.poll(MILLISECONDS)
        assert server.socket.recv() == b"hello"
        assert not server.socket.poll(0)


def test_the_host_that_others_see() -> None:
    assert host_towards("tcp://127.0.0.1:9") == "127.0.0.1"
