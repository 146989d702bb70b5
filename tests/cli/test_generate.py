"""The prompts a file holds, and ``generate`` from end to end on the bundled model."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from llm_engine.cli.generate import Job, parse_lines
from llm_engine.cli.main import main
from llm_engine.core.errors import ConfigError

SMALL = ("--max-num-seqs", "8", "--num-kv-blocks", "64", "--temperature", "0", "--cpu-threads", "1")


def test_lines_of_text_are_prompts_and_blank_ones_are_not() -> None:
    assert parse_lines(["one\n", "\n", "  two \r\n", " "], "f") == ([Job("one"), Job("  two ")], False)


def test_jsonl_lines_bring_sampling_fields_along() -> None:
    lines = [
        json.dumps({"prompt": "a", "max_tokens": 3}),
        json.dumps({"prompt": [1, 2]}),
        json.dumps({"messages": [{"role": "user", "content": "x"}]}),
    ]
    assert parse_lines(lines, "f") == (
        [Job("a", None, {"max_tokens": 3}), Job([1, 2]), Job(None, [{"role": "user", "content": "x"}])],
        True,
    )


@pytest.mark.parametrize("line", ['{"prompt": "a"', "[1]", "{}", '{"prompt": "a", "messages": []}', '"a"'])
def test_bad_jsonl_names_the_line(line: str) -> None:
    with pytest.raises(ConfigError, match="f line 2"):
        parse_lines(['{"prompt": "good"}', line], "f")


def test_text_in_text_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Once upon a time", "2+2=", "--max-tokens", "4", "--no-progress", *SMALL]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_jsonl_in_jsonl_out(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"prompt": "Once", "max_tokens": 2, "ignore_eos": True},
        {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 5, "ignore_eos": True, "n": 2},
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    assert main(["generate", "--file", str(source), "--output", str(target), "--max-tokens", "3", *SMALL]) == 0
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert answers[0]["prompt"] == "Once"
    assert [len(answer["choices"]) for answer in answers] == [1, 2]
    # The flag wins over the line.
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [3, 6]
    assert {choice["finish_reason"] for answer in answers for choice in answer["choices"]} == {"length"}


def test_a_bad_sampling_field_names_itself_and_a_near_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a", "temprature": 1}')
    assert main(["generate", "--file", str(source), *SMALL]) == 2
    err = capsys.readouterr().err
    assert "temprature" in err
    assert "did you mean temperature?" in err


def test_prompts_may_come_through_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert main(["generate", "--format", "jsonl", "--max-tokens", "1", *SMALL]) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["one", "two"]


def test_an_empty_pipe_is_a_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["generate", *SMALL]) == 2
    assert "at least one prompt" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_known_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = str(tmp_path / "missing" / "out.txt")
    assert main(["generate", "a", "--output", nowhere, "--model", str(tmp_path / "no-model-either")]) == 1
    error = capsys.readouterr().err
    assert nowhere in error
    assert "no-model-either" not in error
