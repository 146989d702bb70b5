"""How many queues pay, from what steps of each size took."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llm_engine.core.pipeline_timing import PipelineTiming
from llm_engine.core.request_table import RequestTable
from llm_engine.core.step import StepPlan, StepResult
from llm_engine.schedulers.outstanding import Outstanding
from llm_engine.schedulers.queue_count import QueueCount


def work(num_decodes: int, prompt_tokens: int = 0) -> Outstanding:
    return Outstanding(
        num_decodes=num_decodes,
        prompt_tokens=prompt_tokens,
        num_prompts=int(prompt_tokens > 0),
        mean_worth=1.0,
        idle_decodes=0,
        tokens_in_flight=0,
        crowded=False,
    )


class Stages:
    """Four of them, with twice as many queues; a step of n tokens takes ``seconds(n)`` in each."""

    def __init__(self, seconds: Callable[[int], float], link: float = 0.0) -> None:
        self.seconds, self.link = seconds, link
        self.table = RequestTable(8, 16, num_stages=4)
        self.timing: PipelineTiming = self.table.timing
        self.count = QueueCount()
        self._now = 0.0

    def saw(self, *sizes: int, times: int = 20) -> Stages:
        """Steps of these sizes came back, each alone in the pipeline."""
        for _ in range(times):
            for size in sizes:
                spans, at = [], self._now
                for _ in range(4):
                    spans.append((at, at + self.seconds(size)))
                    at = spans[-1][1] + self.link
                self._now = at
                plan = StepPlan(0, decode_ids=[*range(size)], decode_positions=[0] * size)
                self.timing.observe(plan, StepResult(0, 1, [], busy=spans))
        return self

    def choose(self, num_decodes: int, prompt_tokens: int = 0, largest: int = 2048) -> int:
        self.count._look_again_at = 0
        return self.count.choose(self.table, work(num_decodes, prompt_tokens), largest)


def dense(tokens: int) -> float:
    return 10e-3 + 1e-5 * tokens


def mixtral(tokens: int) -> float:
    """Of ten layers on an A100: two of eight experts for the first token, nearly all for a few dozen."""
    return {1: 5.7e-3, 2: 9.2e-3, 4: 13.6e-3, 32: 19.7e-3, 64: 20.1e-3}[tokens]


def test_before_anything_was_measured_there_are_as_many_as_stages() -> None:
    assert Stages(dense).choose(6) == 4


def test_where_a_step_takes_its_time_whatever_its_tokens_there_are_as_many_as_stages() -> None:
    assert Stages(dense).saw(1, 2, 8, 64).choose(64) == 4


def test_a_link_as_slow_as_a_stage_asks_for_more() -> None:
    slow = Stages(lambda tokens: 1e-3 + 1e-3 * tokens, link=8e-3).saw(1, 4, 8, 16, 32)
    assert slow.choose(32) > 4


@pytest.mark.parametrize(("seen", "count"), [((2, 4, 32, 64), 4), ((1, 2, 4, 32, 64), 6)])
def test_that_one_token_alone_is_cheap_counts_once_it_was_seen(seen: tuple[int, ...], count: int) -> None:
    """Six micro-batches of one token read fewer experts than four of up to two."""
    assert Stages(mixtral).saw(*seen).choose(6) == count


def test_beside_prompts_the_line_counts_and_not_what_one_size_took() -> None:
    stages = Stages(mixtral).saw(1, 2, 4, 32, 64)
    assert (stages.choose(6), stages.choose(3, prompt_tokens=3)) == (6, 4)


def test_fewer_tokens_than_stages_go_one_by_one() -> None:
    assert Stages(dense).saw(1, 2, 3).choose(3) == 3
