"""What requests are like: prompts by those that came, answers by those that ended."""

from __future__ import annotations

import pytest

from llm_engine.core.request import Request, RequestId
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.schedulers.traffic import Traffic


def request(number: int, prompt: int, allowed: int) -> Request:
    return Request(RequestId(number), str(number), [0] * prompt, SamplingParams(), prompt + allowed, 0.0)


def test_before_anybody_came_nothing_is_due() -> None:
    assert Traffic().due(10, 0) == 0.0


def test_until_an_answer_has_ended_it_is_taken_to_be_as_long_as_it_may_get() -> None:
    traffic = Traffic()
    for number in range(3):
        traffic.added(request(number, 100, 50))
    assert traffic.due(10, 0) == pytest.approx(10 * 100 / 50)
    assert traffic.due(0, 200) == pytest.approx(200 / 50)


def test_answers_that_ended_count_by_their_length() -> None:
    traffic, made = Traffic(), request(0, 100, 5000)
    traffic.added(made)
    made.token_ids += [1] * 20
    traffic.ended(0)
    assert traffic.due(1, 0) == pytest.approx(100 / 20)


def test_one_that_comes_back_after_a_pause_counts_once() -> None:
    traffic, made = Traffic(), request(0, 100, 10)
    traffic.added(made)
    made.token_ids += [1] * 5
    traffic.added(made)
    traffic.added(request(1, 200, 10))
    assert traffic.due(1, 0) == pytest.approx(150 / 10)


def test_unknown_ids_are_ignored_and_nobody_is_remembered() -> None:
    traffic = Traffic()
    traffic.ended(7)
    for number in range(1000):
        traffic.added(request(number, 10, 10))
        traffic.ended(number)
    assert not traffic._alive


def test_it_follows_what_comes_of_late() -> None:
    traffic = Traffic()
    for number in range(1000):
        traffic.added(request(number, 10 if number < 500 else 1000, 100))
    assert traffic.due(1, 0) == pytest.approx(10, rel=0.01)
