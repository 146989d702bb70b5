"""Things by name: built-in ones, somebody's own, and what is said of a name that leads nowhere."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

import llm_engine.core.registry as registry_module
from llm_engine.core.errors import ConfigError
from llm_engine.core.registry import Registry


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    points = [
        EntryPoint("violet", "collections:OrderedDict", "colours"),
        EntryPoint("red", "collections:deque", "colours"),
        EntryPoint("broken", "no_such_module_at_all:Thing", "colours"),
    ]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points if group == "colours" else [])
    colours: Registry[Any] = Registry("colour", "colours")
    colours.add("red", ".core.version:__version__", "the built-in red")
    colours.add("green", "collections:Counter", "like grass")
    return colours


def test_built_in_names_come_first_and_win(colours: Registry[Any]) -> None:
    assert colours.names() == ["red", "green", "broken", "violet"]
    assert dict(colours.describe())["red"] == "the built-in red"
    assert [name for name, _ in colours.describe()] == colours.names()
    assert isinstance(colours.get("red"), str)


def test_a_name_is_loaded_when_asked_for(colours: Registry[Any]) -> None:
    import collections

    assert colours.get("green") is collections.Counter
    assert colours.get("violet") is collections.OrderedDict
    assert colours.get("collections:deque") is collections.deque
    assert colours.get("collections:OrderedDict.fromkeys") == collections.OrderedDict.fromkeys


def test_an_unknown_name_lists_what_exists_and_guesses(colours: Registry[Any]) -> None:
    listed = r"colour is 'gren'; allowed: red, green, broken, violet, or .*did you mean 'green'"
    with pytest.raises(ConfigError, match=listed):
        colours.get("gren")
    with pytest.raises(ConfigError, match="paint is 'x'"):
        colours.get("x", "paint")


@pytest.mark.parametrize(
    "target", ["broken", "no_such_module_at_all:X", "collections:NoSuch", ":X", "collections:", "a b:c"]
)
def test_a_target_that_cannot_be_imported_is_a_setting_at_fault(colours: Registry[Any], target: str) -> None:
    with pytest.raises(ConfigError, match="can be imported"):
        colours.get(target)


def test_without_a_group_there_are_no_entry_points() -> None:
    assert Registry("thing").names() == []
