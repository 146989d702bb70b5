"""Settings that say something of each stage: what they mean, and what is refused. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from .errors import ConfigError

SPLIT_NAMES = ("auto", "decode", "prefill", "mixed", "even")
"""Layer splits that are computed (``models/stages.py``)."""
MAX_CPU = 1 << 16
"""CPU numbers end below: a slip of the hand makes no range of billions."""

_NUMBER = re.compile(r"[0-9]{1,9}")


def parse_layer_partition(text: str | None, num_stages: int) -> list[int] | str | None:
    """``6,6`` as numbers, one of ``SPLIT_NAMES`` as it is. Raises ``ConfigError``.

    That the numbers sum to the model's layers is for ``check_split`` to say, once the model is known.
    """
    if text is None or text in SPLIT_NAMES:
        return text
    numbers = [_number(part) for part in text.split(",")]
    if len(numbers) != num_stages or any(number is None or number < 1 for number in numbers):
        allowed = f"{_many(num_stages, 'number')} of 1 or more with commas between, or {', '.join(SPLIT_NAMES)}"
        raise ConfigError("pipeline_layer_partition", text, allowed)
    return [number for number in numbers if number is not None]


def check_split(num_layers: int, num_stages: int, split: Sequence[int] | str | None) -> list[int] | str | None:
    """The split with its numbers read; raises ``ConfigError`` unless a model of so many layers can be split so."""
    if num_stages > num_layers:
        raise ConfigError("pipeline_parallel_size", num_stages, f"at most the model's {num_layers} layers")
    shown = split if isinstance(split, str) else ",".join(map(str, split or ()))
    parsed = parse_layer_partition(split, num_stages) if isinstance(split, str) else split
    if parsed is None or isinstance(parsed, str):
        return parsed
    if len(parsed) != num_stages or sum(parsed) != num_layers or min(parsed) < 1:
        allowed = f"{_many(num_stages, 'number')} of 1 or more that sum to the model's {num_layers} layers"
        raise ConfigError("pipeline_layer_partition", shown, allowed)
    return list(parsed)


def parse_stage_cpus(text: str, num_stages: int) -> list[frozenset[int]] | None:
    """``0-3,8;4-7`` as a set of CPUs for each stage; ``None`` for ``auto`` and ``none``. Raises ``ConfigError``."""
    if text in ("auto", "none"):
        return None
    groups = [parse_cpus(group) for group in text.split(";")]
    if len(groups) != num_stages or any(group is None for group in groups):
        groups_wanted = _many(num_stages, "group")
        allowed = f"auto, none, or {groups_wanted} of CPUs like 0-3,8 with semicolons between"
        raise ConfigError("stage_cpus", text, allowed)
    return [group for group in groups if group is not None]


def parse_stage_devices(text: str | None, num_stages: int) -> list[int] | None:
    """``0,1`` as the number of each stage's CUDA device. Raises ``ConfigError``."""
    if text is None:
        return None
    numbers = [_number(part) for part in text.split(",")]
    if len(numbers) != num_stages or any(number is None for number in numbers):
        allowed = f"{_many(num_stages, 'device number')}, from 0, with commas between"
        raise ConfigError("stage_devices", text, allowed)
    return [number for number in numbers if number is not None]


def parse_remote_stages(text: str | None, num_stages: int) -> frozenset[int]:
    """``1,2`` as the numbers of stages that are started by hand. Raises ``ConfigError``."""
    if text is None:
        return frozenset()
    numbers = [_number(part) for part in text.split(",")]
    if any(number is None or number >= num_stages for number in numbers):
        raise ConfigError("remote_stages", text, f"numbers of stages, from 0 to {num_stages - 1}, with commas between")
    return frozenset(number for number in numbers if number is not None)


def check_pipeline_address(address: str | None) -> None:
    """Raise ``ConfigError`` for what is no tcp address that other hosts could reach."""
    if address is None:
        return
    try:
        parts = urlsplit(address)
        fine = parts.scheme == "tcp" and parts.hostname not in (None, "", "*", "0.0.0.0", "::") and parts.port
    except ValueError:
        fine = False
    if not fine:
        raise ConfigError(
            "pipeline_address", address, "tcp://HOST:PORT, with an address of this host that others reach"
        )


def parse_cpus(text: str) -> frozenset[int] | None:
    """``0-3,8`` as a set; ``None`` where it is spelled otherwise."""
    cpus: set[int] = set()
    for part in text.split(","):
        first_text, dash, last_text = part.partition("-")
        first = _number(first_text)
        last = _number(last_text) if dash else first
        if first is None or last is None or not first <= last < MAX_CPU:
            return None
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if _NUMBER.fullmatch(text) else None


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")
