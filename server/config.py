"""What the HTTP side is built from."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import check_at_least, check_choices, option
from ..core.errors import ConfigError

RESERVED_THREADS = 16
"""Threads that never carry a generation request, so that /health and /metrics are answered under any load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where it listens and what it puts up with. Raises ``ConfigError`` naming the setting at fault."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for every interface")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    uds: str | None = option(None, "listen on this Unix socket instead of host and port")
    served_model_name: tuple[str, ...] = option(
        (), "names clients may ask for, the first one is shown in answers; the model's own when absent"
    )
    http_threads: int = option(256, f"threads that answer requests, one each; {RESERVED_THREADS} are kept for /health")
    max_body_mb: int = option(16, "largest request body in MB; larger ones get 413")
    keep_alive: int = option(15, "seconds an idle connection stays open")
    shutdown_timeout: int = option(60, "seconds running answers may take after SIGTERM")
    tenant_from: str = option(
        "key",
        "whose a request is: key, a digest of its API key, and its user field only where it brings none; user, the "
        "other way round",
        choices=("key", "user"),
    )
    access_log: bool = option(False, "log a line per HTTP request")
    log_level: str = option("info", "what the server logs", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        check_choices(self)
        check_at_least(self, RESERVED_THREADS + 1, "http_threads")
        check_at_least(self, 1, "max_body_mb")
        check_at_least(self, 0, "port", "keep_alive", "shutdown_timeout")
        if self.port > 65535:
            raise ConfigError("port", self.port, "a whole number from 0 to 65535")
        if isinstance(self.served_model_name, str) or not all(
            isinstance(name, str) and name for name in self.served_model_name
        ):
            raise ConfigError("served_model_name", self.served_model_name, "one or more names")
