"""Who may speak over tcp: CURVE with one key pair that the engine and all its stages share, and nobody else."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from ..core.errors import ConfigError
from .wire import TOKEN_BYTES

_DOMAIN = b"llm-engine"
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_JOIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class PipelineKey:
    """A CURVE key pair in Z85. Both ends use it: the server's public key and the only client's are the same."""

    public: str
    secret: str = field(repr=False)

    @property
    def token(self) -> bytes:
        """What a stage that was started by hand shows on the control socket."""
        return hashlib.sha256(b"control" + self.secret.encode()).digest()[:TOKEN_BYTES]

    def secure(self, socket: zmq.Socket[Any], *, server: bool) -> None:
        """For what the socket binds (``server``) or connects to from now on; what it has bound already stays plain."""
        socket.set(zmq.CURVE_PUBLICKEY, self.public.encode())
        socket.set(zmq.CURVE_SECRETKEY, self.secret.encode())
        if server:
            socket.set(zmq.CURVE_SERVER, 1)
            socket.set(zmq.ZAP_DOMAIN, _DOMAIN)
        else:
            socket.set(zmq.CURVE_SERVERKEY, self.public.encode())


def new_key() -> PipelineKey:
    public, secret = zmq.curve_keypair()
    return PipelineKey(public.decode(), secret.decode())


def write_key(path: Path, key: PipelineKey) -> None:
    """Write a key file that only its owner can read; raises ``ConfigError`` where there is one, or it cannot be."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError("new_key", str(path), "a file that is not there yet") from None
    except OSError as error:
        raise ConfigError("new_key", str(path), f"a file that can be written ({error.strerror})") from error
    with os.fdopen(file, "w", encoding="ascii") as out:
        json.dump({"public": key.public, "secret": key.secret}, out)
        out.write("\n")


def read_key(path: Path, field: str = "pipeline_key") -> PipelineKey:
    """Raises ``ConfigError`` for what is no key file, or is one that others may read."""
    made_by = "a file that llm-engine stage --new-key has written"
    try:
        if os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(field, str(path), "a key file that only its owner may read (chmod 600)")
        values = json.loads(path.read_text(encoding="ascii"))
        key = PipelineKey(values["public"], values["secret"])
        if zmq.curve_public(key.secret.encode()).decode() != key.public:
            raise ValueError("its two keys do not belong together")
    except OSError as error:
        raise ConfigError(field, str(path), f"{made_by} ({error.strerror})") from error
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, zmq.ZMQError) as error:
        raise ConfigError(field, str(path), f"{made_by} ({error})") from error
    return key


class ZapThread(threading.Thread):
    """Lets in who has the key (RFC 27, ZAP): libzmq asks it about every connection to a socket bound with CURVE.

    One for each context, started before its first such socket. pyzmq's own is not used: it runs on asyncio.
    """

    def __init__(self, context: zmq.Context[Any], key: PipelineKey) -> None:
        super().__init__(name="llm-engine-zap", daemon=True)
        self._allowed = z85.decode(key.public)
        self._socket = context.socket(zmq.REP)
        self._socket.set(zmq.LINGER, 0)
        self._socket.bind(_ZAP_ADDRESS)
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop_fd, zmq.POLLIN)
        while self._stop_fd not in (ready := dict(poller.poll())):
            if self._socket in ready:
                self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
        self._socket.close(0)

    def stop(self) -> None:
        """From the thread that started it; callable once."""
        os.eventfd_write(self._stop_fd, 1)
        self.join(_JOIN_SECONDS)
        os.close(self._stop_fd)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        # version, request id, domain, address, identity, mechanism, client's public key
        version, request_id, domain, _, _, mechanism, *credentials = request
        allowed = domain == _DOMAIN and mechanism == b"CURVE" and credentials == [self._allowed]
        status = (b"200", b"OK") if allowed else (b"400", b"another pipeline key")
        return [version, request_id, *status, b"", b""]
