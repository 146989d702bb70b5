"""Deltas become answers: text, slices of log-probabilities, several choices, what ends a choice."""

from __future__ import annotations

from typing import Any

import pytest

from llm_engine import LLM, FinishReason, InvalidParamsError, RequestOutput, SamplingParams
from llm_engine.core.errors import EngineDeadError, RequestFailedError
from llm_engine.core.request import Request, RequestId
from llm_engine.core.step import TokenLogprobs
from llm_engine.engine.collector import RequestCollector
from llm_engine.engine.delta import Delta
from tests.engine.engines import await_state
from tests.engine.test_detokenizer import END, TOKENIZER
from tests.toy_model_engine import ToyModelEngine

TEXT = "Once upon a time there was a fox."
IDS = TOKENIZER.encode(TEXT)


class Case:
    """A collector, fed by hand, that notes whom it aborts."""

    def __init__(self, *, streaming: bool = True, tokenizer: Any = TOKENIZER, **params: Any) -> None:
        self.params = SamplingParams(**params)
        self.requests = [
            Request(RequestId(index), "mine", [1, 2, 3], self.params, 99, 1.0, choice_index=index)
            for index in range(self.params.n)
        ]
        self.aborted: list[tuple[list[int], FinishReason]] = []
        self.collector = RequestCollector(
            self.requests,
            "prompt",
            tokenizer,
            lambda ids, reason: self.aborted.append((ids, reason)),
            streaming=streaming,
        )

    def feed(self, ids: list[int], choice: int = 0, **more: Any) -> RequestOutput | None:
        if self.params.logprobs is not None:
            more["logprobs"] = [TokenLogprobs(i, -0.5, 1, [], []) for i in ids]
        return self.collector.take(Delta(self.requests[choice], ids, 2.0, **more))

    def feed_each(self, ids: list[int], choice: int = 0) -> list[RequestOutput]:
        return [part for i in ids if (part := self.feed([i], choice)) is not None]

    def end(
        self, reason: FinishReason, ids: list[int] | None = None, choice: int = 0, **more: Any
    ) -> RequestOutput | None:
        return self.feed(ids or [], choice, finish_reason=reason, **more)


def text_of(parts: list[RequestOutput]) -> str:
    return "".join(part.outputs[0].text for part in parts)


@pytest.mark.parametrize("streaming", [True, False])
def test_the_text_of_the_tokens(streaming: bool) -> None:
    case = Case(streaming=streaming)
    parts = case.feed_each(IDS[:-1])
    last = case.end(FinishReason.LENGTH, IDS[-1:])
    assert (len(parts), last is None) == ((len(IDS) - 1, False) if streaming else (0, True))
    if last is not None:
        assert text_of([*parts, last]) == TEXT
        assert last.outputs[0].finish_reason is FinishReason.LENGTH
    result = case.collector.result()
    assert (result.outputs[0].text, result.outputs[0].token_ids, result.prompt) == (TEXT, IDS, "prompt")
    assert case.collector.finished
    assert result.finished


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_a_stop_string_ends_the_choice_and_aborts_what_still_runs(streaming: bool, include: bool) -> None:
    case = Case(streaming=streaming, stop="a time", include_stop_str_in_output=include, logprobs=0)
    parts = case.feed_each(IDS)
    (output,) = case.collector.result().outputs
    assert output.text == "Once upon " + ("a time" if include else "")
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, "a time")
    assert case.aborted == [([0], FinishReason.STOP)], "once"
    used = len(TOKENIZER.encode("Once upon a time"))
    assert output.token_ids == IDS[:used]
    assert output.logprobs is not None
    assert len(output.logprobs) == used
    assert output.cumulative_logprob == -0.5 * used
    if streaming:
        assert text_of(parts) == output.text
        assert [i for part in parts for i in part.outputs[0].token_ids] == output.token_ids
        assert sum(len(part.outputs[0].logprobs or ()) for part in parts) == used
        assert parts[-1].finished


