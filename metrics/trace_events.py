"""From step records to Chrome trace events: who is drawn where, under which name.

Perfetto shows one process with these tracks: the scheduling thread (schedule, push), the output thread (collect,
waiting for the lock where that takes long, update), each stage, and counters. The events of one step are tied by
``bind_id``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

from ..core.trace import StepStats

PID, SCHEDULING, OUTPUT, FIRST_STAGE = 1, 1, 2, 10
SHOWN_LOCK_WAIT = 10e-6
"""Seconds; shorter waits of the output thread for the lock are not drawn."""

Event = dict[str, Any]


def names_of(model: str, num_stages: int) -> list[Event]:
    """The metadata events that name the process and its tracks."""
    tracks = {SCHEDULING: "scheduling thread", OUTPUT: "output thread"}
    tracks |= {FIRST_STAGE + stage: f"stage {stage}" for stage in range(num_stages)}
    events: list[Event] = [{"ph": "M", "pid": PID, "name": "process_name", "args": {"name": f"llm-engine {model}"}}]
    for order, (tid, name) in enumerate(sorted(tracks.items(), key=lambda track: (track[0] == OUTPUT, track[0]))):
        about = {"ph": "M", "pid": PID, "tid": tid}
        events.append({**about, "name": "thread_name", "args": {"name": name}})
        events.append({**about, "name": "thread_sort_index", "args": {"sort_index": order}})
    return events


def events_of(records: Iterable[StepStats]) -> Iterator[list[Event]]:
    """The events of each step. Times are microseconds from the first event, to the nanosecond."""
    records = list(records)
    if not records:
        return
    origin = min(record.began_at for record in records)
    booked = sorted(record.booked_at for record in records)
    retired = sorted(record.retired_at for record in records)
    ends: dict[int, int] = {}

    def at(seconds: float) -> int:
        return round((seconds - origin) * 1e9)

    def span(tid: int, cat: str, name: str, begin: float, end: float, args: Any) -> Event:
        # Of another host's stage the clock is known to some microseconds only, and spans that overlap are not drawn.
        start = max(at(begin), ends.get(tid, 0))
        ends[tid] = max(at(end), start)
        when = {"ts": start / 1e3, "dur": (ends[tid] - start) / 1e3}
        return {"ph": "X", "pid": PID, "tid": tid, **when, "cat": cat, "name": name, "args": args}

    def counter(seconds: float, values: dict[str, float]) -> Event:
        # Perfetto makes a track of each key, named "pipeline KEY".
        return {"ph": "C", "pid": PID, "ts": at(seconds) / 1e3, "name": "pipeline", "args": values}

    for record in records:
        flow, short = {"bind_id": hex(record.step)}, {"step": record.step, "queue": record.queue}
        in_flight = bisect_right(booked, record.booked_at) - bisect_left(retired, record.booked_at)
        events = [
            span(SCHEDULING, "schedule", "schedule", record.began_at, record.booked_at, record)
            | {**flow, "flow_out": True},
            span(SCHEDULING, "push", "push", record.booked_at, record.pushed_at, short),
            counter(record.booked_at, {"in flight": in_flight, "micro-batch tokens": record.num_tokens}),
        ]
        for stage, (begin, end) in enumerate(record.busy):
            event = span(FIRST_STAGE + stage, "stage", computes(record), begin, end, short)
            events.append(event | {**flow, "flow_in": True, "flow_out": True})
        if record.busy and record.busy[-1][1] < record.collected_at:
            # From the last stage's end; what came while the thread was at an earlier step begins behind that.
            events.append(span(OUTPUT, "collect", "collect", record.busy[-1][1], record.collected_at, short))
        if record.update_at - record.collected_at >= SHOWN_LOCK_WAIT:
            events.append(span(OUTPUT, "lock", "wait for the lock", record.collected_at, record.update_at, short))
        events.append(
            span(OUTPUT, "update", "update", record.update_at, record.retired_at, short) | {**flow, "flow_in": True}
        )
        in_flight = bisect_left(booked, record.retired_at) - bisect_right(retired, record.retired_at)
        now = {"in flight": in_flight, "running": record.num_running, "waiting": record.num_waiting}
        events.append(counter(record.retired_at, {**now, "KV usage": record.kv_usage}))
        yield events


def computes(record: StepStats) -> str:
    """What a micro-batch computes, in a word: ``decode 64``, ``prefill 512``, or ``prefill 512+12`` with 12 decodes."""
    if not record.num_chunks:
        return f"decode {record.num_decodes}"
    chunks = f"prefill {record.num_tokens - record.num_decodes}"
    return f"{chunks}+{record.num_decodes}" if record.num_decodes else chunks
