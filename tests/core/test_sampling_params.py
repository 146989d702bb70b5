"""Sampling parameters: every bad value names its field; good ones are normalised and read-only."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from llm_engine.core.errors import InvalidParamsError
from llm_engine.core.sampling_params import SAMPLING_FIELDS, SamplingParams

NAN, INF = float("nan"), float("inf")
BAD: dict[str, list[Any]] = {
    "n": [0, -1, 129, 1.0, True, None, "1"],
    "max_tokens": [0, -1, 1.5, True, "16", NAN],
    "min_tokens": [-1, 17, None, 1.0],
    "temperature": [-1, -1e-9, 100.5, NAN, INF, None, "hot", True, 10**400],
    "top_k": [-2, 1.5, None, "5", True],
    "top_p": [0, -0.1, 1.01, NAN, None, "1"],
    "min_p": [-0.1, 1.1, NAN, None],
    "repetition_penalty": [0, -1, 101, NAN, INF],
    "presence_penalty": [-2.1, 2.1, NAN, "0"],
    "frequency_penalty": [-2.1, 2.1, NAN, None],
    "logit_bias": [[1], "x", {"a": 1}, {1: 101}, {1: NAN}, {1: "2"}, {1: True}, {-1: 0}, {1.5: 0}, {True: 0}],
    "allowed_token_ids": [5, "5", [-1], ["a"], [True], [1.0], {1: 2}],
    "bad_words": [5, [""], "", [1], b"x"],
    "stop": [5, [""], "", [1], [None], b"x"],
    "stop_token_ids": [5, [-1], ["a"], [True], {3}],
    "include_stop_str_in_output": [None, 1, "true"],
    "ignore_eos": [None, 0],
    "seed": [2**64, -(2**63) - 1, 1.0, True, "1"],
    "logprobs": [-1, 21, True, 1.0],
    "prompt_logprobs": [-1, 21, True],
    "skip_special_tokens": [None, 1],
    "detokenize": [None, 1],
}


def test_every_field_is_in_the_table() -> None:
    assert set(BAD) == set(SAMPLING_FIELDS)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_value_names_its_field_value_and_what_is_allowed(field: str, value: Any) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert caught.value.allowed
    assert str(caught.value).startswith(f"{field} is ")
    assert len(str(caught.value)) < 250, "a huge value is cut"


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidParamsError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_one_word_stands_for_a_list_of_one() -> None:
    params = SamplingParams(stop="end", bad_words="no")
    assert (params.stop, params.bad_words) == (("end",), ("no",))
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()  # type: ignore[arg-type]


def test_spellings_of_off() -> None:
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(logit_bias=None).logit_bias == {}  # type: ignore[arg-type]
    assert SamplingParams(max_tokens=None, min_tokens=10**9).max_tokens is None


def test_json_spells_token_ids_as_strings() -> None:
    assert SamplingParams(logit_bias={"7": -100, 8: 3}).logit_bias == {7: -100.0, 8: 3.0}  # type: ignore[dict-item]


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-6, True), (1e-4, False), (1.0, False)])
def test_a_temperature_of_almost_nothing_is_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).is_greedy is greedy


@pytest.mark.parametrize(
    "change",
    [{"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}, {"logit_bias": {1: 1}},
     {"allowed_token_ids": [1]}, {"bad_words": "x"}, {"min_tokens": 1}],
)  # fmt: skip
def test_what_needs_the_logits_changed(change: dict[str, Any]) -> None:
    assert SamplingParams(**change).needs_logits_processing
    assert not SamplingParams(temperature=0.3, top_k=5, stop_token_ids=[1], logprobs=2).needs_logits_processing


def test_read_only_and_replaceable() -> None:
    params = SamplingParams(temperature=0, stop=["a", "b"], logit_bias={1: 2})
    with pytest.raises(FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert replace(params, n=2) == SamplingParams(temperature=0, stop=("a", "b"), logit_bias={1: 2}, n=2)
