"""What a real run lost between its stages and beside them, learnt from its step records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..core.trace import StepStats
from .least_squares import line
from .links import Link
from .pipeline import Delays
from .simulator import HostCost

_SOON = 20e-3
"""Seconds; who began later after an event than this was not waiting for it."""


@dataclass(frozen=True, slots=True)
class DelayFit:
    """Seconds; see ``Delays`` and ``HostCost`` for what each is."""

    host: HostCost
    delays: Delays
    hop: float
    """From one stage's end to the next one's beginning, where that one was free."""
    hop_per_token: float

    @property
    def link(self) -> Link:
        """Between stages, for messages of one byte per token."""
        return Link(self.hop, 1.0 / self.hop_per_token if self.hop_per_token else float("inf"))


def fit_delays(steps: Sequence[StepStats]) -> DelayFit:
    """From the records of one run, in the order of their retirement; each tells its stages' times."""
    pairs = list(pairwise(steps))
    hop, hop_per_token = _line(_hops(pairs))
    entry, entry_per_token = _line(_entries(pairs))
    exit_, exit_per_row = _line(_exits(pairs))
    push, push_per_row = _line((_rows(step), step.pushed_at - step.began_at) for step in steps)
    retire, retire_per_row = _line((_rows(step), step.retired_at - step.update_at) for step in steps)
    return DelayFit(
        HostCost(push + _middle(_wakes(steps)), retire, push_per_row, retire_per_row),
        Delays(entry, entry_per_token, _middle(_turnarounds(pairs, hop, hop_per_token)), exit_, exit_per_row),
        hop,
        hop_per_token,
    )


def _rows(step: StepStats) -> float:
    return float(step.num_decodes + step.num_chunks)


def _line(samples: Iterable[tuple[float, float]]) -> tuple[float, float]:
    found = np.array([(x, max(y, 0.0)) for x, y in samples], dtype=np.float64).reshape(-1, 2)
    return line(found[:, 0], found[:, 1])


def _middle(samples: Iterable[float]) -> float:
    found = list(samples)
    return float(np.median(found)) if found else 0.0


Pairs = Sequence[tuple[StepStats, StepStats]]


def _hops(pairs: Pairs) -> Iterable[tuple[float, float]]:
    """Where the next stage had been free before."""
    for before, step in pairs:
        for stage in range(1, len(step.busy)):
            sent = step.busy[stage - 1][1]
            if before.busy[stage][1] < sent:
                yield step.num_tokens, step.busy[stage][0] - sent


def _entries(pairs: Pairs) -> Iterable[tuple[float, float]]:
    """Where the first stage had been free before the push, and no token was still to come."""
    for before, step in pairs:
        if before.busy[0][1] < step.booked_at and not step.ahead:
            yield step.num_tokens, step.busy[0][0] - step.pushed_at


def _exits(pairs: Pairs) -> Iterable[tuple[float, float]]:
    """Where the output thread was waiting for it."""
    for before, step in pairs:
        if before.retired_at < step.busy[-1][1]:
            yield _rows(step), step.collected_at - step.busy[-1][1]


def _wakes(steps: Sequence[StepStats]) -> Iterable[float]:
    """From a retirement to the plan that it made possible: the first to begin after it, with none made just before."""
    retired = np.array([step.retired_at for step in steps])
    pushes = sorted((step.began_at, step.pushed_at) for step in steps)
    last_push = -np.inf
    for began, pushed in pushes:
        at = int(np.searchsorted(retired, began, side="right")) - 1
        if at >= 0 and last_push < retired[at] and began - retired[at] < _SOON:
            yield float(began - retired[at])
        last_push = pushed


def _turnarounds(pairs: Pairs, hop: float, hop_per_token: float) -> Iterable[float]:
    """Of stages that had their next step at hand before they had ended one."""
    came: dict[int, float] = {}
    for before, step in pairs:
        came[before.queue] = before.busy[-1][1]
        on_the_way = hop + hop_per_token * step.num_tokens
        at_hand = step.pushed_at if not step.ahead else max(step.pushed_at, came.get(step.queue, np.inf))
        for (_, free), (begin, end) in zip(before.busy, step.busy, strict=True):
            if at_hand + on_the_way < free:
                yield max(begin - free, 0.0)
            at_hand = end
