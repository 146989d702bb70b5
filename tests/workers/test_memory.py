"""What a stage may take: the machine's free memory, or its control group's where that is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_engine.workers import memory


def group(folder: Path, limit: str, used: int, cache: int) -> tuple[str, str, str, tuple[str, ...]]:
    statistics = f"anon 5\ninactive_file {cache // 4}\nactive_file {cache - cache // 4}\n"
    for name, text in (("max", limit), ("current", str(used)), ("stat", statistics)):
        (folder / name).write_text(text)
    return str(folder / "max"), str(folder / "current"), str(folder / "stat"), ("inactive_file", "active_file")


@pytest.mark.parametrize(
    ("limit", "used", "cache", "left"),
    [("1000000", 400000, 100000, 700000), ("1000", 5000, 0, 0), ("max", 1, 0, None), (str(1 << 62), 1, 0, None)],
)
def test_the_control_group_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, used: int, cache: int, left: int | None
) -> None:
    monkeypatch.setattr(memory, "_CGROUPS", (group(tmp_path, limit, used, cache), ("/no", "/such", "/files", ("x",))))
    monkeypatch.setattr(memory, "_machine", lambda: 9_000_000)
    assert memory.available_memory() == (9_000_000 if left is None else left)


def test_this_machine_has_some() -> None:
    memory.return_freed_memory()
    assert memory.available_memory() > 1 << 20
