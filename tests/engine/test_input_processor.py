"""Texts on their way to the engine, with the bundled model's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

import llm_engine
from llm_engine import InvalidParamsError, ModelInfo, SamplingParams
from llm_engine.engine.input_processor import InputProcessor
from llm_engine.engine.stream import QueueSink
from llm_engine.engine.tokenizer import Tokenizer
from llm_engine.kvcache.kv_cache_manager import KVCacheManager

TOKENIZER = Tokenizer(str(Path(llm_engine.__file__).parent / "models" / "demo_model"))
HALF_A_PAIR = "a\ud800"


def made() -> InputProcessor:
    model = ModelInfo("Toy", vocab_size=100_000, max_model_len=64, dtype="float32")
    return InputProcessor(model, KVCacheManager(20, 4), TOKENIZER, max_chunk=16, seed=0)


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [(HALF_A_PAIR, SamplingParams(), "prompt"), ("a", SamplingParams(bad_words=[HALF_A_PAIR]), "bad_words")],
)
def test_half_a_surrogate_pair_is_refused(prompt: str, params: SamplingParams, field: str) -> None:
    inputs = made()
    with pytest.raises(InvalidParamsError, match="surrogates not allowed") as caught:
        inputs.make_requests(prompt, params, QueueSink())
    assert caught.value.field == field


def test_half_a_surrogate_pair_in_a_conversation_is_refused() -> None:
    with pytest.raises(InvalidParamsError, match="surrogates not allowed") as caught:
        TOKENIZER.render_chat([{"role": "user", "content": HALF_A_PAIR}])
    assert caught.value.field == "messages"


def test_the_first_choice_scores_the_prompt_for_all() -> None:
    requests = made().make_requests([1, 2], SamplingParams(n=3, prompt_logprobs=2, logprobs=1), QueueSink())
    assert [request.params.prompt_logprobs for request in requests] == [2, None, None]
    assert [request.params.logprobs for request in requests] == [1, 1, 1]
    assert [request.reads_prefix_cache for request in requests] == [False, True, True]