def test_what_comes_after_the_end_is_not_told() -> None:
    case = Case(stop="Once")
    case.feed_each(IDS)
    assert case.feed([5]) is None
    assert case.end(FinishReason.STOP) is None
    assert case.collector.result().outputs[0].text == ""


def test_tokens_behind_a_stop_string_in_the_same_delta_are_left_out() -> None:
    case = Case(stop="a time", logprobs=0)
    part = case.feed(IDS)
    used = len(TOKENIZER.encode("Once upon a time"))
    assert part is not None
    assert (part.outputs[0].text, part.outputs[0].token_ids) == ("Once upon ", IDS[:used])
    assert len(part.outputs[0].logprobs or ()) == used
    assert case.collector.result().outputs[0].token_ids == IDS[:used]


def test_a_stop_string_in_the_very_last_token_needs_no_abort() -> None:
    case = Case(stop="fox.")
    case.feed_each(IDS[:-1])
    case.end(FinishReason.LENGTH, IDS[-1:])
    (output,) = case.collector.result().outputs
    assert (output.text, output.finish_reason, output.stop_reason) == (
        "Once upon a time there was a ",
        FinishReason.STOP,
        "fox.",
    )
    assert case.aborted == []


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("more", "shown"), [({}, ""), ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "<|im_end|>")]
)
def test_a_stop_token_is_told_but_its_text_is_hidden(streaming: bool, more: dict[str, Any], shown: str) -> None:
    case = Case(streaming=streaming, **more)
    parts = case.feed_each(IDS)
    last = case.end(FinishReason.STOP, [END])
    (output,) = case.collector.result().outputs
    assert output.text == TEXT + shown
    assert output.token_ids == [*IDS, END]
    if last is not None:
        assert text_of([*parts, last]) == output.text


@pytest.mark.parametrize("streaming", [True, False])
def test_a_plain_word_as_a_stop_token_is_hidden_too(streaming: bool) -> None:
    case = Case(streaming=streaming)
    case.feed_each(IDS[:3])
    case.end(FinishReason.STOP, IDS[3:4], stop_reason=IDS[3])
    (output,) = case.collector.result().outputs
    assert (output.text, output.token_ids, output.stop_reason) == (TOKENIZER.decode(IDS[:3]), IDS[:4], IDS[3])


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("skip", "expected"), [(True, "yes no"), (False, "yes<|im_end|> no")])
def test_special_tokens_within(streaming: bool, skip: bool, expected: str) -> None:
    case = Case(streaming=streaming, skip_special_tokens=skip)
    case.feed_each([*TOKENIZER.encode("yes"), END, *TOKENIZER.encode(" no")])
    case.end(FinishReason.ABORT)
    assert case.collector.result().outputs[0].text == expected


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.LENGTH, FinishReason.ERROR])
def test_held_back_text_is_told_at_the_end(reason: FinishReason) -> None:
    case = Case(stop="a very long stop string that never comes")
    parts = case.feed_each(IDS)
    assert text_of(parts) == ""
    last = case.end(reason, error=RequestFailedError("x") if reason is FinishReason.ERROR else None)
    assert last is not None
    assert last.outputs[0].text == TEXT == case.collector.result().outputs[0].text


def test_tokens_without_text_are_told_at_once() -> None:
    case = Case()
    parts = case.feed_each(TOKENIZER.encode("🙂"))
    assert [part.outputs[0].text for part in parts] == ["", "", "", "🙂"]
    case = Case(detokenize=False)
    assert text_of(case.feed_each(IDS)) == ""
    case.end(FinishReason.LENGTH)
    assert case.collector.result().outputs[0].text == ""


def test_without_a_tokenizer_there_are_tokens_only() -> None:
    case = Case(tokenizer=None)
    parts = case.feed_each([1, 2, 3])
    case.end(FinishReason.LENGTH)
    assert [part.outputs[0].token_ids for part in parts] == [[1], [2], [3]]
    assert case.collector.result().outputs[0].text == ""


