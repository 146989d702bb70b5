"""Seconds from `llm-engine serve` to the first answer of the real openai client: python -m benchmarks.first_answer"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time

from openai import OpenAI

QUESTION = [{"role": "user", "content": "What is 47 + 85?"}]


def first_answer(arguments: list[str]) -> tuple[float, float, str]:
    """Start a server, stream one chat answer, end it: (seconds to the first text, to the last, the text)."""
    began = time.monotonic()
    command = [sys.executable, "-m", "llm_engine", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            address = next(found for line in server.stderr if (found := re.search(r"at (http://\S+)", line)))
            client = OpenAI(base_url=f"{address[1]}/v1", api_key="unused", max_retries=0)
            model = client.models.list().data[0].id
            pieces, first = [], 0.0
            for chunk in client.chat.completions.create(model=model, messages=QUESTION, stream=True, temperature=0):
                pieces.append(chunk.choices[0].delta.content or "")
                first = first or (time.monotonic() - began if pieces[-1] else 0.0)
            return first, time.monotonic() - began, "".join(pieces)
        finally:
            server.terminate()


def main() -> None:
    """Prints each start and the median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("arguments", nargs="*", help="what `llm-engine serve` takes, after --")
    options = parser.parse_args()
    times = []
    for _ in range(options.repeats):
        first, last, text = first_answer(options.arguments)
        times.append(first)
        print(f"first text after {first:.2f} s, the whole answer after {last:.2f} s: {text}")
    print(f"median {statistics.median(times):.2f} s ({min(times):.2f}..{max(times):.2f})")


if __name__ == "__main__":
    main()
