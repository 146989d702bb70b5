"""What is sent is what arrives, and what is not what it should be is refused by name."""

from __future__ import annotations

from array import array
from dataclasses import fields, replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import RequestStart, StepPlan, StepResult, TokenLogprobs
from llm_engine.workers import wire
from llm_engine.workers.wire import (
    Fed,
    Kind,
    OutputHead,
    PlanBounds,
    PlanHead,
    WireError,
    decode_fed,
    decode_output_head,
    decode_plan,
    decode_result,
    encode_fed,
    encode_output_head,
    encode_plan,
    encode_result,
    pack_header,
    unpack_header,
)

BOUNDS = PlanBounds(max_num_seqs=8, max_model_len=64, vocab_size=97, num_blocks=50)

slots = st.integers(0, 7)
tokens = st.integers(0, 96)
blocks = st.integers(0, 49)
ids = st.integers(0, 2**62)


def columns(element: st.SearchStrategy[Any], length: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(element, min_size=length, max_size=length)


@st.composite
def sampling(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.floats(0, 2)),
        top_k=draw(st.integers(0, 50)),
        logit_bias=draw(st.dictionaries(st.integers(0, 96), st.floats(-100, 100), max_size=3)),
        stop=draw(st.lists(st.text("ab", min_size=1, max_size=4), max_size=2)),
        seed=draw(st.none() | st.integers(0, 2**64 - 1)),
        logprobs=draw(st.none() | st.integers(0, 5)),
    )


@st.composite
def starts(draw: st.DrawFn) -> RequestStart:
    token_ids = draw(st.lists(tokens, min_size=1, max_size=20))
    return RequestStart(
        draw(ids),
        draw(slots),
        token_ids,
        draw(st.integers(0, len(token_ids))),
        draw(st.lists(blocks, max_size=4)),
        draw(sampling()),
        draw(st.integers(0, 2**64 - 1)),
        draw(st.integers(0, 100)),
        draw(st.lists(tokens, max_size=3)),
        draw(st.lists(st.lists(tokens, max_size=3), max_size=2)),
        draw(st.none() | st.text("ab", max_size=5)),
    )


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    num_decodes, num_chunks = draw(st.integers(0, 5)), draw(st.integers(0, 3))
    num_grown = draw(st.integers(0, 4))
    ahead = draw(st.booleans())
    chunk_starts = draw(columns(st.integers(0, 60), num_chunks))
    return StepPlan(
        queue=draw(st.integers(0, 9)),
        epoch=draw(st.integers(0, 9)),
        step=draw(ids),
        decode_ids=array("q", draw(columns(ids, num_decodes))),
        decode_slots=array("i", draw(columns(slots, num_decodes))),
        decode_positions=draw(columns(st.integers(0, 63), num_decodes)),
        decode_tokens=() if ahead else array("i", draw(columns(tokens, num_decodes))),
        feeds_from=draw(ids) if ahead else None,
        chunk_ids=draw(columns(ids, num_chunks)),
        chunk_tokens=[draw(st.integers(1, 64 - start)) for start in chunk_starts],
        chunk_slots=draw(columns(slots, num_chunks)),
        chunk_starts=chunk_starts,
        chunk_samples=draw(columns(st.booleans(), num_chunks)),
        starts=draw(st.lists(starts(), max_size=2)),
        grown_slots=draw(columns(slots, num_grown)),
        grown_blocks=draw(columns(blocks, num_grown)),
        paused_ids=draw(st.lists(ids, max_size=2)),
        moved_ids=draw(st.lists(ids, max_size=2)),
        moved_queues=draw(st.lists(st.integers(0, 9), max_size=2)),
        resumed_ids=draw(st.lists(ids, max_size=2)),
        finished_ids=draw(st.lists(ids, max_size=2)),
    )


def listed(plan: StepPlan) -> StepPlan:
    """With plain lists for columns, whatever they were."""
    names = ("decode_ids", "decode_slots", "decode_positions", "decode_tokens")
    return replace(plan, **{name: [int(value) for value in getattr(plan, name)] for name in names})


