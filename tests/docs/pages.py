"""The code blocks of the documentation's pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_RUN = "<!-- not run -->"
SERVER = "http://127.0.0.1:8000"
"""What the pages call a running server."""

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. ``line`` is where its text begins in the page."""

    page: Path
    language: str
    text: str
    line: int
    marked_not_run: bool

    @property
    def asks_a_server(self) -> bool:
        return SERVER in self.text

    @property
    def expected(self) -> list[str]:
        """What the block says it prints, in order: the ends of its lines after ``# →``."""
        return re.findall(r"# → (.+)$", self.text, re.MULTILINE)


def blocks_of(name: str, language: str) -> list[Block]:
    """The page's blocks of one language, in order."""
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            found[1],
            found[2],
            text.count("\n", 0, found.start(2)) + 1,
            text[: found.start()].rstrip().endswith(NOT_RUN),
        )
        for found in _BLOCK.finditer(text)
        if found[1] == language
    ]


def run_python(block: Block, names: dict[str, object], text: str | None = None) -> None:
    """Run a block's text, or ``text`` in its place; a traceback shows the page's line."""
    padded = "\n" * (block.line - 1) + (block.text if text is None else text)
    exec(compile(padded, str(block.page), "exec"), names)


def assert_printed(block: Block, printed: str) -> None:
    """Whether what the block says it prints was printed, in this order."""
    at = 0
    for words in block.expected:
        found = printed.find(words, at)
        assert found >= 0, f"{block.page.name} line {block.line}: {words!r} was not printed:\n{printed}"
        at = found + len(words)
