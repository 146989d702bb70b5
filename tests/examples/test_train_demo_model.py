"""The training script: its tokenizer is the one that ships, its batches weigh what they should, its seed decides."""

import json
from pathlib import Path

import pytest
import torch
import train_demo_model as script
from demo_corpus import END, END_OF_TEXT, START
from tokenizers import Tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "models" / "demo_model"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_the_shipped_tokenizer_is_what_the_script_makes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    made = script.train_tokenizer(seed=0)
    assert made.get_vocab() == tokenizer.get_vocab()
    script.save_tokenizer(made, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((FOLDER / name).read_text())


def test_a_batch_has_the_promised_shape_and_weighs_no_question(tokenizer: Tokenizer) -> None:
    shapes = []
    for ids, positions, weights in script.batches(tokenizer, seed=1, steps=8):
        assert ids.shape == positions.shape == weights.shape
        shapes.append(tuple(ids.shape))
        assert 0.1 < (weights > 0).float().mean() < 0.9
        assert not (weights[ids == tokenizer.token_to_id(START)] > 0).any()
    assert shapes == [(8, 256)] * 7 + [(2, 1024)]


def test_rows_begin_with_whole_documents_and_pad_with_the_end_of_text(tokenizer: Tokenizer) -> None:
    ((ids, _, weights),) = script.batches(tokenizer, seed=2, steps=1)
    for row, row_weights in zip(ids.tolist(), weights, strict=True):
        text = tokenizer.decode(row, skip_special_tokens=False)
        assert text.startswith((START, "Once upon a time", "There once was")) or text[0].isdigit()
        assert text.endswith(END_OF_TEXT) or END in text  # whole, or one long document cut at the row's end
        assert row_weights.sum() > 0


def test_positions_begin_again_with_each_document_in_short_rows_only(tokenizer: Tokenizer) -> None:
    *short, (_, long_positions, _) = script.batches(tokenizer, seed=1, steps=8)
    assert torch.equal(long_positions, torch.arange(1024).repeat(2, 1))
    for ids, positions, _ in short:
        assert (positions[:, 0] == 0).all()
        after_an_end = ids[:, :-1] == tokenizer.token_to_id(END_OF_TEXT)
        begins = positions[:, 1:] == 0
        assert (begins <= after_an_end).all() and begins.any()
        assert (positions[:, 1:][~begins] == positions[:, :-1][~begins] + 1).all()


def test_the_rate_warms_up_and_decays() -> None:
    rates = [script.learning_rate(step, 1000) for step in range(1000)]
    peak = rates.index(max(rates))
    assert peak in (script.WARMUP_STEPS - 1, script.WARMUP_STEPS)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(script.PEAK_LEARNING_RATE)
    assert 0 < rates[-1] < 0.03 * max(rates)


def test_a_seed_fixes_the_weights_and_training_moves_them(tokenizer: Tokenizer) -> None:
    first, second = (script.build_model(tokenizer, seed=3) for _ in range(2))
    fresh = {name: value.clone() for name, value in first.state_dict().items()}
    for model in (first, second):
        script.train(model, tokenizer, seed=3, steps=2, score=lambda count: 0.0)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        assert not torch.equal(value, fresh[name]), name
