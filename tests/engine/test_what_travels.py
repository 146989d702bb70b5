"""Whatever the input processor lets through can be sent to a stage's process, and arrives as it was."""

from __future__ import annotations

import enum
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import llm_engine
from llm_engine import InvalidParamsError, ModelInfo, SamplingParams
from llm_engine.core.config import EngineConfig
from llm_engine.core.request import Request
from llm_engine.core.step import StepPlan
from llm_engine.engine.assembly import make_core
from llm_engine.engine.input_processor import InputProcessor
from llm_engine.engine.stream import QueueSink
from llm_engine.engine.tokenizer import Tokenizer
from llm_engine.workers.wire import PlanBounds, decode_plan, encode_plan

TOKENIZER = Tokenizer(str(Path(llm_engine.__file__).parent / "models" / "demo_model"))
VOCAB, LENGTH, BLOCKS = 4096, 64, 200
BOUNDS = PlanBounds(max_num_seqs=8, max_model_len=LENGTH, vocab_size=VOCAB, num_blocks=BLOCKS)


class Number(int):
    """No plain ``int``: msgpack refuses it."""


class Text(str):
    """No plain ``str``: msgpack refuses it."""


class Ratio(float):
    """No plain ``float``."""


Several = enum.IntEnum("Several", "ONE TWO")


def plan_of(prompt: Any, params: dict[str, Any], caching: bool = True, **said: Any) -> StepPlan:
    """What is pushed first where this is all that was asked. Raises ``InvalidParamsError``."""
    config = EngineConfig.of(max_num_seqs=8, max_num_batched_tokens=64, enable_prefix_caching=caching)
    core = make_core(config, num_kv_blocks=BLOCKS, block_size=4, num_stages=1, on_cuda=False)
    model = ModelInfo("Toy", vocab_size=VOCAB, max_model_len=LENGTH, dtype="float32", eos_token_ids=[0])
    inputs = InputProcessor(model, core.kv, TOKENIZER, max_chunk=64, seed=2**64 - 1)
    requests: list[Request] = inputs.make_requests(prompt, SamplingParams(**params), QueueSink(), **said)
    for request in requests:
        core.add(request, 0.0)
    plan = core.schedule(0.0)
    assert plan is not None
    assert plan.starts
    return plan


def check_travels(plan: StepPlan) -> None:
    received = decode_plan(*encode_plan(plan), BOUNDS)
    columns = ("decode_ids", "decode_slots", "decode_positions", "decode_tokens")
    assert replace(received, **{name: list(getattr(received, name)) for name in columns}) == replace(
        plan, **{name: list(getattr(plan, name)) for name in columns}
    )


