"""The books of one engine, and what may happen to them. No threads here: every method runs under the state lock.

    drain -> schedule -> check -> book          one critical section of the scheduling thread: ``schedule``
    retire                                      one critical section of the output thread: ``retire``

``EngineCore`` alone changes the books. A scheduler reads views of them and proposes a plan; the executor and the
callers never see them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..core.errors import RequestFailedError, RequestShedError, SchedulerError
from ..core.outputs import FinishReason
from ..core.request import Request, RequestEvent, RequestState
from ..core.request_table import RequestTable
from ..core.step import StepPlan, StepResult
from ..kvcache.block_hash import extra_key, hash_blocks
from ..kvcache.kv_cache_manager import KVCacheManager
from ..kvcache.resources import ResourceError, ResourceFailure, ResourceManager, SequenceSlots
from ..kvcache.view import KVView
from ..schedulers.base import Scheduler
from ..schedulers.limits import Limits
from .booking import book, carry_out_moves
from .delta import Delta
from .plan_check import check_plan, check_resources
from .plan_form import take_in
from .retirement import InFlight, Retired, advance, check_result
from .stuck import who_waits_in_vain

_MAX_EMPTY_PLANS = 64
"""Plans in a row that only move, pause or shed, before the scheduler is taken to turn in circles; and one more for each
request, since each can be shed or paused for good reason."""


class EngineCore:
    """Request table, running queues, in-flight FIFO, KV manager, resources, stop checks."""

    def __init__(
        self,
        limits: Limits,
        kv: KVCacheManager,
        scheduler: Scheduler,
        resources: ResourceManager,
        *,
        num_queues: int,
        num_stages: int | None = None,
        look_ahead: int = 0,
        active_share: float = 1.0,
        scheduler_name: str = "default",
    ) -> None:
        self.limits, self.kv, self.scheduler, self.resources = limits, kv, scheduler, resources
        self.scheduler_name = scheduler_name
        self.table = RequestTable(
            num_queues,
            kv.block_size,
            num_stages=num_stages or num_queues,
            look_ahead=look_ahead,
            active_share=active_share,
        )
        self.slots = SequenceSlots(limits.max_num_seqs)
        self.view = KVView(kv)
        self.in_flight: deque[InFlight] = deque()
        self.epoch = 0
        """Rises each time the stages are lost; what was pushed in an earlier one never comes back."""
        self.stages_up = True
        self.num_preemptions = 0
        self.num_replays = 0
        """Residents that were taken back to waiting because their stages were lost."""
        self.outbox: list[Delta] = []
        """Ends decided while scheduling; the output thread delivers them."""
        self.resource_failures: list[ResourceFailure] = []
        """What resources raised when they were freed; nobody waits for it, the output thread logs it."""
        self._step = 0
        self._finished_ids: list[int] = []
        self._paused_ids: list[int] = []
        self._scheduler_error: SchedulerError | None = None
        """A scheduler that raised while it was told something: raised at the next ``schedule``, so that whoever was
        telling can finish first."""
        self._retired_at: list[float | None] = [None] * num_queues
        """When each queue's last step came back; nothing before the first of an epoch."""

    # -- arrivals and departures

    @property
    def num_waiting(self) -> int:
        return len(self.table) - self.table.num_resident

    @property
    def is_idle(self) -> bool:
        return not len(self.table) and not self.in_flight

    def add(self, request: Request, now: float) -> None:
        """Take a request from the inbox."""
        self.table.add(request)
        request.record(RequestEvent.QUEUED, now)
        self._tell_scheduler(self.scheduler.add, request)

    def abort(self, request_id: int, now: float, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request wherever it is; ids that ended already are ignored. A late result of it is dropped."""
        request = self.table.get(request_id)
        if request is not None:
            self.finish(request, now)
            self.outbox.append(Delta(request, [], now, finish_reason=reason))

    def fail(self, request: Request, error: Exception, now: float) -> None:
        """End a request with an error; its caller is told through the outbox."""
        self.finish(request, now)
        self.outbox.append(Delta(request, [], now, finish_reason=FinishReason.ERROR, error=error))

    def finish(self, request: Request, now: float) -> None:
        """Take a request off every book and give back what it holds."""
        self.resource_failures += self._give_back(request)
        self.table.leave(request, RequestState.FINISHED)
        request.record(RequestEvent.FINISHED, now)
        self._tell_scheduler(self.scheduler.abort, request.request_id)
        self.view.forget(request.request_id)
        self._finished_ids.append(request.request_id)

    # -- scheduling

    def schedule(self, now: float) -> StepPlan | None:
        """The next plan to push, booked and in the FIFO; ``None`` when nothing can run until the books change.

        Raises ``SchedulerError`` naming the scheduler where it raises or breaks a rule; nothing was taken then.
        """
        num_empty = 0
        while self.stages_up:
            try:
                plan = self._ask_scheduler(now)
                if plan is None:
                    if not self._is_stuck():
                        return None
                    self.fail(*who_waits_in_vain(self), now)
                    continue
            except ResourceError as broken:
                self._fail_asked(broken, now)
                continue
            plan = take_in(plan, self.scheduler_name)
            self._check(plan)
            most_found = self._found_by_newcomers(plan) if plan.paused_ids else {}
            for request_id in plan.paused_ids:
                self.pause(self.table[request_id], now)
            self._paused_ids += plan.paused_ids
            if not plan.num_rows:
                carry_out_moves(self.table, plan)
                self._shed(plan, now)
                num_empty += 1
                if num_empty > _MAX_EMPTY_PLANS + len(self.table):
                    raise SchedulerError(
                        f"scheduler {self.scheduler_name} makes no progress: {num_empty} plans without rows in a row"
                    )
                continue
            unanswered = check_resources(plan, self.table, self.resources, self.scheduler_name)
            self._step += 1
            plan.epoch, plan.step = self.epoch, self._step
            plan.finished_ids, self._finished_ids = self._finished_ids, []
            plan.paused_ids, self._paused_ids = self._paused_ids, []
            self._book(plan, now, most_found)
            for name, problem in self.resources.prepare_resources(plan):
                self._fail_rows(plan, RequestFailedError(f"resource {name} could not prepare: {problem!r}"), now)
            for unknown in unanswered:
                self._fail_asked(unknown, now)
            return plan
        self._shed_in_outage(now)
        return None

    def _shed_in_outage(self, now: float) -> None:
        """Deadlines pass while the stages start again, too. Where a scheduler of somebody else's cannot be asked for
        this alone, its waiting are shed when the stages are back."""
        shed = getattr(self.scheduler, "shed", None)
        plan = None if shed is None or self._scheduler_error is not None else self._ask(shed, now)
        if plan is not None:
            plan = take_in(plan, self.scheduler_name)
            self._check(plan)
            self._shed(plan, now)

    def _shed(self, plan: StepPlan, now: float) -> None:
        for request_id, reason in zip(plan.shed_ids, plan.shed_reasons, strict=True):
            self.fail(self.table[request_id], RequestShedError(reason), now)

    def _ask_scheduler(self, now: float) -> StepPlan | None:
        if self._scheduler_error is not None:
            raise self._scheduler_error
        self.resources.begin_pass()
        return self._ask(self.scheduler.schedule, now, self.table, self.view)

    def _ask(self, ask: Callable[..., StepPlan | None], *what: Any) -> StepPlan | None:
        try:
            return ask(*what)
        except ResourceError:
            raise
        except (Exception, SystemExit) as error:
            raise SchedulerError(f"scheduler {self.scheduler_name} raised {error!r}") from error

    def _tell_scheduler(self, tell: Callable[..., None], *what: Any) -> None:
        try:
            tell(*what)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code; the engine ends with it
            if self._scheduler_error is None:
                self._scheduler_error = SchedulerError(f"scheduler {self.scheduler_name} raised {error!r}")
                self._scheduler_error.__cause__ = error

    def _check(self, plan: StepPlan) -> None:
        check_plan(plan, self.table, self.limits, self.scheduler_name)

    def _found_by_newcomers(self, plan: StepPlan) -> dict[int, int]:
        """Tokens of the hits that a plan counts on, by request: who is paused for it may publish more of them."""
        newcomers = (request for i in plan.chunk_ids if not (request := self.table[i]).is_resident)
        return {r.request_id: self.kv.match_prefix(r.block_hashes, r.num_tokens).num_tokens for r in newcomers}

    def _book(self, plan: StepPlan, now: float, most_found: Mapping[int, int]) -> None:
        """Take what the plan takes, and enter it into the FIFO before anybody pushes it."""
        requests = book(self, plan, now, most_found)
        queue = self.table.queues[plan.queue]
        self.table.enter(plan)
        for request_id in plan.chunk_ids:
            self.table[request_id].num_in_flight += 1
        self.in_flight.append(InFlight(plan, queue.generation, requests, queue.ending(), now))

    def pause(self, request: Request, now: float) -> None:
        """Take a resident's blocks back; it waits to be recomputed from its known tokens."""
        self.num_preemptions += 1
        self._send_back(request, now)

    def _send_back(self, request: Request, now: float) -> None:
        failures = self._give_back(request)
        self.table.leave(request, RequestState.PAUSED)
        request.num_preemptions += 1
        request.record(RequestEvent.PAUSED, now)
        for name, problem in failures[:1]:
            self.fail(request, RequestFailedError(f"resource {name} could not be freed: {problem!r}"), now)

    def extend_hashes(self, request: Request) -> None:
        """Hash the blocks that its known tokens have filled since."""
        if not self.kv.enable_prefix_caching:
            return
        hash_blocks(
            request.token_ids,
            self.kv.block_size,
            known=request.block_hashes,
            extra=extra_key(request.adapter_id, request.cache_salt),
        )

    def _give_back(self, request: Request) -> list[ResourceFailure]:
        if not request.is_resident:
            return []
        assert request.slot is not None
        if request.queue is not None:
            # Tagged with the newest step: should any step in flight fail, these go with it.
            self.extend_hashes(request)
            computed = self.table.queues[request.queue].position(request.request_id)
            self.kv.publish(request.request_id, request.block_hashes, computed, self._step)
        failures = self.resources.free_resources(request)
        self.kv.free(request.request_id)
        self.slots.release(request.slot)
        request.slot = None
        request.num_in_flight = 0
        return failures

    def _is_stuck(self) -> bool:
        """Nothing is to come back, and somebody is there whom nothing outside will wake."""
        return self.stages_up and not self.in_flight and any(self._unparked())

    def _unparked(self) -> Iterator[Request]:
        return (request for request in self.table.requests.values() if request.state is not RequestState.PARKED)

    def _fail_asked(self, broken: ResourceError, now: float) -> None:
        request = self.table.get(broken.request_id)
        if request is None:
            raise SchedulerError(f"scheduler {self.scheduler_name} asked for a request that has ended") from broken
        self.fail(request, RequestFailedError(str(broken)), now)

    # -- retirement

    def retire(self, result: StepResult, now: float) -> Retired | None:
        """Advance the books by what came back; ``None`` for a result of an earlier epoch.

        Results retire in the order of the pushes; rows whose request ended or was paused since are dropped. Raises
        ``UnexpectedResult`` for what is not the answer to the oldest plan in flight, and then changes nothing.
        """
        if result.epoch < self.epoch:
            return None
        check_result(result, self.epoch, self.in_flight[0] if self.in_flight else None)
        flight = self.in_flight.popleft()
        plan = flight.plan
        self.table.come_back(plan)
        self.table.timing.observe(plan, result)
        retired = Retired(flight)
        for request_id in plan.chunk_ids:
            request = self.table.get(request_id)
            if request is not None and request.is_resident and request.start_step <= plan.step:
                request.num_in_flight -= 1
                retired.chunked.append(request)
        last = self._retired_at[plan.queue]
        if len(plan.decode_ids) and last is not None:
            retired.since_last = now - last
        self._retired_at[plan.queue] = now
        if result.error is not None:
            self._fail_step(plan, result.error, now)
        else:
            advance(self.table, retired, result.tokens, now)
            for request_id in retired.finished:
                self.finish(self.table[request_id], now)
        for name, problem in self.resources.update_resources(plan):
            self._fail_rows(plan, RequestFailedError(f"resource {name} failed after its step: {problem!r}"), now)
        self._tell_scheduler(self.scheduler.update, plan, list(retired.finished))
        retired.failed, self.outbox = self.outbox, []
        retired.num_running, retired.num_waiting = self.table.num_resident, self.num_waiting
        retired.kv_usage = self.kv.usage
        return retired

    def _fail_step(self, plan: StepPlan, error: str, now: float) -> None:
        """The step's requests fail; whoever built on what it would have written is recomputed."""
        self._fail_rows(plan, RequestFailedError(f"step {plan.step} failed: {error}"), now)
        for request_id in self.kv.withdraw(plan.step):
            request = self.table.get(request_id)
            if request is not None and request.is_resident:
                self.pause(request, now)
                if request.state is RequestState.PAUSED:
                    self._tell_scheduler(self.scheduler.add, request)

    def _fail_rows(self, plan: StepPlan, error: Exception, now: float) -> None:
        for request_id in (*plan.decode_ids, *plan.chunk_ids):
            request = self.table.get(request_id)
            if request is not None and request.is_resident and request.start_step <= plan.step:
                self.fail(request, error, now)

    # -- the stages' death

    def lose_stages(self, cause: str, now: float, *, replay: bool = True) -> None:
        """The stages are gone, and with them the cache and whatever was in flight. No plan is made until
        ``regain_stages``.

        Residents go back to waiting with their known tokens, or fail with ``cause`` where ``replay`` is off. A request
        that was in flight at two deaths fails: it may be what kills them. Nobody else notices. That plans are lost is
        told neither to the scheduler nor to the resources; ``free_resources`` is called for each resident.
        """
        self.epoch += 1
        self.stages_up = False
        lost = [flight.plan for flight in self.in_flight]
        self.in_flight.clear()
        for plan in lost:
            self.table.come_back(plan)
        # A dict as an ordered set. Who ended meanwhile is gone; who was paused by a failed step may still be the cause.
        suspects = dict.fromkeys(i for plan in lost for i in (*plan.decode_ids, *plan.chunk_ids) if i in self.table)
        for request in map(self.table.__getitem__, suspects):
            request.death_causes.append(cause)
            if len(request.death_causes) > 1:
                causes = "; ".join(said.partition("\n")[0] for said in request.death_causes)
                self.fail(request, RequestFailedError(f"it was in flight when the stages died, twice: {causes}"), now)
        for request in list(self.table.residents()):
            if not replay:
                self.fail(request, RequestFailedError(f"the stages were lost: {cause}"), now)
                continue
            self._send_back(request, now)
            if request.state is RequestState.PAUSED:
                self.num_replays += 1
                self._tell_scheduler(self.scheduler.add, request)
        self.kv.reset_prefix_cache()
        self.table.timing.restart()
        self._retired_at = [None] * len(self._retired_at)
        self._finished_ids, self._paused_ids = [], []

    def regain_stages(self) -> None:
        """New stages with empty books and an empty cache are up."""
        self.stages_up = True

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the books disagree with each other."""
        self.kv.check_integrity()
        self.table.check_integrity()
        assert self.table.num_resident == self.limits.max_num_seqs - self.slots.available()
        for queue in self.table.queues:
            plans = [flight.plan for flight in self.in_flight if flight.plan.queue == queue.index]
            assert queue.in_flight == len(plans)
        assert self.table.num_tokens_in_flight == sum(flight.plan.num_tokens for flight in self.in_flight)
        for request in self.table.residents():
            steps = [flight.plan.step for flight in self.in_flight if request.request_id in flight.plan.chunk_ids]
            assert request.num_in_flight == sum(step >= request.start_step for step in steps), request.external_id
