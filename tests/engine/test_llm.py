"""The library's face over the toy model: what comes back, in which form, with which times and numbers."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import generate_latest

from llm_engine import FinishReason, QueueFullError, RequestFailedError, RequestOutput
from llm_engine.engine.engine import MAX_STATS
from llm_engine.kvcache.resources import BaseResourceManager
from tests.engine.engines import SECONDS, Valve, await_state, await_true, greedy, tokens_of, toy_llm
from tests.toy_model_engine import ToyModelEngine, expected_tokens

pytestmark = pytest.mark.usefixtures("no_thread_left")


def test_outputs_come_in_the_order_of_the_prompts() -> None:
    prompts = [[n, n + 1] * (n % 4 + 1) for n in range(20)]
    counts = [n % 7 + 1 for n in range(20)]
    with toy_llm(max_num_seqs=3) as llm:
        outputs = llm.generate(prompts, [greedy(count) for count in counts], use_tqdm=False)
    for prompt, count, output in zip(prompts, counts, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        assert output.prompt is None
        assert tokens_of(output) == expected_tokens(prompt, count)
        assert output.outputs[0].finish_reason is FinishReason.LENGTH


def test_one_prompt_is_one_output() -> None:
    with toy_llm() as llm:
        (output,) = llm.generate([1, 2, 3], greedy(2), use_tqdm=False)
        assert output.prompt_token_ids == [1, 2, 3]
        assert llm.generate([[1, 2, 3]], use_tqdm=False)[0].outputs[0].token_ids != []


def test_a_progress_bar_counts_requests(capsys: pytest.CaptureFixture[str]) -> None:
    with toy_llm() as llm:
        llm.generate([[1], [2], [3]], greedy(2), use_tqdm=True)
    assert "3/3" in capsys.readouterr().err


def test_times_follow_each_other() -> None:
    with toy_llm() as llm:
        metrics = llm.generate([1, 2, 3], greedy(4), use_tqdm=False)[0].metrics
    assert metrics.first_scheduled is not None
    assert metrics.first_token is not None
    assert metrics.last_token is not None
    assert metrics.arrival <= metrics.first_scheduled < metrics.first_token < metrics.last_token
    assert metrics.num_preemptions == 0


def test_cached_tokens_are_told() -> None:
    prompt = list(range(20))
    with toy_llm() as llm:
        cached = [llm.generate(prompt, greedy(2), use_tqdm=False)[0].num_cached_tokens for _ in range(2)]
        salted = llm.submit(prompt, greedy(2), cache_salt="mine").result(SECONDS)
        assert cached == [0, 16]
        assert salted.num_cached_tokens == 0
    with toy_llm(enable_prefix_caching=False) as llm:
        assert [llm.generate(prompt, greedy(2), use_tqdm=False)[0].num_cached_tokens for _ in range(2)] == [0, 0]


def test_preemption_changes_no_token_and_is_told() -> None:
    prompts = [[n] * 6 for n in range(5)]
    with toy_llm(num_kv_blocks=9, max_num_seqs=5) as llm:
        outputs = llm.generate(prompts, greedy(14), use_tqdm=False)
        assert [tokens_of(output) for output in outputs] == [expected_tokens(prompt, 14) for prompt in prompts]
        assert sum(output.metrics.num_preemptions for output in outputs) == llm.engine.state.core.num_preemptions > 0
        stats = llm.get_stats()
        assert sum(step.num_paused for step in stats) == sum(step.num_resumed for step in stats) > 0


def test_a_stop_id_ends_and_is_shown_last() -> None:
    stop = expected_tokens([1, 2, 3], 4)[3]
    expected = expected_tokens([1, 2, 3], 9, stop_ids=[stop])
    with toy_llm(eos=[stop]) as llm:
        (output,) = llm.generate([1, 2, 3], greedy(9), use_tqdm=False)
        assert (tokens_of(output), output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (
            expected, FinishReason.STOP, None)  # fmt: skip
        (output,) = llm.generate([1, 2, 3], greedy(9, ignore_eos=True), use_tqdm=False)
        assert tokens_of(output) == expected_tokens([1, 2, 3], 9)
        (output,) = llm.generate([1, 2, 3], greedy(9, stop_token_ids=[stop]), use_tqdm=False)
        assert (tokens_of(output), output.outputs[0].stop_reason) == (expected, stop)


def test_choices_differ_and_come_in_order() -> None:
    params = greedy(6, n=3, seed=7)
    sampled = type(params)(n=3, seed=7, max_tokens=6, temperature=1.0)
    with toy_llm() as llm:
        (output,) = llm.generate([1, 2, 3], sampled, use_tqdm=False)
        assert [choice.index for choice in output.outputs] == [0, 1, 2]
        assert len({tuple(choice.token_ids) for choice in output.outputs}) == 3
        (again,) = llm.generate([[1, 2, 3]], sampled, use_tqdm=False)
        assert [c.token_ids for c in again.outputs] == [c.token_ids for c in output.outputs]
        streamed: dict[int, list[int]] = {0: [], 1: [], 2: []}
        for part in llm.stream([1, 2, 3], sampled):
            for choice in part.outputs:
                streamed[choice.index] += choice.token_ids
        assert list(streamed.values()) == [c.token_ids for c in output.outputs]


def test_a_seed_makes_it_the_same_in_any_company_and_after_preemption() -> None:
    params = type(greedy(1))(seed=3, max_tokens=10, temperature=0.9, top_k=40)
    with toy_llm() as llm:
        alone = tokens_of(llm.generate([5, 6, 7], params, use_tqdm=False)[0])
    with toy_llm(num_kv_blocks=8, stages=2, max_num_batched_tokens=6) as llm:
        crowd = llm.generate([[5, 6, 7]] + [[n, n] for n in range(6)], params, use_tqdm=False)
        assert llm.engine.state.core.num_preemptions > 0
    assert tokens_of(crowd[0]) == alone


def test_requests_without_a_seed_differ_and_the_engines_seed_repeats_them() -> None:
    def answers(seed: int) -> list[list[int]]:
        with toy_llm(seed=seed) as llm:
            params = type(greedy(1))(max_tokens=8, temperature=1.0)
            return [tokens_of(output) for output in llm.generate([[1, 2]] * 3, params, use_tqdm=False)]

    first = answers(1)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert answers(1) == first
    assert answers(2) != first


def test_logprobs_are_one_per_token_and_sum_up() -> None:
    with toy_llm() as llm:
        (output,) = llm.generate([1, 2, 3], greedy(5, logprobs=2), use_tqdm=False)
        choice = output.outputs[0]
        assert choice.logprobs is not None
        assert [entry.token_id for entry in choice.logprobs] == choice.token_ids
        assert all(entry.rank == 1 and len(entry.top_ids) == 2 for entry in choice.logprobs)
        assert choice.cumulative_logprob == pytest.approx(sum(entry.logprob for entry in choice.logprobs))
        parts = list(llm.stream([1, 2, 3], greedy(5, logprobs=2)))
        assert [len(part.outputs[0].logprobs or ()) for part in parts] == [1] * 5
        assert parts[-1].outputs[0].cumulative_logprob == pytest.approx(choice.cumulative_logprob)
        assert llm.generate([1, 2, 3], greedy(2), use_tqdm=False)[0].outputs[0].logprobs is None


@pytest.mark.parametrize("budget", [4, 32])
def test_prompt_logprobs_are_one_per_token_whatever_the_chunks(budget: int) -> None:
    prompt = list(range(40, 57))
    with toy_llm(max_num_batched_tokens=budget) as llm:
        llm.generate(prompt, greedy(1), use_tqdm=False)
        for _ in range(2):
            (output,) = llm.generate(prompt, greedy(2, prompt_logprobs=1, n=2), use_tqdm=False)
            entries = output.prompt_logprobs
            assert entries is not None
            assert entries[0] is None
            assert [entry.token_id for entry in entries[1:] if entry] == prompt[1:]
            assert output.num_cached_tokens == 0, "every position is computed for its score"


def test_prompt_logprobs_are_not_doubled_by_preemption() -> None:
    prompts = [[n] * 9 for n in range(4)]
    with toy_llm(num_kv_blocks=9, max_num_batched_tokens=4) as llm:
        outputs = llm.generate(prompts, greedy(14, prompt_logprobs=0), use_tqdm=False)
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_logprobs is not None
        assert [entry.token_id for entry in output.prompt_logprobs[1:] if entry] == prompt[1:]


def test_a_stream_of_parts_is_the_answer() -> None:
    with toy_llm() as llm:
        stream = llm.stream([1, 2, 3], greedy(6), request_id="mine")
        assert stream.request_id == "mine"
        parts = list(stream)
        assert [tokens_of(part) for part in parts] == [[token] for token in expected_tokens([1, 2, 3], 6)]
        assert [part.finished for part in parts] == [False] * 5 + [True]
        assert {part.request_id for part in parts} == {"mine"}
        assert tokens_of(stream.result()) == expected_tokens([1, 2, 3], 6)
        with pytest.raises(StopIteration):
            next(stream)


def test_statistics_are_kept_for_the_last_steps_only() -> None:
    with toy_llm() as llm:
        for _ in range(3):
            llm.generate([[1, 2]] * 2, greedy(350), use_tqdm=False)
        stats = llm.get_stats()
        assert len(stats) == MAX_STATS
        assert [step.step for step in stats] == list(range(stats[0].step, stats[0].step + MAX_STATS))
        assert all(step.pushed_at <= step.retired_at and 0 <= step.kv_usage <= 1 for step in stats)
        assert stats[-1].num_finished == 2
        assert all(len(step.busy) == 1 and not step.failed for step in stats)


def test_metrics_add_up() -> None:
    with toy_llm() as llm:
        llm.generate([[1, 2, 3]] * 4, greedy(5), use_tqdm=False)
        with pytest.raises(ValueError, match="prompt"):
            llm.generate([[]], use_tqdm=False)

        def value(name: str, **labels: str) -> float | None:
            return llm.registry.get_sample_value(
                f"llm_engine_{name}", {"model_name": "custom", "engine": "0", **labels}
            )

        await_true(lambda: value("requests_finished_total", reason="length") == 4)
        assert value("requests_rejected_total", reason="invalid") == 1
        assert value("generation_tokens_total") == 20
        assert value("prompt_tokens_total") == 12
        assert value("time_to_first_token_seconds_count") == 4
        assert value("inter_token_latency_seconds_count") == 16
        assert value("e2e_request_latency_seconds_count") == 4
        assert value("num_requests_running") == value("num_requests_waiting") == value("kv_cache_usage_ratio") == 0
        assert b":" not in b"".join(
            line.split(b"{")[0] for line in generate_latest(llm.registry).splitlines() if line[:1] != b"#"
        )


def test_too_many_who_wait_are_refused_all_or_none() -> None:
    valve = Valve()
    with toy_llm(on_forward=valve, max_num_waiting=3, schedule_ahead=False) as llm:
        running = llm.submit([1, 2], greedy(2))
        valve.await_arrival(1)
        waiting = [llm.submit([3, n], greedy(2)) for n in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait already; max_num_waiting is 3"):
            llm.generate([[5], [6]], greedy(2), use_tqdm=False)
        with pytest.raises(QueueFullError):
            llm.submit([5], greedy(2, n=2))
        assert llm.engine.state.core.num_waiting + len(llm.engine.state._arrivals) == 2
        assert len(llm.engine.state._unanswered) == 3
        waiting.append(llm.submit([5], greedy(2)))
        valve.open()
        for future in [running, *waiting]:
            assert isinstance(future.result(SECONDS), RequestOutput)
        labels = {"model_name": "custom", "engine": "0", "reason": "queue_full"}
        assert llm.registry.get_sample_value("llm_engine_requests_rejected_total", labels) == 2


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on() -> None:
    def fail_first(number: int, batch: Any) -> None:
        if number == 0:
            raise RuntimeError("told to fail")

    with toy_llm(on_forward=fail_first) as llm:
        (output,) = llm.generate([1, 2, 3], greedy(4), use_tqdm=False)
        assert output.outputs[0].finish_reason is FinishReason.ERROR
        assert "told to fail" in (output.outputs[0].error or "")
        assert tokens_of(llm.generate([1, 2, 3], greedy(4), use_tqdm=False)[0]) == expected_tokens([1, 2, 3], 4)
        assert llm.get_stats()[0].failed


def test_a_failed_step_is_raised_by_the_stream_after_what_it_had() -> None:
    def fail_third(number: int, batch: Any) -> None:
        if number == 2:
            raise RuntimeError("told to fail")

    with toy_llm(on_forward=fail_third) as llm:
        stream, seen = llm.stream([1, 2, 3], greedy(9)), list[int]()

        def read() -> None:
            for part in stream:
                seen.extend(tokens_of(part))

        for _ in range(2):
            with pytest.raises(RequestFailedError, match="told to fail"):
                read()
        assert seen == expected_tokens([1, 2, 3], 2)
        assert stream.result().outputs[0].finish_reason is FinishReason.ERROR


class Tables(BaseResourceManager):
    """Two places, and whether more were ever taken."""

    name = "tables"

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.most = 0
        self.ended = False

    def needed(self, request: Any) -> int:
        return 0 if request.request_id in self.held else 1

    def available(self) -> int:
        return 2 - len(self.held)

    def prepare_resources(self, plan: Any) -> None:
        self.held.update(start.request_id for start in plan.starts)
        self.most = max(self.most, len(self.held))

    def free_resources(self, request: Any) -> None:
        self.held.discard(request.request_id)

    def shutdown(self) -> None:
        self.ended = True


def test_a_users_resource_gates_admission() -> None:
    tables = Tables()
    with toy_llm(resources=[tables]) as llm:
        outputs = llm.generate([[n, n] for n in range(7)], greedy(5), use_tqdm=False)
        assert [tokens_of(output) for output in outputs] == [expected_tokens([n, n], 5) for n in range(7)]
        assert tables.most == 2
        assert not tables.held
    assert tables.ended


def test_a_step_that_fails_is_told_to_its_request_and_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def break_the_first(number: int, batch: object) -> None:
        if number == 0:
            raise RuntimeError("a bit fell over")

    with toy_llm(on_forward=break_the_first) as llm:
        (failed,) = llm.generate([[1, 2]], greedy(2), use_tqdm=False)
        assert failed.outputs[0].finish_reason is FinishReason.ERROR
        assert "a bit fell over" in str(failed.outputs[0].error)
        await_true(lambda: "a bit fell over" in caplog.text)
        (fine,) = llm.generate([[1, 2]], greedy(2), use_tqdm=False)
        assert fine.outputs[0].finish_reason is FinishReason.LENGTH


def test_a_resource_that_raises_fails_its_request_and_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    class Picky(Tables):
        def needed(self, request: Any) -> int:
            if request.prompt_token_ids[0] == 13:
                raise ValueError("unlucky")
            return 0

        def free_resources(self, request: Any) -> None:
            raise OSError("stuck")

    with toy_llm(resources=[Picky()]) as llm:
        outputs = llm.generate([[12, 1], [13, 1], [14, 1]], greedy(4), use_tqdm=False)
        assert "unlucky" in (outputs[1].outputs[0].error or "")
        assert tokens_of(outputs[0]) == expected_tokens([12, 1], 4)
        assert tokens_of(outputs[2]) == expected_tokens([14, 1], 4)
        await_true(lambda: "resource tables failed while it was freed: OSError('stuck')" in caplog.text)


def test_a_resource_that_changed_outside_is_looked_at_when_told() -> None:
    valve, tables = Valve(), Tables()
    tables.held = {-1, -2}
    with toy_llm(on_forward=valve, resources=[tables], stages=2) as llm:
        tables.held = set()
        first = llm.submit([1, 2], greedy(3))
        valve.await_arrival(1)
        with llm.engine.state.changed:
            tables.held |= {-1}
        second = llm.submit([3, 4], greedy(3))
        await_state(llm.engine, lambda: llm.engine.state.core.num_waiting == 1)
        with llm.engine.state.changed:
            tables.held -= {-1}
        llm.engine.state.notify()
        await_state(llm.engine, lambda: llm.engine.state.core.num_waiting == 0)
        valve.open()
        assert tokens_of(first.result(SECONDS)) == expected_tokens([1, 2], 3)
        assert tokens_of(second.result(SECONDS)) == expected_tokens([3, 4], 3)


def test_what_the_model_holds_bounds_an_answer_without_max_tokens() -> None:
    from llm_engine import LLM

    with LLM(model_engine=lambda stage: ToyModelEngine(max_model_len=30), num_kv_blocks=50, block_size=4) as llm:
        assert llm.max_model_len == 30
        (output,) = llm.generate([1, 2, 3], greedy(None), use_tqdm=False)  # type: ignore[arg-type]
        assert len(tokens_of(output)) == 27
    with LLM(model_engine=lambda stage: ToyModelEngine(max_model_len=300), num_kv_blocks=5, block_size=4) as llm:
        (output,) = llm.generate([1, 2, 3], greedy(None), use_tqdm=False)  # type: ignore[arg-type]
        assert len(tokens_of(output)) == 14, "16 tokens fit into 4 blocks, and the last one is never computed"
