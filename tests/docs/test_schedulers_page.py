"""``docs/schedulers.md`` has every preset, every policy and every option as they are, and the example's own text."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from llm_engine.cli.schedulers import spelled
from llm_engine.engine.executors.registry import EXECUTORS
from llm_engine.kvcache.registry import KV_CACHE_MANAGERS, RESOURCES
from llm_engine.models.architectures import ARCHITECTURES
from llm_engine.schedulers.options import Chosen
from llm_engine.schedulers.registry import PART_REGISTRIES, PRESETS, SCHEDULERS
from tests.docs.pages import ROOT, blocks_of

PAGE = (ROOT / "docs" / "schedulers.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "examples" / "my_scheduler"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table whose first heading this is."""
    table = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[ -|]+\|\n((?:\|.*\|\n)+)", PAGE, re.MULTILINE)
    assert table, heading
    return [[cell.strip() for cell in line.strip("|\n ").split(" | ")] for line in table[1].splitlines()]


def test_every_part_is_listed() -> None:
    listed = {name.replace("-", "_"): re.findall(r"`([\w-]+)`", built_in) for name, _, _, built_in in rows("part")}
    assert listed == {kind: registry.names() for kind, (registry, _) in PART_REGISTRIES.items()}


def test_every_preset_is_listed() -> None:
    listed = {name.strip("`"): (*parts,) for name, *parts in rows("`--scheduler`")}
    assert listed == {name: tuple(part or "by stages" for part in parts) for name, parts in PRESETS.items()}


def test_every_policy_has_its_paragraph_in_the_order_of_the_registry() -> None:
    section = PAGE[PAGE.index("## What is built in") : PAGE.index("## Limits every plan respects")]
    told = re.findall(r"^\*\*([\w-]+)\.\*\*", section, re.MULTILINE)
    assert told == [name for registry, _ in PART_REGISTRIES.values() for name in registry.names()]


def test_every_option_is_listed_with_its_default() -> None:
    listed = {
        (option.strip("`"), owner): default.strip("`")
        for option, owners, default, _ in rows("option")
        for owner in owners.split(", ")
    }
    existing = {
        (setting.name, name): spelled(setting.default) or "none"
        for kind, (registry, _) in PART_REGISTRIES.items()
        for name in registry.names()
        for setting in Chosen(kind, name, registry.get(name)).options.values()
    }
    assert listed == existing


def test_the_tutorials_files_are_those_of_the_example() -> None:
    (written,) = (
        block.text for block in blocks_of("docs/schedulers.md", "python") if "# my_scheduler.py" in block.text
    )
    assert written.removeprefix("# my_scheduler.py\n") == (EXAMPLE / "my_scheduler.py").read_text(encoding="utf-8")
    (points,) = blocks_of("docs/schedulers.md", "toml")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))
    assert tomllib.loads(points.text)["project"]["entry-points"] == project["project"]["entry-points"]


def test_the_tutorials_commands_run_and_show_what_it_says(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "my_scheduler.py", tmp_path)
    tutorial = PAGE[PAGE.index("## Tutorial") : PAGE.index("## Writing the other parts")]
    commands = re.findall(r"^llm-engine (simulate .+)$", tutorial, re.MULTILINE)
    assert len(commands) == 2
    printed = []
    for command in commands:
        environ = {**os.environ, "PYTHONPATH": f".{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            [sys.executable, "-m", "llm_engine", *command.split()],
            cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        printed.append(ended.stdout)
    assert "scheduler my_scheduler:ShortestPrompt x max-utilization x balanced" in printed[0]
    row = r"^ (fcfs|ordering=\S+) +\d+ +([\d.]+) s +([\d.]+) s"
    first_tokens = {name: (float(p50), float(p99)) for name, p50, p99 in re.findall(row, printed[1], re.MULTILINE)}
    mine, fcfs = first_tokens["ordering=my_scheduler:ShortestPrompt"], first_tokens["fcfs"]
    assert mine[0] < 0.6 * fcfs[0]
    assert mine[1] > fcfs[1]
    claim = "in about half the time that it takes under fcfs (p50), and the long prompts pay for it at p99"
    assert claim in " ".join(tutorial.split())


def test_every_group_of_entry_points_is_listed() -> None:
    parts = [registry for registry, _ in PART_REGISTRIES.values()]
    registries = [SCHEDULERS, *parts, RESOURCES, KV_CACHE_MANAGERS, EXECUTORS, ARCHITECTURES]
    assert [group.strip("`") for group, *_ in rows("entry-point group")] == [registry.group for registry in registries]
