"""How one request wants its tokens chosen. Checked when made, read-only afterwards."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import InvalidParamsError

MAX_LOGPROBS = 20
_MAX_SEED = 2**64 - 1
_MAX_TOP_K = 2**63 - 1
"""Far above any vocabulary, where it is as good as off; only so that it is a number for whoever computes with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Names and meanings follow vLLM and OpenAI. Raises ``InvalidParamsError`` naming the field at fault. Whatever kind
    of ``int``, ``float`` or ``str`` was given, the plain one is kept: nothing else travels to the stages.

    ``temperature`` below 1e-5 means greedy. ``max_tokens=None`` means the rest of the context. ``stop`` strings end
    the text before the match unless ``include_stop_str_in_output``; before ``min_tokens`` neither they nor stop ids end
    it. ``seed`` makes a request repeatable whatever else is in the batch: the noise is a function of (seed, choice
    index, output position) alone.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] = ()
    bad_words: Sequence[str] = ()
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            given = (value,) if isinstance(value, str) else value
            words = _sequence(name, given, str, "a string or a list of strings")
            if "" in words:
                raise InvalidParamsError(name, value, "strings that are not empty")
            object.__setattr__(self, name, tuple(map(str.__str__, words)))
        for name in ("stop_token_ids", "allowed_token_ids"):
            ids = _sequence(name, getattr(self, name), int, "a list of token ids")
            if any(i < 0 for i in ids):
                raise InvalidParamsError(name, getattr(self, name), "token ids of 0 or more")
            object.__setattr__(self, name, tuple(map(operator.index, ids)))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        if self.top_k == -1:  # vLLM's spelling of "off"
            object.__setattr__(self, "top_k", 0)
        _integer(self, "n", 1, 128)
        _integer(self, "max_tokens", 1, None, optional=True)
        _integer(self, "min_tokens", 0, self.max_tokens)
        _integer(self, "top_k", 0, _MAX_TOP_K)
        _integer(self, "seed", -(2**63), _MAX_SEED, optional=True)
        _integer(self, "logprobs", 0, MAX_LOGPROBS, optional=True)
        _integer(self, "prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        _number(self, "temperature", 0.0, 100.0)
        _number(self, "top_p", 0.0, 1.0, above=True)
        _number(self, "min_p", 0.0, 1.0)
        _number(self, "repetition_penalty", 0.0, 100.0, above=True)
        _number(self, "presence_penalty", -2.0, 2.0)
        _number(self, "frequency_penalty", -2.0, 2.0)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidParamsError(name, getattr(self, name), "true or false")
        if self.stop and not self.detokenize:
            raise InvalidParamsError("stop", self.stop, "none while detokenize is false: stop strings need text")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < 1e-5

    @property
    def needs_logits_processing(self) -> bool:
        """Whether anything changes the logits before a token is chosen; plain greedy requests skip all of it."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.allowed_token_ids
            or self.bad_words
            or self.min_tokens
        )


SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams))


def _sequence(name: str, value: Any, kind: type, allowed: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise InvalidParamsError(name, value, allowed)
    if any(not isinstance(item, kind) or isinstance(item, bool) for item in value):
        raise InvalidParamsError(name, value, allowed)
    return tuple(value)


def _logit_bias(value: Any) -> dict[int, float]:
    allowed = "a map of token id to a number in [-100, 100]"
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidParamsError("logit_bias", value, allowed)
    result: dict[int, float] = {}
    for key, bias in value.items():
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise InvalidParamsError("logit_bias", value, allowed)
        try:
            token_id = int(key)  # JSON has no other keys than strings
        except ValueError:
            raise InvalidParamsError("logit_bias", value, allowed) from None
        good = isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100
        if not good or token_id < 0:
            raise InvalidParamsError("logit_bias", value, allowed)
        result[token_id] = float(bias)
    return result


def _integer(params: SamplingParams, name: str, low: int, high: int | None, *, optional: bool = False) -> None:
    value = getattr(params, name)
    if value is None and optional:
        return
    allowed = f"a whole number of {low} or more" if high is None else f"a whole number from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise InvalidParamsError(name, value, allowed + (" or null" if optional else ""))
    object.__setattr__(params, name, operator.index(value))


def _number(params: SamplingParams, name: str, low: float, high: float, *, above: bool = False) -> None:
    value = getattr(params, name)
    allowed = f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidParamsError(name, value, allowed)
    if not low <= value <= high or (above and value == low):  # NaN is in no range
        raise InvalidParamsError(name, value, allowed)
    object.__setattr__(params, name, float(value))
