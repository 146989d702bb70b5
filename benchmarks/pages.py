"""Tables that a benchmark keeps up to date in a page of the documentation."""

from __future__ import annotations

from pathlib import Path


def put_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between the page's two marks of this name; raises what ``marked`` raises."""
    head, tail = marked(page, name)
    page.write_text(f"{head}\n\n{text.strip()}\n\n{tail}", encoding="utf-8")


def marked(page: Path, name: str) -> tuple[str, str]:
    """The page up to and with the first mark, and from the second. Raises ``ValueError`` without both, once each."""
    begin, end = f"<!-- {name}: written by benchmarks.{name} -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    at, to = text.find(begin), text.find(end)
    if not 0 <= at < to or text.count(begin) + text.count(end) != 2:
        raise ValueError(f"{page}: needs the lines {begin} and {end}, once each and in this order")
    return text[: at + len(begin)], text[to:]
