"""The ring between the first stage and the last: what is sent arrives, and nobody waits who should not."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llm_engine.workers.ring import Ring, RingFullError, ring_ends
from llm_engine.workers.wire import Fed, encode_fed

MANY = 4096
"""Sequences for which any Linux has room by its defaults."""


@pytest.fixture
def ends() -> Iterator[tuple[Ring, Ring]]:
    with pair(8, 8) as both:
        yield both


@contextmanager
def pair(max_num_seqs: int, num_queues: int) -> Iterator[tuple[Ring, Ring]]:
    with ring_ends(max_num_seqs, num_queues) as given:
        assert given is not None
        first, last = (Ring(inherited(end)) for end in given)
    yield first, last
    first._socket.close()
    last._socket.close()


def inherited(end: int) -> int:
    """As a process has it that was started with it."""
    own = os.dup(end)
    os.set_inheritable(own, True)
    return own


def test_messages_arrive_one_by_one_and_in_order(ends: tuple[Ring, Ring]) -> None:
    first, last = ends
    for frame in (b"a", b"b" * 5000, b"c"):
        last.send(frame)
    arrived = []
    while (frame := first.receive(wait=False)) is not None:
        arrived.append(bytes(frame))
    assert arrived == [b"a", b"b" * 5000, b"c"]
    last.send(b"late")
    received = first.receive(wait=True)
    assert received is not None and bytes(received) == b"late"


def test_who_has_an_end_does_not_pass_it_on(ends: tuple[Ring, Ring]) -> None:
    assert [os.get_inheritable(end._socket.fileno()) for end in ends] == [False, False]


@pytest.mark.parametrize("by_cut", [True, False])
def test_who_waits_is_woken_by_a_cut_and_by_the_other_ones_end(ends: tuple[Ring, Ring], by_cut: bool) -> None:
    first, last = ends
    last.send(b"before")
    timer = threading.Timer(0.05, first.cut if by_cut else last._socket.close)
    timer.start()
    before = first.receive(wait=True)
    assert before is not None and bytes(before) == b"before"
    assert first.receive(wait=True) is None
    timer.join()
    assert first.receive(wait=True) is None, "and from then on"
    first.cut()  # once more, or of a ring that has no other end


@pytest.mark.parametrize("by_cut", [True, False])
def test_sending_to_nobody_is_no_error(ends: tuple[Ring, Ring], by_cut: bool) -> None:
    first, last = ends
    last.cut() if by_cut else first._socket.close()
    last.send(b"for nobody")


@pytest.mark.parametrize("num_messages", [1, 3, 33])
def test_there_is_room_for_all_that_can_be_under_way(num_messages: int) -> None:
    """Nobody takes anything. Each sequence may be in two steps, and its token may be of the longest."""
    with pair(MANY, num_messages - 1) as (first, last):
        tokens = [2**31 - 1] * (2 * MANY // num_messages)
        frames = [encode_fed(Fed(step, tokens)) for step in range(num_messages)]
        for frame in frames:
            last.send(frame)
        for frame in frames:
            received = first.receive(wait=False)
            assert received is not None and bytes(received) == frame, "whole"


def test_more_than_that_is_refused_and_waits_for_nobody(ends: tuple[Ring, Ring]) -> None:
    _, last = ends
    with pytest.raises(RingFullError, match="set num_queues"):
        send_many(last)


def send_many(end: Ring) -> None:
    for _ in range(10_000):
        end.send(b"x" * 100)


@pytest.mark.parametrize(("max_num_seqs", "num_queues"), [(10**6, 4), (8, 10**6)])
def test_without_room_there_are_no_ends(max_num_seqs: int, num_queues: int) -> None:
    with ring_ends(max_num_seqs, num_queues) as given:
        assert given is None


def test_the_ends_are_closed_for_who_made_them() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with ring_ends(8, 8) as given:
        assert given is not None and len(set(given)) == 2
    assert set(os.listdir("/proc/self/fd")) == before
