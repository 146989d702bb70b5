"""``chat`` with its turns from a pipe."""

from __future__ import annotations

import io
import sys

import pytest

from llm_engine.cli.main import main

SMALL = ("--max-num-seqs", "8", "--num-kv-blocks", "64", "--temperature", "0", "--cpu-threads", "1")


def answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], turns: str, *words: str) -> list[str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(turns))
    assert main(["chat", "--max-tokens", "8", *SMALL, *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_each_line_is_a_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(answers(monkeypatch, capsys, "What is 3 + 4?\n\nWhat is 5 + 6?\n")) == 2


def test_clear_forgets_and_exit_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    question = "What is 3 + 4?\n"
    twice = answers(monkeypatch, capsys, f"{question}/clear\n{question}/exit\n{question}")
    assert len(twice) == 2
    assert twice[0] == twice[1]


def test_a_turn_that_is_too_long_ends_a_piped_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 5000 + "\n"))
    assert main(["chat", *SMALL]) == 2
    assert "tokens" in capsys.readouterr().err
