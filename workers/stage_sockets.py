"""A stage's data sockets: where it is reached, and how it reaches others."""

from __future__ import annotations

import socket as sockets
from typing import Any
from urllib.parse import urlsplit

import zmq

from .control import Launch, Setup
from .links import STOP_ADDRESS, Inbound, Outbound, data_socket
from .pipeline_key import PipelineKey, ZapThread
from .wire import Kind


class StageSockets:
    """Owned by the stage's main thread, as all it makes."""

    def __init__(self, launch: Launch, setup: Setup, context: zmq.Context[Any]) -> None:
        """Bind the inbound socket. Raises what zmq raises where that cannot be."""
        self._context = context
        self._token = setup.token
        self._key = None if launch.key is None else PipelineKey(*launch.key)
        socket = data_socket(context, zmq.PULL)
        socket.bind(STOP_ADDRESS)
        self.addresses: list[str] = []
        if setup.inbound is not None:
            socket.bind(setup.inbound)
            self.addresses.append(setup.inbound)
        if setup.binds_tcp:
            assert self._key is not None, "no tcp without a key"
            ZapThread(context, self._key).start()
            self._key.secure(socket, server=True)
            self.addresses.append(bind_tcp(socket, launch.host or host_towards(launch.control)))
        last = setup.num_stages - 1
        senders = {Kind.PLAN: setup.index - 1, Kind.PROBE: setup.index - 1, Kind.STOP: setup.index}
        if setup.index == 0 and setup.config.scheduler.schedule_ahead and last > 0:
            senders[Kind.FED] = senders[Kind.RING] = last
        self.inbound = Inbound(socket, self._token, senders)

    def connected(self, address: str) -> Outbound:
        return Outbound(connected(self._context, address, self._key), self._token)


def connected(context: zmq.Context[Any], address: str, key: PipelineKey | None) -> zmq.Socket[Any]:
    """A PUSH socket towards a bound PULL; the connection itself comes about by and by."""
    socket = data_socket(context, zmq.PUSH)
    if address.startswith("tcp:"):
        assert key is not None, "no tcp without a key"
        socket.set(zmq.IPV6, 1)
        key.secure(socket, server=False)
    socket.connect(address)
    return socket


def bind_tcp(socket: zmq.Socket[Any], host: str) -> str:
    """Bind to a free port of a host, as ``tcp://host:*`` spells it; returns the address."""
    socket.set(zmq.IPV6, 1)
    socket.bind(f"tcp://{host}:*")
    return socket.get_string(zmq.LAST_ENDPOINT)


def host_towards(address: str) -> str:
    """The address that this host has on the way to another one, brackets around it where it is IPv6."""
    parts = urlsplit(address)
    assert parts.hostname is not None
    family, kind, protocol, _, target = sockets.getaddrinfo(parts.hostname, parts.port, type=sockets.SOCK_DGRAM)[0]
    with sockets.socket(family, kind, protocol) as probe:
        probe.connect(target)  # of a datagram socket: nothing is sent
        host = str(probe.getsockname()[0])
    return f"[{host}]" if ":" in host else host
