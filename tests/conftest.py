"""For all tests."""

from __future__ import annotations

import gc

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Thousands of tests, torch and transformers are there from now on: no collection needs to visit them again."""
    gc.collect()
    gc.freeze()
