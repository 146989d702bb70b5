"""``llm-engine stage``: keys, and what it refuses before it joins anybody. Joining: ``test_zmq_remote.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_engine.cli.main import main
from llm_engine.workers.pipeline_key import read_key


def test_a_new_key_is_written_for_its_owner_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pipeline.key"
    assert main(["stage", "--new-key", str(path)]) == 0
    out = capsys.readouterr().out
    assert str(path) in out and "secret" in out
    assert read_key(path).secret not in out
    assert main(["stage", "--new-key", str(path)]) == 2
    assert "not there yet" in capsys.readouterr().err


def test_what_ends_a_stage_before_it_joins_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = str(tmp_path / "key")
    assert main(["stage", "--new-key", key]) == 0
    (tmp_path / "zmq.py").write_text("raise ImportError('there is no libzmq.so.5')")
    monkeypatch.syspath_prepend(tmp_path)  # of this process, which has its own already, and so of the stage's
    assert main(["stage", "--join", "tcp://127.0.0.1:5", "--index", "1", "--pipeline-key", key]) == 1
    assert "ImportError: there is no libzmq.so.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "join is None; allowed: one"),
        (["--join", "tcp://127.0.0.1:5"], "index is None"),
        (["--join", "tcp://127.0.0.1:5", "--index", "1"], "pipeline_key is None"),
        (["--join", "ipc:///tmp/x", "--index", "1", "--pipeline-key", "KEY"], "pipeline_address is 'ipc:///tmp/x'"),
        (["--join", "tcp://*:5", "--index", "1", "--pipeline-key", "KEY"], "tcp://HOST:PORT"),
        (["--join", "tcp://127.0.0.1:5", "--index", "-1", "--pipeline-key", "KEY"], "index is -1"),
        (["--join", "tcp://127.0.0.1:5", "--index", "1", "--pipeline-key", "/nowhere"], "pipeline_key is '/nowhere'"),
        (["--join", "tcp://127.0.0.1:5", "--index", "1", "--pipeline-key", "KEY", "--cpus", "9999"], "cpus is '9999'"),
        (["--join", "tcp://127.0.0.1:5", "--index", "1", "--pipeline-key", "KEY", "--cpu-threads", "0"], "cpu_threads"),
        (["--join", "tcp://127.0.0.1:5", "--index", "1", "--pipeline-key", "KEY", "--model", "/no"], "model is '/no'"),
    ],
)
def test_what_it_cannot_do_ends_with_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    key = str(tmp_path / "key")
    assert main(["stage", "--new-key", key]) == 0
    capsys.readouterr()
    assert main(["stage", *(key if word == "KEY" else word for word in words)]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
