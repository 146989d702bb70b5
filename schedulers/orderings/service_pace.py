"""How fast answers came of late: the least time that one more can take. Learnt from lives, on the engine's clock.

The hooks of a part are not told the time, so what they tell waits for the next ``tick``, which follows at once: the
engine schedules after each retirement.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ...core.sampling_params import SamplingParams
from ...core.step import StepPlan
from ...core.views import RequestView

NUM_REMEMBERED = 32
_MARGIN = 0.9


class Pace(NamedTuple):
    """Never worse than the best of those remembered, in each of its three parts."""

    first_token: float = 0.0
    """Seconds from becoming resident to the first token."""
    per_token: float = 0.0
    """Seconds for each token after it."""
    num_tokens: float = 0.0
    """Tokens of an answer that may end before its limit."""

    def seconds_for(self, request: RequestView) -> float:
        """The least time a request without output takes from its start to its last token."""
        num_tokens: float = request.max_total_tokens - request.num_prompt_tokens
        if _may_end_early(request.params):
            num_tokens = min(num_tokens, max(self.num_tokens, request.params.min_tokens, 1))
        return self.first_token + (num_tokens - 1) * self.per_token


def _may_end_early(params: SamplingParams) -> bool:
    return not params.ignore_eos or bool(params.stop) or bool(params.stop_token_ids)


@dataclass(slots=True)
class _Run:
    """One request from its start on."""

    request: RequestView
    started_at: float
    counts: bool
    """Not those that resume: what they took before is not known here."""
    first_token_at: float | None = None


class ServicePace:
    """Hears of starts, retirements and ends; ``best`` is what may be relied on now.

    Only the last ``NUM_REMEMBERED`` that finished count, so it follows the load. While nobody runs nothing is known:
    the next one may find the engine to itself, and only by trying is a pace that is out of date forgotten.
    """

    def __init__(self) -> None:
        self._runs: dict[int, _Run] = {}
        self._just_ended: dict[int, _Run] = {}
        self._began: list[_Run] = []
        self._finished: list[_Run] = []
        self._remembered: deque[Pace] = deque(maxlen=NUM_REMEMBERED)
        self._learnt = Pace()

    @property
    def best(self) -> Pace:
        return self._learnt if self._runs else Pace()

    def started(self, request: RequestView, now: float) -> None:
        counts = request.num_output_tokens == 0
        self._runs[request.request_id] = _Run(request, now, counts)

    def waits_again(self, request_id: int) -> None:
        self._runs.pop(request_id, None)

    def ended(self, request_id: int) -> None:
        run = self._runs.pop(request_id, None)
        if run is not None:
            self._just_ended[request_id] = run

    def retired(self, plan: StepPlan, finished_ids: Iterable[int]) -> None:
        for request_id, samples in zip(plan.chunk_ids, plan.chunk_samples, strict=True):
            run = self._runs.get(request_id) or self._just_ended.get(request_id)
            if samples and run is not None and run.counts:
                self._began.append(run)
        ended, self._just_ended = self._just_ended, {}
        self._finished += (ended[request_id] for request_id in finished_ids if request_id in ended)

    def tick(self, now: float) -> None:
        """What was told since the last one happened now. Costs nothing where nothing was."""
        if not self._began and not self._finished:
            return
        for run in self._began:
            run.first_token_at = now
        for run in self._finished:
            self._remember(run, now)
        if self._finished:
            best = Pace(*map(min, zip(*self._remembered, strict=True))) if self._remembered else Pace()
            self._learnt = Pace(*map(_follow, self._learnt, best))
        self._began, self._finished = [], []

    def _remember(self, run: _Run, now: float) -> None:
        num_tokens = run.request.num_output_tokens
        if run.first_token_at is None or not num_tokens:
            return
        first_token = run.first_token_at - run.started_at
        # A single token says nothing of the pace of the others.
        per_token = (now - run.first_token_at) / (num_tokens - 1) if num_tokens > 1 else self._learnt.per_token
        self._remembered.append(Pace(first_token, per_token, num_tokens))


def _follow(told: float, best: float) -> float:
    """A little below the best, and changed seldom: whoever sorts by it has to sort anew."""
    return told if told <= best and best * _MARGIN * _MARGIN <= told else best * _MARGIN
