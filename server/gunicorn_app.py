"""Serving with gunicorn: one worker process of threads that owns the engine, and a parent that minds it.

The parent listens and forks before anything heavy is imported. SIGTERM drains: the worker goes on accepting, answers
new work with 503, and leaves when the last running answer is done; a second SIGTERM ends it at once. A worker that
dies ends the command: whoever supervises us knows better than we do whether to start again.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.workers.gthread import ThreadWorker

from ..core.errors import ConfigError, EngineError
from ..core.heap import freeze_heap
from ..core.version import __version__
from .config import ServerConfig

if TYPE_CHECKING:
    from ..engine.llm import LLM

log = logging.getLogger("llm_engine.server")

_ABORT_GRACE_S = 5
"""Between telling the last answers that their time is over and killing the worker."""


def serve(engine: Mapping[str, Any], config: ServerConfig) -> int:
    """Serve until a signal; returns the command's exit code. ``engine`` holds ``LLM``'s keyword arguments."""
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("gunicorn.error").addFilter(_is_news)
    if config.uds is None:
        _check_address(config.host, config.port)
    parent = os.getpid()
    try:
        _Parent(_Application(engine, config)).run()
    except SystemExit as end:
        if os.getpid() != parent:
            raise  # the worker ends through here too, with a code meant for its parent
        return 0 if end.code in (0, None) else 1
    raise AssertionError("the arbiter leaves by SystemExit")


def _check_address(host: str, port: int) -> None:
    """Raise ``ConfigError`` for an address that cannot be had: gunicorn would say so five times, a second apart."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        raise ConfigError("host and port", f"{host}:{port}", f"a free address of ours ({error.strerror})") from error


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record of gunicorn's says something new: a worker that could not start has told why itself."""
    return not (isinstance(record.args, tuple) and record.args[-1:] == (Arbiter.WORKER_BOOT_ERROR,))


class _Application(BaseApplication):
    """The settings for gunicorn, and the engine, which only the worker makes."""

    def __init__(self, engine: Mapping[str, Any], config: ServerConfig) -> None:
        self._engine, self._config = engine, config
        self._worker: _Worker | None = None
        self._llm: LLM | None = None
        super().__init__()

    def load_config(self) -> None:
        config = self._config
        host = f"[{config.host}]" if ":" in config.host else config.host
        for name, value in {
            "bind": f"unix:{config.uds}" if config.uds else f"{host}:{config.port}",
            "proc_name": "llm-engine",
            "worker_class": _Worker,
            "workers": 1,
            "threads": config.http_threads,
            "worker_connections": max(4096, 2 * config.http_threads),
            "keepalive": config.keep_alive,
            "timeout": 0,  # no heartbeat: loading a model may take any time, and a dead worker is noticed anyway
            "graceful_timeout": config.shutdown_timeout + _ABORT_GRACE_S,
            "limit_request_field_size": 16380,
            "control_socket_disable": True,
            "preload_app": False,
            "accesslog": "-" if config.access_log else None,
            "loglevel": "debug" if config.log_level == "debug" else "warning",
            "post_fork": self._after_fork,
            "post_worker_init": self._announce,
            "worker_int": _end_at_once,
            "worker_exit": self._close,
            "child_exit": _worker_ended,
        }.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """The WSGI application, in the worker. An engine that cannot start ends the process with its message."""
        from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector

        from ..engine.llm import LLM
        from .app import make_app

        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        names = self._config.served_model_name
        try:
            self._llm = LLM(
                **self._engine,
                registry=registry,
                show_progress=sys.stderr.isatty(),
                served_model_name=names[0] if names else None,
            )
            if self._llm.tokenizer is None:
                raise ConfigError("tokenizer", None, "a tokenizer beside the model, or another one's folder")
            self._llm.tokenizer.encode("")  # loads it now rather than at the first request
        except EngineError as error:
            print(f"llm-engine serve: error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(Arbiter.WORKER_BOOT_ERROR) from error
        app = make_app(self._llm, self._config, lambda: self._worker is not None and not self._worker.alive)
        freeze_heap()
        return app

    def _after_fork(self, arbiter: Arbiter, worker: _Worker) -> None:
        self._worker = worker
        # This process ends its answers first; the parent's copy of the setting is when it kills what is left.
        self.cfg.set("graceful_timeout", self._config.shutdown_timeout)

    def _announce(self, worker: _Worker) -> None:
        assert self._llm is not None
        info = self._llm.engine.info
        room = f"KV cache of {(info.num_kv_blocks - 1) * info.block_size:,} tokens"
        for listener in worker.sockets:
            name = listener.getsockname()
            where = f"unix:{name}" if isinstance(name, str) else f"http://{self._config.host}:{name[1]}"
            what = f"llm-engine {__version__} serves {self._llm.model_name} at {where}"
            print(f"{what} ({info.model.dtype}, {room})", file=sys.stderr, flush=True)

    def _close(self, arbiter: Arbiter, worker: _Worker) -> None:
        if self._llm is not None:
            self._llm.close()


class _Worker(ThreadWorker):
    """gunicorn's threaded worker, which while it drains goes on accepting, so that /ready and refusals are heard."""

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled or not self.alive)


class _Parent(Arbiter):
    """gunicorn's arbiter for exactly one worker: no reload, no second copy of the model, no respawn."""

    _told_to_end = False

    def signal(self, sig: int, frame: Any) -> None:
        """A second SIGTERM counts as SIGQUIT, which does not wait."""
        if sig == signal.SIGTERM and self._told_to_end:
            sig = signal.SIGQUIT
        self._told_to_end = self._told_to_end or sig == signal.SIGTERM
        super().signal(sig, frame)

    def halt(self, reason: str | None = None, exit_status: int = 0) -> None:
        if exit_status == self.WORKER_BOOT_ERROR:  # the worker has said why
            logging.getLogger("gunicorn.error").setLevel(logging.CRITICAL)
        super().halt(reason, exit_status)

    def _ignore(self) -> None:
        log.info("signal ignored: this server has one worker and cannot reload")

    handle_hup = handle_ttin = handle_ttou = handle_usr2 = handle_winch = _ignore


def _end_at_once(worker: _Worker) -> None:
    """A second SIGTERM, or Ctrl-C: threads that stream must not hold the process up."""
    os._exit(0)


def _worker_ended(arbiter: Arbiter, worker: _Worker) -> None:
    if arbiter.LISTENERS:  # they are closed when the end was asked for
        raise HaltServer("the worker has died; its output above says why", 1)
