"""What the pages name exists: flags, variables, fields, error types, files; and nothing that exists is left out."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest

from llm_engine.cli.main import make_parser
from llm_engine.cli.settings import ALL_SETTINGS, ENV_INTERNAL
from llm_engine.core import errors
from llm_engine.server import http_errors, protocol
from tests.docs.pages import ROOT

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
OTHER_PROGRAMS = {"--index-url"}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from flags_of(command)


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_variables_exist(page: str) -> None:
    text = read(page)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - OTHER_PROGRAMS
    assert flags <= {*flags_of(make_parser()), "--x", "--y"}
    variables = set(re.findall(r"LLM_ENGINE_([A-Z_]+)", text))
    assert variables <= {name.upper() for name in ALL_SETTINGS} | ENV_INTERNAL | {"CONFIG", "X"}


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page: str) -> None:
    text = read(page)
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (folder / target).exists(), target
    for target in re.findall(r"`((?:\w+/)+\w+\.(?:py|md|cpp))`", text):
        assert (ROOT / target).exists(), target


def test_every_field_of_a_request_is_described() -> None:
    page = read("docs/serving.md")
    table = page[page.index("## Fields") : page.index("**Refused**")]
    cells = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    described = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert described == {*protocol.CompletionRequest.model_fields, *protocol.ChatRequest.model_fields}
    refused = page[page.index("**Refused**") : page.index("**Ignored**")]
    assert set(re.findall(r"`(\w+)`", refused)) - {"false"} == set(protocol._UNSUPPORTED)


def test_every_error_type_is_described() -> None:
    page = read("docs/serving.md")
    table = page[page.index("## Errors") : page.index("## Streaming")]
    assert set(re.findall(r"`(\w+Error)`", table)) == set(http_errors.TYPES.values())
    assert set(map(int, re.findall(r"\b[45]\d\d\b", table))) == set(http_errors.TYPES)


def test_the_tree_of_errors_is_complete() -> None:
    page = read("docs/embedding.md")
    tree = set(re.findall(r"\b\w+Error\b", page[page.index("## Errors") : page.index("What is wrong with a request")]))
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert tree - {"ValueError"} == defined


def test_every_route_is_described() -> None:
    page = read("docs/serving.md")
    described = set(re.findall(r"^\| `(GET|POST) (\S+)` \|", page, re.MULTILINE))
    routes = re.findall(r"@app\.(get|post)\(\"(\S+?)\"\)", (ROOT / "server" / "app.py").read_text(encoding="utf-8"))
    assert described == {(method.upper(), path) for method, path in routes}
