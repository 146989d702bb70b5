"""Numbers of requests by tenant and by priority, for so many of them and no more.

Both come from callers, so their number has no end. The first that are seen have series of their own, whoever comes
later shares ``other``, and that never changes while the engine lives: a counter that moved from one label to another
would fall. A label is a short printable text, whatever was sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .histogram import Histogram

OTHER = "other"
ANONYMOUS = "anonymous"
_MAX_LABEL = 64


def label_of(value: str | int | None) -> str:
    """What a tenant or a priority is called: cut to 64 characters, ``?`` for what cannot be printed, and ``anonymous``
    for requests without a name. Two that are then alike share their series."""
    if value is None or value == "":
        return ANONYMOUS
    text = value[:_MAX_LABEL] if isinstance(value, str) else _number(value)
    return "".join(character if character.isprintable() else "?" for character in text)


def _number(value: int) -> str:
    # Python refuses to write out integers of thousands of digits.
    return str(value) if value.bit_length() < 128 else ("-" if value < 0 else "") + "huge"


class _Group:
    __slots__ = ("finished", "generation_tokens", "prompt_tokens", "queue_time", "ttft")

    def __init__(self, ttft_buckets: Sequence[float], queue_buckets: Sequence[float]) -> None:
        self.finished = self.prompt_tokens = self.generation_tokens = 0
        self.ttft, self.queue_time = Histogram(ttft_buckets), Histogram(queue_buckets)


class RequestGroups:
    """Requests by one attribute, ``kind``. The owner's lock covers it.

    ``limit``: values with series of their own, beside ``anonymous`` and ``other``; with 0 nothing is counted.
    """

    def __init__(self, kind: str, limit: int, ttft_buckets: Sequence[float], queue_buckets: Sequence[float]) -> None:
        self.kind = kind
        self._limit = limit
        self._buckets = ttft_buckets, queue_buckets
        self._groups: dict[str, _Group] = {}
        self._num_named = 0

    def first_token(
        self, value: str | int | None, ttft_seconds: float, queue_seconds: float, prompt_tokens: int
    ) -> None:
        """One of them got its first token."""
        if self._limit:
            group = self._group(value)
            group.ttft.add(ttft_seconds)
            group.queue_time.add(queue_seconds)
            group.prompt_tokens += prompt_tokens

    def finished(self, value: str | int | None, generation_tokens: int) -> None:
        """One of them ended with so many tokens."""
        if self._limit:
            group = self._group(value)
            group.finished += 1
            group.generation_tokens += generation_tokens

    def collect_into(self, families: dict[str, Any], labels: list[str]) -> None:
        """Add the series of every group to the families."""
        for label, group in self._groups.items():
            own, kind = [*labels, label], self.kind
            families[f"{kind}_requests_finished"].add_metric(own, group.finished)
            families[f"{kind}_prompt_tokens"].add_metric(own, group.prompt_tokens)
            families[f"{kind}_generation_tokens"].add_metric(own, group.generation_tokens)
            families[f"{kind}_time_to_first_token_seconds"].add_metric(own, *group.ttft.read())
            families[f"{kind}_request_queue_time_seconds"].add_metric(own, *group.queue_time.read())

    def _group(self, value: str | int | None) -> _Group:
        label = label_of(value)
        group = self._groups.get(label)
        if group is not None:
            return group
        if label not in (ANONYMOUS, OTHER):
            if self._num_named < self._limit:
                self._num_named += 1
            else:
                label = OTHER
        return self._groups.setdefault(label, _Group(*self._buckets))
