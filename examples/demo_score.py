"""The bundled model's score: seeded two-digit additions, asked in chat form, and the rule that judges a reply.

The same questions judge the checkpoint where it is made (``train_demo_model.py --evaluate``), in the tests, and through
the whole engine: since the checkpoint is fixed, a score that differs between two settings accuses the engine.
Pure functions over the standard library; importing this module loads nothing else.
"""

from __future__ import annotations

import random
import re
import zlib
from typing import TypeAlias

Messages: TypeAlias = list[dict[str, str]]

PHRASINGS = (
    "What is {a} + {b}?",
    "{a}+{b}=?",
    "Compute {a} + {b}.",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "How much is {a} + {b}?",
    "Calculate {a}+{b}.",
)

# One unordered pair in twenty is never shown in training, in either order: what is answered there was not memorised.
HELD_OUT_ONE_IN = 20


def is_held_out(a: int, b: int) -> bool:
    """Whether the pair is kept out of training; symmetric, and the same in every process and Python version."""
    low, high = sorted((a, b))
    return zlib.crc32(f"{low}+{high}".encode()) % HELD_OUT_ONE_IN == 0


def addition_questions(count: int, seed: int) -> list[tuple[Messages, str]]:
    """Return ``count`` chats of one user message each, with the number that answers it.

    Both numbers are drawn uniformly from 10..99 (so about one pair in twenty is held out) and the phrasing from
    ``PHRASINGS``, all from ``random.Random(seed)``.
    """
    rng = random.Random(seed)
    return [_question(rng.randint(10, 99), rng.randint(10, 99), rng.choice(PHRASINGS)) for _ in range(count)]


def held_out_questions() -> list[tuple[Messages, str]]:
    """Return every held-out pair of two-digit numbers in both orders, phrasings in turn; always the same list."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if is_held_out(a, b)]
    return [_question(a, b, PHRASINGS[i % len(PHRASINGS)]) for i, (a, b) in enumerate(pairs)]


def is_correct(reply: str, expected: str) -> bool:
    """Whether the last whole number in ``reply`` is ``expected``: "132", "47 + 85 = 132" and "It is 132." all count."""
    numbers = re.findall(r"\d+", reply)
    return bool(numbers) and numbers[-1] == expected


def _question(a: int, b: int, phrasing: str) -> tuple[Messages, str]:
    return [{"role": "user", "content": phrasing.format(a=a, b=b)}], str(a + b)
