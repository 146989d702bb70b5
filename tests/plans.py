"""Plans made by hand, for tests of executors and stages: a tiny set of books, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llm_engine.core.sampling_params import SamplingParams
from llm_engine.core.step import RequestStart, StepPlan, StepResult

GREEDY = SamplingParams(temperature=0.0)


@dataclass(slots=True)
class Booked:
    """One request as the planner sees it."""

    request_id: int
    slot: int
    tokens: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    started: bool = False
    seed: int = 0
    stop_ids: list[int] = field(default_factory=list)
    bad_words_ids: list[list[int]] = field(default_factory=list)

    @property
    def outputs(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]


class Planner:
    """Makes plans for the requests it was given and enters their results. Blocks are handed out and never returned
    unless ``free`` is called; the lowest free one goes first, so that freed blocks are reused at once."""

    def __init__(self, *, block_size: int = 4, num_blocks: int = 1000) -> None:
        self.block_size = block_size
        self.free_blocks = list(range(num_blocks - 1, 0, -1))
        self.requests: dict[int, Booked] = {}
        self.step = 0

    def add(
        self,
        prompt: Sequence[int],
        *,
        slot: int | None = None,
        sampling: SamplingParams = GREEDY,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
        bad_words_ids: Sequence[list[int]] = (),
    ) -> Booked:
        request_id = 1 + max(self.requests, default=0)
        used = {r.slot for r in self.requests.values()}
        slot = slot if slot is not None else next(i for i in range(1000) if i not in used)
        self.requests[request_id] = Booked(
            request_id,
            slot,
            list(prompt),
            len(prompt),
            sampling,
            seed=seed,
            stop_ids=list(stop_ids),
            bad_words_ids=list(bad_words_ids),
        )
        return self.requests[request_id]

    def pause(self, request: Booked) -> None:
        """Give the blocks back; the next plan that carries it sends it whole."""
        self.free_blocks.extend(reversed(request.blocks))
        request.blocks, request.num_computed, request.started = [], 0, False

    def finish(self, request: Booked) -> None:
        self.pause(request)
        del self.requests[request.request_id]

    def plan(self, rows: dict[int, int], *, feeds_from: int | None = None) -> StepPlan:
        """A plan of ``{request id: number of tokens}``; a request past its prompt whose last token is all that is left
        to compute becomes a decode row. With ``feeds_from`` the decode rows' tokens are left to the workers, known or
        not."""
        plan = StepPlan(queue=0, step=self.step, feeds_from=feeds_from)
        self.step += 1
        ids, slots, positions, tokens = [], [], [], []
        for request_id, count in rows.items():
            request = self.requests[request_id]
            start, end = request.num_computed, request.num_computed + count
            ahead = feeds_from is not None and end > len(request.tokens)
            assert end <= len(request.tokens) or ahead
            grown = [self.free_blocks.pop() for _ in range(len(request.blocks), -(-end // self.block_size))]
            request.blocks.extend(grown)
            if not request.started:
                plan.starts.append(
                    RequestStart(
                        request_id,
                        request.slot,
                        list(request.tokens),
                        request.num_prompt_tokens,
                        list(request.blocks),
                        request.sampling,
                        request.seed,
                        0,
                        request.stop_ids,
                        request.bad_words_ids,
                    )
                )
                request.started = True
            else:
                plan.grown_slots.extend([request.slot] * len(grown))
                plan.grown_blocks.extend(grown)
            if start >= request.num_prompt_tokens and (end == len(request.tokens) or ahead) and count == 1:
                ids.append(request_id)
                slots.append(request.slot)
                positions.append(start)
                if feeds_from is None:
                    tokens.append(request.tokens[start])
            else:
                plan.chunk_ids.append(request_id)
                plan.chunk_slots.append(request.slot)
                plan.chunk_starts.append(start)
                plan.chunk_tokens.append(count)
                plan.chunk_samples.append(end == len(request.tokens))
            request.num_computed = end
        plan.decode_ids, plan.decode_slots, plan.decode_positions, plan.decode_tokens = ids, slots, positions, tokens
        return plan

    def enter(self, plan: StepPlan, result: StepResult) -> None:
        """Append a result's tokens to their requests."""
        assert result.error is None, result.error
        assert (result.epoch, result.step) == (plan.epoch, plan.step)
        for request_id, token in zip(plan.sampled_ids, result.tokens, strict=True):
            self.requests[request_id].tokens.append(token)
