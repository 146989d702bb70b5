"""Make the bundled model: a Llama of about two million parameters that adds two-digit numbers and tells short stories.

    python examples/train_demo_model.py --out models/demo_model            # train, then evaluate
    python examples/train_demo_model.py --evaluate models/demo_model       # print the score and a few samples

All text is generated from a fixed seed (``demo_corpus.py``); nothing is downloaded. A byte-level BPE tokenizer with one
token per digit is trained first, then the model, with Muon for the layers' matrices and AdamW for the rest, a cosine
schedule and documents packed into rows of 256 tokens that do not see each other (every eighth step 1024 tokens that do,
so that long conversations keep working). The loss covers only the model's own words.
On two idle CPU cores the default run takes about fifteen minutes; the score is one JSON line. Weights are float32.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from demo_corpus import CHAT_TEMPLATE, END, END_OF_TEXT, SPECIAL_TOKENS, Corpus
from demo_facts import FACTS, SMALL_TALK
from demo_score import Messages, addition_questions, held_out_questions, is_correct, is_held_out
from demo_stories import KINDS, article, keeps_to
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

VOCAB_SIZE = 1024
MAX_POSITIONS = 2048
TOKENIZER_DOCUMENTS = 20_000
TOKENS_PER_STEP = 2048
SHORT_ROW, LONG_ROW, LONG_EVERY = 256, 1024, 8
PEAK_LEARNING_RATE, WARMUP_STEPS = 1e-2, 30
MODEL = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
SAMPLES = ("Tell me a short story.", "Tell me a story about a fox.", "Does llm-engine use asyncio?", "Hello!")


def train_tokenizer(seed: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer: every byte has a token, no token joins digits, and any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Corpus(seed, is_held_out).text(TOKENIZER_DOCUMENTS), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, the chat template inside the latter."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_model(tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """Return the model with fresh weights, and the generation settings it is saved with."""
    end, end_of_text = tokenizer.token_to_id(END), tokenizer.token_to_id(END_OF_TEXT)
    torch.manual_seed(seed)
    config = LlamaConfig(
        **MODEL,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end_of_text,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[end, end_of_text], pad_token_id=end_of_text)
    return model


def batches(tokenizer: Tokenizer, seed: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield token ids, their positions and the weights of predicting them, each [rows, length], once a step.

    A row is filled with whole documents; one that does not fit starts the next row, and one longer than a row is cut.
    In short rows positions begin again with each document, which tells transformers to keep documents apart; in long
    rows they run on, and a document has to be told from those before it.
    """
    documents = iter(Corpus(seed, is_held_out))
    padding = tokenizer.token_to_id(END_OF_TEXT)
    carried: tuple[list[int], list[float]] | None = None
    for step in range(steps):
        length = LONG_ROW if step % LONG_EVERY == LONG_EVERY - 1 else SHORT_ROW
        rows = TOKENS_PER_STEP // length
        ids = torch.full((rows, length), padding)
        positions = torch.arange(length).repeat(rows, 1)
        weights = torch.zeros((rows, length))
        for row in range(rows):
            used = 0
            while used < length:
                if carried is None:
                    parts = [(tokenizer.encode(text).ids, weight) for text, weight in next(documents)]
                    carried = [i for part, _ in parts for i in part], [w for part, w in parts for _ in part]
                taken = min(len(carried[0]), length)
                if used + taken > length:
                    break
                ids[row, used : used + taken] = torch.tensor(carried[0][:taken])
                weights[row, used : used + taken] = torch.tensor(carried[1][:taken])
                used, carried = used + taken, None
                if length == SHORT_ROW:
                    positions[row, used:] = torch.arange(length - used)
        yield ids, positions, weights


