"""What stages can be told by name, and what has no name that would do."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from llm_engine.core.errors import ConfigError
from llm_engine.workers.sampler import BatchSampler
from llm_engine.workers.stage_model import importable_name, imported


class Factory:
    @classmethod
    def make(cls, stage: int) -> None:
        pass

    class Inner:
        pass

    def __call__(self, stage: int) -> None:
        pass


def make(stage: int) -> None:
    pass


@pytest.mark.parametrize("thing", [make, Factory, Factory.Inner, BatchSampler])
def test_functions_and_classes_of_modules_are_found_again(thing: Any) -> None:
    name = importable_name("model_engine", thing)
    assert imported(name) is thing


def closure(stage: int = 0) -> Any:
    return lambda stage: None


def replaced(stage: int) -> None:
    pass


original, replaced = replaced, make


@pytest.mark.parametrize(
    ("thing", "says"),
    [
        (closure(), "a lambda, or what a function makes"),
        (functools.partial(make, stage=1), "made at run time"),
        (Factory(), "made at run time"),
        (original, "is another object"),
    ],
)
def test_what_cannot_be_found_again_is_refused_with_the_reason(thing: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        importable_name("model_engine", thing)
    assert caught.value.field == "model_engine"
    assert "import" in str(caught.value)


def test_the_main_script_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "__module__", "__main__")
    with pytest.raises(ConfigError, match="move it out of the main script"):
        importable_name("sampler", make)
