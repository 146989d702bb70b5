"""What keeps a pipeline full, shown on the virtual clock: balance, evening out, liveness, refilling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.published_rule import PublishedRule, UnconditionalRule
from llm_engine.core.config import EngineConfig
from llm_engine.core.trace import StepStats
from llm_engine.simulation.config import SimulationConfig
from llm_engine.simulation.links import Link
from llm_engine.simulation.run import SimulationRun, Step
from llm_engine.simulation.setup import set_up
from llm_engine.simulation.simulator import HostCost
from llm_engine.simulation.workload import Arrival, fixed, prompt
from tests.simulation.pipelines import simulator

UNLIMITED = 1_000_000


def headline(scheduler: str = "balanced", *, budget: int = UNLIMITED, **settings: Any) -> SimulationRun:
    """Llama-2-13B on four RTX 4070: 256 requests of 128 tokens in and 128 out, at once."""
    shape = {"stages": 4, "link": "lan-1g", "unlimited_kv": True, **settings}
    engine = EngineConfig.of(scheduler=scheduler, max_num_batched_tokens=budget)
    setup = set_up(SimulationConfig(**shape), engine)
    return setup.simulator().run(setup.arrivals)


def linear(num_stages: int = 4, **settings: Any) -> Any:
    """Stages of 10 ms and a tenth for each token."""
    defaults = {"scheduler": "balanced", "max_num_seqs": 300, "max_num_batched_tokens": 2048, "num_kv_blocks": 100_000}
    return simulator([0.01] * num_stages, per_token=1e-4, **{**defaults, "schedule_ahead": True, **settings})


def unevenness(steps: Sequence[Step], revolution: int) -> list[float]:
    """Largest over smallest micro-batch of every revolution, from the most even to the least."""
    sizes = [step.num_tokens for step in steps]
    windows = [sizes[at : at + revolution] for at in range(len(sizes) - revolution + 1)]
    assert windows
    return sorted(max(window) / min(window) for window in windows)


# -- the headline


def test_the_headline_takes_less_than_half_of_what_one_swallowing_micro_batch_takes() -> None:
    greedy, balanced = headline("greedy"), headline()
    assert greedy.num_failed == balanced.num_failed == 0
    assert greedy.makespan / balanced.makespan >= 2.08


def test_the_headlines_micro_batches_are_even_from_the_first_one_after_its_prompts() -> None:
    """But for the one revolution in which the number of queues in use falls."""
    run = headline()
    last_chunk = max(index for index, step in enumerate(run.steps) if step.num_decodes < step.num_tokens)
    decoding = run.steps[last_chunk + 1 :]
    before, after = len({step.queue for step in decoding[:8]}), len({step.queue for step in decoding[40:60]})
    fell = 1 + max(index for index, step in enumerate(decoding[:60]) if step.queue >= after)
    assert fell <= 4 * before
    settled = decoding[fell + after : 90 * after]
    assert sum(step.num_tokens for step in settled[-after:]) > 200, "before the drain"
    assert max(unevenness(decoding[:fell], before)) <= 1.25
    assert max(unevenness(settled, after)) <= 1.25


def test_decodes_with_long_histories_go_in_as_many_queues_as_stages() -> None:
    """A row costs four times what a prompt's token does here, and links next to nothing: with three queues a
    micro-batch is longer under way than with four, and stages rest for a quarter of the time."""
    simulation = SimulationConfig(model_shape="llama-3-8b", hardware="l4", stages=4, link="lan-10g")
    engine = EngineConfig.of(scheduler="balanced", max_num_batched_tokens=2048)
    setup = set_up(simulation, engine, arrivals=[Arrival(0.0, prompt(index, 1024), 64) for index in range(128)])
    run = setup.simulator().run(setup.arrivals)
    last_chunk = max(index for index, step in enumerate(run.steps) if step.num_decodes < step.num_tokens)
    decoding = run.steps[last_chunk + 20 : last_chunk + 100]
    assert {step.queue for step in decoding} == {0, 1, 2, 3}


def test_the_headlines_micro_batches_are_even_while_prompts_come_in() -> None:
    run = headline()
    ratios = unevenness([step for step in run.steps if step.num_decodes < step.num_tokens], 4)
    assert ratios[len(ratios) // 2] <= 1.05


def test_without_latency_stages_that_compute_are_nearly_always_busy() -> None:
    run = headline(link="none", input_len=512, output_len=16, requests=128)
    assert min(run.stage_busy) >= 0.95


def test_memory_that_does_not_suffice_is_respected() -> None:
    """All of it is used, nobody is there without it, and everybody is served."""
    setup = set_up(SimulationConfig(), EngineConfig.of(scheduler="balanced", max_num_batched_tokens=UNLIMITED))
    run = setup.simulator(keep_stats=UNLIMITED).run(setup.arrivals)
    assert run.num_failed == 0
    assert run.num_preemptions > 0
    assert run.kv_usage_peak >= 0.99
    # Of 64 tokens: two for each prompt.
    assert 2 * max(record.num_running for record in run.stats) <= setup.num_kv_blocks - 1 < 2 * 256
    assert len(run.e2es) == 256


# -- evening out


@pytest.mark.parametrize("cohorts", [(100, 20, 80, 56), (256, 0, 0, 0), (7, 13, 2, 10), (1, 1, 1, 253)])
def test_lopsided_queues_are_even_within_two_revolutions(cohorts: tuple[int, ...]) -> None:
    made = linear()
    made.start_with(cohorts, 16, 40)
    run = made.run()
    assert run.num_failed == 0
    settled = run.steps[8:100]
    assert max(unevenness(settled, 4)) <= 1.25
    assert sum(step.num_tokens for step in settled[:4]) == pytest.approx(sum(cohorts), rel=0.1)


def test_greedy_queues_stay_as_lopsided_as_they_began() -> None:
    made = linear(scheduler="greedy", schedule_ahead=False)
    made.start_with((100, 20, 80, 56), 16, 40)
    assert sorted({step.num_tokens for step in made.run().steps}) == [20, 56, 80, 100]


def test_where_requests_come_and_end_at_random_micro_batches_stay_even() -> None:
    arrivals = [
        Arrival(index * 0.02, prompt(index, 20 + index * 7 % 60), 20 + index * 31 % 150) for index in range(600)
    ]
    runs = {name: linear(scheduler=name).run(arrivals) for name in ("balanced", "greedy")}
    ratios = {}
    for name, run in runs.items():
        ratios[name] = unevenness(run.steps[len(run.steps) // 4 : len(run.steps) * 3 // 4], 4)
    middle = len(ratios["balanced"]) // 2
    assert ratios["balanced"][middle] <= 1.1 < 1.5 <= ratios["greedy"][len(ratios["greedy"]) // 2]
    assert min(runs["balanced"].stage_busy) >= 0.95 > max(runs["greedy"].stage_busy)


# -- nothing stands still


@pytest.mark.parametrize("schedule_ahead", [False, True])
def test_one_request_on_four_stages_never_waits(schedule_ahead: bool) -> None:
    """Every token takes its way round and nothing else."""
    made = linear(link=Link(0.002, 1e12), host=HostCost(1e-4, 1e-4), schedule_ahead=schedule_ahead)
    run = made.run([Arrival(0.0, prompt(0, 40), 30)])
    first = 4 * (0.01 + 40e-4) + 4 * 0.002 + 2e-4
    each = 4 * (0.01 + 1e-4) + 4 * 0.002
    assert first + 29 * each <= run.makespan <= first + 29 * (each + 3e-4)


def test_few_requests_are_served_as_fast_as_one() -> None:
    alone = linear().run([Arrival(0.0, prompt(0, 16), 50)]).makespan
    three = linear().run([Arrival(0.0, prompt(index, 16), 50) for index in range(3)]).makespan
    assert three <= alone * 1.15


@pytest.mark.parametrize("budget", [1, 3, 17])
@pytest.mark.parametrize("num_kv_blocks", [40, 60, 1000])
def test_a_small_budget_and_a_tight_pool_serve_everybody(budget: int, num_kv_blocks: int) -> None:
    made = linear(max_num_batched_tokens=budget, num_kv_blocks=num_kv_blocks, max_num_seqs=9)
    run = made.run(
        [Arrival(0.1 * index, prompt(index, 5 + index * 13 % 80), 1 + index * 7 % 30) for index in range(40)]
    )
    assert len(run.e2es) == 40
    assert all(step.num_tokens for step in run.steps)


def test_idle_then_a_burst_a_hundred_times() -> None:
    """Full again within one revolution: every stage works on another micro-batch. Nothing empty is ever pushed."""
    arrivals = [Arrival(5.0 * burst, prompt(100 * burst + i, 64), 8) for burst in range(100) for i in range(12)]
    run = linear(keep_stats=100_000).run(arrivals)
    assert len(run.e2es) == 1200
    assert len(run.loads) == 100
    assert all(step.num_tokens > 0 for step in run.steps)
    for load in range(100):
        records = [stats for stats, step in zip(run.stats, run.steps, strict=True) if step.load == load]
        first_home = records[0].busy[-1][1]
        moments = [begin for record in records for begin, _ in record.busy if begin < first_home + 0.02]
        assert any(all(_works(records, stage, moment) for stage in range(4)) for moment in moments)


def _works(records: Sequence[StepStats], stage: int, moment: float) -> bool:
    return any(record.busy[stage][0] <= moment < record.busy[stage][1] for record in records)


# -- a prompt's chunks


def test_a_long_prompt_is_pipelined_in_chunks_of_equal_time() -> None:
    """Twice, so that the price of history is known."""
    cost = 1e-7
    made = linear(num_stages=4, max_num_batched_tokens=8192, per_context=cost, keep_stats=1000)
    run = made.run([Arrival(0.0, prompt(0, 8000), 1), Arrival(60.0, prompt(1, 8000), 1)])
    times = [s.busy[0][1] - s.busy[0][0] for s in run.stats if s.began_at >= 60.0]
    whole = 4 * (0.01 + 8000 * 1e-4 + cost * 8000 * 8001 / 2)
    assert run.ttfts[1] <= 0.45 * whole
    assert max(times[:-1]) <= 1.1 * min(times[:-1])


@pytest.mark.parametrize("known", [(1, 1), (4, 8), (10, 16), (64, 16), (2048, 8)])
def test_whatever_steps_were_seen_before_a_long_prompt_is_as_fast_as_the_first(known: tuple[int, int]) -> None:
    """Steps below the knee all take the time of the weights: what they teach must not cut a prompt into crumbs."""
    long = prompt(100, 2048)
    before = [Arrival(50.0 * index, prompt(index, known[0]), known[1]) for index in range(8)]
    times = []
    for arrivals in ([Arrival(0.0, long, 4)], [*before, Arrival(1000.0, long, 4)]):
        setup = set_up(SimulationConfig(stages=4, unlimited_kv=True), EngineConfig.of(), arrivals=arrivals)
        times.append(setup.simulator().run(setup.arrivals).ttfts[-1])
    cold, warm = times
    assert warm <= 1.05 * cold


# -- the published rule


def test_the_published_rule_evens_out_too() -> None:
    made = linear(scheduler="benchmarks.published_rule:PublishedRule", schedule_ahead=False)
    made.start_with((100, 20, 80, 56), 16, 40)
    assert max(unevenness(made.run().steps[8:100], 4)) <= 1.25


def test_the_published_rule_serves_one_request_on_four_stages() -> None:
    made = linear(scheduler=f"{PublishedRule.__module__}:PublishedRule", schedule_ahead=False)
    run = made.run([Arrival(0.0, prompt(0, 40), 5)])
    assert len(run.e2es) == 1


def test_without_the_exemption_of_the_first_entry_it_stands_still() -> None:
    """One decode on four stages has a budget of int(1 / 4) tokens."""
    made = linear(scheduler=f"{UnconditionalRule.__module__}:UnconditionalRule", schedule_ahead=False)
    made.start_with((1, 0, 0, 0), 16, 40)
    run = made.run()
    assert not run.steps
    assert "runs nobody" in str(run.failure)


@pytest.mark.parametrize("budget", [512, 2048, UNLIMITED])
def test_the_headline_is_not_behind_the_published_rule(budget: int) -> None:
    rule = headline("benchmarks.published_rule:PublishedRule", budget=budget)
    assert headline(budget=budget).makespan <= rule.makespan


def test_everybody_at_once_on_one_stage_is_as_fast_as_greedy() -> None:
    arrivals = fixed(40, 100, 30)
    balanced, greedy = linear(1).run(arrivals), linear(1, scheduler="greedy").run(arrivals)
    assert balanced.makespan <= greedy.makespan * 1.001


@pytest.mark.parametrize("num_stages", [1, 2])
def test_the_decodes_of_a_burst_wait_until_all_of_it_is_computed(num_stages: int) -> None:
    run = linear(num_stages).run(fixed(60, 128, 128))
    last_prompt = max(index for index, step in enumerate(run.steps) if step.num_decodes < step.num_tokens)
    assert last_prompt >= 3, "more than a step of each stage"
    assert not any(step.num_decodes for step in run.steps[: last_prompt - 1]), "the last ones do not fill a step"


@pytest.mark.parametrize(("input_len", "output_len", "num_kv_blocks"), [(512, 64, 100_000), (128, 128, 600)])
def test_long_prompts_and_little_memory_keep_nobody_waiting(
    input_len: int, output_len: int, num_kv_blocks: int
) -> None:
    run = linear(1, num_kv_blocks=num_kv_blocks).run(fixed(60, input_len, output_len))
    assert run.num_failed == 0
    assert any(0 < step.num_decodes < step.num_tokens for step in run.steps[:4])


def test_prompts_that_fill_no_step_keep_nobody_waiting() -> None:
    """The long ones go on by 16 tokens a step, beside which the short one decodes for nothing."""
    run = linear(1, long_prefill_token_threshold=16).run([*fixed(1, 16, 600), *fixed(3, 512, 600)])
    prompts = [step for step in run.steps[1:] if step.num_decodes < step.num_tokens]
    assert len(prompts) > 20
    assert all(step.num_decodes for step in prompts)


@pytest.mark.parametrize("link", ["none", "lan-1g"])
def test_fewer_requests_than_stages_are_computed_one_by_one(link: str) -> None:
    """A micro-batch of 448 tokens is as quick as one of 256 on these devices, but the slow link makes it wait."""
    setup = set_up(
        SimulationConfig(model_shape="mixtral-8x7b", hardware="a100-40g", stages=8, link=link),
        EngineConfig.of(scheduler="balanced"),
        arrivals=fixed(6, 256, 128),
    )
    run = setup.simulator().run(setup.arrivals)
    prompts = [step.num_tokens for step in run.steps if not step.num_decodes]
    assert prompts == [256] * 6
