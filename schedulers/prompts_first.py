"""When the decodes of a burst wait until all its prompts are computed."""

from __future__ import annotations

from .outstanding import Outstanding
from .scheduling_pass import SchedulingPass
from .traffic import Traffic

URGENCY = frozenset({"priority", "deadline_ms"})
"""Words of a request by which some orderings go."""


class PromptsFirst:
    """A row that rides with prompts which fill a step costs what a token of theirs costs; in a step of decodes alone,
    where the weights are read anyhow, next to nothing. And who began sooner ends sooner, and leaves the last steps with
    few rows. So where many come at once, they are computed first and then decode together. Only where

    - they came while nobody decoded, so that nobody waits but those who came with them. Who comes later prolongs the
      wait of none: it is over after as many tokens as there were at first, and once what is left fills no step;
    - nobody said who is more urgent than others: what decodes may be that, and what it would wait for less so;
    - their prompts are no more tokens than their answers, so that nobody waits for longer than the answers take;
    - memory holds them all with half of their answers. They grow in step: where there is less, they are paused soon
      and in one wave, and are better computed one after the other.
    """

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._tokens = 0
        """Of the burst's prompts, what is left to be computed before its decodes."""

    def apply(self, step: SchedulingPass, work: Outstanding) -> bool:
        """Whether this micro-batch should be of prompts alone though there are decodes. Takes note of a burst."""
        if not work.num_decodes:
            self._tokens = work.prompt_tokens if self._is_worth_it(step, work) else 0
            return False
        # Less is left than was not computed, where some were found in the cache or have ended.
        self._tokens = min(self._tokens, work.prompt_tokens)
        if work.crowded or work.prompt_tokens < step.table.timing.knee:
            self._tokens = 0
        return self._tokens > 0

    def computed(self, tokens: int) -> None:
        """A plan has so many tokens of prompts, whatever becomes of it."""
        self._tokens -= tokens

    def _is_worth_it(self, step: SchedulingPass, work: Outstanding) -> bool:
        answers = work.num_prompts * self._traffic.answer
        room = step.kv.free_blocks * step.kv.block_size
        fits = not work.crowded and work.prompt_tokens + answers / 2 <= room
        return fits and work.prompt_tokens <= answers and not URGENCY & step.ordering.knows
