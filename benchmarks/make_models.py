"""Make the checkpoints that the benchmarks run on: random weights, fixed seeds, Hugging Face format, bf16.

    python -m benchmarks.make_models DIR [tiny small base]

    tiny     14 M  Llama, tied     hidden 256,  6 layers, 8 heads over 4, intermediate 1024
    small   153 M  Qwen3, untied   hidden 768, 12 layers, 12 heads over 4 of 64, intermediate 3072
    base    387 M  Qwen2, tied     hidden 896, 24 layers, 14 heads over 2, intermediate 4864

What a step costs does not depend on what the weights say. The tokenizer is the demo model's: the workloads speak in
ids, of which it knows only the first thousand, so the texts of such a model mean nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

VOCABULARY = 32_000
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    # name: architecture, seed, shape
    "tiny": ("Llama", 1234, {
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 32, "intermediate_size": 1024, "tie_word_embeddings": True,
    }),
    "small": ("Qwen3", 1235, {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
        "head_dim": 64, "intermediate_size": 3072, "tie_word_embeddings": False,
    }),
    "base": ("Qwen2", 1236, {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "tie_word_embeddings": True,
    }),
}  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
DEMO_IDS = (2, 0)
"""The end of an answer and the padding, in the demo model's tokenizer."""


def make(name: str, folder: Path) -> int:
    """Write one checkpoint; returns its number of parameters."""
    import torch
    import transformers

    from llm_engine.models.hub import DEMO_MODEL

    architecture, seed, shape = MODELS[name]
    config = getattr(transformers, f"{architecture}Config")(**shape, **COMMON)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(torch.bfloat16)
    # Set late: a padding id known at construction would zero its row of the embedding.
    for target in (model.config, model.generation_config):
        target.bos_token_id, target.eos_token_id, target.pad_token_id = None, *DEMO_IDS
    model.config.dtype = torch.bfloat16
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    for file in TOKENIZER:
        shutil.copy(DEMO_MODEL / file, folder / file)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> int:
    """Write the checkpoints asked for."""
    parser = argparse.ArgumentParser(description="Make the checkpoints that the benchmarks run on.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to; each model gets a folder in it")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(MODELS)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(MODELS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    console = Console()
    for name in args.names or MODELS:
        with console.status(f"making {name}"):
            count = make(name, args.folder / name)
        console.print(f"{args.folder / name}: {MODELS[name][0]}, {count / 1e6:.1f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