RELAXED = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@RELAXED
@given(plans())
def test_a_plan_arrives_as_it_was(plan: StepPlan) -> None:
    received = decode_plan(*encode_plan(plan), BOUNDS)
    assert listed(received) == listed(plan)
    assert received.num_tokens == plan.num_tokens
    assert received.sampled_ids == plan.sampled_ids


def test_every_field_of_a_plan_travels() -> None:
    decodes = {"decode_ids", "decode_slots", "decode_positions", "decode_tokens"}
    kept = {"shed_ids", "shed_reasons"}  # a plan that sheds has no rows, and is never pushed
    assert {f.name for f in fields(StepPlan)} - decodes - kept == set(PlanHead.__struct_fields__) - {"num_decodes"}


def test_a_plan_that_was_encoded_may_change() -> None:
    plan = StepPlan(queue=0, decode_ids=[1], decode_slots=array("i", [2]), decode_positions=[3], decode_tokens=[4])
    frames = encode_plan(plan)
    plan.decode_slots[0] = 7  # type: ignore[index]
    assert list(decode_plan(*frames, BOUNDS).decode_slots) == [2]


@RELAXED
@given(
    st.builds(
        StepResult,
        epoch=st.integers(0, 9),
        step=ids,
        tokens=st.lists(tokens, max_size=5),
        logprobs=st.dictionaries(
            st.integers(0, 4),
            st.builds(TokenLogprobs, tokens, st.floats(-50, 0), st.integers(1, 97), st.just([1]), st.just([-0.5])),
            max_size=2,
        ),
        error=st.none() | st.text("ab", max_size=20),
        busy=st.lists(st.tuples(st.floats(0, 1e6), st.floats(1e6, 2e6)), max_size=3),
    )
)
def test_a_result_arrives_as_it_was(result: StepResult) -> None:
    assert decode_result(encode_result(result)) == result


def test_fed_tokens_and_output_heads_arrive_as_they_were() -> None:
    fed = Fed(3, [1, 2, 96])
    assert decode_fed(encode_fed(fed), BOUNDS) == fed
    head = OutputHead([(1.5, 2.5)], None, "torch", "bfloat16", (7, 64))
    assert decode_output_head(encode_output_head(head)) == head
    header = b"t" * wire.TOKEN_BYTES, Kind.FED, 2**63
    assert unpack_header(pack_header(*header) + b"and what follows it") == header


def test_an_error_in_text_that_is_no_utf8_arrives_written_out() -> None:
    result = StepResult(0, 3, [], error="caf\udce9", busy=[(1.0, 2.0)])
    assert decode_result(encode_result(result)) == replace(result, error="caf\\udce9")
    head = OutputHead([(1.0, 2.0)], "caf\udce9")
    assert decode_output_head(encode_output_head(head)) == OutputHead([(1.0, 2.0)], "caf\\udce9")


def refused(decode: Any, *arguments: Any) -> bool:
    """Whether it is refused the way it should be; anything else that it raises fails the test."""
    try:
        decode(*arguments)
    except WireError:
        return True
    return False


@RELAXED
@given(plans(), st.data())
def test_a_truncated_plan_is_refused(plan: StepPlan, data: st.DataObject) -> None:
    head, block = encode_plan(plan)
    assert refused(decode_plan, head[: data.draw(st.integers(0, len(head) - 1))], block, BOUNDS)
    if block:
        assert refused(decode_plan, head, block[: data.draw(st.integers(0, len(block) - 1))], BOUNDS)
    assert refused(decode_plan, head, block + b"\0", BOUNDS)
    assert refused(decode_plan, head + b"\0", block, BOUNDS)


@settings(RELAXED, max_examples=300)
@given(plans(), st.data())
def test_a_garbled_plan_is_refused_or_within_bounds(plan: StepPlan, data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in encode_plan(plan)]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = frames[data.draw(st.integers(0, 1))]
        if frame:
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        received = decode_plan(bytes(frames[0]), bytes(frames[1]), BOUNDS)
    except WireError:
        return
    slot_lists = [received.decode_slots, received.chunk_slots, received.grown_slots, [s.slot for s in received.starts]]
    assert all(0 <= slot < BOUNDS.max_num_seqs for some in slot_lists for slot in some)
    assert all(0 <= token < BOUNDS.vocab_size for token in received.decode_tokens)
    assert all(0 <= position < BOUNDS.max_model_len for position in received.decode_positions)
    for start, count in zip(received.chunk_starts, received.chunk_tokens, strict=True):
        assert 0 <= start < start + count <= BOUNDS.max_model_len
    for one in received.starts:
        assert all(0 <= block < BOUNDS.num_blocks for block in one.block_ids)
        assert all(0 <= token < BOUNDS.vocab_size for token in one.token_ids)


