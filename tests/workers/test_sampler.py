"""The vectorised sampler against its definition in plain Python, parameter by parameter and mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llm_engine.core.sampling_params import SamplingParams
from llm_engine.workers.slots import PromptRows
from tests.workers.conftest import Bench
from tests.workers.plain_sampler import draw, edited, kept, log_softmax, uniform

MakeBench = Callable[[int], Bench]
SMALL, LARGE = 97, 4099
"""A vocabulary that is sorted whole, and one where candidates are looked for first; both no multiple of anything."""


def random_logits(rows: int, vocab_size: int, seed: int = 0, spread: float = 3.0) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(seed).standard_normal((rows, vocab_size)) * spread).astype(np.float32)


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
def test_greedy_takes_the_likeliest_and_the_lowest_of_equals(make_bench: MakeBench, vocab_size: int) -> None:
    bench = make_bench(vocab_size)
    logits = np.round(random_logits(40, vocab_size))
    for slot in range(40):
        bench.start(slot, SamplingParams(temperature=0.0 if slot % 2 else 9e-6))
    tokens, logprobs = bench.sample(logits)
    assert tokens == [int(np.flatnonzero(row == row.max())[0]) for row in logits]
    assert not logprobs


DRAWN = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 5.0},
    "cold": {"temperature": 0.01},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k beyond few": {"top_k": 200},
    "top_k beyond blocks": {"top_k": 900, "temperature": 3.0},
    "top_k of all": {"top_k": 10**9},
    "top_p": {"top_p": 0.6},
    "top_p wide": {"top_p": 0.97, "temperature": 4.0},
    "top_p tiny": {"top_p": 1e-9},
    "min_p": {"min_p": 0.1},
    "min_p of 1": {"min_p": 1.0},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "min_p and top_p": {"temperature": 2.0, "top_p": 0.9, "min_p": 0.05},
    "min_p and top_k": {"temperature": 2.0, "top_k": 30, "min_p": 0.05},
}


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
@pytest.mark.parametrize("name", DRAWN)
def test_draws_are_the_definition(make_bench: MakeBench, vocab_size: int, name: str) -> None:
    bench, params = make_bench(vocab_size), SamplingParams(**DRAWN[name])
    logits = random_logits(12, vocab_size)
    logits[6:] = np.round(logits[6:])  # plenty of equal logits
    for slot in range(12):
        bench.start(slot, params, prompt=[1, 2], outputs=[3] * slot, seed=slot * 7, choice_index=slot % 3)
    tokens, _ = bench.sample(logits)
    assert tokens == [draw(row, params, uniform(i * 7, i % 3, i)) for i, row in enumerate(logits)]


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
def test_a_mixed_batch_is_the_definition_row_by_row_and_each_row_alone(make_bench: MakeBench, vocab_size: int) -> None:
    bench = make_bench(vocab_size)
    logits = random_logits(len(DRAWN) + 2, vocab_size, seed=5)
    params = [SamplingParams(temperature=0.0), *(SamplingParams(**kwargs) for kwargs in DRAWN.values())]
    params.append(SamplingParams(temperature=0.0, logit_bias={3: 50.0}))
    for slot, sampling in enumerate(params):
        bench.start(slot, sampling, seed=slot)
    tokens, _ = bench.sample(logits)
    for slot, sampling in enumerate(params):
        x = edited(logits[slot], sampling, [0], [])
        assert tokens[slot] == draw(x, sampling, uniform(slot, 0, 0)), sampling
        assert bench.sample(logits[slot : slot + 1], [slot]) == ([tokens[slot]], {})
    order = np.random.default_rng(1).permutation(len(params))
    assert bench.sample(logits[order], order.tolist())[0] == [tokens[slot] for slot in order]


@pytest.mark.parametrize("kwargs", [
    {"temperature": 1.0}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.9},
])  # fmt: skip
def test_frequencies_follow_the_probabilities(make_bench: MakeBench, kwargs: dict[str, Any]) -> None:
    """Pearson's chi-squared over 8000 draws with fixed seeds: each output position is a draw."""
    bench, params, rounds, rows = make_bench(SMALL), SamplingParams(**kwargs), 100, 80
    row = random_logits(1, SMALL, seed=3, spread=1.5)
    for slot in range(rows):
        bench.start(slot, params, seed=slot)
    counts: Counter[int] = Counter()
    for position in range(rounds):
        counts.update(bench.sample(np.repeat(row, rows, axis=0), positions=[position] * rows)[0])
    weights = kept(row[0], params)
    assert set(counts) <= set(weights)
    total, draws = sum(weights.values()), rounds * rows
    expected = {i: draws * weight / total for i, weight in weights.items()}
    statistic = sum((counts[i] - e) ** 2 / e for i, e in expected.items())
    freedom = len(weights) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_noise_depends_on_seed_choice_and_output_position_alone(make_bench: MakeBench) -> None:
    bench = make_bench(SMALL)
    row = np.zeros((1, SMALL), np.float32)  # the token tells the noise
    hot = SamplingParams(temperature=1.0)

    def token(seed: int, choice: int, prompt: list[int], outputs: list[int], slot: int) -> int:
        bench.start(slot, hot, prompt, outputs, seed=seed, choice_index=choice)
        return bench.sample(row, [slot])[0][0]

    assert token(5, 0, [1, 2, 3], [4, 5], 0) == token(5, 0, [9], [8, 7], 3)
    for other in ((6, 0, 2), (5, 1, 2), (5, 0, 3)):
        several = [token(other[0] + 100 * i, other[1], [1], [0] * other[2], 1) for i in range(5)]
        assert several != [token(5 + 100 * i, 0, [1], [0, 0], 2) for i in range(5)]
    assert token(-1, 0, [1], [], 0) == token(2**64 - 1, 0, [1], [], 0)


EDITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "repetition": ({"repetition_penalty": 1.7}, {}),
    "repetition below 1": ({"repetition_penalty": 0.5}, {}),
    "presence": ({"presence_penalty": 1.5}, {}),
    "frequency": ({"frequency_penalty": 0.75}, {}),
    "negative": ({"presence_penalty": -0.5, "frequency_penalty": -0.25}, {}),
    "bias": ({"logit_bias": {3: 4.0, 90: -100.0, 10**6: 100.0}}, {}),
    "allowed": ({"allowed_token_ids": [5, 60, 61, 10**6]}, {}),
    "bad words": ({"bad_words": ["a"]}, {"bad_words_ids": [[11], [7, 12], [8, 7, 13], [7, 7, 14], [10**6]]}),
    "min_tokens": ({"min_tokens": 9}, {"stop_ids": [0, 1, 2]}),
    "min_tokens reached": ({"min_tokens": 2}, {"stop_ids": [0, 1, 2]}),
    "all": (
        {
            "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3, "min_tokens": 9,
            "logit_bias": {5: 3.0, 60: 2.0, 2: 100.0}, "allowed_token_ids": [2, 5, 7, 8, 13, 60, 61],
        },
        {"bad_words_ids": [[8, 7, 13]], "stop_ids": [2]},
    ),
}  # fmt: skip
PROMPT, OUTPUTS = [3, 5, 3, 60, 20], [7, 8, 7, 7, 60, 8, 7]


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
def test_edits_are_the_definition(make_bench: MakeBench, name: str, vocab_size: int) -> None:
    """The edited logits themselves are compared, and a draw from them."""
    bench, (kwargs, more) = make_bench(vocab_size), EDITS[name]
    params = SamplingParams(max_tokens=100, top_k=20, **kwargs)
    logits = random_logits(4, vocab_size, seed=11)
    for slot in range(0, 4, 2):
        bench.start(slot, params, PROMPT, OUTPUTS, seed=slot, **more)
        bench.start(slot + 1, SamplingParams(temperature=0.0))
    known = {key: [w for w in ids if (w[-1] if isinstance(w, list) else w) < vocab_size] for key, ids in more.items()}
    plain = SamplingParams(max_tokens=100, top_k=20, **{
        **kwargs, "logit_bias": {i: b for i, b in kwargs.get("logit_bias", {}).items() if i < vocab_size}
    })  # fmt: skip
    wanted = [edited(logits[slot], plain, PROMPT, OUTPUTS, **known) for slot in (0, 2)]
    changed = logits.copy()
    rows = np.array([0, 2])
    bench.sampler._edits.apply(bench.wrap(changed), rows, rows, np.array([len(PROMPT) + len(OUTPUTS) - 1] * 2))
    np.testing.assert_array_equal(changed[[0, 2]], np.array(wanted, np.float32))
    np.testing.assert_array_equal(changed[[1, 3]], logits[[1, 3]])
    tokens, _ = bench.sample(logits)
    drawn = [draw(x, plain, uniform(slot, 0, 7)) for slot, x in zip((0, 2), wanted, strict=True)]
    assert [tokens[0], tokens[2]] == drawn
    assert [tokens[1], tokens[3]] == logits[[1, 3]].argmax(axis=1).tolist()


def test_a_new_request_inherits_nothing_from_its_slot(make_bench: MakeBench) -> None:
    bench = make_bench(SMALL)
    logits = random_logits(1, SMALL)
    best = int(logits[0].argmax())
    bench.start(
        0, SamplingParams(logit_bias={best: -100.0}, allowed_token_ids=[1], repetition_penalty=9.0, logprobs=3),
        bad_words_ids=[[best]],
    )  # fmt: skip
    assert bench.sample(logits)[0] == [1]
    for kwargs in ({}, {"presence_penalty": 0.1}):
        bench.start(0, SamplingParams(temperature=0.0, **kwargs), prompt=[best])
        assert bench.sample(logits) == ([best], {})


