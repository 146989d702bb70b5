"""Who asks for what and when: as the settings describe it, or line by line from a file."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.errors import ConfigError
from .config import LOAD_SETTINGS, SimulationConfig

_PREFIX_MARK = 1 << 30
"""Added to the first token of a shared prefix, so that it is nobody's own."""
_LINE_KEYS = (
    "arrival_s",
    "input_len",
    "prompt_token_ids",
    "output_len",
    "tenant",
    "priority",
    "deadline_ms",
    "prefix",
    "prefix_len",
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come. What an ordering does not know it passes over: every policy gets the same workload."""

    at: float
    """Seconds from the beginning."""
    prompt_token_ids: Sequence[int]
    output_len: int
    tenant: str | None = None
    priority: int = 0
    """Lower goes first."""
    deadline: float | None = None
    """Seconds after ``at`` when its last token should be there."""

    @property
    def num_tokens(self) -> int:
        """Prompt and answer."""
        return len(self.prompt_token_ids) + self.output_len


def describe(config: SimulationConfig, seed: int, max_len: int) -> list[Arrival]:
    """The workload that the settings describe, in the order of arrival. The same for the same seed.

    ``max_len`` is the longest prompt and answer together; drawn lengths are cut to it. Raises ``ConfigError``.
    """
    if config.workload is not None:
        return _of_its_own(config, config.workload, seed, max_len)
    if config.lengths == "fixed" and config.input_len >= max_len:
        raise ConfigError("input_len", config.input_len, f"at most {max_len - 1}: the context is {max_len} tokens")
    if config.lengths == "fixed" and config.input_len + config.output_len > max_len:
        raise ConfigError(
            "output_len", config.output_len, f"at most {max_len - config.input_len}: the context is {max_len} tokens"
        )
    if not 0 <= config.shared_prefix < config.input_len:
        raise ConfigError("shared_prefix", config.shared_prefix, f"0 or more, below input_len, {config.input_len}")
    rng = random.Random(seed)
    times = poisson(config.requests, config.rate, rng)
    deadline = None if config.deadline_ms is None else config.deadline_ms / 1000
    arrivals = []
    for index, at in enumerate(times):
        input_len, output_len = config.input_len, config.output_len
        if config.lengths == "lognormal":
            input_len = max(lognormal(input_len, config.length_sigma, rng), config.shared_prefix + 1)
            input_len = min(input_len, max_len - 1)
            output_len = min(lognormal(output_len, config.length_sigma, rng), max_len - input_len)
        prefix = min(config.shared_prefix, input_len - 1)
        group = rng.randrange(config.prefix_groups) if prefix else None
        arrivals.append(
            Arrival(
                at,
                prompt(index, input_len, prefix, group),
                output_len,
                tenant=f"tenant-{index % config.tenants}" if config.tenants > 1 else None,
                priority=index % config.priority_levels,
                deadline=deadline,
            )
        )
    return arrivals


def _of_its_own(config: SimulationConfig, workload: str, seed: int, max_len: int) -> list[Arrival]:
    """From a name or a file, which say all of it but how fast they come."""
    from .workloads import WORKLOADS

    if workload not in WORKLOADS and not os.path.exists(workload):
        raise ConfigError("workload", workload, f"{', '.join(WORKLOADS)}, or a file that is there")
    for name, default in LOAD_SETTINGS.items():
        if getattr(config, name) != default:
            raise ConfigError(name, getattr(config, name), f"nothing beside workload={workload!r}, which says it")
    arrivals = WORKLOADS[workload].make(seed, max_len) if workload in WORKLOADS else read_workload(workload, max_len)
    if config.time_scale == 1.0:
        return arrivals
    return [replace(arrival, at=arrival.at * config.time_scale) for arrival in arrivals]


def fixed(num_requests: int, input_len: int, output_len: int) -> list[Arrival]:
    """All alike and at once."""
    return [Arrival(0.0, prompt(index, input_len), output_len) for index in range(num_requests)]


def prompt(request: int, length: int, prefix: int = 0, group: int | None = None) -> list[int]:
    """A prompt unlike every other one but for its first ``prefix`` tokens, which it shares with its group.

    A block is known by all tokens up to its end, so one token that is somebody's own sets all behind it apart.
    """
    own = [1 + request, *([0] * (length - prefix - 1))]
    return own if group is None or not prefix else [_PREFIX_MARK + group, *([0] * (prefix - 1)), *own]


def poisson(num_requests: int, rate: float, rng: random.Random) -> list[float]:
    """Times of arrival; all zero for an infinite rate."""
    if rate == math.inf:
        return [0.0] * num_requests
    times, at = [], 0.0
    for _ in range(num_requests):
        at += rng.expovariate(rate)
        times.append(at)
    return times


def lognormal(mean: float, sigma: float, rng: random.Random) -> int:
    """A length whose mean is ``mean`` and whose logarithm spreads by ``sigma``; 1 at least."""
    return max(1, round(rng.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)))


def read_workload(path: str, max_len: int) -> list[Arrival]:
    """A JSONL file, an object per line: ``arrival_s`` (0 when absent), ``input_len`` or ``prompt_token_ids``, and
    ``output_len``; where wanted ``tenant``, ``priority``, ``deadline_ms``, and ``prefix`` with ``prefix_len``, a name
    for the first tokens that all prompts with it share.

    Empty lines are passed over. Raises ``ConfigError``, naming the line where one is at fault.
    """
    arrivals = []
    groups: dict[str, int] = {}
    try:
        # Bytes, so that what is no UTF-8 is found in its line.
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    arrivals.append(_read_line(path, number, line, groups, max_len))
    except OSError as error:
        raise ConfigError("workload", path, f"a file that can be read ({error.strerror})") from error
    if not arrivals:
        raise ConfigError("workload", path, "a file with at least one request")
    return sorted(arrivals, key=lambda arrival: arrival.at)


def _read_line(path: str, number: int, line: bytes, groups: dict[str, int], max_len: int) -> Arrival:
    try:
        return _arrival(json.loads(line.decode()), number, groups, max_len)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError("workload", path, f"objects with {', '.join(_LINE_KEYS)}; line {number}: {reason}") from error


def _arrival(values: Any, number: int, groups: dict[str, int], max_len: int) -> Arrival:
    """Raises ``ValueError`` saying what is wrong. ``groups``: prefixes by name, as they come."""
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__}, not an object")
    unknown = values.keys() - set(_LINE_KEYS)
    if unknown:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")
    at = values.get("arrival_s", 0.0)
    if not _is_number(at) or at < 0:
        raise ValueError(f"arrival_s is {at!r}, not seconds of 0 or more")
    output_len = _length(values, "output_len")
    token_ids = values.get("prompt_token_ids")
    if (token_ids is None) == (values.get("input_len") is None):
        raise ValueError("either input_len or prompt_token_ids is needed")
    if token_ids is None:
        input_len, (prefix, group) = _length(values, "input_len"), _prefix(values, groups)
        if prefix >= input_len:
            raise ValueError(f"prefix_len is {prefix}, not below input_len, {input_len}")
        _check_room(input_len, output_len, max_len)  # before there is a list of so many tokens
        token_ids = prompt(number, input_len, prefix, group)
    elif not isinstance(token_ids, list) or not token_ids or not all(_is_token(token) for token in token_ids):
        raise ValueError("prompt_token_ids is not a list of token ids")
    elif "prefix" in values or "prefix_len" in values:
        raise ValueError("a prefix goes with input_len; prompt_token_ids say what they share")
    else:
        _check_room(len(token_ids), output_len, max_len)
    return Arrival(
        float(at),
        token_ids,
        output_len,
        tenant=_name(values, "tenant"),
        priority=_priority(values),
        deadline=_deadline(values),
    )


def _check_room(input_len: int, output_len: int, max_len: int) -> None:
    if input_len + output_len > max_len:
        raise ValueError(f"its {input_len + output_len} tokens exceed the context of {max_len}")


def _prefix(values: dict[str, Any], groups: dict[str, int]) -> tuple[int, int | None]:
    """(tokens, group); none shared where no prefix is named."""
    name = _name(values, "prefix")
    if (name is None) != (values.get("prefix_len") is None):
        raise ValueError("prefix and prefix_len go together")
    if name is None:
        return 0, None
    return _length(values, "prefix_len"), groups.setdefault(name, len(groups))


def _length(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, not a whole number of 1 or more")
    return value


def _name(values: dict[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(f"{name} is {value!r}, not a name")
    return value


def _priority(values: dict[str, Any]) -> int:
    value = values.get("priority", 0)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"priority is {value!r}, not a whole number")
    return value


def _deadline(values: dict[str, Any]) -> float | None:
    value = values.get("deadline_ms")
    if value is None:
        return None
    if not _is_number(value) or value <= 0:
        raise ValueError(f"deadline_ms is {value!r}, not milliseconds above 0")
    return float(value) / 1000


def _is_number(value: Any) -> bool:
    """One that a float holds; whole numbers of hundreds of digits are none."""
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