def test_several_choices_run_side_by_side_and_end_each_by_itself() -> None:
    case = Case(n=3, stop="upon")
    case.feed_each(TOKENIZER.encode("abc"), 2)
    case.feed_each(IDS, 1)
    assert case.aborted == [([1], FinishReason.STOP)]
    assert case.collector.unfinished_ids == [0, 2]
    case.end(FinishReason.LENGTH, IDS[:1], 0)
    assert not case.collector.finished
    case.end(FinishReason.ABORT, choice=2)
    assert case.collector.finished
    outputs = case.collector.result().outputs
    assert [(o.index, o.text, o.finish_reason) for o in outputs] == [
        (0, TOKENIZER.decode(IDS[:1]), FinishReason.LENGTH),
        (1, "Once ", FinishReason.STOP),
        (2, "abc", FinishReason.ABORT),
    ]


def test_cancelling_ends_what_still_runs() -> None:
    case = Case(n=2)
    case.end(FinishReason.LENGTH, [5], 0)
    case.collector.cancel()
    assert case.aborted == [([1], FinishReason.ABORT)]
    case.end(FinishReason.ABORT, choice=1)
    case.collector.cancel()
    assert len(case.aborted) == 1


def test_the_first_error_is_kept_and_a_death_is_raised() -> None:
    case = Case(n=2)
    first = RequestFailedError("the first")
    case.end(FinishReason.ERROR, error=first)
    case.collector.raise_if_dead()
    case.end(FinishReason.ERROR, choice=1, error=EngineDeadError("the second"))
    assert case.collector.error is first
    assert [o.error for o in case.collector.result().outputs] == ["the first", "the second"]
    dead = Case()
    dead.end(FinishReason.ERROR, error=EngineDeadError("dead"))
    with pytest.raises(EngineDeadError, match="dead"):
        dead.collector.raise_if_dead()


def test_prompt_scores_fall_into_their_places() -> None:
    case = Case(prompt_logprobs=0)
    first, second = (TokenLogprobs(i, -1.0, 1, [], []) for i in (2, 3))
    case.feed([], prompt_logprobs=[first], prompt_start=1)
    case.feed([], prompt_logprobs=[first], prompt_start=1)  # paused and computed again
    part = case.feed([9], prompt_logprobs=[second], prompt_start=2)
    assert part is not None
    assert part.prompt_logprobs == [None, first, second]
    assert Case().collector.result().prompt_logprobs is None


# -- through an engine


def test_a_tokenizer_of_another_model_is_noticed() -> None:
    path = TOKENIZER._path
    with LLM(model_engine=lambda stage: ToyModelEngine(), tokenizer=path, num_kv_blocks=50) as llm:
        with pytest.raises(InvalidParamsError, match="the tokenizer is another model's"):
            llm.generate("Once upon a time", use_tqdm=False)
        with pytest.raises(InvalidParamsError, match="prompt is ''; allowed: at least one token"):
            llm.generate("", use_tqdm=False)
        with pytest.raises(InvalidParamsError, match="messages"):
            llm.chat([{"role": "user"}, {"content": "x"}], use_tqdm=False)


def test_a_stop_string_ends_the_request_in_the_engine_too() -> None:
    with LLM(model_engine=lambda stage: ToyModelEngine(), tokenizer=TOKENIZER._path, num_kv_blocks=100) as llm:
        params = SamplingParams(temperature=0, max_tokens=300)
        (whole,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
        stop = whole.outputs[0].text[40:43]
        stopping = SamplingParams(temperature=0, max_tokens=300, stop=stop)
        expected = whole.outputs[0].text[: whole.outputs[0].text.index(stop)]
        (output,) = llm.generate([[1, 2, 3]], stopping, use_tqdm=False)
        assert (output.outputs[0].text, output.outputs[0].stop_reason) == (expected, stop)
        assert text_of(list(llm.stream([1, 2, 3], stopping))) == expected
        assert llm.submit([1, 2, 3], stopping).result(20).outputs[0].text == expected
        await_state(llm.engine, lambda: llm.engine.state.core.is_idle)
        assert llm.get_stats()[-1].step < 900, "the engine learnt of it"
