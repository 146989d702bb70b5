"""Which of a test's cases the quick suite runs; the slow marker runs the others too."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_quick(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """All of them for ``parametrize``, those that are not quick behind the slow marker; ``quick`` may name others."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
