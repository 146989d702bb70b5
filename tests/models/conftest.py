"""Small checkpoints, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models import tiny_models


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a row of ``tiny_models.ARCHITECTURES``. Not to be changed: copy it first."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tiny_models.build(name, root / name)
        return made[name]

    return folder
