"""The files that a command is to write, looked at before it begins."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..core.errors import ConfigError


def check_outputs(written: Mapping[str, str | None], read: Mapping[str, str | None]) -> None:
    """Paths by their flags; ``None`` where a flag was not given. Raises ``ConfigError`` for a file that cannot be
    written, for a plot that cannot be drawn, and for a file that is named twice."""
    from ..metrics.figures import new_figure
    from ..metrics.step_trace import check_writable

    known = {os.path.realpath(path): name for name, path in read.items() if path is not None}
    for name, path in written.items():
        if path is None:
            continue
        other = known.setdefault(os.path.realpath(path), name)
        if other != name and path != os.devnull:
            raise ConfigError(name, path, f"another file than that of {other}")
        check_writable(path, name)
        if name == "plot":
            new_figure(path, 1.0, 1.0)
