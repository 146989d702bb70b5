"""Shortest job: the least expected rest of an answer first, by its limit or by a guess; who waits gains on others."""

from __future__ import annotations

import itertools

import pytest

from llm_engine.core.errors import ConfigError, SchedulerError
from llm_engine.core.request import Request
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.schedulers.base import Scheduler
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization
from llm_engine.schedulers.limits import Limits
from llm_engine.schedulers.micro_batches.greedy import GreedyMicroBatch
from llm_engine.schedulers.orderings.shortest_job import ShortestJobOptions, ShortestJobOrdering
from tests.engine.core_driver import CoreDriver
from tests.schedulers import predictors
from tests.schedulers.books import order
from tests.schedulers.requests import a_request

Asked = tuple[int, float]
"""Longest answer and arrival."""


def made(*requests: Request, predictor: str = "max-tokens", aging: float = 10.0) -> ShortestJobOrdering:
    ordering = ShortestJobOrdering(ShortestJobOptions(predictor=predictor, aging=aging))
    for request in requests:
        ordering.add(request)
    return ordering


@pytest.mark.parametrize(
    ("asked", "aging", "expected"),
    [
        pytest.param([(30, 0.0), (10, 0.0), (20, 0.0)], 10, [1, 2, 0], id="the shortest first"),
        pytest.param([(10, 0.0), (5, 0.0), (10, 0.0)], 10, [1, 0, 2], id="ties go by arrival"),
        pytest.param([(100, 0.0), (50, 4.9)], 10, [1, 0], id="50 tokens longer, 4.9 s older"),
        pytest.param([(100, 0.0), (50, 5.0)], 10, [0, 1], id="5 s make up for 50 tokens, and the older goes first"),
        pytest.param([(100, 0.0), (50, 5.1)], 10, [0, 1], id="more than 5 s"),
        pytest.param([(100, 0.0), (50, 49.0)], 1, [1, 0], id="with slower aging it takes longer"),
        pytest.param([(2, 0.0), (1, 1e6)], 0, [1, 0], id="without aging no wait is long enough"),
    ],
)
def test_visiting_order(asked: list[Asked], aging: float, expected: list[int]) -> None:
    requests = [a_request(number, max_tokens=tokens, arrival=at) for number, (tokens, at) in enumerate(asked)]
    assert order(made(*requests, aging=aging)) == expected


def test_the_prompt_does_not_count() -> None:
    assert order(made(a_request(0, prompt=2, max_tokens=30), a_request(1, prompt=2000, max_tokens=20))) == [1, 0]


def test_without_a_limit_it_counts_as_long_as_it_may_become() -> None:
    unlimited = a_request(0, prompt=10, max_tokens=90, params=SamplingParams(max_tokens=None))
    assert order(made(unlimited, a_request(1, max_tokens=89), a_request(2, max_tokens=91))) == [1, 0, 2]


def test_what_was_produced_before_a_pause_is_not_left_to_do() -> None:
    paused = a_request(0, max_tokens=100, produced=85)
    assert order(made(a_request(1, max_tokens=16), a_request(2, max_tokens=14), paused)) == [2, 0, 1]


def test_one_that_outlived_its_guess_counts_as_one_token() -> None:
    guess = "tests.schedulers.predictors:twice_the_prompt"
    outlived = [a_request(number, prompt=2, max_tokens=50, produced=20 - number) for number in range(2)]
    assert order(made(*outlived, a_request(2, prompt=1), predictor=guess)) == [0, 1, 2]


def test_a_guess_is_asked_for_once_in_a_life() -> None:
    predictors.ASKED.clear()
    long, short = a_request(0, prompt=9), a_request(1, prompt=3, max_tokens=500)
    ordering = made(long, short, predictor="tests.schedulers.predictors:twice_the_prompt")
    assert order(ordering) == [1, 0]
    ordering.remove(1)
    short.token_ids += [2] * 3
    assert ordering.pause_key(short) == (3.0, 1)
    ordering.add(short)
    assert predictors.ASKED == [0, 1]
    ordering.remove(1)
    ordering.ended(1)
    ordering.add(short)
    assert predictors.ASKED == [0, 1, 1]


def test_the_longest_rest_is_paused_first_and_of_equals_the_youngest() -> None:
    ordering = made()
    residents = [a_request(0, max_tokens=30), a_request(1, max_tokens=20), a_request(2, max_tokens=40, produced=10)]
    paused = sorted(residents, key=ordering.pause_key, reverse=True)
    assert [request.request_id for request in paused] == [2, 0, 1]


def test_nobody_is_displaced() -> None:
    short, long = a_request(1, max_tokens=1), a_request(0, max_tokens=1000)
    assert not made(short).displaces(short, long, {})


def test_a_flood_of_short_ones_starves_nobody() -> None:
    """One a second comes, one a second is served; 90 tokens more are worth 9 seconds."""
    ordering = made(a_request(0, max_tokens=100))
    for second in itertools.count(1):
        ordering.add(a_request(second, max_tokens=10, arrival=float(second)))
        served = order(ordering)[0]
        ordering.remove(served)
        if served == 0:
            assert second == 9
            return
        assert second < 9


@pytest.mark.parametrize("says", ["negative", "endless", "no number", "text", "yes", "nothing"])
def test_a_guess_that_is_no_number_of_tokens_is_told(says: str) -> None:
    with pytest.raises(ValueError, match="predictors:nonsense returned"):
        made(a_request(0, tenant=says), predictor="tests.schedulers.predictors:nonsense")


def test_a_predictor_that_raises_is_the_scheduler_s_error() -> None:
    ordering = made(predictor="tests.schedulers.predictors:broken")
    driver = CoreDriver(scheduler=Scheduler(ordering, MaxUtilization(), GreedyMicroBatch(), Limits(4, 4, 16, 4)))
    driver.add([1, 2, 3])
    with pytest.raises(SchedulerError, match=r"scheduler .* raised LookupError\('the model of lengths is gone'\)"):
        driver.schedule()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"aging": -1.0}, "aging"),
        ({"aging": float("nan")}, "aging"),
        ({"aging": float("inf")}, "aging"),
        ({"aging": "fast"}, "aging"),
        ({"predictor": None}, "predictor"),
        ({"predictor": "crystal-ball"}, "predictor"),
        ({"predictor": "tests.schedulers.predictors:missing"}, "predictor"),
        ({"predictor": "tests.schedulers.predictors:NOT_CALLABLE"}, "predictor"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ShortestJobOrdering(ShortestJobOptions(**options))  # type: ignore[arg-type]
    assert caught.value.field == field
