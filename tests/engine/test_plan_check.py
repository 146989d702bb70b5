"""Every rule a plan may break is refused before anything is taken, naming the scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from llm_engine.core.errors import SchedulerError
from llm_engine.core.step import StepPlan
from llm_engine.engine.plan_check import check_plan, check_resources
from tests.schedulers.books import Books, Places


def books() -> Books:
    """Decodes: 0, 1 in queue 0, idle; 2 in queue 1, in flight, and 4, whose last chunk is. 3 has computed 4 of 10;
    7 has 6 of 10 in flight; 5, 6 wait."""
    made = Books(num_queues=2, max_num_seqs=7, max_micro_batch_seqs=3, max_num_batched_tokens=8, threshold=6)
    made.decoding(6, queue=0)
    made.decoding(6, queue=0)
    made.decoding(6, queue=1)
    made.prefilling(10, 4)
    made.joining(8, queue=1)
    made.waiting(5)
    made.waiting(9)
    made.prefilling(10, 6, in_flight=1)
    made.in_flight(1)
    return made


def plan(**fields: Any) -> StepPlan:
    return StepPlan(**{"queue": 0, **fields})


def check(broken: StepPlan, over: Books | None = None) -> None:
    over = over or books()
    check_plan(broken, over.table, over.limits, "mine")


@pytest.mark.parametrize(
    "good",
    [
        plan(decode_ids=[0, 1], chunk_ids=[3], chunk_tokens=[6]),
        plan(decode_ids=[1]),
        plan(chunk_ids=[5, 3], chunk_tokens=[2, 6]),
        plan(decode_ids=[0], paused_ids=[1, 3]),
        plan(paused_ids=[0]),
        plan(queue=1, paused_ids=[3]),
        plan(chunk_ids=[7], chunk_tokens=[4]),
    ],
)
def test_what_is_allowed_passes(good: StepPlan) -> None:
    check(good)


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (plan(queue=2, decode_ids=[0]), "queue 2 of 2"),
        (plan(queue=-1, decode_ids=[0]), "queue -1 of 2"),
        (plan(queue=1, decode_ids=[2]), "queue 1 is in flight"),
        (plan(chunk_ids=[3], chunk_tokens=[]), "1 chunk ids with 0 token counts"),
        (plan(decode_ids=[0, 1], chunk_ids=[3, 5], chunk_tokens=[1, 1]), "4 rows, max_micro_batch_seqs is 3"),
        (plan(chunk_ids=[3, 5], chunk_tokens=[6, 3]), "9 tokens, max_num_batched_tokens is 8"),
        (plan(paused_ids=[0, 0]), "paused twice"),
        (plan(paused_ids=[5]), "pauses request 5, which holds no blocks"),
        (plan(paused_ids=[99]), "pauses request 99, which holds no blocks"),
        (plan(paused_ids=[2]), "pauses request 2, which is in flight"),
        (plan(paused_ids=[4]), "pauses request 4, which is in flight"),
        (plan(paused_ids=[7]), "pauses request 7, which is in flight"),
        (plan(decode_ids=[2]), "decodes request 2, which is not in queue 0"),
        (plan(decode_ids=[99]), "decodes request 99"),
        (plan(decode_ids=[3]), "decodes request 3"),
        (plan(decode_ids=[4]), "decodes request 4, which is not in queue 0"),
        (plan(decode_ids=[0, 0]), "stands in it twice"),
        (plan(chunk_ids=[3, 3], chunk_tokens=[1, 1]), "stands in it twice"),
        (plan(decode_ids=[0], paused_ids=[0]), "stands in it twice"),
        (plan(chunk_ids=[3], chunk_tokens=[1], paused_ids=[3]), "stands in it twice"),
        (plan(chunk_ids=[0], chunk_tokens=[1]), "a chunk of request 0, which has none to compute"),
        (plan(chunk_ids=[99], chunk_tokens=[1]), "a chunk of request 99"),
        (plan(chunk_ids=[3], chunk_tokens=[0]), "computes 0 tokens of request 3"),
        (plan(chunk_ids=[3], chunk_tokens=[-1]), "computes -1 tokens of request 3"),
        (plan(chunk_ids=[4], chunk_tokens=[1]), "a chunk of request 4, which has none to compute"),
        (plan(chunk_ids=[7], chunk_tokens=[5]), "computes 5 tokens of request 7"),
        (plan(chunk_ids=[5], chunk_tokens=[6]), "computes 6 tokens of request 5"),
        (plan(chunk_ids=[6], chunk_tokens=[7]), "long_prefill_token_threshold is 6"),
    ],
)
def test_what_is_not_allowed_is_refused_by_name(broken: StepPlan, rule: str) -> None:
    with pytest.raises(SchedulerError, match="scheduler mine returned an impossible plan: .*" + rule):
        check(broken)


def test_more_residents_than_seats() -> None:
    over = books()
    check(plan(chunk_ids=[5], chunk_tokens=[2]), over)
    with pytest.raises(SchedulerError, match="more residents than max_num_seqs, 7"):
        check(plan(chunk_ids=[5, 6], chunk_tokens=[2, 2]), over)
    check(plan(chunk_ids=[5, 6], chunk_tokens=[2, 2], paused_ids=[0]), over)


def test_nothing_changes_while_checking() -> None:
    over = books()
    before = over.kv.num_free_blocks
    check(plan(decode_ids=[0, 1], chunk_ids=[3], chunk_tokens=[6]), over)
    over.table.check_integrity()
    assert over.kv.num_free_blocks == before


# -- resources: here 5 and 6 wait, and 3 is resident


def places(*managers: Places) -> Books:
    made = Books(num_queues=1, max_num_seqs=6, max_num_batched_tokens=20, resources=managers)
    for _ in range(3):
        made.decoding(6)
    made.prefilling(10, 4)
    made.joining(8)
    made.waiting(5)
    made.waiting(9)
    return made


BOTH = plan(chunk_ids=[5, 6], chunk_tokens=[1, 1])


def lacking(over: Books, broken: StepPlan) -> None:
    assert check_resources(broken, over.table, over.resources, "mine") == []


def test_newcomers_are_counted_one_after_the_other() -> None:
    lacking(places(Places("lamps", 4), Places("desks", 2)), BOTH)
    says = "scheduler mine returned an impossible plan: it starts request 6, and resource desks has too little for it"
    with pytest.raises(SchedulerError, match=says):
        lacking(places(Places("lamps", 4), Places("desks", 1)), BOTH)


def test_residents_need_nothing_more() -> None:
    over = places(Places("desks", 1))
    lacking(over, plan(decode_ids=[0, 1], chunk_ids=[3, 5], chunk_tokens=[1, 1]))


def test_whom_the_scheduler_reserved_for_is_not_asked_about_again() -> None:
    desks = Places("desks", 1)
    over = places(desks)
    over.resources.begin_pass()
    over.resources.reserve(over.table[5])
    desks.count = 0  # somebody outside took it
    lacking(over, plan(chunk_ids=[5], chunk_tokens=[1]))
    over.resources.begin_pass()
    with pytest.raises(SchedulerError, match="starts request 5, and resource desks"):
        lacking(over, plan(chunk_ids=[5], chunk_tokens=[1]))


def test_where_a_manager_raises_the_request_is_named_and_the_others_stand() -> None:
    class Moody(Places):
        def needed(self, request: Any) -> int:
            if request.request_id == 5:
                raise LookupError("who is that")
            return 1

    over = places(Moody("desks", 1))
    found = check_resources(BOTH, over.table, over.resources, "mine")
    assert [(error.request_id, error.manager) for error in found] == [(5, "desks")]
