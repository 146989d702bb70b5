"""The control messages: what is sent arrives, what is none is refused."""

from __future__ import annotations

import contextlib
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_engine.core.config import EngineConfig
from llm_engine.core.errors import ConfigError
from llm_engine.workers import control
from llm_engine.workers.control import (
    Allocate,
    ClockPing,
    ClockPong,
    Failed,
    Heartbeat,
    Hello,
    Loaded,
    Log,
    Message,
    Progress,
    Ready,
    Refused,
    Setup,
    Stop,
    decode_from_stage,
    decode_to_stage,
    encode,
)
from llm_engine.workers.control_link import failure_of
from llm_engine.workers.links import PeerError
from llm_engine.workers.model_engine import ModelInfo
from llm_engine.workers.wire import WireError

SETUP = Setup(
    index=1,
    num_stages=2,
    epoch=3,
    token=b"0123456789abcdef",
    config=EngineConfig.of(pipeline_parallel_size=2, max_num_seqs=7),
    block_size=16,
    on_cuda=False,
    model_path="/models/a",
    model_engine=None,
    sampler="a.b:C",
    fingerprint="00",
    inbound=None,
    binds_tcp=True,
)
FROM_STAGE = [
    Hello(1, "0.1", 0, 42, "here"),
    Progress(1, 2),
    Loaded(ModelInfo("Toy", 97, 512, "float32", [1, 2]), ["ipc://x"], "host"),
    Ready(),
    Heartbeat(None, 0.0),
    Heartbeat(7, 1.5),
    Failed("ConfigError", "m", "t", ["field", 3, "allowed"], -1),
    Log(30, "llm_engine", "text"),
    ClockPong(1.0, 2.0),
]
TO_STAGE = [SETUP, Refused("no"), Allocate(9, 4, "ipc://y", None), Stop(True), ClockPing(1.0)]


@pytest.mark.parametrize("message", FROM_STAGE, ids=lambda m: type(m).__name__)
def test_what_a_stage_says_arrives(message: Message) -> None:
    assert decode_from_stage(encode(message)) == message
    with pytest.raises(WireError):
        decode_to_stage(encode(message))


@pytest.mark.parametrize("message", TO_STAGE, ids=lambda m: type(m).__name__)
def test_what_the_engine_says_arrives(message: Message) -> None:
    assert decode_to_stage(encode(message)) == message
    with pytest.raises(WireError):
        decode_from_stage(encode(message))


def test_text_that_is_no_utf8_is_written_out_and_the_rest_arrives_as_it_was() -> None:
    name, told = "caf\udce9", "caf\\udce9"  # as the system names a file whose bytes are no UTF-8
    assert decode_from_stage(encode(Log(30, name, name))) == Log(30, told, told)
    failed = Failed("OSError", name, name, ["model", name, 3])
    assert decode_from_stage(encode(failed)) == Failed("OSError", told, told, ["model", told, 3])
    sent = msgspec.structs.replace(SETUP, model_path=name)
    assert decode_to_stage(encode(sent)) == msgspec.structs.replace(SETUP, model_path=told)


@settings(deadline=None, derandomize=True)
@given(st.binary(max_size=100))
def test_noise_is_refused(noise: bytes) -> None:
    for decode in (decode_from_stage, decode_to_stage):
        with contextlib.suppress(WireError):
            decode(noise)


@settings(deadline=None, derandomize=True)
@given(st.sampled_from(FROM_STAGE), st.data())
def test_what_is_cut_short_is_refused(message: Message, data: st.DataObject) -> None:
    whole = encode(message)
    with pytest.raises(WireError):
        decode_from_stage(whole[: data.draw(st.integers(0, len(whole) - 1))])


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, 1e300])
def test_a_time_that_no_clock_shows_is_refused(seconds: float) -> None:
    for message in (Heartbeat(7, seconds), ClockPong(seconds, 1.0), ClockPong(1.0, seconds)):
        with pytest.raises(WireError, match="float"):
            decode_from_stage(encode(message))


def test_a_setting_that_no_engine_would_send_is_refused() -> None:
    spoilt = encode(SETUP).replace(b"max_num_seqs\x07", b"max_num_seqs\x00")
    assert spoilt != encode(SETUP)
    with pytest.raises(WireError, match="max_num_seqs is 0"):
        decode_to_stage(spoilt)


def test_an_oversized_message_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_FRAME", 100)
    with pytest.raises(WireError, match="control message of"):
        decode_from_stage(encode(Log(30, "x", "y" * 200)))


def test_a_failure_is_told_with_what_it_is_made_from() -> None:
    try:
        raise ConfigError("stage_cpus", {1}, "others")
    except ConfigError as error:
        failed = failure_of(error)
    assert failed.kind == "ConfigError"
    assert failed.arguments == ["stage_cpus", "{1}", "others"]
    assert "raise ConfigError" in failed.traceback
    assert failure_of(PeerError(2, "nonsense")).blames == 2
    assert decode_from_stage(encode(failed)) == failed
