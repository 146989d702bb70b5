"""What the books learn of the pipeline from the busy spans that results bring home."""

from __future__ import annotations

import pytest

from llm_engine.core.pipeline_timing import PipelineTiming
from llm_engine.core.step import StepPlan, StepResult


class Line:
    """Stages in a row: a step of n tokens takes ``base + n * per_token`` in each, then ``link`` to the next, and
    ``back`` from the last to the first. A step that waited for its stage begins ``pause`` after that is free."""

    def __init__(
        self,
        num_stages: int,
        *,
        base: float = 5e-3,
        per_token: float = 1e-4,
        link: float = 0.0,
        back: float = 0.0,
        pause: float = 0.0,
    ) -> None:
        self.base, self.per_token, self.link, self.back, self.pause = base, per_token, link, back, pause
        self.slower = [1.0] * num_stages
        self.free = [0.0] * num_stages
        self.home: dict[int, float] = {}
        self.timing = PipelineTiming(num_stages)
        self.steps = 0

    def step(self, queue: int, tokens: int, *, prompt: bool = False, clock_offsets: list[float] | None = None) -> None:
        """Queue ``queue`` goes round once more, as soon as it may."""
        at, spans = self.home.get(queue, 0.0), []
        for stage, slower in enumerate(self.slower):
            began = max(at, self.free[stage] + self.pause)
            ended = self.free[stage] = began + slower * (self.base + tokens * self.per_token)
            offset = clock_offsets[stage] if clock_offsets else 0.0
            spans.append((began + offset, ended + offset))
            at = ended + self.link
        self.home[queue] = at - self.link + self.back
        ids = [100 * queue + row for row in range(tokens)]
        plan = StepPlan(queue, step=self.steps, decode_ids=ids, decode_positions=[0] * tokens)
        if prompt:
            plan = StepPlan(queue, chunk_ids=[queue], chunk_tokens=[tokens], chunk_starts=[0], chunk_samples=[False])
        self.steps += 1
        self.timing.observe(plan, StepResult(0, plan.step, [], busy=spans))


def around(line: Line, tokens: int) -> float:
    trip = line.timing.round_trip(tokens)
    assert trip is not None
    return trip.around.at(tokens)


def test_nothing_is_known_before_the_first_step() -> None:
    timing = PipelineTiming(2)
    assert timing.round_trip(8) is None
    assert not timing.was_seen(8)
    assert list(timing.stages) == [None, None]
    assert timing.history_price == 0.0


def test_a_model_that_uses_a_quarter_of_its_weights_for_a_token_is_taken_to_have_room_for_four_times_as_many() -> None:
    dense, sparse = PipelineTiming(2), PipelineTiming(2, active_share=0.25)
    assert sparse.knee == sparse.usual_knee == 4 * dense.usual_knee == 4 * dense.knee
    plan = StepPlan(0, chunk_ids=[1], chunk_tokens=[512], chunk_starts=[0], chunk_samples=[False])
    for timing in (dense, sparse):
        timing.observe(plan, StepResult(0, 1, [], busy=[(0.0, 0.1), (0.1, 0.2)]))
    assert sparse.knee > 2 * dense.knee, "how long a short step takes is still guessed"


def test_failed_steps_and_those_without_times_teach_nothing() -> None:
    timing = PipelineTiming(2)
    timing.observe(StepPlan(0, decode_ids=[1]), StepResult(0, 1, []))
    timing.observe(StepPlan(0, decode_ids=[1]), StepResult(0, 2, [], busy=[(0, 1), (1, 2)], error="told to fail"))
    assert timing.num_steps == 0


@pytest.mark.parametrize("tells_times", [True, False])
def test_a_wait_behind_a_step_that_failed_is_no_link(tells_times: bool) -> None:
    line = Line(2, link=1e-3)
    line.step(0, 8)
    failed = [(10.0, 10.01), (10.011, 14.0)] if tells_times else []
    line.timing.observe(StepPlan(1, decode_ids=[1] * 8), StepResult(0, 1, [], busy=failed, error="told to fail"))
    line.timing.observe(StepPlan(2, decode_ids=[2] * 8), StepResult(0, 2, [], busy=[(10.01, 10.02), (14.0, 14.01)]))
    assert around(line, 8) < 0.1


def test_the_slowest_stage_is_found() -> None:
    line = Line(3)
    line.slower[1] = 2.0
    for tokens in (4, 16, 64, 256):
        line.step(0, tokens)
    trip = line.timing.round_trip(64)
    assert trip is not None
    assert trip.slowest.at(64) == pytest.approx(2 * (5e-3 + 64e-4), rel=0.05)
    assert (line.timing.was_seen(64), line.timing.was_seen(1)) == (True, False)
    costs = line.timing.stages
    assert costs[0] is not None
    assert costs[0].at(64) == pytest.approx(5e-3 + 64e-4, rel=0.1)


@pytest.mark.parametrize("num_queues", [1, 4, 7])
def test_links_and_the_way_back_count_whether_or_not_the_stages_are_busy(num_queues: int) -> None:
    """With seven queues on four stages the first one always works, and its micro-batches wait."""
    line = Line(4, link=3e-3, back=2e-3)
    for _ in range(60):
        for queue in range(num_queues):
            line.step(queue, 20)
    way_back = 0.0 if num_queues == 7 else 2e-3  # nobody sees it where everybody waits
    assert around(line, 20) == pytest.approx(4 * 7e-3 + 3 * 3e-3 + way_back, rel=0.05)