@RELAXED
@given(st.binary(max_size=200), st.binary(max_size=64))
def test_noise_is_refused(first: bytes, second: bytes) -> None:
    for decode, arguments in (
        (decode_plan, (first, second, BOUNDS)),
        (decode_result, (first,)),
        (decode_fed, (first, BOUNDS)),
        (decode_output_head, (first,)),
    ):
        refused(decode, *arguments)
    if len(first) < wire.HEADER_BYTES:
        assert refused(unpack_header, first)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decode_slots": [8]}, "decode slots from 8 to 8: 0 to 7"),
        ({"decode_slots": [-1]}, "decode slots from -1"),
        ({"decode_positions": [64]}, "decode positions"),
        ({"decode_tokens": [97]}, "decode tokens from 97"),
        ({"chunk_ids": [1]}, "1 chunks with 0 chunk_tokens"),
        ({"grown_slots": [1]}, "1 slots grow by 0 blocks"),
        ({"grown_slots": [1], "grown_blocks": [50]}, "grown blocks from 50"),
        (
            {
                "chunk_ids": [1],
                "chunk_tokens": [0],
                "chunk_slots": [0],
                "chunk_starts": [0],
                "chunk_samples": [True],
            },
            "a chunk without tokens",
        ),
        (
            {
                "chunk_ids": [1],
                "chunk_tokens": [5],
                "chunk_slots": [0],
                "chunk_starts": [60],
                "chunk_samples": [True],
            },
            "chunk ends from 65",
        ),
        ({"starts": [RequestStart(1, 0, [97], 1, [], SamplingParams(), 0, 0, [])]}, "tokens from 97"),
        ({"starts": [RequestStart(1, 0, [1], 2, [], SamplingParams(), 0, 0, [])]}, "prompt tokens from 2"),
        ({"starts": [RequestStart(1, 9, [1], 1, [], SamplingParams(), 0, 0, [])]}, "slots from 9"),
        ({"starts": [RequestStart(1, 0, [1], 1, [-1], SamplingParams(), 0, 0, [])]}, "blocks from -1"),
    ],
)
def test_numbers_out_of_bounds_are_refused(change: dict[str, Any], says: str) -> None:
    plan = StepPlan(queue=0, decode_ids=[1], decode_slots=[0], decode_positions=[1], decode_tokens=[2])
    frames = encode_plan(plan)
    decode_plan(*frames, BOUNDS)
    with pytest.raises(WireError, match=says):
        decode_plan(*encode_plan(replace(plan, **change)), BOUNDS)


def test_an_oversized_frame_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME", 100)
    result = encode_result(StepResult(0, 0, list(range(97)) * 2))
    assert len(result) > 100
    with pytest.raises(WireError, match="a frame of"):
        decode_result(result)


def test_a_length_that_promises_more_than_there_is_costs_nothing() -> None:
    with pytest.raises(WireError):
        decode_result(b"\xdd\xff\xff\xff\xff")  # an array of four billion


def test_columns_are_the_plans_own() -> None:
    """A stage may go on using them when the message is gone."""
    plan = StepPlan(queue=0, decode_ids=[1], decode_slots=[2], decode_positions=[3], decode_tokens=[4])
    head, block = encode_plan(plan)
    memory = bytearray(block)
    received = decode_plan(head, memoryview(memory), BOUNDS)
    memory[:] = bytes(len(memory))
    assert np.array_equal(np.asarray(received.decode_tokens), [4])


def test_a_result_with_a_foreign_field_type_is_refused() -> None:
    with pytest.raises(WireError, match="result"):
        decode_result(msgspec.msgpack.encode({"epoch": 0, "step": 0, "tokens": ["x"]}))
