"""Nothing is in flight, somebody is there, and the scheduler runs nobody: who fails, and what its caller is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.errors import CapacityError
from ..core.request import Request, RequestState

if TYPE_CHECKING:
    from .core import EngineCore


def who_waits_in_vain(core: EngineCore) -> tuple[Request, CapacityError]:
    """Of those not parked: one who is too large for the cache now, else who may become so, else who lacks a resource,
    else the oldest. Not simply the oldest: the ordering may have put another one first, and the others can run.

    Of the built-in capacity policies those that reserve to completion refuse the second kind; the others run them. None
    leaves a resident without a step, so where there is one the scheduler is at fault.
    """
    growing = lacking = oldest = None
    for request in core.table.requests.values():
        if request.state is RequestState.PARKED:
            continue
        oldest = oldest or request
        if core.table.num_resident:
            continue
        if not _would_fit(core, request.num_tokens):
            return request, _too_large(core, request, f"{request.num_tokens} tokens")
        if growing is None and not _would_fit(core, request.max_total_tokens - 1):
            growing = request
        if lacking is None and core.resources.shortage(request) is not None:
            lacking = request
    if growing is not None:
        return growing, _too_large(core, growing, f"up to {growing.max_total_tokens - 1} tokens")
    if lacking is not None:
        cause = f"resource {core.resources.shortage(lacking)} has too little for it"
        return lacking, _never(lacking, cause, "make the resource larger")
    assert oldest is not None
    return oldest, _never(oldest, f"scheduler {core.scheduler_name} runs nobody", "take another scheduler")


def _would_fit(core: EngineCore, num_tokens: int) -> bool:
    return core.kv.peak_blocks(num_tokens, core.limits.max_num_batched_tokens) <= core.kv.num_free_blocks


def _too_large(core: EngineCore, request: Request, tokens: str) -> CapacityError:
    kv = core.kv
    cause = (
        f"it needs room for {tokens} and {kv.num_free_blocks} of {kv.num_usable_blocks} blocks of {kv.block_size} "
        f"are free"
    )
    return _never(request, cause, "raise num_kv_blocks or lower max_tokens")


def _never(request: Request, cause: str, advice: str) -> CapacityError:
    return CapacityError(f"request {request.external_id} can never run: {cause}; {advice}")
