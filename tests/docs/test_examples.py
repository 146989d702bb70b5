"""The Python examples of the pages run as they stand, page by page, and print what they say they print."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_engine import LLM
from tests.docs.pages import Block, assert_printed, blocks_of, run_python

PAGES = (
    "README.md",
    "docs/embedding.md",
    "docs/schedulers.md",
    "docs/kvcache.md",
    "docs/operations.md",
    "docs/simulation.md",
)
MOST_NOT_RUN = 0
"""How many blocks may be marked ``<!-- not run -->``; those that ask a server run in another file."""

_FILE = re.compile(r"# (\w+)\.py\n")


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to import from, for blocks that say which file they are."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, modules: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    blocks = [block for block in blocks_of(page, "python") if not (block.asks_a_server or block.marked_not_run)]
    assert blocks, "the page has no example"
    try:
        for block in blocks:
            if file := _FILE.match(block.text):
                (modules / f"{file[1]}.py").write_text(block.text, encoding="utf-8")
                importlib.invalidate_caches()
            run_python(block, names)
            assert_printed(block, capsys.readouterr().out)
    finally:
        for value in names.values():
            if isinstance(value, LLM):
                value.close()


def test_few_blocks_are_not_run() -> None:
    marked: list[Block] = [block for page in PAGES for block in blocks_of(page, "python") if block.marked_not_run]
    assert len(marked) <= MOST_NOT_RUN
