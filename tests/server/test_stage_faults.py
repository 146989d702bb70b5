"""What a client, a load balancer and a scraper see when a stage process of the bundled model is killed."""

from __future__ import annotations

import os
import signal
import time

import pytest

from llm_engine import LLM
from llm_engine.engine.executors.zmq_executor import ZmqExecutor
from tests.engine.engines import greedy, tokens_of
from tests.engine.stage_faults import await_that
from tests.engine.test_faults_zmq import NOTICED_SECONDS, traces
from tests.server.test_app import Site

__all__ = ["traces"]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.usefixtures("traces")
def test_a_stream_goes_on_and_ready_tells_of_it(victim: int) -> None:
    began = time.monotonic()
    with LLM(pipeline_parallel_size=2, executor="zmq", num_kv_blocks=64, cpu_threads=1) as llm:
        start_seconds = time.monotonic() - began
        site = Site(llm)
        prompt, params = "Once upon a time", greedy(60, ignore_eos=True)
        right = tokens_of(llm.generate(prompt, params, use_tqdm=False)[0])
        executor = llm.engine._executor
        assert isinstance(executor, ZmqExecutor)
        assert executor._group is not None
        process = executor._group.stages[victim].process
        assert process is not None
        tokens: list[int] = []
        answers = [site.get("/ready")]
        with llm.stream(prompt, params) as stream:
            while len(tokens) < 20:
                tokens += next(stream).outputs[0].token_ids
            os.kill(process.pid, signal.SIGKILL)

            def is_away() -> bool:
                answers.append(site.get("/ready"))
                return answers[-1].status_code == 503

            await_that(is_away, NOTICED_SECONDS)
            assert site.get("/health").status_code == 200
            cause = f"stage {victim} died: its process was ended by SIGKILL"
            assert answers[-1].text == f"{cause}; the stages are being started again\n"
            # As long as the start took and two seconds; twice that, since other programs may run now and not then.
            await_that(lambda: site.get("/ready").status_code == 200, 2 * (start_seconds + 2.0))
            tokens += [token for part in stream for token in part.outputs[0].token_ids]
        assert tokens == right
        labels = f'{{engine="0",model_name="{llm.model_name}"}}'
        for counter in ("stage_restarts", "replays"):
            assert f"llm_engine_{counter}_total{labels} 1.0" in site.get("/metrics").text
