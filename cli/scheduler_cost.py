"""The books of an engine driven without stages, to see what deciding and book-keeping cost the host.

Requests are like those of a service: prompts of about 512 tokens whose lengths spread over a block, the first 64 shared
within a tenant; answers end in turn. Nothing is timed but ``EngineCore.schedule``, ``EngineCore.retire`` and the making
of deltas, which is outside the lock but belongs to it as outputs belong to other schedulers' updates: in an engine the
callers' threads make requests and hash prompts, and the stages compute.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from ..core.config import EngineConfig
from ..core.request import BlockHash, Request, RequestId
from ..core.sampling_params import SamplingParams
from ..core.step import StepPlan, StepResult
from ..engine.assembly import make_core
from ..engine.retirement import Retired
from ..engine.threads.reporting import deltas_of
from ..kvcache.block_hash import hash_blocks

BLOCK_SIZE = 16
PROMPT_TOKENS = 512
SHARED_TOKENS = 64
TENANTS = 8
ANSWER_TOKENS = 256
"""Of a request in a mixed load; with few running less, so that somebody ends in each step."""
MAX_CHUNK = 256
"""Longest chunk of a mixed load: each prompt comes in two or three."""
WARM_UP_STEPS = 20
WATCHED_STEPS = 20
"""In which the parts are timed, apart from the others: it costs a microsecond or two."""
MIXES = ("decode", "mixed")
_LEAST_PER_STEP = 1024
"""Prompt tokens that any scheduler takes in a step: those who come in first decode until the last ones do."""
_MOST_FILL_STEPS = 4096
_FULL = 0.8
"""Share of the seats that are taken at any time of a mixed load."""
_TURN = 4
"""Steps from a request's end to the first token of the one who takes its seat."""
_TOKEN, _END = 7, 2
_SECONDS_PER_STEP = 0.02
_FOREVER = 1e9

PARTS = ("decide", "ordering", "capacity", "check", "book", "retire", "update", "deltas")


class NoSuchLoad(Exception):
    """The scheduler does not let such a load come about."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Nanoseconds of one step: of every call of ``schedule`` until it had nothing more, and of ``retire`` with the
    deltas that are made of it."""

    schedule: int
    update: int


@cache
def prompt(number: int) -> tuple[Sequence[int], Sequence[BlockHash]]:
    """The tokens of request ``number`` and the hashes of their blocks; ids are shared objects, to spare memory."""
    ids = _token_ids()
    tenant, length = number % TENANTS, PROMPT_TOKENS - BLOCK_SIZE // 2 + number % BLOCK_SIZE
    start = number % (len(ids) - PROMPT_TOKENS)
    tokens = [*ids[tenant : tenant + SHARED_TOKENS], 1000 + number, *ids[start : start + length - SHARED_TOKENS - 1]]
    return tokens, tuple(hash_blocks(tokens, BLOCK_SIZE))


@cache
def _token_ids() -> list[int]:
    return [3 + i * 37 % 30_000 for i in range(8192)]