RIGHT: dict[str, Any] = {"prompt": [1, 2, 3], "params": {}}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("top_k", 2**64, "a whole number from 0 to 9223372036854775807"),
        pytest.param("top_k", 10**5000, "a whole number from 0 to 9223372036854775807", id="of thousands of digits"),
        ("min_tokens", 2**70, "at most 61: there is no room for more"),
        ("min_tokens", 62, "at most 61: there is no room for more"),
        ("max_tokens", 2**70, "at most 61: the context is 64 and the prompt takes 3"),
        ("seed", 2**64, "a whole number from -9223372036854775808 to 18446744073709551615 or null"),
        ("logit_bias", {2**70: 1.0}, "token ids from 0 to 4095"),
        ("logit_bias", {5: float("nan")}, "a map of token id to a number in [-100, 100]"),
        ("stop_token_ids", [2**64], "token ids from 0 to 4095"),
        ("allowed_token_ids", [2**64], "token ids from 0 to 4095"),
        ("stop", ["\ud800"], "valid Unicode (surrogates not allowed)"),
        ("bad_words", ["\ud800"], "valid Unicode (surrogates not allowed)"),
    ],
)
def test_what_no_message_can_carry_is_refused_by_name(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        plan_of([1, 2, 3], {"max_tokens": None, field: value})
    assert caught.value.field == field
    assert caught.value.allowed == allowed


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("field", ["adapter_id", "cache_salt", "tenant", "request_id"])
def test_texts_beside_the_prompt_are_valid_unicode(field: str, caching: bool) -> None:
    with pytest.raises(InvalidParamsError, match="surrogates not allowed") as caught:
        plan_of([1, 2, 3], {}, caching, **{field: "\ud800"})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([1, 2, 3], {"top_k": 2**63 - 1, "seed": 2**64 - 1, "min_tokens": 16}, {}),
        ([1, 2, 3], {"max_tokens": None, "min_tokens": 61, "seed": -(2**63)}, {}),
        ([Number(1), Several.TWO], {"stop_token_ids": [Number(3), Several.ONE]}, {}),
        ([1], {"top_k": Number(5), "n": Several.TWO, "seed": Number(3), "logprobs": Several.ONE}, {}),
        ([1], {"allowed_token_ids": [Several.ONE], "logit_bias": {Several.TWO: Ratio(0.5), "3": np.float64(1)}}, {}),
        ([1], {"temperature": np.float64(0.5), "top_p": Ratio(0.5)}, {}),
        ([1], {"stop": [np.str_("x"), Text("y")], "bad_words": Text("z")}, {}),
        ([1], {"stop": Text("x")}, {"adapter_id": Text("a"), "cache_salt": np.str_("b"), "tenant": Text("c")}),
        (np.array([1, 2], np.int32).tolist(), {}, {"request_id": Text("r")}),
    ],
)
def test_only_plain_numbers_and_texts_are_kept(prompt: Any, params: dict[str, Any], said: dict[str, Any]) -> None:
    check_travels(plan_of(prompt, params, **said))


def test_the_subclasses_above_would_not_travel() -> None:
    for odd in (Number(1), Text("x"), np.str_("x")):
        with pytest.raises(TypeError):
            msgspec.msgpack.encode(odd)


integers = st.one_of(
    st.integers(-3, 70), st.integers(), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**4000]),
    st.booleans(), st.integers(0, 70).map(Number), st.sampled_from(list(Several)), st.just(np.int64(3)),
)  # fmt: skip
numbers = st.one_of(st.floats(0, 2), st.floats(), st.floats(0, 1).map(Ratio), st.floats(0, 1).map(np.float64), integers)
texts = st.one_of(
    st.text(max_size=6), st.text("a\ud800\U0001f600", max_size=4), st.text(max_size=3).map(Text), st.just(np.str_("x"))
)
words = st.one_of(texts, st.lists(texts, max_size=3))
ids = st.lists(st.one_of(st.integers(0, VOCAB - 1), integers), max_size=5)
biases = st.dictionaries(st.one_of(st.integers(0, 70), integers, st.just("7")), numbers, max_size=3)
maybe = st.none()
PARAMS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("n", "min_tokens", "top_k"), integers),
    **dict.fromkeys(("max_tokens", "seed", "logprobs", "prompt_logprobs"), maybe | integers),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), numbers),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), numbers),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids"), ids),
    **dict.fromkeys(("stop", "bad_words"), words),
    "logit_bias": biases,
}
SAID: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("request_id", "tenant", "adapter_id", "cache_salt"), maybe | texts),
    "priority": integers,
    "deadline_ms": maybe | numbers,
}


@st.composite
def some_of(draw: st.DrawFn, known: dict[str, st.SearchStrategy[Any]]) -> dict[str, Any]:
    """A few fields, so that not every request has something wrong with it."""
    return {name: draw(known[name]) for name in draw(st.lists(st.sampled_from(sorted(known)), max_size=3))}


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.one_of(ids, texts), some_of(PARAMS), some_of(SAID), st.booleans())
def test_whatever_is_let_through_arrives_as_it_was(
    prompt: Any, params: dict[str, Any], said: dict[str, Any], caching: bool
) -> None:
    try:
        plan = plan_of(prompt, params, caching, **said)
    except InvalidParamsError:
        event("refused")
        return
    event("let through")
    check_travels(plan)
