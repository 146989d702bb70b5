"""Twenty random kills in five minutes, under load: every request is accounted for, and nothing is left.

``SOAK_SECONDS`` and ``SOAK_KILLS`` make it shorter or longer; ``SOAK_SEED`` repeats the order of one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import random
import signal
import threading
import time

import pytest

from llm_engine import LLM, RequestFailedError, SamplingParams
from llm_engine.engine.executors.zmq_executor import ZmqExecutor
from tests.engine.engines import await_state, tokens_of, toy_llm
from tests.engine.stage_faults import await_that, marked_processes
from tests.engine.test_faults_zmq import traces
from tests.toy_stages import make_stage, tell_stages

__all__ = ["traces"]

SECONDS = float(os.environ.get("SOAK_SECONDS", "300"))
KILLS = int(os.environ.get("SOAK_KILLS", "20"))
ANSWER_SECONDS = 120.0
"""No request takes longer, outages included."""
NUM_STAGES, NUM_CALLERS, NUM_ASKED = 3, 6, 200

Asked = tuple[list[int], SamplingParams]


def make_asked(seed: int) -> list[Asked]:
    """Short and long, greedy and sampled, some with a shared beginning."""
    rng = random.Random(seed)
    asked: list[Asked] = []
    for number in range(NUM_ASKED):
        shared = list(range(10, 10 + rng.choice([0, 0, 16, 40])))
        prompt = shared + [rng.randrange(97) for _ in range(rng.randint(1, 60))]
        params = SamplingParams(
            max_tokens=rng.randint(1, 200), temperature=rng.choice([0.0, 0.0, 1.0]), top_p=rng.choice([1.0, 0.9]),
            seed=number, logprobs=rng.choice([None, None, 1]),
        )  # fmt: skip
        asked.append((prompt, params))
    return asked


class Caller(threading.Thread):
    """Asks one after the other, and sometimes leaves in the middle."""

    def __init__(self, llm: LLM, asked: list[Asked], right: list[list[int]], seed: int, until: float) -> None:
        super().__init__(name=f"caller-{seed}")
        self.llm, self.asked, self.right, self.until = llm, asked, right, until
        self.rng = random.Random(seed)
        self.num_right = self.num_left = 0
        self.failures: list[str] = []
        self.wrong: list[object] = []

    def run(self) -> None:
        while time.monotonic() < self.until and not self.wrong:
            number = self.rng.randrange(len(self.asked))
            try:
                tokens = self.ask(*self.asked[number])
            except RequestFailedError as error:
                self.failures.append(str(error))
                continue
            except Exception as error:  # noqa: BLE001 - told to the test
                self.wrong.append(error)
                continue
            right = self.right[number]
            if tokens == right[: len(tokens)] and (len(tokens) == len(right) or self.left):
                self.num_right += 1
            else:
                self.wrong.append((self.asked[number], tokens, right))

    def ask(self, prompt: list[int], params: SamplingParams) -> list[int]:
        self.left = False
        if self.rng.random() < 0.5:
            return tokens_of(self.llm.submit(prompt, params).result(ANSWER_SECONDS))
        tokens: list[int] = []
        leaves_at = self.rng.choice([None, None, self.rng.randint(1, 50)])
        with self.llm.stream(prompt, params) as stream:
            for part in iter(functools.partial(stream.next_delta, ANSWER_SECONDS), None):
                tokens += part.outputs[0].token_ids
                if len(tokens) == leaves_at and not part.finished:
                    self.left = True
                    self.num_left += 1
                    break
        return tokens


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_random_kills_under_load(monkeypatch: pytest.MonkeyPatch, traces: str) -> None:
    faulthandler.cancel_dump_traceback_later()  # the suite's, for tests that should take seconds
    seed = int(os.environ.get("SOAK_SEED", random.randrange(10**6)))
    print(f"SOAK_SEED={seed}")
    rng = random.Random(seed)
    asked = make_asked(seed)
    settings: dict[str, object] = {"num_kv_blocks": 160, "block_size": 4, "max_num_batched_tokens": 32}
    with toy_llm(**settings) as calm:
        right = [tokens_of(calm.submit(*one).result(60)) for one in asked]
    tell_stages(monkeypatch, NUM_STAGES)
    with LLM(
        model_engine=make_stage, pipeline_parallel_size=NUM_STAGES, executor="zmq", max_stage_restarts=10 * KILLS,
        max_num_seqs=8, **settings,  # type: ignore[arg-type]
    ) as llm:  # fmt: skip
        began = time.monotonic()
        callers = [Caller(llm, asked, right, seed + number, began + SECONDS) for number in range(NUM_CALLERS)]
        for caller in callers:
            caller.start()
        moments = sorted(rng.uniform(0.0, SECONDS - 5.0) for _ in range(KILLS))
        for number, moment in enumerate(moments):
            threading.Event().wait(max(0.0, began + moment - time.monotonic()))
            strike(llm, rng, stop=number % 5 == 4)
        for caller in callers:
            caller.join(SECONDS + 150)
            assert not caller.is_alive()
            assert not caller.wrong, caller.wrong
        core = llm.engine.state.core
        await_state(llm.engine, lambda: core.is_idle and core.stages_up)
        core.check_integrity()
        assert core.kv.num_free_blocks == core.kv.num_usable_blocks
        assert len(marked_processes(traces)) == NUM_STAGES, "no stage of an earlier life"
        failures = [failure for caller in callers for failure in caller.failures]
        assert all(failure.count(" died: its process ") == 2 for failure in failures), failures
        print(
            f"{sum(c.num_right for c in callers)} right, {sum(c.num_left for c in callers)} of them left early, "
            f"{len(failures)} in flight at two deaths, {core.epoch} deaths, {core.num_replays} replays, "
            f"{core.num_preemptions} pauses"
        )
        assert core.epoch >= KILLS - 1
        assert core.num_replays > 0
        assert sum(caller.num_right for caller in callers) > 10 * KILLS


def strike(llm: LLM, rng: random.Random, *, stop: bool) -> None:
    """End or stop one stage, whatever it does, even where it only starts; wait until that is known."""
    executor = llm.engine._executor
    assert isinstance(executor, ZmqExecutor)
    await_that(lambda: executor._group is not None and executor._group.failure is None, 20)
    assert executor._group is not None
    process = rng.choice(executor._group.stages).process
    assert process is not None
    restarts = llm.engine.state.num_restarts
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGSTOP if stop else signal.SIGKILL)
    await_that(lambda: llm.engine.state.num_restarts > restarts, 2.0)
