"""Refuses an impossible plan before anything is taken for it, naming the rule it breaks."""

from __future__ import annotations

from collections.abc import Callable, Container

from ..core.decode_queue import DecodeQueue
from ..core.errors import SchedulerError
from ..core.request import RequestState
from ..core.request_table import RequestTable
from ..core.step import StepPlan
from ..kvcache.resources import ResourceError, ResourceManager
from ..schedulers.limits import Limits


def check_plan(plan: StepPlan, table: RequestTable, limits: Limits, scheduler: str) -> None:
    """Raise ``SchedulerError`` where the plan breaks a rule. Block needs are checked while booking."""

    def refuse(rule: str) -> None:
        raise SchedulerError(f"scheduler {scheduler} returned an impossible plan: {rule}")

    if not 0 <= plan.queue < len(table.queues):
        refuse(f"queue {plan.queue} of {len(table.queues)}")
    queue = table.queues[plan.queue]
    if plan.num_rows and not queue.idle and queue not in table.queues_to_look_ahead():
        refuse(f"queue {plan.queue} is in flight")
    _check_moves(plan, table, refuse)
    _check_shed(plan, table, refuse)
    if len(plan.chunk_ids) != len(plan.chunk_tokens):
        refuse(f"{len(plan.chunk_ids)} chunk ids with {len(plan.chunk_tokens)} token counts")
    if plan.num_rows > limits.max_micro_batch_seqs:
        refuse(f"{plan.num_rows} rows, max_micro_batch_seqs is {limits.max_micro_batch_seqs}")
    num_tokens = plan.num_tokens + limits.num_draft_tokens * len(plan.decode_ids)
    if num_tokens > limits.max_num_batched_tokens:
        refuse(f"{num_tokens} tokens, max_num_batched_tokens is {limits.max_num_batched_tokens}")
    seen: set[int] = set(plan.paused_ids)
    if len(seen) != len(plan.paused_ids):
        refuse("a request is paused twice")
    for request_id in plan.paused_ids:
        request = table.get(request_id)
        if request is None or not request.is_resident:
            refuse(f"pauses request {request_id}, which holds no blocks")
        elif table.is_in_flight(request):
            refuse(f"pauses request {request_id}, which is in flight")
    _check_rows(plan, queue, seen, refuse)
    newcomers = 0
    for request_id, num_tokens in zip(plan.chunk_ids, plan.chunk_tokens, strict=True):
        request = table.get(request_id)
        if request is None or request.state in (RequestState.DECODING, RequestState.PARKED):
            refuse(f"computes a chunk of request {request_id}, which has none to compute")
        elif not 0 < num_tokens <= request.num_tokens - request.num_computed_tokens:
            refuse(f"computes {num_tokens} tokens of request {request_id}")
        elif num_tokens > (limits.long_prefill_token_threshold or num_tokens):
            refuse(
                f"computes {num_tokens} tokens of request {request_id}, long_prefill_token_threshold is "
                f"{limits.long_prefill_token_threshold}"
            )
        newcomers += request is not None and not request.is_resident
    if table.num_resident - len(seen) + newcomers > limits.max_num_seqs:
        refuse(f"more residents than max_num_seqs, {limits.max_num_seqs}")


def check_resources(
    plan: StepPlan, table: RequestTable, resources: ResourceManager, scheduler: str
) -> list[ResourceError]:
    """Raise ``SchedulerError`` where newcomers need more of a resource than there is, once those who are paused for
    them have given theirs back. Returns those for whom a manager raised: they are to fail.

    Whom the scheduler reserved for in its pass is not asked about again: a manager of somebody else's may answer
    otherwise by now, and that would be nobody's fault.
    """
    broken: list[ResourceError] = []
    for request_id in plan.chunk_ids if resources.managers else ():
        request = table[request_id]
        if request.is_resident or resources.is_reserved_for(request_id):
            continue
        try:
            lacking = resources.shortage(request)
            if lacking is None:
                resources.reserve(request)
        except ResourceError as error:
            broken.append(error)
            continue
        if lacking is not None:
            raise SchedulerError(
                f"scheduler {scheduler} returned an impossible plan: it starts request {request_id}, and resource "
                f"{lacking} has too little for it"
            )
    return broken


def _check_rows(plan: StepPlan, queue: DecodeQueue, paused: set[int], refuse: Callable[[str], None]) -> None:
    """That the decodes are the queue's to compute, and that nobody stands in the plan twice."""
    decodes: Container[int] = queue
    if plan.decode_ids != queue.ids:  # mostly they are all of it, and comparing columns costs next to nothing
        decodes = set(plan.decode_ids)
        if not queue.holds(decodes):
            stranger = next(request_id for request_id in plan.decode_ids if request_id not in queue)
            refuse(f"decodes request {stranger}, which is not in queue {plan.queue}")
        if len(decodes) != len(plan.decode_ids):
            refuse("a request stands in it twice")
    if not queue.idle and (ending := sorted(i for i in queue.ending() if i in decodes)):
        refuse(f"decodes requests {ending}, which end with the step in flight")
    others = [*plan.chunk_ids, *plan.moved_ids]
    if len(set(others)) != len(others) or any(i in decodes or i in paused for i in others):
        refuse("a request stands in it twice")
    if any(request_id in decodes for request_id in paused):
        refuse("a request stands in it twice")


def _check_moves(plan: StepPlan, table: RequestTable, refuse: Callable[[str], None]) -> None:
    if len(plan.moved_ids) != len(plan.moved_queues):
        refuse(f"{len(plan.moved_ids)} moved ids with {len(plan.moved_queues)} queues")
    if plan.moved_ids and not table.queues[plan.queue].idle:
        refuse(f"moves decodes out of queue {plan.queue}, which is in flight")
    for request_id, target in zip(plan.moved_ids, plan.moved_queues, strict=True):
        if request_id not in table.queues[plan.queue]:
            refuse(f"moves request {request_id}, which is not in queue {plan.queue}")
        if target == plan.queue or not 0 <= target < len(table.queues):
            refuse(f"moves request {request_id} to queue {target} of {len(table.queues)}")


def _check_shed(plan: StepPlan, table: RequestTable, refuse: Callable[[str], None]) -> None:
    if len(plan.shed_ids) != len(plan.shed_reasons):
        refuse(f"{len(plan.shed_ids)} shed ids with {len(plan.shed_reasons)} reasons")
    if plan.shed_ids and plan.num_rows:
        refuse("it sheds requests and has rows")
    if len(set(plan.shed_ids)) != len(plan.shed_ids):
        refuse("a request is shed twice")
    for request_id in plan.shed_ids:
        request = table.get(request_id)
        if request is None or request.is_resident:
            refuse(f"sheds request {request_id}, which does not wait")
