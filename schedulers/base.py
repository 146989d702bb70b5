"""The three choices a scheduler is made of, and the scheduler that composes them.

A policy reads views and fills in a plan; it cannot change the books. Replace one part (``--ordering``, ``--capacity``,
``--micro-batch``) or the whole (``--scheduler package.module:Class``, anything with ``Scheduler``'s five methods).
Every method runs in the scheduling or the output thread under the state lock: no I/O, no waiting, and the same inputs
give the same plan (``now`` is an argument).
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from ..core.step import StepPlan
from ..core.views import QueueView, RequestView, TableView
from ..kvcache.resources import ResourceManager
from ..kvcache.view import KVView
from .limits import Limits
from .scheduling_pass import SchedulingPass

INTERFACE_VERSION = 1


class Verdict(enum.Enum):
    """What a capacity policy says of one waiting request."""

    ADMIT = "admit"
    SKIP = "skip"
    """Not this one, not now; try the next. A pass goes on past ``SchedulingPass.most_skipped`` of them in a row, and
    past everybody where nobody is resident: who waits behind more comes in when those before it do, or at the latest
    when all the residents have ended."""
    STOP = "stop"
    """Nobody behind it either."""


class Part:
    """What the three have in common: options of their own, and news of everybody's life.

    ``Options``: a dataclass of what ``--scheduler-option NAME=VALUE`` may set; a part that has one is made as
    ``Class(options)``, others as ``Class()``. The news need not be heard; nothing is told twice but ``added``.
    """

    Options: ClassVar[type[Any] | None] = None

    def added(self, request: RequestView) -> None:
        """It waits: it arrived, or it was paused and holds nothing any more."""

    def started(self, request: RequestView) -> None:
        """It becomes resident with the plan just made."""

    def ended(self, request_id: int) -> None:
        """It ended, wherever it was. Ids that nobody knows are possible."""

    def retired(self, plan: StepPlan, finished_ids: Iterable[int]) -> None:
        """The plan came back, and these of its requests ended; ``ended`` was called for each."""


class Ordering(Part, abc.ABC):
    """Who waits first. Holds the waiting and the paused; never the residents."""

    knows: ClassVar[frozenset[str]] = frozenset()
    """Which of ``priority``, ``deadline_ms`` and ``tenant`` it goes by. A request that brings a priority or a deadline
    which the ordering does not know is refused when it is submitted."""

    @abc.abstractmethod
    def add(self, request: RequestView) -> None:
        """A request arrived, or was paused and waits again."""

    @abc.abstractmethod
    def remove(self, request_id: int) -> None:
        """It was admitted or aborted. Unknown ids are ignored."""

    @abc.abstractmethod
    def visit(self, step: SchedulingPass) -> Iterator[RequestView]:
        """The waiting in visiting order, lazily: most often only the first is looked at. ``add`` and ``remove`` are not
        called while it is iterated."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    def shed(self, now: float) -> Iterable[tuple[RequestView, str]]:
        """Those of the waiting that are to end unserved, each with the reason its caller is told. Asked before each
        pass, so it must cost nothing while there are none."""
        return ()

    def may_displace(self) -> bool:
        """Whether ``displaces`` may be true of anybody now: asked in each pass while somebody waits."""
        return type(self).displaces is not Ordering.displaces

    @property
    def standing(self) -> int:
        """Rises when ``displaces`` may answer otherwise although no resident came or went."""
        return 0

    def displaces(self, newcomer: RequestView, resident: RequestView, changes: Mapping[str | None, int]) -> bool:
        """Whether this waiting request may have that resident paused to take its place. A strict order, or two would
        pause each other for ever. ``changes``: by tenant, how many more residents than now there are to be, by the
        places granted and the pauses planned before. The answer may be kept until a resident comes or goes, ``changes``
        are others or ``standing`` rises."""
        return False

    def pause_key(self, request: RequestView) -> Any:
        """Of the residents that may be paused, the one with the greatest is."""
        return request.request_id


class Capacity(Part, abc.ABC):
    """Who may hold KV memory, and who gives it back when it runs short."""

    def make_way(self, step: SchedulingPass, waiting: Ordering) -> None:
        """Before a micro-batch is formed: pause residents in ``step`` whom the first of the waiting displace, if they
        could not become resident otherwise, and note those in ``step.makes_way_for``."""

    def candidates(self, step: SchedulingPass, waiting: Ordering) -> Iterator[RequestView]:
        """Whom of the waiting to judge, in order: for a policy that knows who comes next without asking everybody."""
        return waiting.visit(step)

    @abc.abstractmethod
    def make_room(self, step: SchedulingPass, num_blocks: int) -> bool:
        """Pause residents in ``step`` until ``num_blocks`` are free; whether they are."""

    @abc.abstractmethod
    def judge(self, step: SchedulingPass, request: RequestView) -> Verdict:
        """Whether a waiting request may become resident now. Does not change ``step``."""

    def room(self, step: SchedulingPass) -> int:
        """Blocks that newcomers may take. With ``need`` it tells a micro-batch about how many of the waiting could come
        in, without judging each."""
        return step.kv.free_blocks - step.promised_blocks

    def need(self, step: SchedulingPass, request: RequestView) -> int:
        """Blocks of ``room`` that a waiting request would take, about: it is asked of many, so it must be quick."""
        return step.kv.blocks_for(request.num_tokens - step.prefix(request).num_tokens)