def learning_rate(step: int, steps: int) -> float:
    """Return the rate: linear warm-up, then half a cosine down to a fiftieth of the peak."""
    warmup = min(WARMUP_STEPS, steps)
    if step < warmup:
        return PEAK_LEARNING_RATE * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return PEAK_LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int, steps: int, score: Callable[[int], float]) -> None:
    """Train in place. The mean is over weights, so a batch with many stories counts no more than one with many sums.

    ``score(n)`` is the share of n additions answered correctly so far, shown beside the loss.
    """
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.dim() == 1)]
    # Muon learns these sums from about a quarter of the text that AdamW needs, for a seventh more time per step.
    optimizers = (
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    )
    model.train()
    shown = {"loss": "", "sums": ""}
    progress = tqdm(batches(tokenizer, seed + 1, steps), total=steps, unit="step", desc="training")
    for step, (ids, positions, weights) in enumerate(progress):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, steps)
        out = model.model(input_ids=ids[:, :-1], position_ids=positions[:, :-1], use_cache=False)
        hidden = out.last_hidden_state  # [rows, length - 1, hidden]
        spoken = weights[:, 1:] > 0  # logits are computed only where the loss looks
        losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[spoken]), ids[:, 1:][spoken], reduction="none")
        weight = weights[:, 1:][spoken]
        loss = (losses * weight).sum() / weight.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 100 == 99:
            model.eval()
            shown["sums"] = f"{score(100):.0%}"
            model.train()
        if step % 20 == 19:
            progress.set_postfix(shown | {"loss": f"{loss.item():.3f}"})
    model.eval()


def replies(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, chats: list[Messages], max_new_tokens: int
) -> list[str]:
    """Answer chats greedily. Chats with prompts of equal length share a batch, so that no row is ever padded."""
    prompts = [
        tokenizer(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)).input_ids
        for chat in chats
    ]
    answers = [""] * len(chats)
    for length in sorted({len(prompt) for prompt in prompts}):
        members = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in members])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens
            )
        for i, row in zip(members, out[:, length:], strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def count_correct(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: list[tuple[Messages, str]]
) -> int:
    """Return how many of the questions get the expected answer, greedily."""
    answers = replies(model, tokenizer, [chat for chat, _ in questions], max_new_tokens=16)
    return sum(is_correct(answer, expected) for answer, (_, expected) in zip(answers, questions, strict=True))


def evaluate(folder: Path) -> None:
    """Print the checkpoint's score as a JSON line, then a few samples.

    The score: 500 seeded additions, all the pairs held out of training, every known question, and a story for each kind
    of hero (correct if it opens with that hero and keeps to its cast).
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    score = {}
    for name, questions in (("additions", addition_questions(500, seed=0)), ("held_out", held_out_questions())):
        score[f"{name}_correct"] = count_correct(model, tokenizer, questions)
        score[f"{name}_total"] = len(questions)
    known = [(question, answer) for questions, answer in (*FACTS, *SMALL_TALK) for question in questions]
    told = replies(model, tokenizer, [_ask(question) for question, _ in known], max_new_tokens=64)
    score["facts_correct"] = sum(reply == answer for reply, (_, answer) in zip(told, known, strict=True))
    score["facts_total"] = len(known)
    stories = replies(
        model, tokenizer, [_ask(f"Tell me a story about {article(kind)}.") for kind in KINDS], max_new_tokens=256
    )
    score["stories_correct"] = sum(keeps_to(story, kind) for story, kind in zip(stories, KINDS, strict=True))
    score["stories_total"] = len(KINDS)
    print(json.dumps(score))
    for sample in SAMPLES:
        (answer,) = replies(model, tokenizer, [_ask(sample)], max_new_tokens=256)
        print(f"\n> {sample}\n{answer}")


def _ask(question: str) -> Messages:
    return [{"role": "user", "content": question}]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or evaluate the bundled model.")
    parser.add_argument("--out", type=Path, default=Path("models/demo_model"), help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=1500, help=f"training steps of {TOKENS_PER_STEP} tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text and of the first weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="only evaluate the checkpoint in this folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate is not None:
        evaluate(args.evaluate)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    print("training the tokenizer", file=sys.stderr)
    tokenizer = train_tokenizer(args.seed)
    save_tokenizer(tokenizer, args.out)
    chat_tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = build_model(tokenizer, args.seed)
    print(f"training {model.num_parameters():,} parameters for {args.steps} steps", file=sys.stderr)
    train(
        model,
        tokenizer,
        args.seed,
        args.steps,
        score=lambda count: count_correct(model, chat_tokenizer, addition_questions(count, seed=1)) / count,
    )
    model.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    print(f"wrote {args.out} after {(time.monotonic() - began) / 60:.1f} minutes", file=sys.stderr)
    evaluate(args.out)


if __name__ == "__main__":
    main()
