"""The parts of a step's time, from the lock to the books: the same for the live metrics and for a trace's report."""

from __future__ import annotations

from ..core.trace import StepStats

PARTS = ("schedule", "push", "wait", "hop", "stage", "collect", "lock", "update")
"""In order:

- ``schedule``: drain, schedule, check and book, under the lock
- ``push``: handing the plan to the executor; the first stage may begin meanwhile, so it is in no sum
- ``wait``: standing before stages that were busy with earlier steps
- ``hop``: from the scheduling thread to the first stage and from stage to stage, with nothing in the way
- ``stage``: computing, all stages
- ``collect``: from the last stage's end until the output thread has the result in hand
- ``lock``: the output thread's wait for the state lock
- ``update``: retiring, under the lock

All but ``push`` add up to the time from ``began_at`` to ``retired_at``.
"""

Busy = tuple[tuple[float, float], ...]


def parts_of(record: StepStats, before: Busy = ()) -> tuple[float, ...]:
    """Seconds of each of ``PARTS``. ``before`` are the busy spans of the step that the stages ran before this one.

    Clocks of several hosts never agree quite: a time that would be negative counts as 0.
    """
    wait = hop = stage = 0.0
    sent = record.booked_at
    for index, (began, ended) in enumerate(record.busy):
        waited = 0.0
        if index < len(before):
            free = before[index][1]
            if free > sent:
                waited = (free if free < began else began) - sent
        wait += waited
        between = began - sent - waited
        if between > 0.0:
            hop += between
        stage += ended - began
        sent = ended
    collect = record.collected_at - sent
    return (
        record.booked_at - record.began_at,
        record.pushed_at - record.booked_at,
        wait if wait > 0.0 else 0.0,
        hop,
        stage,
        collect if collect > 0.0 else 0.0,
        record.update_at - record.collected_at,
        record.retired_at - record.update_at,
    )
