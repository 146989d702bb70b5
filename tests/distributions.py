"""Distributions as pip would leave them, made up for a test: modules and entry points in a folder to import from."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path


def write_distribution(folder: Path, module: str, text: str, entry_points: Mapping[str, Mapping[str, str]]) -> None:
    """``module``'s text, and by group the names that lead into it."""
    (folder / f"{module}.py").write_text(text, encoding="utf-8")
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    lines = []
    for group, points in entry_points.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    importlib.invalidate_caches()


def forget_modules(folder: Path) -> None:
    """What was imported from this folder is imported anew when it is next asked for."""
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]
