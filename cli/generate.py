"""``llm-engine generate``: prompts in, answers out."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from ..core.errors import ConfigError, InvalidParamsError
from ..core.outputs import RequestOutput
from .sampling_flags import given, make_params
from .settings import ENGINE_SETTINGS, resolve

if TYPE_CHECKING:
    from ..engine.llm import LLM


@dataclass(slots=True)
class Job:
    """One prompt: text or token ids, or else a conversation, and what it says about sampling."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Complete every prompt and write the answers in order; returns the exit code."""
    settings = resolve(ENGINE_SETTINGS, args)
    jobs, was_jsonl = _jobs(args)
    style = args.format or ("jsonl" if was_jsonl else "text")

    from ..engine.llm import LLM

    # The file first: a path that cannot be written is to be known before the work, not after it.
    with _open_output(args.output) as file, LLM(**settings, show_progress=sys.stderr.isatty()) as llm:
        params = [make_params(dict(llm.default_sampling), job.sampling, given(args)) for job in jobs]
        prompts = [_prompt(llm, job, number) for number, job in enumerate(jobs, 1)]
        progress = sys.stderr.isatty() if args.progress is None else args.progress
        for output in llm.generate(prompts, params, use_tqdm=progress):
            file.writelines(_as_jsonl(output) if style == "jsonl" else _as_text(output))
    return 0


def _jobs(args: argparse.Namespace) -> tuple[list[Job], bool]:
    """The prompts that were asked for, and whether they came as JSONL."""
    if args.prompts and args.file:
        raise ConfigError("--file", args.file, "prompts as arguments or a file, not both")
    if args.prompts:
        return [Job(prompt=text) for text in args.prompts], False
    if args.file is None and sys.stdin.isatty():
        raise ConfigError("PROMPT", None, "one or more prompts, or --file")
    name = args.file or "-"
    if name == "-":
        jobs, was_jsonl = parse_lines(sys.stdin, "stdin")
    else:
        with open(name, encoding="utf-8") as file:
            jobs, was_jsonl = parse_lines(file, name)
    if not jobs:
        raise ConfigError("--file", name, "at least one prompt")
    return jobs, was_jsonl


def parse_lines(lines: Iterable[str], name: str) -> tuple[list[Job], bool]:
    """A job per line that is not blank, and whether they are JSONL: the first line decides.

    Raises ``ConfigError`` naming the line.
    """
    jobs: list[Job] = []
    was_jsonl = False
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        if not jobs:
            was_jsonl = text.lstrip().startswith("{")
        jobs.append(_parse_job(text, f"{name} line {number}") if was_jsonl else Job(prompt=text))
    return jobs, was_jsonl


def _parse_job(text: str, where: str) -> Job:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(where, text[:80], f"a JSON object ({error})") from error
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ConfigError(where, text[:80], "a JSON object with either prompt or messages")
    return Job(value.pop("prompt", None), value.pop("messages", None), value)


def _prompt(llm: LLM, job: Job, number: int) -> str | list[int]:
    try:
        if job.messages is not None:
            return llm.render_chat(job.messages)
        if isinstance(job.prompt, str | list):
            return job.prompt
        raise InvalidParamsError("prompt", job.prompt, "text or a list of token ids")
    except InvalidParamsError as error:
        raise InvalidParamsError(f"{error.field} of prompt {number}", error.value, error.allowed) from error


@contextlib.contextmanager
def _open_output(name: str | None) -> Iterator[TextIO]:
    if name is None:
        yield sys.stdout
        sys.stdout.flush()
    else:
        with open(name, "w", encoding="utf-8") as file:
            yield file


def _as_text(output: RequestOutput) -> Iterator[str]:
    for choice in output.outputs:
        yield choice.text + "\n"


def _as_jsonl(output: RequestOutput) -> Iterator[str]:
    choices = [
        {"index": c.index, "text": c.text, "finish_reason": c.finish_reason, "stop_reason": c.stop_reason}
        for c in output.outputs
    ]
    usage = {
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": sum(len(choice.token_ids) for choice in output.outputs),
        "cached_tokens": output.num_cached_tokens,
    }
    yield json.dumps({"prompt": output.prompt, "choices": choices, "usage": usage}, ensure_ascii=False) + "\n"
