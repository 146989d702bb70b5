"""Fill the memory; when it runs short, pause whom the ordering pauses first: the youngest, unless it says otherwise.

The rule of TensorRT-LLM's MAX_UTILIZATION and of vLLM's scheduler: admission looks at what a request needs now, not at
what it may grow to, and a shortage is met by pausing a resident - possibly the one that asks. A paused request gives
all its blocks back and is recomputed later from its known tokens.

Under an ordering that displaces, the first of the waiting also takes the place of residents it outranks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ...core.config import check_types, option
from ...core.errors import ConfigError
from ...core.views import RequestView
from ..base import Capacity, Ordering, Verdict
from ..scheduling_pass import SchedulingPass
from .pausing import Way, pause_until_free


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxUtilizationOptions:
    """How careful admission is."""

    watermark: float = option(
        0.0, "share of the blocks that admission leaves free for the residents to grow; not kept in an empty engine"
    )
    reserve_full_prompt: bool = option(
        True, "admit a request when its whole prompt fits beside the prompts in progress, not only its first chunk"
    )
    defer_duplicates: bool = option(True, "a request whose first new block another one is computing waits for the hit")

    def __post_init__(self) -> None:
        check_types(self)
        if not 0.0 <= self.watermark < 1.0:
            raise ConfigError("watermark", self.watermark, "a share from 0 to below 1")


class MaxUtilization(Capacity):
    """Admits while the request's known tokens fit beside what the admitted still need for theirs."""

    Options = MaxUtilizationOptions

    def __init__(self, options: MaxUtilizationOptions | None = None) -> None:
        self._options = options or MaxUtilizationOptions()
        self._residents: dict[int, None] = {}
        self._outranked: tuple[Hashable, list[int]] | None = None
        """Who was asked about last and how things stood, and the residents it displaces: the same until somebody comes
        or goes."""

    def started(self, request: RequestView) -> None:
        self._residents[request.request_id] = self._outranked = None

    def added(self, request: RequestView) -> None:
        self.ended(request.request_id)

    def ended(self, request_id: int) -> None:
        if request_id in self._residents:
            del self._residents[request_id]
            self._outranked = None

    def make_way(self, step: SchedulingPass, waiting: Ordering) -> None:
        if not waiting.may_displace():
            return
        way, num_skipped = Way(step, self._kept), 0
        for newcomer in waiting.visit(step):
            outranked = self._outranked_by(step, newcomer, way)
            if not outranked and not step.plan.paused_ids:
                return  # the cheapest question first: most often it is the only one
            deferred = self._is_deferred(step, newcomer) or way.computes_for(newcomer)
            if deferred or step.lacking_resource(newcomer) is not None:
                num_skipped += 1
                if num_skipped > step.most_skipped:
                    return
                continue
            num_skipped = 0
            needed = self._needed(step, newcomer)
            if not step.plan.paused_ids and step.seats_left > 0 and needed <= self.room(step):
                return  # the pass admits somebody as it is
            if not step.plan.paused_ids or not way.has_place(needed):
                victims = way.victims(newcomer, needed, self._displaceable(step, outranked))
                if not victims:
                    return
                if step.ahead:
                    step.is_short = True  # nobody is put out for a guess: the queue comes home first
                    return
                for victim in victims:
                    way.pause(victim)
            # Anew: what it finds of those that were paused is free now, and costs it a block each.
            way.grant(newcomer, self._needed(step, newcomer))

    def make_room(self, step: SchedulingPass, num_blocks: int) -> bool:
        return pause_until_free(step, num_blocks)

    def judge(self, step: SchedulingPass, request: RequestView) -> Verdict:
        if step.plan.paused_ids and request.request_id not in step.makes_way_for:
            # It would take what was just given back. Those for whom it was stand behind this one, or have all come in.
            return Verdict.SKIP if len(step.admitted) < len(step.makes_way_for) else Verdict.STOP
        room = self.room(step)
        if step.seats_left <= 0 or room <= 0:
            return Verdict.STOP  # whatever it finds in memory, it needs a block
        if self._is_deferred(step, request):
            return Verdict.SKIP
        if self._needed(step, request) > room:
            return Verdict.STOP
        return Verdict.ADMIT if step.lacking_resource(request) is None else Verdict.SKIP

    def _is_deferred(self, step: SchedulingPass, request: RequestView) -> bool:
        return self._options.defer_duplicates and step.is_being_computed(request)

    def room(self, step: SchedulingPass) -> int:
        """Blocks that a newcomer may take."""
        promised = step.promised_blocks if self._options.reserve_full_prompt else 0
        return step.kv.free_blocks - promised - self._kept(step)

    def _kept(self, step: SchedulingPass, seats_left: int | None = None) -> int:
        """Blocks that are not given away. In an empty engine nobody needs them, and a request that fits alone runs."""
        if (step.seats_left if seats_left is None else seats_left) == step.limits.max_num_seqs:
            return 0
        return int(self._options.watermark * step.kv.num_usable_blocks)

    def _needed(self, step: SchedulingPass, request: RequestView) -> int:
        """Free blocks it must find."""
        match, most = step.prefix(request), step.peak_blocks(request)
        if self._options.reserve_full_prompt:
            return min(step.kv.blocks_to_start(match, request.num_tokens, claim=False), most)
        if most > step.kv.num_usable_blocks:
            return most  # or it would begin over and over
        first = step.chunk_size(match.num_tokens, request.num_tokens - match.num_tokens)
        return step.kv.blocks_to_start(match, match.num_tokens + first, claim=False)

    def _outranked_by(self, step: SchedulingPass, newcomer: RequestView, way: Way) -> list[int]:
        """Residents it displaces."""
        asked = newcomer.request_id, step.ordering.standing, len(step.plan.paused_ids)
        if self._outranked is None or self._outranked[0] != asked:
            displaces, changes = step.ordering.displaces, way.changes
            outranked = [r.request_id for r in step.table.residents() if displaces(newcomer, r, changes)]
            self._outranked = asked, outranked
        return self._outranked[1]

    def _displaceable(self, step: SchedulingPass, outranked: Sequence[int]) -> list[RequestView]:
        """Of them those who are not in flight or, ahead, not in flight but with this queue."""
        ending = step.queue.ending() if step.ahead else ()
        return [
            resident
            for resident in map(step.table.__getitem__, outranked)
            if not step.is_paused(resident.request_id)
            and (
                not step.table.is_in_flight(resident)
                or (step.ahead and resident.request_id in step.queue and resident.request_id not in ending)
            )
        ]
