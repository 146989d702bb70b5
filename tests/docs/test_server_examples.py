"""The examples that talk to a server, run against one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import SERVER, Block, assert_printed, blocks_of, run_python
from tests.server.conftest import Server, serving

PAGES = ("README.md", "docs/serving.md", "docs/metrics.md", "docs/operations.md")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running
        assert running.stop() == 0


def asking(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page, language) if block.asks_a_server]


def named(block: Block) -> str:
    return f"{block.page.name}:{block.line}"


@pytest.mark.parametrize("block", asking("python"), ids=named)
def test_python(block: Block, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    run_python(block, {"__name__": "__main__"}, block.text.replace(SERVER, server.base_url))
    assert_printed(block, capsys.readouterr().out)


@pytest.mark.parametrize("block", [block for block in asking("sh") if "curl" in block.text], ids=named)
def test_curl(block: Block, server: Server, tmp_path: Path) -> None:
    text = "set -e -o pipefail\n" + block.text.replace(SERVER, server.base_url)
    ended = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert '"error"' not in ended.stdout
    assert '"choices"' in ended.stdout
