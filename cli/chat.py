"""``llm-engine chat``: a conversation, streamed. Lines may also come through a pipe, one turn each."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from typing import TYPE_CHECKING

from ..core.errors import RequestError
from .sampling_flags import given, make_params
from .settings import ENGINE_SETTINGS, resolve

if TYPE_CHECKING:
    from ..engine.llm import LLM

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends; returns the exit code."""
    settings = resolve(ENGINE_SETTINGS, args)
    make_params({}, given(args))  # a bad flag ends it here, before the model is loaded

    from ..engine.llm import LLM

    interactive = sys.stdin.isatty()
    with LLM(**settings, show_progress=sys.stderr.isatty()) as llm:
        if interactive:
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")  # gives input() line editing and a history
            print(f"Talking to {llm.model_name}. {HELP}.", file=sys.stderr)
        start = [{"role": "system", "content": args.system}] if args.system else []
        messages = list(start)
        while (line := _read_line(interactive)) is not None:
            text = line.strip()
            if text == "/exit":
                break
            if text == "/clear":
                messages = list(start)
            elif text:
                messages.append({"role": "user", "content": text})
                try:
                    messages.append({"role": "assistant", "content": _answer(llm, messages, args)})
                except RequestError as error:
                    if not interactive:
                        raise
                    print(f"error: {error}", file=sys.stderr)
                    messages.pop()
    return 0


def _read_line(interactive: bool) -> str | None:
    """The next turn; ``None`` when the input has ended."""
    if not interactive:
        return sys.stdin.readline() or None
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def _answer(llm: LLM, messages: list[dict[str, str]], args: argparse.Namespace) -> str:
    """Stream the answer to stdout and return it; Ctrl-C keeps what came so far."""
    params = make_params({"max_tokens": None, **llm.default_sampling}, given(args))
    parts: list[str] = []
    stream = llm.stream(llm.render_chat(messages), params)
    try:
        for delta in stream:
            for choice in delta.outputs:
                parts.append(choice.text)
                print(choice.text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        stream.cancel()
    print(flush=True)
    return "".join(parts)
