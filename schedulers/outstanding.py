"""How much work there is, from live state: nothing is counted up and down, so nothing can leak."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .base import Capacity, Ordering, Verdict
from .scheduling_pass import SchedulingPass

_LOOKED_AT = 32
"""Waiting requests that are looked at; those behind them are taken to be like them."""


@dataclass(frozen=True, slots=True)
class Outstanding:
    """What is to be computed."""

    num_decodes: int
    """Requests that decode, or have their last chunk in flight: each is a token a revolution."""
    prompt_tokens: int
    """Of prompts in progress, and of those waiting that could be admitted now; behind their prefix hits."""
    num_prompts: int
    mean_worth: float
    """Of a prompt token, its history counted; see ``worth``."""
    idle_decodes: int
    """Decodes whose queue is idle."""
    tokens_in_flight: int
    crowded: bool
    """Whether some wait who find no memory or no seat."""

    @property
    def num_tokens(self) -> int:
        """Of the next revolution: waiting to be pushed, or in flight."""
        return self.prompt_tokens + self.idle_decodes + self.tokens_in_flight


def worth(start: int, count: int, history_price: float) -> float:
    """Tokens without history that take as long as ``count`` tokens from position ``start``. ``history_price``: what a
    token before costs, as a share of a token."""
    return count * (1.0 + history_price * (start + count / 2))


def tokens_worth(room: float, start: int, history_price: float) -> int:
    """The inverse: how many tokens from ``start`` take as long as ``room`` tokens without history."""
    if room <= 0 or not history_price:
        return max(0, math.floor(room))
    slope = 1.0 + history_price * start
    return math.floor((math.sqrt(slope * slope + 2.0 * history_price * room) - slope) / history_price)


def outstanding(step: SchedulingPass, waiting: Ordering, capacity: Capacity, history_price: float = 0.0) -> Outstanding:
    """Look at who decodes and prefills, and at the first of the waiting."""
    table, prompts = step.table, _Prompts(history_price)
    for request in table.prefilling.values():
        prompts.add(request.num_computed_tokens, request.num_tokens)
    crowded = bool(len(waiting)) and _add_admissible(prompts, step, waiting, capacity)
    return Outstanding(
        num_decodes=table.num_decoding,
        prompt_tokens=prompts.tokens,
        num_prompts=prompts.count,
        mean_worth=prompts.worth / prompts.tokens if prompts.tokens else 1.0,
        idle_decodes=table.num_idle_decodes,
        tokens_in_flight=table.num_tokens_in_flight,
        crowded=crowded,
    )


@dataclass(slots=True)
class _Prompts:
    history_price: float
    count: int = 0
    tokens: int = 0
    worth: float = 0.0

    def add(self, start: int, end: int) -> None:
        self.count += 1
        self.tokens += end - start
        self.worth += worth(start, end - start, self.history_price)


def _add_admissible(prompts: _Prompts, step: SchedulingPass, waiting: Ordering, capacity: Capacity) -> bool:
    """Add those waiting who could be admitted now; whether others find no memory or no seat. Who is passed over for
    another reason, as one that waits for a hit, does neither."""
    if step.is_full:
        return True
    room, seats = capacity.room(step), min(step.seats_left, len(waiting))
    found, left, num_looked_at, crowded = _Prompts(prompts.history_price), room, 0, False
    for request in capacity.candidates(step, waiting):
        if num_looked_at == _LOOKED_AT or found.count == seats:
            break
        verdict = Verdict.ADMIT if found.count else capacity.judge(step, request)
        num_looked_at += 1
        if verdict is Verdict.SKIP:
            continue
        needed = capacity.need(step, request)
        if verdict is Verdict.STOP or needed > left:
            crowded = True
            break
        left -= needed
        found.add(step.prefix(request).num_tokens, request.num_tokens)
    times = 1.0
    if found.count and num_looked_at == _LOOKED_AT and not crowded:
        all_of_them = len(waiting) / num_looked_at
        times = min(all_of_them, seats / found.count, room / max(room - left, 1))
        crowded = times < all_of_them
    elif found.count == seats:
        crowded = num_looked_at < len(waiting)
    prompts.count += round(found.count * times)
    prompts.tokens += round(found.tokens * times)
    prompts.worth += found.worth * times
    return crowded
