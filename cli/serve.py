"""``llm-engine serve``."""

from __future__ import annotations

import argparse

from ..core.config import EngineConfig
from ..engine.assembly import check_names
from ..server.config import ServerConfig
from .settings import ALL_SETTINGS, ENGINE_SETTINGS, SERVER_SETTINGS, resolve


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop; returns the exit code."""
    values = resolve(ALL_SETTINGS, args)
    config = ServerConfig(**{name: value for name, value in values.items() if name in SERVER_SETTINGS})
    engine = {name: value for name, value in values.items() if name in ENGINE_SETTINGS}
    # A bad setting, or a name that leads nowhere, ends it here, before a port is taken.
    checked = EngineConfig.of(**engine)
    check_names(checked)
    if (trace := checked.observability.trace) is not None:
        from ..metrics.step_trace import check_writable

        check_writable(trace)

    from ..server.gunicorn_app import serve

    return serve(engine, config)
