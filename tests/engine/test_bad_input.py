"""What a caller can get wrong: each names the field, its value and what is allowed; nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llm_engine import LLM, CapacityError, InvalidParamsError, PromptTooLongError, SamplingParams
from tests.engine.engines import greedy, tokens_of, toy_llm
from tests.toy_model_engine import ToyModelEngine, expected_tokens


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """64 positions of context; the cache holds 40 tokens, so that it is what a long request exceeds."""
    with LLM(
        model_engine=lambda stage: ToyModelEngine(max_model_len=64),
        num_kv_blocks=11,
        block_size=4,
        max_num_batched_tokens=16,
    ) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_left_behind(llm: LLM) -> Iterator[None]:
    yield
    state = llm.engine.state
    with state.changed:
        assert not len(state.core.table)
        assert not state._arrivals
        assert not state._unanswered
        assert state.core.kv.usage == 0.0
    assert tokens_of(llm.generate([1, 2], greedy(2), use_tqdm=False)[0]) == expected_tokens([1, 2], 2)


DOORS = ("generate", "stream", "submit")


def ask(llm: LLM, door: str, prompt: Any, params: Any = None, **more: Any) -> Any:
    if door == "generate":
        return llm.generate([prompt, [1]], params, use_tqdm=False)
    return getattr(llm, door)(prompt, params, **more)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("prompt", "params", "field", "value", "allowed"),
    [
        ([], greedy(2), "prompt", [], "at least one token"),
        ([1, 97], greedy(2), "prompt", 97, "token ids from 0 to 96"),
        ([1, -1], greedy(2), "prompt", -1, "token ids from 0 to 96"),
        ([1, 2.0], greedy(2), "prompt", 2.0, "token ids from 0 to 96"),
        ([1, True], greedy(2), "prompt", True, "token ids from 0 to 96"),
        ([1, None], greedy(2), "prompt", None, "token ids from 0 to 96"),
        ([1, "2"], greedy(2), "prompt", "2", "token ids from 0 to 96"),
        (5, greedy(2), "prompt", 5, "a text or a list of token ids"),
        (None, greedy(2), "prompt", None, "a text or a list of token ids"),
        (b"abc", greedy(2), "prompt", b"abc", "a text or a list of token ids"),
        ({"prompt": 1}, greedy(2), "prompt", {"prompt": 1}, "a text or a list of token ids"),
        ("hello", greedy(2), "prompt", "hello", "this engine has no tokenizer"),
        ([1], greedy(2, stop="x"), "stop", ("x",), "this engine has no tokenizer"),
        ([1], greedy(2, bad_words="x"), "bad_words", ("x",), "this engine has no tokenizer"),
        ([1], greedy(2, stop_token_ids=[97]), "stop_token_ids", 97, "token ids from 0 to 96"),
        ([1], greedy(2, logit_bias={97: 1}), "logit_bias", 97, "token ids from 0 to 96"),
        ([1], greedy(2, allowed_token_ids=[3, 970]), "allowed_token_ids", 970, "token ids from 0 to 96"),
        ([1], {"temperature": 0}, "sampling_params", {"temperature": 0}, "SamplingParams"),
        ([1], "greedy", "sampling_params", "greedy", "SamplingParams"),
    ],
)
def test_bad_values(llm: LLM, door: str, prompt: Any, params: Any, field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        ask(llm, door, prompt, params)
    assert (caught.value.field, caught.value.value) == (field, value)
    assert allowed in caught.value.allowed


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("length", "max_tokens", "field", "words"),
    [
        (64, 1, "prompt", "prompt is '64 tokens'; allowed: at most 63, the context of 64"),
        (10, 55, "max_tokens", "max_tokens is 55; allowed: at most 54: the context is 64 and the prompt takes 10"),
        (10, 32, "max_tokens", "max_tokens is 32; allowed: prompt and output of at most 40 tokens"),
        (45, None, "prompt", "prompt is '45 tokens'; allowed: prompt and output of at most 40 tokens"),
    ],
)
def test_what_is_too_long(llm: LLM, door: str, length: int, max_tokens: int | None, field: str, words: str) -> None:
    with pytest.raises(PromptTooLongError) as caught:
        ask(llm, door, [1] * length, SamplingParams(temperature=0, max_tokens=max_tokens))
    assert caught.value.field == field
    assert words in str(caught.value)


@pytest.mark.parametrize(("length", "max_tokens"), [(10, 31), (40, 1), (1, 40), (40, None)])
def test_what_just_fits(llm: LLM, length: int, max_tokens: int | None) -> None:
    (output,) = llm.generate([[1] * length], SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)
    assert len(tokens_of(output)) == (max_tokens or 1)


@pytest.mark.parametrize(
    ("bad", "field"),
    [({"n": 0}, "n"), ({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature"),
     ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": "many"}, "max_tokens"), ({"top_p": 2}, "top_p")],
)  # fmt: skip
def test_bad_parameters_never_reach_the_engine(bad: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParamsError, match=f"^{field} is "):
        SamplingParams(**bad)


@pytest.mark.parametrize("door", ["stream", "submit"])
@pytest.mark.parametrize(
    "bad",
    [{"priority": "high"}, {"priority": True}, {"cache_salt": 5}, {"tenant": 5}, {"request_id": 5}, {"adapter_id": []}],
)
def test_what_goes_with_a_request(llm: LLM, door: str, bad: dict[str, Any]) -> None:
    (field,) = bad
    with pytest.raises(InvalidParamsError, match=f"^{field} is "):
        ask(llm, door, [1], greedy(1), **bad)


@pytest.mark.parametrize("bad", [{"priority": "high"}, {"priority": 3}, {"deadline_ms": 5.0}, {"tenant": ""}])
def test_what_goes_with_all_prompts(llm: LLM, bad: dict[str, Any]) -> None:
    (field,) = bad
    with pytest.raises(InvalidParamsError, match=f"^{field} is "):
        llm.generate([1], greedy(1), use_tqdm=False, **bad)


@pytest.mark.parametrize("prompts", [[], "", b"x", 5, None, {"a": 1}])
def test_no_prompts_at_all(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidParamsError, match="prompt"):
        llm.generate(prompts, use_tqdm=False)


def test_one_bad_prompt_among_good_ones_submits_nothing(llm: LLM) -> None:
    with pytest.raises(InvalidParamsError, match="97"):
        llm.generate([[1], [2], [97]], greedy(2), use_tqdm=False)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_parameters_as_prompts(llm: LLM, count: int) -> None:
    with pytest.raises(InvalidParamsError, match="sampling_params"):
        llm.generate([[1], [2]], [greedy(1)] * count, use_tqdm=False)


@pytest.mark.parametrize(
    "messages", [[], "hi", [{"role": "user", "content": "hi"}], {"role": "user"}, [[]], None, 5, [["x"]]]
)
def test_conversations_need_a_tokenizer(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidParamsError, match="messages"):
        llm.chat(messages, use_tqdm=False)


def test_a_bad_setting_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="did you mean 'max_num_seqs'"):
        toy_llm(max_num_sequences=3)
    with pytest.raises(ValueError, match="scheduler is 'gredy'"):
        toy_llm(scheduler="gredy")
    with pytest.raises(ValueError, match="executor is 'trheads'"):
        toy_llm(executor="trheads")


def test_a_capacity_error_is_no_value_error() -> None:
    assert not issubclass(CapacityError, ValueError)