def test_a_stage_that_is_always_busy_does_not_make_its_link_look_long() -> None:
    line = Line(4, link=1e-3)
    line.slower[3] = 3.0
    for _ in range(60):
        for queue in range(6):
            line.step(queue, 10)
    assert around(line, 10) == pytest.approx((1 + 1 + 1 + 3) * 6e-3 + 3 * 1e-3, rel=0.05)


def test_a_moment_between_two_steps_that_wait_is_no_link() -> None:
    """Real stages begin a little later than they could; how long a micro-batch had waited by then is no way."""
    line = Line(2, link=1e-3, pause=5e-4)
    line.slower[1] = 3.0
    for _ in range(60):
        for queue in range(4):
            line.step(queue, 10)
    assert around(line, 10) == pytest.approx((1 + 3) * 6e-3 + 1e-3, rel=0.05)


def test_new_stages_do_not_follow_the_old_ones() -> None:
    line = Line(2, link=1e-3, back=1e-3)
    for round_ in range(40):
        line.home[0] = round_ * 10.0
        line.timing.restart()
        line.step(0, 8)
    assert around(line, 8) == pytest.approx(2 * (5e-3 + 8e-4) + 1e-3, rel=0.05)


def test_waiting_for_new_requests_is_no_way_back() -> None:
    line = Line(2)
    for round_ in range(40):
        line.home[0] = round_ * 10.0  # somebody new comes every ten seconds
        line.step(0, 8, prompt=True)
    assert around(line, 8) == pytest.approx(2 * (5e-3 + 8e-4), rel=0.05)


def test_clocks_of_other_hosts_may_be_ahead() -> None:
    """A gap that looks negative counts as none; the one that looks too long stands against it."""
    line = Line(2, link=1e-3, back=1e-3)
    for _ in range(40):
        line.step(0, 8, clock_offsets=[0.0, 5e-4])
    assert around(line, 8) == pytest.approx(2 * (5e-3 + 8e-4) + 2e-3, rel=0.05)


def test_steps_that_take_as_long_whatever_their_tokens_lay_no_high_price_on_history() -> None:
    """As below the knee: 17 ms and a hundredth of a microsecond for each token before. Then one step is above it."""
    timing, start = PipelineTiming(1), 0
    for size in [10] * 8 + [64] * 7 + [128]:
        start = start + 64 if size > 10 else 0
        plan = StepPlan(0, chunk_ids=[1], chunk_tokens=[size], chunk_starts=[start], chunk_samples=[False])
        seconds = max(17e-3, size * 2e-4) + 1e-8 * plan.context_tokens
        timing.observe(plan, StepResult(0, 0, [], busy=[(0.0, seconds)]))
    assert timing.history_price < 1e-3, "it is 5e-5; the fit alone finds a hundred times that"


def test_the_price_of_history_is_learnt_from_prompts() -> None:
    timing = PipelineTiming(1)
    for start in range(0, 8192, 256):
        plan = StepPlan(0, chunk_ids=[1], chunk_tokens=[256], chunk_starts=[start], chunk_samples=[False])
        seconds = 1e-3 + 1e-4 * 256 + 2e-8 * plan.context_tokens
        timing.observe(plan, StepResult(0, 1, [], busy=[(0.0, seconds)]))
    assert timing.history_price == pytest.approx(2e-4, rel=0.2)


def test_what_a_row_costs_that_reads_a_long_history_is_learnt_from_decodes_alone() -> None:
    """16 ms, a twentieth for a token, a fifth more for a row of a thousand tokens before. Chunks read theirs once."""
    timing = PipelineTiming(1)

    def observe(plan: StepPlan, seconds: float) -> None:
        timing.observe(plan, StepResult(0, 1, [], busy=[(0.0, seconds)]))

    for _ in range(40):
        prompt = StepPlan(0, chunk_ids=[1], chunk_tokens=[1024], chunk_starts=[0], chunk_samples=[False])
        observe(prompt, 16e-3 + 5e-5 * 1024)
    for rows in (30, 32, 32, 32):
        decodes = StepPlan(0, decode_ids=[*range(rows)], decode_positions=[1000] * rows)
        observe(decodes, 16e-3 + 25e-5 * rows)
    trip = timing.round_trip(32, decodes=True)
    assert trip is not None
    assert trip.slowest.at(43) - trip.slowest.at(32) == pytest.approx(11 * 25e-5, rel=0.1)


def test_until_decodes_came_back_alone_they_are_taken_to_cost_what_other_steps_do() -> None:
    line = Line(2)
    for tokens in (4, 16, 64, 256):
        line.step(0, tokens, prompt=True)
    assert line.timing.round_trip(8, decodes=True) == line.timing.round_trip(8)
    assert not line.timing.was_seen(16), "no sixteen decodes"


def test_the_same_steps_give_the_same_figures() -> None:
    found = []
    for _ in range(2):
        line = Line(3, link=1e-3)
        for number in range(100):
            line.step(number % 4, 5 + number % 11, prompt=number % 5 == 0)
        found.append((line.timing.round_trip(8), line.timing.history_price))
    assert found[0] == found[1]


def test_with_many_stages_only_some_steps_are_looked_at() -> None:
    line = Line(160, link=1e-3)
    for _ in range(100):
        line.step(0, 8)
    assert line.timing._steps.num_steps == 10
    assert around(line, 8) == pytest.approx(160 * (5e-3 + 8e-4) + 159 * 1e-3, rel=0.05)
