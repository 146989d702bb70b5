"""Stages and links on a virtual clock. Each works first in, first out, so a plan's whole way is known when pushed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from ..core.cost_model import StageCost, StepShape
from .links import LINKS, Link

_VECTORS_FROM = 24
"""Stages from which numpy pays for a walk."""

Times = npt.NDArray[np.float64]


class Spans(Sequence[tuple[float, float]]):
    """When each stage began and ended; pairs are made when somebody looks, which of a thousand stages few do."""

    __slots__ = ("begins", "ends")

    def __init__(self, begins: Sequence[float], ends: Sequence[float]) -> None:
        self.begins, self.ends = begins, ends

    def __len__(self) -> int:
        return len(self.begins)

    @overload
    def __getitem__(self, stage: int) -> tuple[float, float]: ...
    @overload
    def __getitem__(self, stage: slice) -> Spans: ...
    def __getitem__(self, stage: int | slice) -> tuple[float, float] | Spans:
        if isinstance(stage, slice):
            return Spans(self.begins[stage], self.ends[stage])
        return self.begins[stage], self.ends[stage]

    def __iter__(self) -> Iterator[tuple[float, float]]:
        return zip(self.begins, self.ends, strict=True)


@dataclass(frozen=True, slots=True)
class Passage:
    """When one plan is where. Seconds."""

    begins: Sequence[float]
    """Per stage: its forward begins."""
    ends: Sequence[float]
    """Per stage: it ends."""
    result_at: float
    """Its tokens are back at the host, and at the first stage."""


@dataclass(frozen=True, slots=True)
class Delays:
    """Seconds between the parts of a real pipeline, as a trace shows them; none of them in a roofline."""

    entry: float = 0.0
    """From a push until the first stage can begin."""
    entry_per_token: float = 0.0
    turnaround: float = 0.0
    """Between two steps of a stage that has the next one at hand."""
    exit: float | None = None
    """From the last stage's end until the host has the result; the link's latency when absent, if there is a link."""
    exit_per_row: float = 0.0


class Pipeline:
    """Stages that work for ``costs`` seconds a step, with a link behind each but the last, and one back to the first.

    The host sits beside the first stage: a push costs host time only, a result crosses the link unless there is but one
    stage. A stage never waits for the link to take its activations: an I/O thread sends them.
    """

    def __init__(
        self,
        costs: Sequence[StageCost],
        link: Link = LINKS["none"],
        *,
        activation_bytes: float = 0.0,
        delays: Delays | None = None,
    ) -> None:
        """``activation_bytes`` cross each link for each token of a step."""
        self.num_stages = len(costs)
        self.link = link
        self._delays = delays or Delays()
        self._back = link.latency if self.num_stages > 1 else 0.0
        # Most stages are alike: a step costs one call per kind of stage.
        self._kinds = list(dict.fromkeys(costs))
        self._kind_of = np.array([self._kinds.index(cost) for cost in costs])
        self._activation_bytes = activation_bytes
        self._fed_back_at: dict[int, float] = {}
        # Stages and links take turns in one chain, so that the walk is the same for both.
        self._free = np.zeros(2 * self.num_stages - 1)
        self._busy = np.zeros(self.num_stages)

    @property
    def busy_seconds(self) -> list[float]:
        """Per stage: for how long it computed so far."""
        found: list[float] = self._busy.tolist()
        return found

    def push(self, step: int, shape: StepShape, at: float, feeds_from: int | None = None) -> Passage:
        """The way of a plan that leaves the host at ``at``. Steps are pushed in order.

        The first stage waits for the tokens of step ``feeds_from``, which comes back to it as to the host.
        """
        delays = self._delays
        at += delays.entry + delays.entry_per_token * shape.num_tokens
        if feeds_from is not None:
            at = max(at, self._fed_back_at[feeds_from])
        sending = self.link.transfer_seconds(shape.num_tokens * self._activation_bytes)
        seconds = [cost.seconds(shape) for cost in self._kinds]
        walk = self._walk if self.num_stages < _VECTORS_FROM else self._walk_vectors
        begins, ends = walk(seconds, sending, at)
        self._fed_back_at[step] = ends[-1] + self._back
        leaving = self._back if delays.exit is None else delays.exit
        return Passage(begins, ends, ends[-1] + leaving + delays.exit_per_row * shape.num_rows)

    def forget(self, step: int) -> None:
        """No plan will feed from it any more."""
        del self._fed_back_at[step]

    def _walk(self, seconds: list[float], sending: float, at: float) -> tuple[Sequence[float], Sequence[float]]:
        free, busy, latency, turnaround = self._free, self._busy, self.link.latency, self._delays.turnaround
        begins, ends = [], []
        for stage, kind in enumerate(self._kind_of.tolist()):
            begin = max(at, float(free[2 * stage]))
            end = begin + seconds[kind]
            free[2 * stage] = end + turnaround
            busy[stage] += end - begin
            begins.append(begin)
            ends.append(end)
            if stage + 1 < self.num_stages:
                sent = max(end, float(free[2 * stage + 1])) + sending
                free[2 * stage + 1] = sent
                at = sent + latency
        return begins, ends

    def _walk_vectors(self, seconds: list[float], sending: float, at: float) -> tuple[Sequence[float], Sequence[float]]:
        """The same at once. With ``reach[k]``, the time from the chain's begin to element k without waiting, an element
        begins at ``reach[k] + max over j <= k of (free[j] - reach[j])``: the latest obstacle before it decides."""
        service = np.full(2 * self.num_stages - 1, sending)
        service[::2] = np.array(seconds)[self._kind_of]
        step = service.copy()
        step[1::2] += self.link.latency
        reach = np.concatenate(([0.0], np.cumsum(step[:-1])))
        obstacles = self._free - reach
        obstacles[0] = max(float(obstacles[0]), at)
        begins = reach + np.maximum.accumulate(obstacles)
        ends = self._free = begins + service
        self._busy += service[::2]
        passage = array("d", begins[::2].tobytes()), array("d", ends[::2].tobytes())
        self._free[::2] += self._delays.turnaround
        return passage
