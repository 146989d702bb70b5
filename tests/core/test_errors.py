"""The tree of errors: what a caller may catch."""

from __future__ import annotations

import pytest

from llm_engine.core import errors


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_one_root_for_all(name: str) -> None:
    assert issubclass(getattr(errors, name), errors.EngineError)


@pytest.mark.parametrize(
    ("child", "parent"),
    [
        ("InvalidParamsError", "RequestError"),
        ("PromptTooLongError", "InvalidParamsError"),
        ("QueueFullError", "CapacityError"),
        ("ModelNotFoundError", "RequestError"),
        ("RequestFailedError", "RequestError"),
    ],
)
def test_kinds_of_errors(child: str, parent: str) -> None:
    assert issubclass(getattr(errors, child), getattr(errors, parent))


def test_bad_input_is_a_value_error_too_and_shows_little_of_a_huge_value() -> None:
    error = errors.InvalidParamsError("prompt", "x" * 10**6, "a short one")
    assert isinstance(error, ValueError)
    assert (error.field, error.allowed) == ("prompt", "a short one")
    assert len(str(error)) < 150
