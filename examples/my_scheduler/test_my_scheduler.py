"""Who stands where. An ordering is asked without an engine: it reads requests and nothing else."""

import pytest
from my_scheduler import ShortestPrompt, ShortestPromptOptions

from llm_engine import (
    ConfigError,
    KVCacheManager,
    KVView,
    Limits,
    Request,
    RequestId,
    RequestTable,
    ResourceManager,
    SamplingParams,
    SchedulingPass,
)


def asking(number: int, prompt_len: int, *, at: float = 0.0) -> Request:
    return Request(RequestId(number), str(number), [1] * prompt_len, SamplingParams(), prompt_len + 16, at)


def order(ordering: ShortestPrompt) -> list[int]:
    """Ids in visiting order, over empty books."""
    table, kv = RequestTable(num_queues=1, block_size=16), KVView(KVCacheManager(num_blocks=100, block_size=16))
    limits = Limits(max_num_seqs=8, max_micro_batch_seqs=8, max_num_batched_tokens=512, chunk_unit=16)
    step = SchedulingPass(0.0, table, kv, limits, table.queues[0], ResourceManager(), ordering)
    return [request.request_id for request in ordering.visit(step)]


@pytest.mark.parametrize(
    ("requests", "visited"),
    [
        ([], []),
        ([asking(0, 500), asking(1, 50), asking(2, 5)], [2, 1, 0]),
        ([asking(0, 50), asking(1, 50)], [0, 1]),  # a tie goes to who came first
        ([asking(0, 200, at=0.0), asking(1, 100, at=0.5)], [0, 1]),  # the very second: still who came first
        ([asking(0, 201, at=0.0), asking(1, 100, at=0.5)], [1, 0]),
        ([asking(0, 1000, at=0.0), asking(1, 1, at=6.0)], [0, 1]),  # nobody overtakes who came so long ago
    ],
)
def test_by_arrival_and_length_of_the_prompt(requests: list[Request], visited: list[int]) -> None:
    ordering = ShortestPrompt()
    for request in requests:
        ordering.add(request)
    assert order(ordering) == visited
    assert len(ordering) == len(visited)


def test_who_is_removed_is_gone_and_who_is_paused_comes_back_to_the_same_place() -> None:
    ordering = ShortestPrompt()
    made = [asking(number, 100 * number) for number in range(1, 4)]
    for request in made:
        ordering.add(request)
    ordering.remove(2)
    ordering.remove(99)
    assert order(ordering) == [1, 3]
    ordering.add(made[1])
    assert order(ordering) == [1, 2, 3]


def test_the_option_says_how_much_length_weighs() -> None:
    line = [asking(0, 300, at=0.0), asking(1, 100, at=0.5)]
    for tokens_per_second, visited in ((200.0, [1, 0]), (500.0, [0, 1])):
        ordering = ShortestPrompt(ShortestPromptOptions(tokens_per_second=tokens_per_second))
        for request in line:
            ordering.add(request)
        assert order(ordering) == visited
    with pytest.raises(ConfigError, match="tokens_per_second is 0"):
        ShortestPromptOptions(tokens_per_second=0)
