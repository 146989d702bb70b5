"""Whether what a scheduler returned is a plan at all: of the right class, fresh, its columns of the right types.

Somebody else's code may return anything. What passes here may still break a rule (``plan_check``), but no rule trips
over it. The engine goes on with a copy: nothing the scheduler keeps can change it afterwards.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from ..core.errors import SchedulerError
from ..core.step import StepPlan

_COLUMNS = ("chunk_ids", "chunk_tokens", "paused_ids", "moved_ids", "moved_queues", "shed_ids", "shed_reasons")
_TAKEN = -1
"""The ``step`` of a plan that was taken in, so that it is known when it is returned again."""
_INTEGERS, _TEXTS = frozenset({int}), frozenset({str})
_INTEGER_CODES = frozenset("bBhHiIlLqQ")


def take_in(plan: Any, scheduler: str) -> StepPlan:
    """A plan with copies of the decision's columns and nothing else; raises ``SchedulerError`` where it is none."""

    def refuse(rule: str) -> None:
        raise SchedulerError(f"scheduler {scheduler} returned an impossible plan: {rule}")

    if type(plan) is not StepPlan:
        refuse(f"it is {_shown(plan)}, not a StepPlan")
    if type(plan.queue) is not int:
        refuse(f"queue is {_shown(plan.queue)}, not a whole number")
    if plan.step or plan.starts or plan.chunk_slots or plan.chunk_samples or plan.grown_slots or plan.finished_ids:
        refuse("it was returned before, or fills in what the engine fills in")
    if not _holds_numbers(plan.decode_ids):
        refuse(f"decode_ids is {_shown(plan.decode_ids)}, not a list or array of whole numbers")
    copies: dict[str, Any] = {}
    for name in _COLUMNS:
        column = getattr(plan, name)
        kinds = _TEXTS if name == "shed_reasons" else _INTEGERS
        if type(column) is not list or (column and not kinds.issuperset(map(type, column))):
            refuse(f"{name} is {_shown(column)}, not a list of {'texts' if kinds is _TEXTS else 'whole numbers'}")
        copies[name] = column[:]
    plan.step = _TAKEN
    return StepPlan(plan.queue, plan.decode_ids[:], **copies)


def _holds_numbers(column: Sequence[int]) -> bool:
    if type(column) is array:
        return column.typecode in _INTEGER_CODES
    return type(column) in (list, tuple) and _INTEGERS.issuperset(map(type, column))


def _shown(value: Any) -> str:
    try:
        shown = repr(value)
    except Exception:  # noqa: BLE001 - somebody else's class
        shown = f"a {type(value).__name__}"
    return shown if len(shown) <= 80 else shown[:77] + "..."
