"""Every scheduler that can be put together from the registered parts, and drivers that hold it to the contract."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any, NamedTuple
from zlib import crc32

from hypothesis import given, seed, settings

from llm_engine.core.request import Request
from llm_engine.core.step import StepPlan
from llm_engine.engine.delta import Delta
from llm_engine.kvcache.resources import ResourceManager
from llm_engine.kvcache.view import KVView
from llm_engine.schedulers.chunking import CHUNKINGS
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.orderings.fair import FairOptions, FairOrdering
from llm_engine.schedulers.registry import CAPACITIES, MICRO_BATCHES, ORDERINGS, PRESETS
from tests.engine.core_driver import CoreDriver

NEVER_PAUSE = ("guaranteed-no-evict", "static-batch")
"""Capacities that take nothing back, whatever happens to the stages."""


class Triple(NamedTuple):
    """Settings of one scheduler: a name for each part, and how prompts share a micro-batch."""

    ordering: str
    capacity: str
    micro_batch: str
    chunking: str

    def __str__(self) -> str:
        return "-x-".join(self)

    @property
    def settings(self) -> dict[str, Any]:
        *parts, chunking = self
        return {**dict(zip(self._fields, parts, strict=False)), "scheduler_options": {"chunking": chunking}}


TRIPLES = [Triple(*names) for names in product(ORDERINGS.names(), CAPACITIES.names(), MICRO_BATCHES.names(), CHUNKINGS)]


class ContractDriver(CoreDriver):
    """Also checks each decision of the scheduler before it is carried out, and how long everybody waits."""

    def __init__(self, choice: Triple | str, **shape: Any) -> None:
        """``choice``: a triple, or the name of a registered scheduler."""
        named = {"parts": choice.settings} if isinstance(choice, Triple) else {"preset": choice}
        super().__init__(**shape, **named)
        preset = PRESETS.get(choice) if isinstance(choice, str) else None
        self.capacity = choice.capacity if isinstance(choice, Triple) else preset and preset[1]
        self.num_decided_pauses = 0
        self.came: dict[int, int] = {}
        """Pushes there had been when each request arrived."""
        self.went: dict[int, int] = {}
        """And when it ended."""
        self._ask, self.core.scheduler.schedule = self.core.scheduler.schedule, self._decide  # type: ignore[method-assign]
        self._chosen: set[int] = set()
        """Of a static batch: who was chosen when nobody was resident last."""

    def add(self, prompt: Sequence[int], max_tokens: int = 4, **more: Any) -> int:
        self.came[len(self.requests)] = len(self.pushed)
        return super().add(prompt, max_tokens, **more)

    def _take(self, delta: Delta) -> None:
        super()._take(delta)
        if delta.finish_reason is not None:
            self.went[delta.request.request_id] = len(self.pushed)

    def check_waits(self) -> None:
        """Nobody waits for more pushes than it takes to serve all those it shared the engine with one by one.

        A round pushes each queue until each of its rows had a turn, and makes a token for whoever is not put back. Who
        is put back starts anew, but only for somebody who goes before it.
        """
        limits, queues = self.limits, len(self.core.table.queues)
        rows = min(limits.max_micro_batch_seqs, limits.max_num_batched_tokens)
        round_ = queues * -(-limits.max_num_seqs // rows) + self.core.table.look_ahead
        for one, came in self.came.items():
            beside = [other for other in self.came if self.came[other] <= self.went[one] and self.went[other] >= came]
            tokens = sum(self.requests[other].max_total_tokens for other in beside)
            assert self.went[one] - came <= round_ * tokens, one

    def _decide(self, now: float, table: Any, kv: KVView) -> StepPlan | None:
        plan = self._ask(now, table, kv)
        if self.capacity == "static-batch" and not table.num_resident:
            started = plan.chunk_ids if plan is not None else ()
            self._chosen = {*started, *self.core.scheduler.capacity._chosen}  # type: ignore[attr-defined]
        if plan is not None:
            self.num_decided_pauses += len(plan.paused_ids)
            assert not (self.capacity in NEVER_PAUSE and plan.paused_ids), "it paused somebody"
            self._check_displacement(plan, table)
            if self.capacity == "static-batch":
                self._check_static(plan, table)
        return plan

    def _check_displacement(self, plan: StepPlan, table: Any) -> None:
        """Whoever is admitted while others are paused displaces one of them, and none of them displaces it."""
        ordering = getattr(self.core.scheduler, "ordering", None)
        newcomers = [table[request_id] for request_id in plan.chunk_ids if not table[request_id].is_resident]
        paused = [table[request_id] for request_id in plan.paused_ids]
        if not newcomers or not paused or ordering is None:
            return
        if isinstance(ordering, FairOrdering):
            self._check_shares(newcomers, paused, table)
            return
        for newcomer in newcomers:
            assert any(ordering.displaces(newcomer, resident, {}) for resident in paused)
            assert not any(ordering.displaces(resident, newcomer, {}) for resident in paused)

    @staticmethod
    def _check_shares(newcomers: Sequence[Request], paused: Sequence[Request], table: Any) -> None:
        """Counters have moved by now, so what the tenants hold is counted anew: before the last one paused, the loser
        held more than three times what a tenant of the newcomers was to hold."""
        left = Counter(resident.tenant for resident in table.residents())
        left.subtract(resident.tenant for resident in paused)
        came = Counter(newcomer.tenant for newcomer in newcomers)
        for loser in {resident.tenant for resident in paused}:
            most = 1 + left[loser] + came[loser]
            assert any(most > FairOptions().displace_at * (left[tenant] + 1) for tenant in came if tenant != loser)

    def _check_static(self, plan: StepPlan, table: Any) -> None:
        newcomers = {request_id for request_id in plan.chunk_ids if not table[request_id].is_resident}
        assert newcomers <= self._chosen, "somebody was admitted into a batch that is under way"


def random_examples(
    triple: Triple | str, number: int, check: Callable[..., None], *strategies: Any, **named: Any
) -> None:
    """Run ``check`` on so many examples; each triple sees others, each time the same."""
    own = seed(crc32(f"{triple} {check.__name__}".encode()))
    own(settings(max_examples=number, deadline=None, database=None)(given(*strategies, **named)(check)))()


def kept_by(scheduler: Any) -> tuple[list[Request], int]:
    """The requests that can be reached from a scheduler, and how many entries its lists, sets and dictionaries have."""
    seen: set[int] = set()
    requests: list[Request] = []
    entries = 0
    todo: list[Any] = [scheduler]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, _NOT_ITS_OWN):
            continue
        seen.add(id(thing))
        if isinstance(thing, Request):
            requests.append(thing)
        elif isinstance(thing, Mapping):
            entries += len(thing)
            todo += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set | frozenset | deque | array):
            entries += 0 if isinstance(thing, tuple) else len(thing)
            todo += thing
        else:
            todo += vars(thing).values() if hasattr(thing, "__dict__") else ()
            todo += (getattr(thing, name) for name in getattr(type(thing), "__slots__", ()) if hasattr(thing, name))
    return requests, entries


_NOT_ITS_OWN = (
    str, bytes, int, float, type, type(None), FunctionType, ModuleType, MappingProxyType, Limits, ResourceManager,
)  # fmt: skip
