"""The columns of running decodes against a naive model: positions, due blocks, due lengths, whatever comes and goes."""

from __future__ import annotations

from dataclasses import dataclass

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
    prompt = list(range(num_tokens))
    request = Request(RequestId(number), str(number), prompt, SamplingParams(), limit, 0.0, frozenset(stops))
    table.add(request)
    request.slot = number
    table.start_prefill(request)
    table.start_decode(request, queue)
    return request


@dataclass
class Row:
    """The naive model of one decode."""

    request: Request
    position: int
    limit: int
    reached: bool = False
    """Whether the last push samples its last token."""


class Model:
    """A queue as anybody would write it, and the queue itself, told the same."""

    def __init__(self, block_size: int) -> None:
        self.table = RequestTable(1, block_size)
        self.queue: DecodeQueue = self.table.queues[0]
        self.block_size = block_size
        self.rows: dict[int, Row] = {}
        self.next_id = 0

    def add(self, num_tokens: int, more: int) -> None:
        request = decoding(self.table, self.next_id, num_tokens, num_tokens + more, 0)
        self.rows[self.next_id] = Row(request, num_tokens - 1, num_tokens + more)
        self.next_id += 1

    def leave(self, index: int, state: RequestState) -> None:
        if self.rows:
            request_id = list(self.rows)[index % len(self.rows)]
            self.table.leave(self.rows.pop(request_id).request, state)

    def push(self, stalls: list[bool]) -> None:
        """Push every row that does not stall, take in a token for each, and take the finished ones out."""
        stalls = (stalls or [False]) * len(self.queue)
        chosen = [i for i, stall in zip(self.queue.ids, stalls, strict=False) if not stall]
        stalled = [i for i in self.queue.ids if i not in chosen]
        self.queue.advance(stalled)
        for request_id in chosen:
            row = self.rows[request_id]
            row.position += 1
            row.request.token_ids.append(request_id % 50)
            row.reached = row.request.num_tokens == row.limit
        self.check()
        for request_id in self.queue.ending():
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
        assert sorted(queue.ending()) == sorted(i for i, row in rows.items() if row.reached)
        assert [request.request_id for request in queue] == list(queue.ids)
        assert list(queue.slots) == list(queue.ids)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 2, 4, 16]),
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 12)),
            st.tuples(st.just("pause"), st.integers(0, 50)),
            st.tuples(st.just("finish"), st.integers(0, 50)),
            st.tuples(st.just("push"), st.just([])),
            st.tuples(st.just("push"), st.lists(st.booleans(), min_size=1, max_size=8)),
        ),
        max_size=60,
    ),
)
def test_columns_agree_with_a_naive_model(block_size: int, actions: list[tuple[str, ...]]) -> None:
    model = Model(block_size)
    for action in actions:
        match action:
            case ("add", num_tokens, more):
                model.add(int(num_tokens), int(more))
            case ("pause", index):
                model.leave(int(index), RequestState.PAUSED)
            case ("finish", index):
                model.leave(int(index), RequestState.FINISHED)
            case ("push", stalls):
                model.push(list(stalls))  # type: ignore[arg-type]
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
