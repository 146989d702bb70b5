"""The data sockets: order is kept, strangers are dropped, nonsense is blamed on whoever sent it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from llm_engine.workers.links import Inbound, Outbound, PeerError, Received, data_socket
from llm_engine.workers.wire import Kind, pack_header

TOKEN = b"0123456789abcdef"
MILLISECONDS = 10_000


class Pair:
    def __init__(self, folder: Path) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        pull = data_socket(self.context, zmq.PULL)
        self.address = f"ipc://{folder}/in"
        pull.bind(self.address)
        self.inbound = Inbound(pull, TOKEN, {Kind.PLAN: 0, Kind.FED: 3})
        self.outbound = Outbound(self.push(), TOKEN)

    def push(self) -> zmq.Socket[Any]:
        socket = data_socket(self.context, zmq.PUSH)
        socket.connect(self.address)
        return socket

    def receive(self) -> Received | None:
        assert self.inbound.socket.poll(MILLISECONDS)
        return self.inbound.receive()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.context.destroy(linger=0)


def test_messages_arrive_in_order_whatever_their_size(pair: Pair) -> None:
    sent = [b"", b"x", b"y" * 40_000, b"z" * 5_000_000]
    for frame in sent:
        pair.outbound.send(Kind.PLAN, frame, b"end")
    for frame in sent:
        received = pair.receive()
        assert received is not None
        _, buffers = received
        assert [bytes(buffer) for buffer in buffers] == [frame, b"end"]
    assert pair.inbound.receive() is None


def test_nothing_blocks_a_sender(pair: Pair) -> None:
    """Nobody receives, and nobody is connected either."""
    for _ in range(5000):
        pair.outbound.send(Kind.PLAN, b"x" * 100)
    lonely = data_socket(pair.context, zmq.PUSH)
    lonely.connect(pair.address + "-nobody")
    outbound = Outbound(lonely, TOKEN)
    for _ in range(5000):
        outbound.send(Kind.PLAN, b"x" * 100)
    outbound.close()


def test_frames_that_were_received_are_passed_on(pair: Pair, tmp_path: Path) -> None:
    pair.outbound.send(Kind.PLAN, b"a" * 20_000, b"b")
    received = pair.receive()
    assert received is not None
    kind, buffers = received
    pair.outbound.send(kind, *buffers)
    again = pair.receive()
    assert again is not None
    kind, buffers = again
    assert kind is Kind.PLAN
    assert [bytes(buffer) for buffer in buffers] == [b"a" * 20_000, b"b"]


def test_a_strangers_message_is_dropped_with_a_warning(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    stranger = pair.push()
    forged = pack_header(b"f" * 16, Kind.PLAN, 0)
    with caplog.at_level(logging.WARNING):
        for frames in ([b"garbage"], [b""], [forged + b"plan"], [TOKEN + b"\xff" + bytes(8)]):
            stranger.send_multipart(frames)
            assert pair.receive() is None
    assert caplog.text.count("from a stranger was dropped") == 4
    assert "7 bytes, where a header alone is 25" in caplog.text and "a wrong token" in caplog.text
    pair.outbound.send(Kind.PLAN, b"real")
    received = pair.receive()
    assert received is not None
    _, buffers = received
    assert bytes(buffers[0]) == b"real"
    stranger.close(0)


def test_a_flood_of_strangers_is_not_a_flood_of_warnings(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    stranger = pair.push()
    for _ in range(50):
        stranger.send(b"garbage")
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            assert pair.receive() is None
    assert caplog.text.count("from a stranger was dropped") == 5
    assert "dropped in silence" in caplog.text
    stranger.close(0)


def test_a_lost_message_is_noticed_and_the_sender_named(pair: Pair) -> None:
    skipping = pair.push()
    skipping.send(pack_header(TOKEN, Kind.FED, 2) + b"late")
    with pytest.raises(PeerError, match="FED 2 follows -1") as caught:
        pair.receive()
    assert caught.value.sender == 3
    skipping.close(0)


def test_a_kind_that_has_no_business_here_is_refused(pair: Pair) -> None:
    pair.outbound.send(Kind.RESULT, b"x")
    with pytest.raises(PeerError, match="RESULT message, which does not belong here"):
        pair.receive()
