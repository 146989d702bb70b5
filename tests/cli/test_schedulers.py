"""``llm-engine schedulers``: everything that can be named, with its options; one of them in detail; as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_engine.cli.main import main
from llm_engine.schedulers.registry import CAPACITIES, MICRO_BATCHES, ORDERINGS, PRESETS
from tests.distributions import forget_modules, write_distribution


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["schedulers", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def entries(capsys: pytest.CaptureFixture[str], *words: str) -> dict[tuple[str, str], dict[str, Any]]:
    code, out, _ = run(capsys, "--json", *words)
    assert code == 0
    return {(entry["kind"], entry["name"]): entry for entry in json.loads(out)}


def test_everything_registered_is_listed_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = entries(capsys)
    for kind, names in (
        ("scheduler", PRESETS), ("ordering", ORDERINGS.names()), ("capacity", CAPACITIES.names()),
        ("micro_batch", MICRO_BATCHES.names()), ("kv_cache_manager", ["lru"]),
    ):  # fmt: skip
        for name in names:
            assert found[kind, name]["summary"]
            assert "error" not in found[kind, name]
    assert found["scheduler", "priority"]["parts"] == {
        "ordering": "priority", "capacity": "max-utilization", "micro_batch": None,
    }  # fmt: skip


def test_options_have_a_type_a_default_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    found = entries(capsys)
    (aging,) = found["ordering", "priority"]["options"]
    assert (aging["name"], aging["type"], aging["required"]) == ("aging_s", "float", False)
    assert aging["default"] > 0
    assert aging["help"]
    assert all(option["help"] for entry in found.values() for option in entry["options"])
    _, out, _ = run(capsys)
    assert f"--scheduler-option aging_s={aging['default']}  {aging['help']}" in out


def test_one_is_shown_with_its_parts_and_what_it_says_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "priority")
    assert code == 0
    assert "priority x max-utilization x by stages" in out
    assert "--ordering NAME" in out
    assert "--capacity max-utilization" in out
    assert "longest-prefix" not in out


def test_a_class_of_ones_own_is_shown_as_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    found = entries(capsys, "tests.schedulers.test_options:Ordering")
    ((kind, _), entry), *none = found.items()
    assert (kind, none) == ("ordering", [])
    assert [option["name"] for option in entry["options"]][:2] == ["aging_s", "top"]
    found = entries(capsys, "tests.schedulers.test_options:Whole")
    assert [kind for kind, _ in found] == ["scheduler"]


@pytest.mark.parametrize(("name", "says"), [("priorit", "did you mean 'priority'"), ("no.where:X", "can be imported")])
def test_a_name_that_leads_nowhere_lists_what_there_is(
    name: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, name)
    assert code == 2
    assert says in error


def test_other_packages_stand_among_them_and_a_broken_one_hinders_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "from llm_engine.schedulers.orderings.fcfs import FcfsOrdering\n"
        "class O(FcfsOrdering):\n    '''Mine goes first. And more.'''\n"
        "from examples.licence_slots import LicenceSlots\n"
        "PRESET = ('theirs', 'max-utilization', None)\n"
    )
    points = {
        "llm_engine.ordering": {"theirs": "shown_here:O", "broken": "shown_here:Nowhere"},
        "llm_engine.schedulers": {"theirs": "shown_here:PRESET"},
        "llm_engine.resources": {"licences": "shown_here:LicenceSlots"},
    }
    write_distribution(tmp_path, "shown_here", text, points)
    monkeypatch.syspath_prepend(tmp_path)
    request.addfinalizer(lambda: forget_modules(tmp_path))
    found = entries(capsys)
    assert found["ordering", "theirs"]["summary"] == "Mine goes first (from shown_here:O)"
    assert found["scheduler", "theirs"]["summary"] == "theirs x max-utilization x by stages"
    assert found["ordering", "broken"]["summary"].startswith("cannot be used: ordering is 'shown_here:Nowhere'")
    assert ("resource", "licences") in found
    _, out, _ = run(capsys)
    assert "--resource NAME" in out
