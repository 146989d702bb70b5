"""Every architecture against transformers in float32: logits within 1e-5 of their spread, however the text is fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_engine.models.ops import TorchOps
from tests.models.stage_runs import Sequence, Stages, make_batch
from tests.models.tiny_models import ARCHITECTURES, prompt, reference_logits

TOLERANCE = 1e-5
Checkpoints = Callable[[str], Path]


def whole(stages: Stages, sequences: list[Sequence]) -> list[torch.Tensor]:
    """Each text in one go, one after another."""
    return [stages.run((sequence, sequence.left))[0] for sequence in sequences]


def chunks(stages: Stages, sequences: list[Sequence]) -> list[torch.Tensor]:
    """Chunks of seven tokens, across block borders."""
    return [_advance(stages, sequence, 7) for sequence in sequences]


def decodes(stages: Stages, sequences: list[Sequence]) -> list[torch.Tensor]:
    """All but the last tokens in one go, then one token a step, all texts in one batch."""
    steps = 6
    parts = [[stages.run((sequence, sequence.left - steps))[0]] for sequence in sequences]
    for _ in range(steps):
        for part, logits in zip(parts, stages.run(*((sequence, 1) for sequence in sequences)), strict=True):
            part.append(logits)
    return [torch.cat(part) for part in parts]


def mixed(stages: Stages, sequences: list[Sequence]) -> list[torch.Tensor]:
    """A decode, a chunk behind a cached prefix and the start of a text in the same batches."""
    first, second, third = sequences
    parts = {0: [stages.run((first, first.left - 3))[0]], 1: [stages.run((second, 5))[0]], 2: []}
    for sizes in ((1, 9, 4), (1, 12, 3), (1, second.left - 21, third.left - 7)):
        for index, logits in enumerate(stages.run(*zip(sequences, sizes, strict=True))):
            parts[index].append(logits)
    return [torch.cat(part) for part in parts.values()]


def _advance(stages: Stages, sequence: Sequence, size: int) -> torch.Tensor:
    parts = []
    while sequence.left:
        parts += stages.run((sequence, min(size, sequence.left)))
    return torch.cat(parts)


FEEDS = {"whole": (whole, 1), "chunks": (chunks, 1), "decodes": (decodes, 1), "mixed": (mixed, 1),
         "mixed-2-stages": (mixed, 2), "decodes-3-stages": (decodes, 3)}  # fmt: skip


@lru_cache(maxsize=1)
def loaded(folder: Path, num_stages: int, max_model_len: int | None) -> Stages:
    return Stages(folder, num_stages, max_model_len=max_model_len)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the spread of what is expected."""
    return ((found - expected).abs().max() / expected.std()).item()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """How sums are split over threads changes their rounding, in the reference too: up to the tolerance itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "feed"), [(name, feed) for name in ARCHITECTURES for feed in FEEDS])
def test_logits_are_those_of_transformers(checkpoint: Checkpoints, name: str, feed: str) -> None:
    run, num_stages = FEEDS[feed]
    stages = loaded(checkpoint(name), num_stages, ARCHITECTURES[name].max_model_len)
    texts = [prompt(70, seed=1), prompt(38, seed=2), prompt(19, seed=3)]
    sequences = [stages.sequence(text) for text in texts]
    found = run(stages, sequences)
    for sequence in sequences:
        stages.free(sequence)
    for logits, text in zip(found, texts, strict=True):
        assert distance(logits, _expected(name, tuple(text))) < TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torch_alone_gives_the_same(checkpoint: Checkpoints, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_engine.workers.torch_model_engine.select_ops", lambda device, dtype: TorchOps())
    stages = Stages(checkpoint(name), max_model_len=ARCHITECTURES[name].max_model_len)
    texts = [prompt(70, seed=1), prompt(38, seed=2), prompt(19, seed=3)]
    found = mixed(stages, [stages.sequence(text) for text in texts])
    for logits, text in zip(found, texts, strict=True):
        assert distance(logits, _expected(name, tuple(text))) < TOLERANCE


@lru_cache(maxsize=3)
def _expected(name: str, token_ids: tuple[int, ...]) -> torch.Tensor:
    return reference_logits(name, list(token_ids))


@pytest.mark.parametrize("name", ["llama-bias-tied", "qwen3-moe"])
def test_packed_linears_are_as_exact(checkpoint: Checkpoints, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_engine.models.ops._PACK_FROM", {torch.float32: 0})
    stages = Stages(checkpoint(name))
    text = prompt(70, seed=4)
    found = chunks(stages, [stages.sequence(text)])[0]
    assert distance(found, reference_logits(name, text)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_bfloat16_stays_near(checkpoint: Checkpoints, name: str) -> None:
    stages = Stages(checkpoint(name), 2, dtype="bfloat16")
    text = prompt(40, seed=5)
    found, expected = whole(stages, [stages.sequence(text)])[0], reference_logits(name, text)
    assert (found - expected).abs().mean() / expected.std() < 0.1


@pytest.mark.parametrize("wanted", [[], [19], [0, 7, 19]])
def test_only_the_logits_that_are_wanted(checkpoint: Checkpoints, wanted: list[int]) -> None:
    stages = Stages(checkpoint("gemma2"))
    text = prompt(20, seed=6)
    batch = make_batch([(stages.sequence(text), 20)])
    batch.logit_rows = np.array(wanted, np.int64)
    for array in (batch.token_ids, batch.positions, batch.slot_mapping, batch.logit_rows):
        array.flags.writeable = False  # as arrays are that came in a message
    found = stages.engines[0].forward(batch, None)
    assert found.shape == (len(wanted), 320)
    assert not wanted or distance(found, reference_logits("gemma2", text)[wanted]) < TOLERANCE