def test_the_record_of_tokens_that_penalties_see_grows_with_every_decode(make_bench: MakeBench) -> None:
    from llm_engine.core.step import StepPlan

    bench = make_bench(SMALL)
    bench.start(0, SamplingParams(temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0), [1, 2], [])
    logits = np.full((1, SMALL), -9.0, np.float32)
    logits[0, [4, 5, 6]] = [3.0, 2.0, 1.0]
    position, outputs = 1, []
    for _ in range(5):
        token = bench.sample(logits, [0], [position])[0][0]
        outputs.append(token)
        position += 1
        bench.slots.apply(StepPlan(0, [0], decode_slots=[0], decode_positions=[position], decode_tokens=[token]))
    assert outputs == [4, 5, 6, 4, 5]


@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
def test_logprobs_are_of_the_raw_logits(make_bench: MakeBench, vocab_size: int) -> None:
    bench = make_bench(vocab_size)
    logits = random_logits(6, vocab_size, seed=2)
    logits[4] = np.round(logits[4])
    nums: list[int | None] = [None, 0, 1, 5, 20, 20]
    for slot, num in enumerate(nums):
        bench.start(slot, SamplingParams(temperature=2.5, logprobs=num, logit_bias={slot: 5.0}, top_p=0.9), seed=slot)
    tokens, logprobs = bench.sample(logits)
    assert list(logprobs) == [1, 2, 3, 4, 5]
    for row, entry in logprobs.items():
        wanted = log_softmax(logits[row])
        order = sorted(range(vocab_size), key=lambda i: (-logits[row, i], i))[: nums[row]]
        assert entry.token_id == tokens[row]
        assert entry.logprob == pytest.approx(wanted[tokens[row]], abs=1e-5)
        assert entry.rank == 1 + int((logits[row] > logits[row, tokens[row]]).sum())
        assert entry.top_ids == order
        assert entry.top_logprobs == pytest.approx([wanted[i] for i in order], abs=1e-5)


def test_prompt_logprobs_score_the_token_that_follows(make_bench: MakeBench) -> None:
    bench = make_bench(LARGE)
    prompt = [5, 17, 4000, 3, 9]
    bench.start(2, SamplingParams(prompt_logprobs=3), prompt)
    logits = random_logits(5, LARGE)
    # rows 1 and 2 are a chunk's that began at position 2: they score the tokens at 3 and 4
    scored = bench.sampler.score_prompts(logits, [PromptRows(77, 2, 1, 2, 2)])
    assert list(scored) == [77]
    for entry, row, token in zip(scored[77], (1, 2), (3, 9), strict=True):
        wanted = log_softmax(logits[row])
        assert (entry.token_id, len(entry.top_ids)) == (token, 3)
        assert entry.logprob == pytest.approx(wanted[token], abs=1e-5)
        assert entry.top_ids == np.argsort(-logits[row])[:3].tolist()


@pytest.mark.parametrize("kwargs", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}])
@pytest.mark.parametrize("vocab_size", [SMALL, LARGE])
def test_rows_that_are_not_numbers_hurt_nobody_else(
    make_bench: MakeBench, kwargs: dict[str, Any], vocab_size: int
) -> None:
    bench, params = make_bench(vocab_size), SamplingParams(**kwargs)
    logits = random_logits(5, vocab_size)
    for slot in range(5):
        bench.start(slot, params, seed=slot)
    alone = bench.sample(logits)[0]
    logits[1], logits[2, 4], logits[3] = -np.inf, np.inf, np.nan
    tokens = bench.sample(logits)[0]
    assert [tokens[0], tokens[4]] == [alone[0], alone[4]]
    assert tokens[2] == 4 and all(0 <= token < vocab_size for token in tokens)


def test_banned_tokens_are_never_drawn(make_bench: MakeBench) -> None:
    """With few tokens left, every draw falls on one of them."""
    bench = make_bench(LARGE)
    for slot, kwargs in enumerate(DRAWN.values()):
        bench.start(slot, SamplingParams(allowed_token_ids=[7, 4000], **kwargs), seed=slot)
    seen = {t for p in range(30) for t in bench.sample(random_logits(len(DRAWN), LARGE), positions=[p] * len(DRAWN))[0]}
    assert seen == {7, 4000}


def test_large_batches_go_in_slices(monkeypatch: pytest.MonkeyPatch, make_bench: MakeBench) -> None:
    from llm_engine.workers import numpy_logits, torch_logits

    bench, logits = make_bench(LARGE), random_logits(len(DRAWN), LARGE)
    for slot, kwargs in enumerate(DRAWN.values()):
        bench.start(slot, SamplingParams(logprobs=2, **kwargs), seed=slot)
    whole = bench.sample(logits)
    for module in (numpy_logits, torch_logits):
        monkeypatch.setattr(module, "_MAX_ELEMENTS", 3 * LARGE)
    assert bench.sample(logits) == whole


def test_torch_tensors_on_the_cpu_are_sampled_in_place_of_a_copy() -> None:
    torch = pytest.importorskip("torch")
    from llm_engine.workers.logits import wrap
    from llm_engine.workers.numpy_logits import NumpyLogits

    with torch.inference_mode():
        logits = torch.zeros(2, SMALL)
    view = wrap(logits)
    assert isinstance(view, NumpyLogits)
    view.put(np.array([1]), np.array([5]), 3.0)
    assert logits.argmax(dim=1).tolist() == [0, 5]
