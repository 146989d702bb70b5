"""What a step costs is learnt from steps that came back."""

from __future__ import annotations

import random

import pytest

from llm_engine.core.cost_model import CostFit, LinearCost, StepCost, StepShape
from llm_engine.core.step import StepPlan

TRUE = LinearCost(5e-3, 1e-4, 2e-8)


def observe(fit: CostFit, tokens: int, history: int = 0, cost: LinearCost = TRUE, noise: float = 1.0) -> None:
    context = tokens * history + tokens * (tokens + 1) // 2
    fit.observe(tokens, context, cost.at(tokens, context) * noise)


def test_nothing_is_known_before_the_first_step() -> None:
    fit = CostFit()
    assert fit.cost is None
    assert fit.knee is None
    assert list(fit.near(10)) == []


def test_a_linear_cost_is_found() -> None:
    fit = CostFit()
    for tokens in (1, 4, 16, 64, 256, 1024):
        for history in (0, 500, 4000):
            observe(fit, tokens, history)
    found = fit.cost
    assert found is not None
    assert found.base == pytest.approx(TRUE.base, rel=0.05)
    assert found.per_token == pytest.approx(TRUE.per_token, rel=0.05)
    assert found.per_context == pytest.approx(TRUE.per_context, rel=0.1)


def test_noise_of_a_tenth_leaves_the_costs_of_steps_right_to_a_tenth() -> None:
    rng, fit = random.Random(0), CostFit()
    for _ in range(400):
        observe(fit, rng.choice((1, 8, 32, 100, 500)), rng.randrange(2000), noise=rng.uniform(0.9, 1.1))
    assert fit.cost is not None
    for tokens in (1, 32, 500):
        assert fit.cost.at(tokens, tokens * 1000) == pytest.approx(TRUE.at(tokens, tokens * 1000), rel=0.1)


def test_a_thousand_steps_of_one_size_do_not_make_it_forget_another() -> None:
    fit = CostFit()
    for tokens in (16, 1024):
        observe(fit, tokens)
    for _ in range(1000):
        observe(fit, 16)
    assert fit.cost is not None
    context = 1024 * 1025 // 2
    assert fit.cost.at(1024, context) == pytest.approx(TRUE.at(1024, context), rel=0.05)


def test_it_follows_what_changes() -> None:
    fit = CostFit()
    slower = LinearCost(TRUE.base * 2, TRUE.per_token * 2, TRUE.per_context * 2)
    for cost in (TRUE, slower):
        for _ in range(200):
            for tokens in (8, 100, 700):
                observe(fit, tokens, cost=cost)
    assert fit.cost is not None
    assert fit.cost.at(100, 5050) == pytest.approx(slower.at(100, 5050), rel=0.05)


def test_after_steps_of_one_size_a_part_of_them_is_taken_to_be_fixed() -> None:
    fit = CostFit()
    fit.observe(1024, 0, 1.0)
    assert fit.cost is not None
    assert 0.0 < fit.cost.base < 0.2
    assert fit.cost.at(1024) == pytest.approx(1.0, rel=0.01)


def test_no_coefficient_is_negative() -> None:
    fit = CostFit()
    for tokens, seconds in ((1, 3e-3), (10, 2.9e-3), (100, 2.8e-3), (1000, 2.7e-3)):
        fit.observe(tokens, tokens * 10, seconds)
    assert fit.cost is not None
    assert min(fit.cost.base, fit.cost.per_token, fit.cost.per_context) >= 0.0


def test_columns_are_fitted_each() -> None:
    fit = CostFit(3)
    for tokens in (1, 10, 100, 1000):
        fit.observe(tokens, 0, *(factor * TRUE.at(tokens) for factor in (1.0, 2.0, 3.0)))
    assert [cost.base for cost in fit.costs] == pytest.approx([TRUE.base * f for f in (1, 2, 3)], rel=0.05)


def roofline(tokens: int) -> float:
    """Reads for 16 ms, computes for 0.2 ms a token, whichever is longer."""
    return max(16e-3, 2e-4 * tokens)


def test_near_a_size_its_like_count_most() -> None:
    fit = CostFit()
    for tokens in (4, 8, 16, 32, 64, 128, 256, 512, 1024):
        fit.observe(tokens, 0, roofline(tokens))
    (small,), (large,) = fit.near(12), fit.near(700)
    assert small.at(12) == pytest.approx(16e-3, rel=0.05)
    assert small.line.per_token < 5e-5, "flat there"
    assert large.at(700) == pytest.approx(0.14, rel=0.05)
    assert large.line.per_token == pytest.approx(2e-4, rel=0.1)