class HostLoad:
    """One scheduler with ``running`` residents, all of whom decode, and with as many waiting as ``set_waiting`` says.

    ``mixed``: in each step somebody ends, somebody waiting takes the seat, and somebody new arrives. Else nobody ends,
    and no seat comes free for those who wait.
    """

    def __init__(self, scheduler: str, running: int, mix: str, *, steps: int) -> None:
        """``steps``: how many will be run, as far as it is known: nobody ends before where nobody is to. Raises
        ``NoSuchLoad`` where the scheduler does not let it come about."""
        assert mix in MIXES
        self.scheduler, self.running, self.mixed = scheduler, running, mix == "mixed"
        self.ends_per_step = max(1, running // ANSWER_TOKENS)
        longest = PROMPT_TOKENS + BLOCK_SIZE
        if self.mixed:
            budget = running + max(2, self.ends_per_step) * PROMPT_TOKENS
            self._answer = max(1, running // self.ends_per_step - _TURN)
        else:
            budget = running * longest  # one micro-batch brings in everybody, where the scheduler lets it
            self._answer = steps + BLOCK_SIZE + budget // _LEAST_PER_STEP
        longest += self._answer
        num_kv_blocks = 1 + (running + 1) * -(-longest // BLOCK_SIZE)
        threshold = MAX_CHUNK if self.mixed else None
        config = EngineConfig.of(
            scheduler=scheduler,
            max_num_seqs=running,
            max_num_batched_tokens=budget,
            long_prefill_token_threshold=threshold,
        )
        self.core = make_core(config, num_kv_blocks=num_kv_blocks, block_size=BLOCK_SIZE, num_stages=1, on_cuda=False)
        self.described: dict[str, Any] = {
            "running": running,
            "mix": mix,
            "max_num_batched_tokens": budget,
            "long_prefill_token_threshold": threshold,
            "num_kv_blocks": num_kv_blocks,
            "block_size": BLOCK_SIZE,
            "prompt_tokens": PROMPT_TOKENS,
            "shared_tokens": SHARED_TOKENS,
            "tenants": TENANTS,
            "answer_tokens": self._answer,
            "ends_per_step": self.ends_per_step,
            "token_ids": _token_ids(),
        }
        """The same load for somebody else's scheduler."""
        self._numbers = itertools.count()
        self._results: deque[StepResult] = deque()
        self._now = 0.0
        self.fill_steps = 0
        self._fill()
        self.described["fill_steps"] = self.fill_steps

    @property
    def num_waiting(self) -> int:
        return self.core.num_waiting

    def set_waiting(self, count: int) -> None:
        """As many more arrive as are missing."""
        while self.core.num_waiting < count:
            self._arrive(self._answer, priority=1)
        gc.collect()  # what the making of requests left behind is not the steps' to pay for

    def run(self, steps: int) -> list[StepTimes]:
        """So many steps. Raises ``NoSuchLoad`` where they do not keep the seats taken."""
        times = [one for one in (self.step() for _ in range(steps)) if one is not None]
        least = self.running * (_FULL if self.mixed else 1)
        if len(times) < steps or self.core.table.num_resident < least:
            raise NoSuchLoad(f"{self.core.table.num_resident} of {self.running} are resident")
        return times

    def step(self) -> StepTimes | None:
        """Every plan that can be made now, then one result; as many arrive as ended. ``None`` if nothing was."""
        core, clock = self.core, time.perf_counter_ns
        self._now += _SECONDS_PER_STEP
        began = clock()
        plan = core.schedule(self._now)
        scheduling = clock() - began
        while plan is not None:
            self._results.append(self._result_of(plan))
            began = clock()
            plan = core.schedule(self._now)
            scheduling += clock() - began
        if not self._results:
            return None
        result = self._results.popleft()
        began = clock()
        retired = core.retire(result, self._now)
        assert retired is not None
        self._make_deltas(retired, result)
        updating = clock() - began
        assert not retired.failed, "a request of the benchmark failed"
        for _ in retired.finished:
            self._arrive(self._answer, priority=1)
        return StepTimes(scheduling, updating)

    def _make_deltas(self, retired: Retired, result: StepResult) -> None:
        deltas_of(retired, result, self._now)

    def _result_of(self, plan: StepPlan) -> StepResult:
        busy = [(self._now, self._now + _SECONDS_PER_STEP)]
        return StepResult(plan.epoch, plan.step, [_TOKEN] * plan.num_sampled, busy=busy)

    def _arrive(self, answer: int, priority: int) -> None:
        number = next(self._numbers)
        tokens, hashes = prompt(number)
        request = Request(
            RequestId(number),
            str(number),
            tokens,
            SamplingParams(temperature=0.0, max_tokens=answer),
            len(tokens) + answer,
            self._now,
            stop_ids=frozenset((_END,)),
            priority=priority,
            deadline=self._now + _FOREVER,
            tenant=f"tenant-{number % TENANTS}",
            block_hashes=list(hashes),
        )
        self.core.add(request, self._now)

    def _fill(self) -> None:
        """Until everybody decodes. In a mixed load as many arrive in each step as are to end later, and it goes on
        until nobody finds a block that was never used: from then on each that is taken is one the prefix cache loses.
        """
        missing, at_once = self.running, self.ends_per_step if self.mixed else self.running
        while self.fill_steps < _MOST_FILL_STEPS:
            for _ in range(min(missing, at_once)):
                self._arrive(self._answer, priority=0)
            missing -= min(missing, at_once)
            if not self.step():
                break
            self.fill_steps += 1
            if not missing and (self.core.kv.evictions if self.mixed else self.core.table.num_decoding == self.running):
                break
        if self.core.table.num_resident < _FULL * self.running:
            raise NoSuchLoad(f"{self.core.table.num_resident} of {self.running} became resident")


class Peer(Protocol):
    """Somebody else's scheduler under the same load."""

    def set_waiting(self, count: int) -> None: ...
    def run(self, steps: int) -> list[StepTimes]: ...


class Stopwatch:
    """Takes the time of the parts of a step while it is entered, by wrapping their methods. What a part spends in
    another one that is measured counts for the inner one."""

    def __init__(self, load: HostLoad) -> None:
        self.spent: Counter[str] = Counter()
        """Nanoseconds by part, since they were last taken."""
        core, scheduler = load.core, load.core.scheduler
        ordering, capacity = getattr(scheduler, "ordering", None), getattr(scheduler, "capacity", None)
        self._wrapped = [
            (core, "_ask_scheduler", "decide"),
            *((ordering, name, "ordering") for name in ("shed", "visit", "add", "remove") if ordering),
            *((capacity, name, "capacity") for name in ("make_way", "make_room", "judge") if capacity),
            (core, "_check", "check"),
            (core, "_book", "book"),
            (core, "retire", "retire"),
            (scheduler, "update", "update"),
            (load, "_make_deltas", "deltas"),
        ]
        self._stack: list[str] = []
        self._last = 0

    def __enter__(self) -> Stopwatch:
        for owner, name, part in self._wrapped:
            setattr(owner, name, self._timed(getattr(owner, name), part))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, _part in self._wrapped:
            delattr(owner, name)

    def take(self) -> Counter[str]:
        """What was spent since the last call."""
        found, self.spent = self.spent, Counter()
        return found

    def _timed(self, inner: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            self._begin(part)
            try:
                found = inner(*arguments)
            finally:
                self._end()
            return self._iterate(found, part) if isinstance(found, Iterator) else found

        return timed

    def _iterate(self, inner: Iterator[Any], part: str) -> Iterator[Any]:
        while True:
            self._begin(part)
            try:
                found = next(inner, None)
            finally:
                self._end()
            if found is None:
                return
            yield found

    def _begin(self, part: str) -> None:
        now = time.perf_counter_ns()
        if self._stack:
            self.spent[self._stack[-1]] += now - self._last
        self._stack.append(part)
        self._last = now

    def _end(self) -> None:
        now = time.perf_counter_ns()
        self.spent[self._stack.pop()] += now - self._last
        self._last = now


def measure(
    load: HostLoad,
    waiting: int,
    steps: int,
    rounds: int = 1,
    peer: Peer | None = None,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """A row of the report, of ``rounds`` times ``steps`` steps; a ``peer`` under the same load takes turns."""
    loads: list[Any] = [load] if peer is None else [load, peer]
    for one in loads:
        one.set_waiting(waiting)
        one.run(WARM_UP_STEPS)
    times: list[list[list[StepTimes]]] = [[] for _ in loads]
    for number in range(rounds):
        for index in range(len(loads)) if number % 2 == 0 else reversed(range(len(loads))):
            times[index].append(loads[index].run(steps))
        if on_round is not None:
            on_round()
    with Stopwatch(load) as watch:
        watched = [watch.take() for _ in range(WATCHED_STEPS) if load.run(1)]
    row: dict[str, Any] = {
        "scheduler": load.scheduler,
        "running": load.running,
        "waiting": waiting,
        "mix": MIXES[load.mixed],
        **figures([one for each in times[0] for one in each]),
        "parts_us": {part: statistics.median(one[part] / 1000 for one in watched) for part in PARTS},
    }
    if peer is not None:
        p50s = [[figures(each)["p50_us"] for each in one] for one in times]
        ratios = [theirs / ours for ours, theirs in zip(*p50s, strict=True)]
        row["vllm"] = {**figures([one for each in times[1] for one in each]), "ratios": ratios}
    return row


def figures(times: Sequence[StepTimes]) -> dict[str, float]:
    """Of these steps, microseconds."""
    whole = sorted((one.schedule + one.update) / 1000 for one in times)
    return {
        "p50_us": statistics.median(whole),
        "p99_us": whole[min(len(whole) - 1, int(0.99 * len(whole)))],
        "best_us": whole[0],
        "schedule_us": statistics.median(one.schedule / 1000 for one in times),
        "update_us": statistics.median(one.update / 1000 for one in times),
    }
