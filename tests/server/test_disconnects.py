"""Hang-ups are noticed at once, once, and for the right connection."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from llm_engine.server.disconnects import DisconnectWatcher

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(scope="module")
def watcher() -> DisconnectWatcher:
    made = DisconnectWatcher()
    made.start()
    return made


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize("leave", [socket.socket.close, lambda s: s.shutdown(socket.SHUT_WR)])
def test_a_peer_that_leaves_is_noticed(
    watcher: DisconnectWatcher, pair: Pair, leave: Callable[[socket.socket], None]
) -> None:
    gone = threading.Event()
    with watcher.watch(pair[0], gone.set):
        assert not gone.wait(0.05)
        leave(pair[1])
        assert gone.wait(5)


def test_a_peer_that_left_before_is_noticed(watcher: DisconnectWatcher, pair: Pair) -> None:
    pair[1].close()
    gone = threading.Event()
    with watcher.watch(pair[0], gone.set):
        assert gone.wait(5)


def test_bytes_that_arrive_are_no_hang_up_and_stay_unread(watcher: DisconnectWatcher, pair: Pair) -> None:
    gone = threading.Event()
    with watcher.watch(pair[0], gone.set):
        pair[1].sendall(b"GET /next")
        assert not gone.wait(0.1)
    assert pair[0].recv(100) == b"GET /next"


def test_nothing_is_called_after_the_block(watcher: DisconnectWatcher, pair: Pair) -> None:
    gone = threading.Event()
    with watcher.watch(pair[0], gone.set):
        pass
    pair[1].close()
    assert not gone.wait(0.1)


def test_it_is_called_once(watcher: DisconnectWatcher, pair: Pair) -> None:
    calls: list[int] = []
    first = threading.Event()

    def gone() -> None:
        calls.append(1)
        first.set()

    with watcher.watch(pair[0], gone):
        pair[1].close()
        assert first.wait(5)
        assert not threading.Event().wait(0.05)
    assert calls == [1]


def test_one_callback_that_fails_leaves_the_others_watched(
    watcher: DisconnectWatcher, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("on purpose")

    other_ours, other_theirs = socket.socketpair()
    gone = threading.Event()
    with watcher.watch(pair[0], fail), watcher.watch(other_ours, gone.set):
        pair[1].close()
        other_theirs.close()
        assert gone.wait(5)
    other_ours.close()


def test_a_stale_event_does_not_hit_the_descriptors_next_owner(pair: Pair) -> None:
    """The event of a connection that ended comes late, its number already belongs to a living one."""
    watcher = DisconnectWatcher()  # not started: the race is played by hand
    called: list[str] = []
    with watcher.watch(pair[0], lambda: called.append("old")):
        pair[1].close()
        (event,) = watcher._epoll.poll(5)
    next_ours, next_theirs = socket.socketpair()
    fd = pair[0].fileno()
    os.dup2(next_ours.fileno(), fd)  # the same number, another connection
    with watcher.watch(pair[0], lambda: called.append("new")):
        assert watcher._take(event[0]) is None
        next_theirs.close()
        taken = watcher._take(fd)
        next_ours.close()
        if taken is not None:
            taken()
    assert called in ([], ["new"])


def test_many_connections_come_and_go(watcher: DisconnectWatcher) -> None:
    """Descriptors are reused all the time; nobody is called for a peer that stayed."""
    wrong: list[int] = []
    missed: list[int] = []

    def churn(seed: int) -> None:
        for turn in range(60):
            ours, theirs = socket.socketpair()
            gone = threading.Event()
            with watcher.watch(ours, gone.set):
                if (turn + seed) % 2:
                    theirs.close()
                    if not gone.wait(5):
                        missed.append(turn)
                elif gone.is_set():
                    wrong.append(turn)
            ours.close()
            theirs.close()

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, missed) == ([], [])
    assert watcher._callbacks == {}


def test_a_socket_closed_within_the_block_does_no_harm(watcher: DisconnectWatcher) -> None:
    ours, theirs = socket.socketpair()
    called = threading.Event()
    with watcher.watch(ours, called.set):
        fd = ours.detach()
        os.close(fd)
        next_ours, next_theirs = socket.socketpair()
        assert next_ours.fileno() == fd
        gone = threading.Event()
        with watcher.watch(next_ours, gone.set):
            next_theirs.close()
            assert gone.wait(5)
    assert not called.is_set()
    next_ours.close()
    theirs.close()
