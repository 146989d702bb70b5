"""A request's states: the table is complete, and every move it does not list is a bug of ours."""

from __future__ import annotations

from itertools import product

import pytest

from llm_engine.core.request import (
    RESIDENT_STATES,
    TRANSITIONS,
    IllegalTransition,
    Request,
    RequestEvent,
    RequestId,
    RequestState,
)
from llm_engine.core.sampling_params import SamplingParams

S = RequestState
LEGAL = {
    (S.WAITING, S.PREFILLING), (S.WAITING, S.PARKED), (S.WAITING, S.FINISHED),
    (S.PARKED, S.WAITING), (S.PARKED, S.FINISHED),
    (S.PREFILLING, S.DECODING), (S.PREFILLING, S.PAUSED), (S.PREFILLING, S.FINISHED),
    (S.DECODING, S.PAUSED), (S.DECODING, S.FINISHED),
    (S.PAUSED, S.PREFILLING), (S.PAUSED, S.FINISHED),
}  # fmt: skip


def make(**more: object) -> Request:
    return Request(RequestId(1), "one", [1, 2, 3], SamplingParams(), 10, 0.0, **more)  # type: ignore[arg-type]


def test_the_table_knows_every_state() -> None:
    assert set(TRANSITIONS) == set(RequestState)
    assert {(a, b) for a, after in TRANSITIONS.items() for b in after} == LEGAL


@pytest.mark.parametrize(("before", "after"), list(product(RequestState, repeat=2)))
def test_only_listed_moves_are_made(before: RequestState, after: RequestState) -> None:
    request = make(state=before)
    if (before, after) in LEGAL:
        request.move_to(after)
        assert request.state is after
        assert request.is_resident == (after in RESIDENT_STATES)
    else:
        with pytest.raises(IllegalTransition, match=f"one: {before.value} -> {after.value}"):
            request.move_to(after)
        assert request.state is before


def test_tokens_are_the_prompt_then_the_outputs() -> None:
    request = make()
    request.token_ids += [4, 5]
    assert (request.num_prompt_tokens, request.num_tokens, request.num_output_tokens) == (3, 5, 2)
    assert request.prompt_token_ids == [1, 2, 3]


def test_events_keep_the_first_time() -> None:
    request = make()
    request.record(RequestEvent.PAUSED, 1.0)
    request.record(RequestEvent.PAUSED, 2.0)
    assert request.time_of(RequestEvent.PAUSED) == 1.0
    assert request.time_of(RequestEvent.RESUMED) is None


def test_who_wants_its_prompt_scored_computes_all_of_it() -> None:
    request = Request(RequestId(1), "one", [1], SamplingParams(prompt_logprobs=0), 10, 0.0)
    assert not request.reads_prefix_cache
    assert make().reads_prefix_cache
