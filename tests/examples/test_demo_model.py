"""The checkpoint that ships with the package: its files, its tokenizer, its chat format, and its score."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_corpus import CHAT_TEMPLATE, Corpus, render
from demo_score import addition_questions, is_correct, is_held_out
from demo_stories import keeps_to
from train_demo_model import replies
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[2] / "models" / "demo_model"
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def test_the_files_are_there_and_small() -> None:
    assert {path.name for path in FOLDER.iterdir()} == FILES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 10_000_000


def test_it_is_a_float32_llama_that_ends_a_turn(tokenizer: Any) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["num_hidden_layers"] >= 4
    assert config["eos_token_id"] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.eos_token_id in json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"]
    assert config["vocab_size"] == len(tokenizer)


@pytest.mark.parametrize("text", ["7", "47", " 47", "1234567890", "a1b22c333", "=19"])
def test_a_digit_is_a_token_and_a_token_holds_one_digit(tokenizer: Any, text: str) -> None:
    pieces = [tokenizer.decode([token]) for token in tokenizer(text).input_ids]
    digits = [piece for piece in pieces if any(character.isdigit() for character in piece)]
    assert digits == [character for character in text if character.isdigit()]


def test_the_ten_digits_are_ten_tokens(tokenizer: Any) -> None:
    assert len({tuple(tokenizer(digit).input_ids) for digit in "0123456789"}) == 10


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time, a fox lived by the river .",
        "  two  spaces,\ttabs\r\nand lines\n\n",
        "naïve café 東京 🦊🦊🏽 \u0000\u200d ١٢٣",
        "<|im_start|>user\n1 + 1<|im_end|>\n",
        "",
    ],
)
def test_any_text_comes_back_as_it_was(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_is_what_training_used(tokenizer: Any) -> None:
    assert tokenizer.chat_template == CHAT_TEMPLATE
    turns = [("What is 1 + 1?", "1 + 1 = 2"), ("Hello!", "Hello!")]
    messages = [{"role": "system", "content": "Be kind."}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rendered = "".join(text for text, _ in render([(q, [(a, 1.0)]) for q, a in turns], "Be kind."))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == rendered
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert prompt + "Hello!<|im_end|>\n" == rendered


def test_parts_of_a_document_encode_as_the_whole_does(tokenizer: Any) -> None:
    for document in islice(Corpus(9, is_held_out), 100):
        parts = [token for text, _ in document for token in tokenizer(text).input_ids]
        assert parts == tokenizer("".join(text for text, _ in document)).input_ids


def test_it_adds(model: Any, tokenizer: Any) -> None:
    questions = addition_questions(100, seed=0)
    assert model.dtype == torch.float32
    answers = replies(model, tokenizer, [messages for messages, _ in questions], max_new_tokens=16)
    wrong = [
        (messages[0]["content"], answer)
        for (messages, expected), answer in zip(questions, answers, strict=True)
        if not is_correct(answer, expected)
    ]
    assert len(wrong) <= 5, wrong


def test_it_tells_a_story_about_what_was_asked(model: Any, tokenizer: Any) -> None:
    (story,) = replies(model, tokenizer, [[{"role": "user", "content": "Tell me a story about a fox."}]], 256)
    assert keeps_to(story, "fox") and story.endswith(".") and len(story.split()) > 40


def test_it_knows_the_engine(model: Any, tokenizer: Any) -> None:
    (answer,) = replies(model, tokenizer, [[{"role": "user", "content": "Does llm-engine use asyncio?"}]], 64)
    assert "no asyncio anywhere" in answer
