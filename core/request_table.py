"""The books' table: every live request, and the running queues that hold the decodes as columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from .decode_queue import DecodeQueue
from .pipeline_timing import PipelineTiming
from .request import Request, RequestState
from .step import StepPlan
from .views import RequestView


class RequestTable:
    """Owned by ``EngineCore``; every method under the state lock. Schedulers are given it to read."""

    def __init__(
        self, num_queues: int, block_size: int, *, num_stages: int = 1, look_ahead: int = 0, active_share: float = 1.0
    ) -> None:
        self.num_stages = num_stages
        self.look_ahead = look_ahead
        """How many plans may be pushed for a queue before the tokens of its last one are known: 0 or 1."""
        self.timing = PipelineTiming(num_stages, active_share)
        """What steps cost, learnt from those that came back."""
        self.requests: dict[int, Request] = {}
        self.queues = [DecodeQueue(index, block_size) for index in range(num_queues)]
        self._idle = dict.fromkeys(range(num_queues))
        """Indices of the queues with nothing in flight, idle for longest first."""
        self._flying: dict[int, None] = {}
        """Indices of the others, pushed longest ago first."""
        self._last_step = 0
        # Sums over the queues, kept up to date: a look at a thousand queues must not cost a thousand looks.
        self.num_decoding = 0
        """Decodes in all queues."""
        self.num_idle_decodes = 0
        """Decodes in idle queues."""
        self.num_in_flight = 0
        """Plans that were pushed and have not come back."""
        self.num_tokens_in_flight = 0
        """Tokens of the plans that were pushed and have not come back."""
        self.prefilling: dict[int, Request] = {}
        """Residents with known tokens that no plan carries yet, in the order they were admitted."""
        self.stop_ids: Counter[int] = Counter()
        """How many of the living each id would end: one set test tells that a step stopped nobody."""

    def __len__(self) -> int:
        return len(self.requests)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self.requests

    def __getitem__(self, request_id: int) -> Request:
        return self.requests[request_id]

    def get(self, request_id: int) -> Request | None:
        return self.requests.get(request_id)

    @property
    def num_resident(self) -> int:
        return self.num_decoding + len(self.prefilling)

    def residents(self) -> Iterator[Request]:
        """Every request that holds blocks: decodes by queue, then prefills."""
        for queue in self.queues:
            yield from queue.requests
        yield from self.prefilling.values()

    def idle_queues(self) -> list[DecodeQueue]:
        """Queues with nothing in flight, the one idle for longest first."""
        return [self.queues[index] for index in self._idle]

    def queues_to_look_ahead(self) -> list[DecodeQueue]:
        """Queues in flight that may be pushed once more before their tokens are known, pushed longest ago first.

        They have at least ``num_stages - 1`` micro-batches behind their last one, which so comes back about when the
        first stage gets to the new one; with fewer, the first stage would wait with work behind it.
        """
        if not self.look_ahead:
            return []
        behind = self._last_step - self.num_stages + 1
        found = []
        for index in self._flying:
            queue = self.queues[index]
            if queue.last_pushed > behind:
                break
            if queue.in_flight <= self.look_ahead:
                found.append(queue)
        return found

    def is_in_flight(self, request: RequestView) -> bool:
        """Whether a pushed plan carries it; such a request is never paused."""
        if request.queue is not None:
            return not self.queues[request.queue].idle
        return request.num_in_flight > 0

    # -- changes, by EngineCore

    def add(self, request: Request) -> None:
        assert request.request_id not in self.requests
        self.requests[request.request_id] = request
        self.stop_ids.update(request.stop_ids)

    def start_prefill(self, request: Request, num_computed: int = 0) -> None:
        """It becomes a resident whose first ``num_computed`` tokens are in the cache, not all of them."""
        request.move_to(RequestState.PREFILLING)
        request.num_computed_tokens = num_computed
        self.prefilling[request.request_id] = request

    def start_decode(self, request: Request, queue: int) -> None:
        """A plan of this queue carries the last of its known tokens: the next one, which that samples, is a row of the
        queue's next plan, be it made ahead or not."""
        del self.prefilling[request.request_id]
        request.move_to(RequestState.DECODING)
        request.queue = queue
        self._join(request, self.queues[queue], request.num_tokens)

    def move(self, request: Request, queue: int) -> None:
        """Take a decode, all of whose tokens are known, from its queue to another."""
        assert request.queue is not None
        self._part(request, self.queues[request.queue])
        request.queue = queue
        self._join(request, self.queues[queue], request.num_tokens - 1)

    def enter(self, plan: StepPlan) -> None:
        """A plan goes into flight."""
        queue = self.queues[plan.queue]
        if queue.idle:
            del self._idle[plan.queue]
            self.num_idle_decodes -= len(queue)
        else:
            del self._flying[plan.queue]
        self._flying[plan.queue] = None
        queue.in_flight += 1
        queue.last_pushed = self._last_step = plan.step
        if plan.num_sampled:
            queue.last_sampled = plan.step
        self.num_in_flight += 1
        self.num_tokens_in_flight += plan.num_tokens

    def come_back(self, plan: StepPlan) -> None:
        """A plan retires, or is lost with its stages."""
        queue = self.queues[plan.queue]
        queue.in_flight -= 1
        if queue.last_sampled == plan.step:
            queue.last_sampled = None
        if queue.idle:
            del self._flying[plan.queue]
            self._idle[plan.queue] = None
            self.num_idle_decodes += len(queue)
        self.num_in_flight -= 1
        self.num_tokens_in_flight -= plan.num_tokens

    def leave(self, request: Request, state: RequestState) -> None:
        """Take a resident or a waiter off the table's lists: it is paused or finished."""
        if request.queue is not None:
            self._part(request, self.queues[request.queue])
            request.queue = None
        self.prefilling.pop(request.request_id, None)
        request.move_to(state)
        request.num_computed_tokens = 0
        if state is RequestState.FINISHED:
            del self.requests[request.request_id]
            self.stop_ids -= Counter(request.stop_ids)  # counts that reach zero go with it

    def _join(self, request: Request, queue: DecodeQueue, position: int) -> None:
        queue.add(request, position)
        self.num_decoding += 1
        self.num_idle_decodes += queue.idle

    def _part(self, request: Request, queue: DecodeQueue) -> None:
        queue.remove(request.request_id)
        self.num_decoding -= 1
        self.num_idle_decodes -= queue.idle

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the lists disagree with the requests' states."""
        decoding = [request for queue in self.queues for request in queue]
        for queue in self.queues:
            queue.check_integrity()
        assert sorted(self._idle) == [queue.index for queue in self.queues if queue.idle]
        flying = sorted((queue for queue in self.queues if not queue.idle), key=lambda queue: queue.last_pushed)
        assert list(self._flying) == [queue.index for queue in flying]
        assert all(r.num_computed_tokens < r.num_tokens for r in self.prefilling.values())
        assert self.num_decoding == len(decoding)
        assert self.num_idle_decodes == sum(len(queue) for queue in self.queues if queue.idle)
        assert self.num_in_flight == sum(queue.in_flight for queue in self.queues)
        _check_states(decoding, RequestState.DECODING)
        _check_states(self.prefilling.values(), RequestState.PREFILLING)
        resident = [r for r in self.requests.values() if r.is_resident]
        assert len(resident) == self.num_resident
        slots = [r.slot for r in resident]
        assert None not in slots and len(set(slots)) == len(slots)


def _check_states(requests: Iterable[Request], state: RequestState) -> None:
    for request in requests:
        assert request.state is state, (request.external_id, request.state, state)
