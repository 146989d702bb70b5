"""What benchmarks publish: JSON, Markdown, the tables in a page of the documentation and what stands under them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.children import ROOT
from benchmarks.report import Spread, load_line

NOT_QUIET = 0.1
"""Cores busy with other things above which a result is called provisional."""


def add_arguments(parser: argparse.ArgumentParser, name: str, page: str) -> None:
    """The flags that say where results go. ``page`` is in ``docs``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"(default: benchmarks/results/{name}.json)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help=f"(default: benchmarks/results/{name}.md)")
    parser.add_argument("--page", type=Path, metavar="FILE", help=f"renew its table (default: docs/{page})")
    parser.add_argument(
        "--quick", action="store_true", help="one hasty round to see that all works; writes only files that are named"
    )


def settle_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, page: str, *, whole: bool
) -> None:
    """Fill in the defaults where the ``whole`` benchmark is to run; else only what is asked for is written.

    A page that cannot be written is an error before anything is measured.
    """
    if whole and not args.quick:
        args.json = args.json or ROOT / "benchmarks" / "results" / f"{name}.json"
        args.markdown = args.markdown or ROOT / "benchmarks" / "results" / f"{name}.md"
        args.page = args.page or ROOT / "docs" / page
    if args.page:
        try:
            marked(args.page, name)
        except ValueError as error:
            parser.error(f"--page {error}")


def publish(args: argparse.Namespace, name: str, result: dict[str, Any], title: str, section: str) -> None:
    """Write what the flags ask for."""
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(f"# {title}\n\n{section}\n", encoding="utf-8")
    if args.page:
        put_between(args.page, name, section)
    written = [str(path) for path in (args.json, args.markdown, args.page) if path]
    if written:
        print(f"written: {', '.join(written)}")


def begin(repeats: int, versions: Mapping[str, str]) -> dict[str, Any]:
    """A result without figures yet. A run brings ``load_before`` and ``other_cores``; a failure ``who``, ``repeat``
    and ``error``."""
    return {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine.describe(),
        "versions": {"python": sys.version.split()[0], **versions},
        "repeats": repeats,
        "runs": [],
        "failures": [],
    }


def circumstances(result: dict[str, Any], said: str) -> str:
    """What was measured, where, when, and beside what; ``said`` is what only this benchmark knows."""
    on = result["machine"]
    made_of = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    parts = [
        f"Median (min..max) over {result['repeats']} rounds, {said}; {result['when']}. "
        f"{on['cpu']}, {on['cores']} cores, {on['system']}; {made_of}. {load_line(result)}"
    ]
    if Spread.of([run["other_cores"] for run in result["runs"]]).median > NOT_QUIET:
        parts.append("**Provisional:** the machine was not quiet.")
    for failure in result["failures"]:
        first, *log = failure["error"].strip().split("\n")
        parts.append(f"Failed: {failure['who']}, repeat {failure['repeat'] + 1}: {': '.join([first, *log[-1:]])}")
    return "\n\n".join(parts)


def spread(values: list[float]) -> str:
    """A cell: the median with its range, or the one value there is."""
    found = Spread.of(values)
    text = found.text(0 if found.median >= 100 else 1)
    return text if len(values) > 1 else text.partition(" ")[0]


def put_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between the page's two marks of this name; raises what ``marked`` raises."""
    head, tail = marked(page, name)
    page.write_text(f"{head}\n\n{text.strip()}\n\n{tail}", encoding="utf-8")


def marked(page: Path, name: str) -> tuple[str, str]:
    """The page up to and with the first mark, and from the second. Raises ``ValueError`` without both, once each."""
    begins, ends = f"<!-- {name}: written by benchmarks.{name} -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    at, to = text.find(begins), text.find(ends)
    if not 0 <= at < to or text.count(begins) + text.count(ends) != 2:
        raise ValueError(f"{page}: needs the lines {begins} and {ends}, once each and in this order")
    return text[: at + len(begins)], text[to:]