def first_of_the_empty(queues: Iterable[QueueView]) -> Iterator[QueueView]:
    """The idle queues less those without decodes but the first: they are alike, and what one has no use for, no other
    has. With a thousand stages most may be empty."""
    found = False
    for queue in queues:
        if queue.ids:
            yield queue
        elif not found:
            found = True
            yield queue


class MicroBatch(Part, abc.ABC):
    """What runs now, under token, sequence and chunk limits."""

    def num_queues(self, num_stages: int) -> int:
        """Running queues it wants to choose from, where the settings do not say how many there are."""
        return num_stages

    def visit(self, table: TableView) -> Iterator[QueueView]:
        """The queues to make a plan for, in turn: the first that comes to something is taken.

        Idle ones; then, with as many micro-batches in flight as there are queues, one of them once more. That one keeps
        the first stage fed while the books catch up; were there one for each queue, a newcomer would wait behind all.
        """
        yield from first_of_the_empty(table.idle_queues())
        if table.num_in_flight <= max(len(table.queues), table.num_stages):
            yield from table.queues_to_look_ahead()

    @abc.abstractmethod
    def form(self, step: SchedulingPass, waiting: Ordering, capacity: Capacity) -> None:
        """Fill ``step.plan`` for the queue ``step.queue``; leave it empty when nothing can run.

        The queue is idle or, where ``step.ahead``, has its last micro-batch in flight.
        """


class Scheduler:
    """Ordering x capacity x micro-batch. The engine calls five things: ``add``, ``abort``, ``schedule``, ``update`` and
    ``has_work``; a class of your own with these five can stand in its place. A sixth, ``shed``, is called where it is
    there, while no stages are up."""

    def __init__(
        self,
        ordering: Ordering,
        capacity: Capacity,
        micro_batch: MicroBatch,
        limits: Limits,
        resources: ResourceManager | None = None,
    ) -> None:
        self.ordering, self.capacity, self.micro_batch = ordering, capacity, micro_batch
        self.limits = limits
        self._parts: tuple[Part, ...] = (ordering, capacity, micro_batch)
        self._resources = resources if resources is not None else ResourceManager()

    @property
    def has_work(self) -> bool:
        """Whether anybody waits."""
        return len(self.ordering) > 0

    def num_queues(self, num_stages: int) -> int:
        """Running queues it wants, where the settings do not say how many there are."""
        return self.micro_batch.num_queues(num_stages)

    def add(self, request: RequestView) -> None:
        """A request waits until a plan carries it: it arrived, or the engine had to pause it."""
        self.ordering.add(request)
        for part in self._parts:
            part.added(request)

    def abort(self, request_id: int) -> None:
        """A request ended, wherever it was. Unknown ids are ignored."""
        self.ordering.remove(request_id)
        for part in self._parts:
            part.ended(request_id)

    def schedule(self, now: float, table: TableView, kv: KVView) -> StepPlan | None:
        """The next micro-batch, for the first queue in the policy's order that has something to run; ``None`` if
        nothing can run.

        A plan without rows only pauses, sheds, or moves decodes to other queues; the engine then asks again.
        """
        if (plan := self.shed(now)) is not None:
            return plan
        for queue in self.micro_batch.visit(table):
            plan = self._plan_for(queue, now, table, kv)
            if plan is not None:
                return plan
        return None

    def shed(self, now: float) -> StepPlan | None:
        """A plan that only ends waiting requests unserved, where there are any to be. The engine asks for it by itself
        while no stage is up."""
        shed = list(self.ordering.shed(now))
        if not shed:
            return None
        ids, reasons = [request.request_id for request, _ in shed], [reason for _, reason in shed]
        return StepPlan(queue=0, shed_ids=ids, shed_reasons=reasons)

    def update(self, plan: StepPlan, finished_ids: Iterable[int]) -> None:
        """A plan came back and these of its requests ended."""
        for part in self._parts:
            part.retired(plan, finished_ids)

    def _plan_for(self, queue: QueueView, now: float, table: TableView, kv: KVView) -> StepPlan | None:
        step = SchedulingPass(now, table, kv, self.limits, queue, self._resources, self.ordering)
        if len(self.ordering):
            self.capacity.make_way(step, self.ordering)
        self.micro_batch.form(step, self.ordering, self.capacity)
        step.finish()
        if not step.plan.num_rows and not step.plan.paused_ids and not step.plan.moved_ids:
            return None
        if step.ahead and not self._may_go_ahead(step):
            return None
        for request in step.admitted:
            self.ordering.remove(request.request_id)
            for part in self._parts:
                part.started(request)
        for request_id in step.plan.paused_ids:
            self.add(table[request_id])
        return step.plan

    @staticmethod
    def _may_go_ahead(step: SchedulingPass) -> bool:
        """Nobody is put out for a guess: where memory is short the queue is asked again when its tokens are known. They
        are on their way, so whoever waits for the books to change is woken."""
        if step.plan.paused_ids or step.is_short:
            return False
        # A micro-batch that knows nothing of looking ahead takes every row.
        ending = step.queue.ending()
        return not ending or set(ending).isdisjoint(step.plan.decode_ids)
