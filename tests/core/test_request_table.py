"""The columns of running decodes against a naive model: positions, due blocks, due lengths, whatever comes and goes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.decode_queue import DecodeQueue
from llm_engine.core.request import Request, RequestId, RequestState
from llm_engine.core.request_table import RequestTable
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import StepPlan


def decoding(
    table: RequestTable, number: int, num_tokens: int, limit: int, queue: int, stops: tuple[int, ...] = ()
) -> Request:
    """A request whose known tokens but the last are computed, put in a queue."""
    request = joining(table, number, num_tokens, limit, queue, stops)
    table.move(request, queue)  # as if its last chunk had come back with the last of these tokens
    return request


def joining(
    table: RequestTable, number: int, num_tokens: int, limit: int, queue: int, stops: tuple[int, ...] = ()
) -> Request:
    """A request that joins a queue with its last chunk: what that samples is not known yet."""
    prompt = list(range(num_tokens))
    request = Request(RequestId(number), str(number), prompt, SamplingParams(), limit, 0.0, frozenset(stops))
    table.add(request)
    request.slot = number
    table.start_prefill(request)
    table.start_decode(request, queue)
    return request


@dataclass(eq=False)
class Row:
    """The naive model of one decode."""

    request: Request
    limit: int
    unknown: int = 0
    """Tokens of it that pushes in flight sample."""

    @property
    def num_sampled(self) -> int:
        """Its tokens, those in flight included."""
        return self.request.num_tokens + self.unknown

    @property
    def position(self) -> int:
        return self.num_sampled - 1


class Model:
    """A queue as anybody would write it, and the queue itself, told the same. Two pushes are in flight at most."""

    def __init__(self, block_size: int) -> None:
        self.table = RequestTable(1, block_size)
        self.queue: DecodeQueue = self.table.queues[0]
        self.block_size = block_size
        self.rows: dict[int, Row] = {}
        self.in_flight: deque[tuple[StepPlan, list[Row]]] = deque()
        self.next_id = 0
        self.step = 0

    def add(self, num_tokens: int, more: int) -> None:
        """One that comes from another queue: all its tokens are known."""
        request = decoding(self.table, self.next_id, num_tokens, num_tokens + more, 0)
        self.rows[self.next_id] = Row(request, num_tokens + more)
        self.next_id += 1

    def leave(self, index: int, state: RequestState) -> None:
        if self.rows:
            request_id = list(self.rows)[index % len(self.rows)]
            self.table.leave(self.rows.pop(request_id).request, state)

    def push(self, stalls: list[bool], prompts: list[tuple[int, int]]) -> None:
        """Push every row that neither stalls nor is ending, and the last chunks of these prompts."""
        while len(self.in_flight) > 1:
            self.take_result()
        stalls = (stalls or [False]) * len(self.queue)
        ending = self.queue.ending()
        chosen = [i for i, stall in zip(self.queue.ids, stalls, strict=False) if not stall and i not in ending]
        if chosen:
            self.queue.advance([i for i in self.queue.ids if i not in chosen])
        sampled = [self.rows[i] for i in chosen]
        for num_tokens, more in prompts:
            request = joining(self.table, self.next_id, num_tokens, num_tokens + more, 0)
            self.rows[self.next_id] = Row(request, num_tokens + more)
            sampled.append(self.rows[self.next_id])
            self.next_id += 1
        for row in sampled:
            row.unknown += 1
        self.step += 1
        plan = StepPlan(0, decode_ids=chosen, chunk_samples=[True] * len(prompts), step=self.step)
        self.table.enter(plan)
        self.in_flight.append((plan, sampled))

    def take_result(self) -> None:
        """The oldest push comes back: its tokens are known, and who has its last one is finished."""
        if not self.in_flight:
            return
        plan, sampled = self.in_flight.popleft()
        self.table.come_back(plan)
        for row in sampled:
            row.unknown -= 1
            request_id = row.request.request_id
            if request_id not in self.rows:
                continue
            row.request.token_ids.append(request_id % 50)
            if row.request.num_tokens == row.limit:
                self.table.leave(self.rows.pop(request_id).request, RequestState.FINISHED)

    def check(self) -> None:
        queue, rows = self.queue, self.rows
        self.table.check_integrity()
        assert sorted(queue.ids) == sorted(rows)
        assert len(queue) == len(rows) == self.table.num_decoding == self.table.num_resident
        for left_out in ([], list(rows)[::2], list(rows)):
            kept = queue.rows(left_out)
            assert list(kept.ids) == list(kept.slots) == [i for i in queue.ids if i not in left_out]
            assert list(kept.positions) == [rows[i].position for i in kept.ids]
            assert kept.requests == [rows[i].request for i in kept.ids]
        assert all(queue.position(i) == row.position for i, row in rows.items())
        assert sorted(queue.due_for_block()) == sorted(i for i, r in rows.items() if r.position % self.block_size == 0)
        assert sorted(queue.ending()) == sorted(i for i, row in rows.items() if row.num_sampled == row.limit)
        assert [request.request_id for request in queue] == list(queue.ids)
        assert list(queue.slots) == list(queue.ids)
        assert queue.last_sampled == max((plan.step for plan, sampled in self.in_flight if sampled), default=None)


sizes = st.tuples(st.integers(1, 40), st.integers(1, 12))
stalls = st.one_of(st.just([]), st.lists(st.booleans(), min_size=1, max_size=8))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 2, 4, 16]),
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), sizes),
            st.tuples(st.just("pause"), st.integers(0, 50)),
            st.tuples(st.just("finish"), st.integers(0, 50)),
            st.tuples(st.just("push"), stalls, st.lists(sizes, max_size=2)),
            st.tuples(st.just("push"), stalls, st.just([])),
            st.tuples(st.just("result")),
        ),
        max_size=60,
    ),
)
def test_columns_agree_with_a_naive_model(block_size: int, actions: list[Any]) -> None:
    model = Model(block_size)
    for action in actions:
        match action:
            case ("add", (num_tokens, more)):
                model.add(num_tokens, more)
            case ("pause", index):
                model.leave(index, RequestState.PAUSED)
            case ("finish", index):
                model.leave(index, RequestState.FINISHED)
            case ("push", stalls, prompts):
                model.push(stalls, prompts)
            case ("result",):
                model.take_result()
        model.check()


def test_a_row_is_due_for_a_block_when_its_next_position_opens_one() -> None:
    table = RequestTable(1, 4)
    for number, num_tokens in enumerate([4, 5, 6, 9]):  # next positions 3, 4, 5, 8
        decoding(table, number, num_tokens, 100, 0)
    assert table.queues[0].due_for_block() == [1, 3]
    table.queues[0].advance([1])
    assert sorted(table.queues[0].due_for_block()) == [0, 1]


def test_a_row_is_ending_when_its_last_token_was_pushed() -> None:
    table = RequestTable(1, 4)
    decoding(table, 0, 5, 6, 0)
    decoding(table, 1, 5, 7, 0)
    queue = table.queues[0]
    assert queue.ending() == []
    queue.advance([])
    assert queue.ending() == [0]
    queue.remove(0)
    queue.advance([1])
    assert queue.ending() == []
    queue.advance([])
    assert queue.ending() == [1]


def test_a_row_whose_last_chunk_is_in_flight_computes_the_token_that_it_samples_next() -> None:
    table = RequestTable(1, 4)
    for number, (num_tokens, limit) in enumerate([(3, 9), (4, 9), (5, 6), (8, 10)]):
        joining(table, number, num_tokens, limit, 0)
    queue = table.queues[0]
    assert list(queue.rows().positions) == [3, 4, 5, 8]
    assert queue.due_for_block() == [1, 3], "its prompt fills its blocks"
    assert queue.ending() == [2], "it may have one token"
    queue.advance([2])
    assert sorted(queue.ending()) == [2, 3]


def test_whom_a_plan_samples_decides_where_the_next_is_fed_from() -> None:
    table = RequestTable(2, 4)
    plans = [
        StepPlan(0, step=1, chunk_samples=[False, True]),
        StepPlan(0, step=2, chunk_samples=[False]),
        StepPlan(1, step=3, decode_ids=[7]),
    ]
    for plan in plans:
        table.enter(plan)
    assert [queue.last_sampled for queue in table.queues] == [1, 3], "a chunk that ends no prompt samples nothing"
    table.come_back(plans[0])
    assert [queue.last_sampled for queue in table.queues] == [None, 3]


def test_the_last_row_takes_the_place_of_one_that_leaves() -> None:
    table = RequestTable(1, 4)
    for number in range(4):
        decoding(table, number, 3, 10, 0)
    queue = table.queues[0]
    before = queue.generation
    queue.remove(1)
    assert list(queue.ids) == [0, 3, 2]
    assert queue.generation == before + 1, "whoever waits for a result learns that the rows changed"
    queue.remove(2)
    assert list(queue.ids) == [0, 3]
    assert 2 not in queue
    assert 3 in queue
    assert queue.holds({0, 3})
    assert not queue.holds({0, 2})


def test_the_queue_idle_longest_comes_first() -> None:
    table = RequestTable(3, 4)
    assert [queue.index for queue in table.idle_queues()] == [0, 1, 2]
    plans = [StepPlan(queue=queue, step=step) for step, queue in enumerate((1, 0, 1))]
    table.enter(plans[0])
    table.enter(plans[1])
    assert [queue.index for queue in table.idle_queues()] == [2]
    table.come_back(plans[0])
    assert [queue.index for queue in table.idle_queues()] == [2, 1]
    table.enter(plans[2])
    table.come_back(plans[1])
    assert [queue.index for queue in table.idle_queues()] == [2, 0]
    table.check_integrity()


def test_looking_ahead_takes_a_queue_in_flight_with_enough_micro_batches_behind_it() -> None:
    table = RequestTable(3, 4, num_stages=3, look_ahead=1)
    plans = [StepPlan(queue=queue, step=step) for step, queue in enumerate((0, 1, 2, 0), start=1)]
    table.enter(plans[0])
    table.enter(plans[1])
    assert table.queues_to_look_ahead() == [], "one other is behind it, and three stages want two"
    table.enter(plans[2])
    assert [queue.index for queue in table.queues_to_look_ahead()] == [0]
    table.enter(plans[3])
    assert [queue.index for queue in table.queues_to_look_ahead()] == [1], "one step ahead, not two"
    assert RequestTable(1, 4).look_ahead == 0


def test_who_is_in_flight() -> None:
    table = RequestTable(2, 4)
    decode = decoding(table, 0, 3, 9, 1)
    prefill = Request(RequestId(1), "1", [1, 2], SamplingParams(), 9, 0.0)
    table.add(prefill)
    prefill.slot = 1
    table.start_prefill(prefill)
    assert not table.is_in_flight(decode)
    assert not table.is_in_flight(prefill)
    table.queues[1].in_flight = prefill.num_in_flight = 1
    assert table.is_in_flight(decode)
    assert table.is_in_flight(prefill)
    assert [r.request_id for r in table.residents()] == [0, 1]


def test_stop_ids_are_those_of_the_living() -> None:
    table = RequestTable(1, 4)
    one, two = decoding(table, 0, 3, 9, 0, (7,)), decoding(table, 1, 3, 9, 0, (8,))
    table.leave(one, RequestState.FINISHED)
    assert set(table.stop_ids) == {8}
    table.leave(two, RequestState.FINISHED)
    assert not table.stop_ids
    assert 1 not in table


def test_integrity_notices_a_wheel_that_is_wrong() -> None:
    table = RequestTable(1, 4)
    decoding(table, 0, 3, 9, 0)
    table.check_integrity()
    table.queues[0]._bases[0] += 1
    with pytest.raises(AssertionError):
        table.check_integrity()


def test_integrity_notices_a_slot_given_twice() -> None:
    table = RequestTable(1, 4)
    first, second = decoding(table, 0, 3, 9, 0), decoding(table, 1, 3, 9, 0)
    second.slot = first.slot
    table.queues[0].slots[1] = table.queues[0].slots[0]
    with pytest.raises(AssertionError):
        table.check_integrity()
