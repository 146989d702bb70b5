"""Pictures without a window system: matplotlib, imported when the first one is drawn."""

from __future__ import annotations

from typing import Any

from ..core.errors import ConfigError


def new_figure(path: str, width: float, height: float) -> Any:
    """A figure to be saved at ``path``; inches. Raises ``ConfigError`` without matplotlib and for an unknown suffix."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plot", path, "matplotlib beside llm-engine: pip install 'llm-engine[plot]'") from error
    # Not pyplot: it keeps figures and chooses a window system for the whole process.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    suffix = path.rpartition(".")[2].lower()
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise ConfigError("plot", path, f"a file name that ends in one of {', '.join(sorted(known))}")
    return figure