def test_near_a_size_the_usual_history_counts_with_the_tokens() -> None:
    fit = CostFit()
    for tokens in (8, 16, 32, 64):
        for history in (900, 1000, 1100):
            observe(fit, tokens, history)
    (found,) = fit.near(32)
    assert found.at(32) == pytest.approx(TRUE.at(32, 32 * 1000 + 528), rel=0.05)


def experts(tokens: int) -> float:
    """What four stages of a mixture of experts take: two experts for the first token, nearly all for a few dozen."""
    return 20e-3 - 15e-3 * 0.75**tokens


def test_where_a_size_was_seen_its_own_times_count() -> None:
    fit = CostFit()
    for tokens in (2, 32, 64, 128):
        for _ in range(20):
            fit.observe(tokens, 0, experts(tokens))
    (found,) = fit.near(2, bent=True)
    assert (fit.was_seen(2), fit.was_seen(1)) == (True, False)
    assert found.at(2) == pytest.approx(experts(2), rel=0.05)
    assert found.at(1) > 1.3 * experts(1), "no line knows that"
    for _ in range(20):
        fit.observe(1, 0, experts(1))
    assert fit.was_seen(1)
    (found,), (line,) = fit.near(2, bent=True), fit.near(2)
    assert found.at(1) == pytest.approx(experts(1), rel=0.05)
    assert line.at(1) > 1.1 * experts(1), "only the line was asked for"


def test_a_size_that_took_no_time_does_not_outweigh_all_others() -> None:
    fit = CostFit()
    for tokens, seconds in ((64, 3e-3), (512, 20e-3)):
        for _ in range(30):
            fit.observe(tokens, 0, seconds)
    fit.observe(1, 0, 0.0)
    (found,) = fit.near(512)
    assert found.at(512) == pytest.approx(20e-3, rel=0.1)


def test_one_odd_step_bends_the_line_by_half() -> None:
    fit = CostFit()
    for tokens in (8, 16, 32, 64, 128):
        for _ in range(30):
            observe(fit, tokens)
    observe(fit, 4, noise=3.0)
    (found,) = fit.near(32, bent=True)
    assert found.at(4) == pytest.approx(2 * TRUE.at(4), rel=0.1)


def test_stages_one_after_the_other_take_the_sum_of_what_each_takes_at_a_size() -> None:
    fit = CostFit(2)
    for tokens in (1, 2, 4, 8, 64):
        for _ in range(9):
            fit.observe(tokens, 0, experts(tokens), 2 * TRUE.at(tokens))
    first, second = fit.near(4, bent=True)
    total = StepCost.total([first, second])
    for tokens in (1, 2, 4, 8, 64):
        assert total.at(tokens) == pytest.approx(first.at(tokens) + second.at(tokens), rel=0.02)


def test_the_knee_is_where_a_step_begins_to_take_longer() -> None:
    fit = CostFit()
    for tokens in (4, 30, 200, 1000):
        fit.observe(tokens, 0, roofline(tokens))
    assert fit.knee == pytest.approx(80, rel=0.01)


def test_after_large_steps_alone_the_knee_is_guessed() -> None:
    fit = CostFit()
    fit.observe(2000, 0, roofline(2000))
    assert fit.knee is not None
    assert 60 < fit.knee < 200


def test_an_upper_bound_counts_only_where_more_was_expected() -> None:
    fit = CostFit()
    fit.observe_at_most(10, 0, 1.0)
    assert fit.cost is None, "nothing was expected"
    fit.observe(10, 0, 2.0)
    fit.observe_at_most(10, 0, 5.0)
    assert fit.num_steps == 1
    for _ in range(50):
        fit.observe_at_most(10, 0, 1.0)
    assert fit.cost is not None
    assert fit.cost.at(10) == pytest.approx(1.0, rel=0.1)


def test_the_shape_of_a_booked_plan() -> None:
    plan = StepPlan(
        queue=0, decode_ids=[1, 2], decode_positions=[9, 19], chunk_ids=[3], chunk_tokens=[4], chunk_starts=[6],
        chunk_samples=[True],
    )  # fmt: skip
    shape = StepShape.of(plan)
    assert (shape.num_tokens, shape.num_rows, shape.num_sampled) == (6, 3, 3)
    assert shape.context_tokens == 10 + 20 + (7 + 8 + 9 + 10)
    assert shape.kv_tokens == 10 + 20 + 10
