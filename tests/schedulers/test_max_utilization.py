"""Who may hold memory: what fits now beside what was promised; whom a shortage and whom a newcomer pauses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.errors import CapacityError, ConfigError
from llm_engine.core.sampling_params import SamplingParams
from llm_engine.schedulers.base import Verdict
from llm_engine.schedulers.capacities.max_utilization import MaxUtilization, MaxUtilizationOptions
from tests.engine.core_driver import CoreDriver
from tests.engine.test_core_properties import check_outcomes, live, lives, shapes
from tests.schedulers.books import Books, Places, chunks

# -- making room


def test_room_that_is_there_costs_nobody_anything() -> None:
    books = Books(num_blocks=5)
    books.decoding(8)
    step = books.a_pass()
    assert MaxUtilization().make_room(step, 3)
    assert step.plan.paused_ids == []


def test_the_youngest_goes_first_and_no_more_than_needed() -> None:
    books = Books(num_blocks=6)
    for _ in range(3):
        books.decoding(9)  # two blocks each
    step = books.a_pass()
    assert MaxUtilization().make_room(step, 1)
    assert step.plan.paused_ids == [2]
    assert MaxUtilization().make_room(step, 4)
    assert step.plan.paused_ids == [2, 1]


def test_who_shares_its_blocks_frees_none_and_the_next_must_go_too() -> None:
    books = Books(num_blocks=4)
    books.decoding(9, first=1)
    books.decoding(9, first=2)
    sharer = books.waiting(9, first=1)
    books.kv.add_sequence(sharer.request_id, sharer.block_hashes, 9)
    sharer.slot = 2
    books.table.start_prefill(sharer)
    step = books.a_pass()
    assert MaxUtilization().make_room(step, 1)
    assert step.plan.paused_ids == [2, 1]


def test_who_is_in_flight_or_in_the_plan_stays() -> None:
    books = Books(num_queues=2, num_blocks=10)
    for queue in (0, 0, 1):
        books.decoding(9, queue=queue)
    books.prefilling(9, 8, in_flight=1)
    books.joining(8, queue=1)
    books.in_flight(1)
    step = books.a_pass()
    step.add_decodes([1], 0)
    assert not MaxUtilization().make_room(step, 5)
    assert step.plan.paused_ids == [0], "1 is in the plan, 2, 3 and 4 are in flight"


def test_the_one_that_asks_may_be_the_youngest() -> None:
    books = Books(num_blocks=2)
    books.decoding(9)
    plan = books.plan()
    assert plan is not None
    assert (plan.paused_ids, list(plan.decode_ids)) == ([0], [])
    assert [request.request_id for request in books.scheduler.ordering.visit(books.a_pass())] == [0]


# -- judging


def test_admitted_while_the_known_tokens_fit() -> None:
    books = Books(num_blocks=5)
    assert MaxUtilization().judge(books.a_pass(), books.waiting(20)) is Verdict.ADMIT
    assert MaxUtilization().judge(books.a_pass(), books.waiting(21)) is Verdict.STOP


def test_what_residents_still_need_for_their_prompts_is_not_given_away() -> None:
    books = Books(num_blocks=6)
    books.prefilling(16, 8)  # holds 2 of 6, is promised 2 more
    assert MaxUtilization().judge(books.a_pass(), books.waiting(8)) is Verdict.ADMIT
    assert MaxUtilization().judge(books.a_pass(), books.waiting(9)) is Verdict.STOP


def test_what_this_pass_admitted_is_promised_the_rest_of_its_prompt_too() -> None:
    books = Books(num_blocks=6)
    first = books.waiting(16)
    step = books.a_pass()
    step.start(first, 8)
    assert MaxUtilization().judge(step, books.waiting(8)) is Verdict.ADMIT
    assert MaxUtilization().judge(step, books.waiting(9)) is Verdict.STOP


def test_a_chunk_in_this_plan_is_not_promised_twice() -> None:
    books = Books(num_blocks=4)
    resident = books.prefilling(12, 4)  # holds 1
    step = books.a_pass()
    step.add_chunk(resident, 8, 2)
    assert MaxUtilization().judge(step, books.waiting(4)) is Verdict.ADMIT
    assert MaxUtilization().judge(step, books.waiting(5)) is Verdict.STOP


def test_a_prefix_that_somebody_holds_costs_nothing() -> None:
    books = Books(num_blocks=6)
    books.decoding(17, first=1)  # holds 4, all of them to be found
    assert MaxUtilization().judge(books.a_pass(), books.waiting(24, first=1)) is Verdict.ADMIT
    assert MaxUtilization().judge(books.a_pass(), books.waiting(24, first=2)) is Verdict.STOP


def test_a_prefix_that_nobody_holds_costs_its_blocks() -> None:
    books = Books(num_blocks=5)
    books.kv.free(books.decoding(17, first=1).request_id)
    assert MaxUtilization().judge(books.a_pass(), books.waiting(21, first=1)) is Verdict.STOP
    assert MaxUtilization().judge(books.a_pass(), books.waiting(20, first=1)) is Verdict.ADMIT


def test_a_window_bounds_what_a_long_prompt_needs() -> None:
    assert MaxUtilization().judge(Books(num_blocks=20).a_pass(), Books().waiting(400)) is Verdict.STOP
    books = Books(num_blocks=20, window=8, max_num_batched_tokens=16)
    assert MaxUtilization().judge(books.a_pass(), books.waiting(400)) is Verdict.ADMIT


def test_no_seat_is_left() -> None:
    books = Books(max_num_seqs=2)
    books.decoding(4)
    books.prefilling(8, 4)
    assert MaxUtilization().judge(books.a_pass(), books.waiting(4)) is Verdict.STOP


def test_a_pass_that_paused_admits_nobody() -> None:
    books = Books(num_blocks=10)
    step = books.a_pass()
    step.pause(books.decoding(9))
    assert MaxUtilization().judge(step, books.waiting(1)) is Verdict.STOP


@pytest.mark.parametrize(("places", "verdict"), [(0, Verdict.SKIP), (1, Verdict.SKIP), (2, Verdict.ADMIT)])
def test_who_lacks_a_resource_is_passed_over(places: int, verdict: Verdict) -> None:
    books = Books(resources=[Places("plenty", 99), Places("rare", places, wanted=2)])
    assert MaxUtilization().judge(books.a_pass(), books.waiting(4)) is verdict


def test_resources_are_promised_once_in_a_pass() -> None:
    books = Books(resources=[Places("rare", 3, wanted=2)])
    books.waiting(4)
    books.waiting(4)
    assert chunks(books.plan()) == {0: 4}


# -- options of admission


def capacity(**options: Any) -> MaxUtilization:
    return MaxUtilization(MaxUtilizationOptions(**options))


@pytest.mark.parametrize(
    ("known", "verdict"),
    [
        pytest.param(24, Verdict.ADMIT, id="leaves just the watermark"),
        pytest.param(25, Verdict.STOP, id="would leave a block less"),
    ],
)
def test_the_watermark_stays_free(known: int, verdict: Verdict) -> None:
    books = Books(num_blocks=10)
    books.decoding(9)  # holds 2 of 10; the watermark is 2
    assert capacity(watermark=0.25).judge(books.a_pass(), books.waiting(known)) is verdict


def test_the_watermark_is_not_kept_in_an_empty_engine() -> None:
    books = Books(num_blocks=10)
    step, first = books.a_pass(), books.waiting(36)
    assert capacity(watermark=0.9).judge(step, first) is Verdict.ADMIT
    step.start(first, 32)
    assert capacity(watermark=0.9).judge(step, books.waiting(1)) is Verdict.STOP


@pytest.mark.parametrize("watermark", [-0.1, 1.0, 2, float("nan")])
def test_the_watermark_is_a_share(watermark: float) -> None:
    with pytest.raises(ConfigError, match="watermark"):
        MaxUtilizationOptions(watermark=watermark)


def test_a_request_that_fits_alone_runs_under_any_watermark() -> None:
    driver = CoreDriver(num_blocks=6, parts={"scheduler_options": {"watermark": 0.99}})
    for number in range(3):
        driver.add([number] * 9, 11)  # 5 blocks, all there are
    driver.run()
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in range(3))


@pytest.mark.parametrize(("whole", "verdict"), [(True, Verdict.STOP), (False, Verdict.ADMIT)])
def test_the_whole_prompt_or_only_the_first_chunk_must_fit(whole: bool, verdict: Verdict) -> None:
    books = Books(num_blocks=10, max_num_batched_tokens=8)
    books.prefilling(40, 32)  # 2 blocks are free, both promised
    assert capacity(reserve_full_prompt=whole).judge(books.a_pass(), books.waiting(20)) is verdict


@pytest.mark.parametrize(("free", "verdict"), [(2, Verdict.ADMIT), (1, Verdict.STOP)])
def test_the_first_chunk_must_find_its_blocks(free: int, verdict: Verdict) -> None:
    books = Books(num_blocks=6, max_num_batched_tokens=8)
    books.decoding(4 * (6 - free) + 1)
    assert capacity(reserve_full_prompt=False).judge(books.a_pass(), books.waiting(20)) is verdict


def test_who_would_never_fit_whole_is_not_begun() -> None:
    books = Books(num_blocks=5, max_num_batched_tokens=8)
    assert capacity(reserve_full_prompt=False).judge(books.a_pass(), books.waiting(20)) is Verdict.ADMIT
    assert capacity(reserve_full_prompt=False).judge(books.a_pass(), books.waiting(21)) is Verdict.STOP


@pytest.mark.parametrize("options", [{}, {"watermark": 0.5}, {"reserve_full_prompt": False}], ids=str)
def test_who_can_never_run_is_told_and_nobody_else(options: dict[str, Any]) -> None:
    driver = CoreDriver(num_blocks=5, parts={"ordering": "shortest-job", "scheduler_options": options})
    first = driver.add([9] * 4, 12)
    too_large = driver.add(range(17), 2)  # visited first, refused; it is not the oldest
    driver.run()
    error = driver.outcomes[too_large].ends[0].error
    assert isinstance(error, CapacityError)
    assert "request r1 can never run: it needs room for 17 tokens" in str(error)
    assert driver.outcomes[first].tokens == driver.expected(first)


# -- duplicates


def a_driver(**settings: Any) -> CoreDriver:
    return CoreDriver(**{"num_blocks": 40, "max_num_batched_tokens": 64, **settings})


def test_a_duplicate_is_passed_over_and_finds_the_blocks_in_the_next_pass() -> None:
    driver = a_driver(num_queues=2)
    driver.add(range(10))
    driver.add(range(10))
    driver.add([50, 51])
    assert chunks(driver.schedule()) == {0: 10, 2: 2}
    assert chunks(driver.schedule()) == {1: 2}, "published when pushed: nothing had to come back"
    assert driver.requests[1].num_cached_tokens == 8
    driver.run()


def test_duplicates_run_together_where_that_is_wanted() -> None:
    driver = a_driver(parts={"scheduler_options": {"defer_duplicates": False}})
    driver.add(range(10))
    driver.add(range(10))
    assert chunks(driver.schedule()) == {0: 10, 1: 10}
    driver.run()


def test_a_prompt_in_chunks_is_followed_until_the_prefix_parts() -> None:
    driver = a_driver(max_num_batched_tokens=8)
    driver.add(range(20), 1)
    driver.add([*range(12), 90, 91, 92, 93], 1)
    assert chunks(driver.step()) == {0: 8}
    assert chunks(driver.step()) == {0: 8}, "its third block is next"
    assert chunks(driver.step()) == {0: 4, 1: 4}
    driver.run()


def test_duplicates_that_are_cached_whole_run_together() -> None:
    driver = a_driver()
    driver.add(range(8), 1)
    driver.run()
    driver.add(range(8), 1)
    driver.add(range(8), 1)
    # The last token is computed again, and so is its block: waiting would not spare that.
    assert chunks(driver.schedule()) == {1: 4, 2: 4}
    driver.run()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"prompt": range(4)}, {"prompt": range(4)}, id="prompts of one block find none"),
        pytest.param({"prompt": range(3)}, {"prompt": range(9)}, id="the first one fills no block"),
        pytest.param({"prompt": range(9)}, {"prompt": range(9), "salt": "mine"}, id="salted apart"),
        pytest.param(
            {"prompt": range(9)},
            {"prompt": range(9), "params": SamplingParams(temperature=0.0, prompt_logprobs=0)},
            id="one that computes every token",
        ),
    ],
)
def test_who_would_not_find_it_does_not_wait(first: dict[str, Any], second: dict[str, Any]) -> None:
    driver = a_driver()
    driver.add(**first)
    driver.add(**second)
    assert list(chunks(driver.schedule())) == [0, 1]


def test_who_waits_for_one_that_goes_away_runs() -> None:
    driver = a_driver(max_num_batched_tokens=8)
    driver.add(range(20))
    driver.add(range(20))
    assert chunks(driver.step()) == {0: 8}
    driver.abort(0)
    assert chunks(driver.step()) == {1: 8}
    assert driver.requests[1].num_cached_tokens == 8
    driver.run()


def test_who_waits_for_one_that_is_paused_goes_on_behind_it() -> None:
    books = Books()
    contributor, duplicate = books.prefilling(20, 8, first=1), books.waiting(20, first=1)
    step = books.a_pass()
    assert step.is_being_computed(duplicate)
    step.pause(contributor)
    assert not step.is_being_computed(duplicate)


# -- two steps of a decode in flight: a position advances when it is pushed, so no block is counted for later


def test_a_decode_in_flight_twice_opens_its_block_when_that_is_due() -> None:
    driver = a_driver(look_ahead=1, num_blocks=10)
    driver.add([1, 2, 3], 6)
    driver.step()  # the prompt; its first token is known
    grown = []
    for _ in range(2):
        free = driver.kv.num_free_blocks
        plan = driver.schedule()
        assert plan is not None
        grown.append((list(plan.decode_positions), len(plan.grown_blocks), free - driver.kv.num_free_blocks))
    assert grown == [([3], 0, 0), ([4], 1, 1)]
    assert driver.schedule() is None, "twice is all"
    driver.run()


@pytest.mark.parametrize("preset", ["max-utilization", "guaranteed-no-evict", "max-requests"])
@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("num_queues", [1, 2, 4])
def test_a_pool_of_just_the_blocks_is_enough_with_any_number_in_flight(
    preset: str, look_ahead: int, num_queues: int
) -> None:
    driver = CoreDriver(
        preset=preset, num_queues=num_queues, look_ahead=look_ahead, num_blocks=1 + 4 * 3, max_num_seqs=4
    )
    for number in range(4):
        driver.add([number] * 3, 10)  # 12 tokens are computed: 3 blocks to the last position
    driver.run()
    assert driver.core.num_preemptions == 0
    assert all(driver.outcomes[i].tokens == driver.expected(i) for i in range(4))


# -- random lives


options = st.fixed_dictionaries(
    {
        "watermark": st.sampled_from([0.0, 0.1, 0.5]),
        "reserve_full_prompt": st.booleans(),
        "defer_duplicates": st.booleans(),
    }
)


class RankedDriver(CoreDriver):
    """Every third request is urgent."""

    def add(self, prompt: Any, max_tokens: int = 4, **more: Any) -> int:
        return super().add(prompt, max_tokens, **more, priority=-(len(self.requests) % 3 == 2))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shapes, options, st.integers(1, 8), st.sampled_from(["fcfs", "priority"]), lives, st.sampled_from([None, 3, 8]))
def test_any_life_ends_right_under_any_options(
    shape: dict[str, Any], chosen: Any, num_queues: int, ordering: str, todo: list[Any], window: int | None
) -> None:
    shape = {**shape, "num_queues": num_queues}
    blocks = max(2, 1 + shape.pop("num_tokens") // shape["block_size"])
    parts = {"ordering": ordering, "micro_batch": shape["preset"], "scheduler_options": chosen}
    driver = RankedDriver(**shape | {"preset": "max-utilization"}, parts=parts, num_blocks=blocks, window=window)
    check_outcomes(driver, live(driver, todo))
