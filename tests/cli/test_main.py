"""The command line: what each mistake says, what it returns, and that looking at it is cheap."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llm_engine.cli.main import main, make_parser
from llm_engine.cli.settings import ENGINE_SETTINGS, SERVER_SETTINGS
from llm_engine.core.version import __version__


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("serve", "--max-num-seq", "4"), "unknown argument --max-num-seq; did you mean --max-num-seqs?"),
        (("serve", "--prot=1"), "unknown argument --prot; did you mean --port?"),
        (("generate", "a", "--max-token", "4"), "unknown argument --max-token; did you mean --max-tokens?"),
        (("serve", "one", "two"), "unknown argument two"),
        (("serve", "one", "--model", "two"), "two models: one and --model two"),
        (("serve", "--port", "x"), "'x'; allowed: a whole number"),
        (("serve", "--port", "70000"), "port is 70000; allowed: a whole number from 0 to 65535"),
        (("serve", "--http-threads", "3"), "http_threads is 3"),
        (("serve", "--dtype", "int3"), "int3"),
        (("serve", "--max-num-seqs", "0"), "max_num_seqs is 0"),
        (("serve", "--config", "/nowhere.yaml"), "/nowhere.yaml"),
        (("serve", "--log-level", "loud"), "loud"),
        (("bench", "offline"), "--workload"),
        (("bench", "offline", "--workload", "W1", "--repeat", "0"), "repeat is 0"),
        (("generate", "a", "--file", "b"), "not both"),
        (("chat", "--temperature", "-1"), "temperature is -1.0"),
        (("fly",), "fly"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert err.startswith("llm-engine")


def test_a_model_that_is_not_there_ends_with_one_line_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "generate", "hello", "--model", "/nowhere/model")
    assert (code, out) == (1, "")
    assert "/nowhere/model" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [(), ("bench",)])
def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "usage: llm-engine" in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"llm-engine {__version__}\n", "")


def test_every_setting_is_in_the_help_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "serve", "--help")
    assert code == 0
    words = " ".join(out.split())
    for setting in [*ENGINE_SETTINGS.values(), *SERVER_SETTINGS.values()]:
        assert setting.flag in words
        assert " ".join(setting.help.split()[:4]) in words


def test_the_help_needs_no_torch_and_little_time() -> None:
    code = (
        "import sys\n"
        "from llm_engine.cli.main import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'flask', 'gunicorn', 'numpy', 'transformers', 'asyncio'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=30)


def test_schedulers_lists_names_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "schedulers")
    assert code == 0
    for flag in ("--scheduler", "--ordering", "--capacity", "--micro-batch"):
        assert f"{flag} NAME" in out
    for name in ("greedy", "balanced", "fcfs", "max-utilization"):
        assert any(line.split()[:1] == [name] and len(line.split()) > 1 for line in out.splitlines())
    assert out.count("(default with one stage)") == out.count("(default with several stages)") == 1


def test_abbreviations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "serve", "--por", "1")[0] == 2


def test_the_parser_accepts_a_model_by_position_or_by_flag() -> None:
    assert make_parser().parse_args(["serve", "m"]).positional_model == "m"
    assert make_parser().parse_args(["serve", "--model", "m"]).model == "m"


def test_python_m_is_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "llm_engine", "--version"], check=True, capture_output=True, text=True, timeout=30
    )
    assert shown.stdout.split() == ["llm-engine", __version__]
