"""When a burst's decodes wait for its prompts, and that nobody waits for longer than for those who came with them."""

from __future__ import annotations

from typing import Any

import pytest

from llm_engine.schedulers.outstanding import Outstanding
from llm_engine.schedulers.prompts_first import PromptsFirst
from llm_engine.schedulers.traffic import Traffic
from tests.schedulers.books import Books


def work(prompt_tokens: int, num_decodes: int = 0, **settings: Any) -> Outstanding:
    """Prompts of 100 tokens."""
    values = {"num_prompts": -(-prompt_tokens // 100), "mean_worth": 1.0, "crowded": False, **settings}
    return Outstanding(
        num_decodes=num_decodes, prompt_tokens=prompt_tokens, idle_decodes=num_decodes, tokens_in_flight=0, **values
    )


class Burst:
    """Twenty prompts of 100 tokens, and answers of ``answer``; blocks hold 4 tokens."""

    def __init__(self, answer: int = 100, num_blocks: int = 2000, ordering: str = "fcfs") -> None:
        self.books, traffic = Books(num_blocks=num_blocks, parts={"ordering": ordering}), Traffic()
        traffic.added(self.books.waiting(100, max_tokens=answer))
        self.rule = PromptsFirst(traffic)

    def apply(self, work: Outstanding) -> bool:
        return self.rule.apply(self.books.a_pass(), work)


def test_the_decodes_of_a_burst_wait_until_its_prompts_no_longer_fill_a_step() -> None:
    """The knee of a model that never ran is 128 tokens."""
    burst = Burst()
    assert not burst.apply(work(2000)), "nobody decodes"
    burst.rule.computed(1000)
    assert burst.apply(work(1000, num_decodes=10))
    burst.rule.computed(900)
    assert not burst.apply(work(100, num_decodes=19))


def test_who_comes_later_prolongs_the_wait_of_nobody() -> None:
    burst = Burst()
    burst.apply(work(2000))
    burst.rule.computed(1000)
    assert burst.apply(work(5000, num_decodes=10))
    burst.rule.computed(1000)
    assert not burst.apply(work(4000, num_decodes=20))


def test_what_the_cache_had_or_has_ended_makes_nobody_wait_later() -> None:
    """Half of the burst is never computed: who comes next finds it over."""
    burst = Burst()
    burst.apply(work(2000))
    burst.rule.computed(1000)
    assert not burst.apply(work(0, num_decodes=20))
    assert not burst.apply(work(1000, num_decodes=20))


def test_a_burst_that_shrinks_is_over_sooner() -> None:
    burst = Burst()
    burst.apply(work(2000))
    burst.rule.computed(500)
    assert burst.apply(work(300, num_decodes=5)), "1,200 tokens of it have gone"
    burst.rule.computed(300)
    assert not burst.apply(work(5000, num_decodes=8))


@pytest.mark.parametrize(("ordering", "wait"), [("priority", False), ("deadline", False), ("fair", True)])
def test_where_some_are_more_urgent_than_others_nobody_waits(ordering: str, wait: bool) -> None:
    burst = Burst(ordering=ordering)
    burst.apply(work(2000))
    assert burst.apply(work(1000, num_decodes=10)) is wait


def test_decodes_that_were_there_before_do_not_wait() -> None:
    assert not Burst().apply(work(2000, num_decodes=1))


@pytest.mark.parametrize(("answer", "wait"), [(99, False), (100, True), (300, True)])
def test_nobody_waits_for_longer_than_the_answers_take(answer: int, wait: bool) -> None:
    burst = Burst(answer)
    burst.apply(work(2000))
    assert burst.apply(work(1000, num_decodes=10)) is wait


@pytest.mark.parametrize(("num_blocks", "wait"), [(749, False), (750, True)])
def test_without_memory_for_the_prompts_and_half_of_the_answers_nobody_waits(num_blocks: int, wait: bool) -> None:
    burst = Burst(num_blocks=num_blocks)
    burst.apply(work(2000))
    assert burst.apply(work(1000, num_decodes=10)) is wait


def test_where_some_find_no_place_nobody_waits_any_more() -> None:
    burst = Burst()
    burst.apply(work(2000, crowded=True))
    assert not burst.apply(work(1000, num_decodes=10))
    burst.apply(work(2000))
    assert burst.apply(work(1000, num_decodes=10))
    assert not burst.apply(work(1000, num_decodes=10, crowded=True))
    assert not burst.apply(work(1000, num_decodes=10)), "it is over"
